//! How long connections may take to finish when their shards stop.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Time for connections to finish when the last handle of a transport was dropped: its address is
/// to be free within a second.
const ABANDONED: Duration = Duration::from_millis(500);

/// How long a stop may take; set before the shards are asked to stop.
#[derive(Debug)]
pub(crate) struct StopLimit(AtomicU64);

impl Default for StopLimit {
    fn default() -> Self {
        Self(AtomicU64::new(u64::MAX))
    }
}

impl StopLimit {
    /// The last handle of the transport is gone.
    pub(crate) fn set_abandoned(&self) {
        let ms = ABANDONED.as_millis() as u64;
        self.0.store(ms, Ordering::Release);
    }

    /// The longest time that the stop may take.
    pub(crate) fn get(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Acquire))
    }
}
