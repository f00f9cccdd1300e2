//! How a transport's shards stop: in good order, or at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long a shard that closes at once may try to send its connections' last packets: its address
/// is to be free within a second.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// How the shards stop; set before they are asked to.
#[derive(Debug, Default)]
pub(crate) struct StopMode {
    at_once: AtomicBool,
}

impl StopMode {
    /// Connections are closed without waiting for what they carry.
    pub(crate) fn set_at_once(&self) {
        self.at_once.store(true, Ordering::Release);
    }

    /// Whether connections close at once; otherwise they get the config's `drain_timeout`.
    pub(crate) fn is_at_once(&self) -> bool {
        self.at_once.load(Ordering::Acquire)
    }
}
