//! The deadline of a client that is silent.
//!
//! hyper's own header timeout wants timers that are `Send`; a shard-like executor has none. One
//! deadline per connection does the same for header, body and answer: each progress moves it.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How often to look while the node, not the client, is at work.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

pub(super) struct IdleDeadline {
    until: Cell<Option<Instant>>,
    body_timeout: Duration,
}

impl IdleDeadline {
    pub(super) fn new(header_timeout: Duration, body_timeout: Duration) -> Self {
        Self {
            until: Cell::new(Some(Instant::now() + header_timeout)),
            body_timeout,
        }
    }

    /// The node is at work now; the client owes nothing.
    pub(super) fn suspend(&self) {
        self.until.set(None);
    }

    /// The client owes the next part, or has to take it.
    pub(super) fn extend(&self) {
        self.until.set(Some(Instant::now() + self.body_timeout));
    }

    /// Ends when the client was silent for too long.
    pub(super) async fn passed(&self) {
        loop {
            let now = Instant::now();
            match self.until.get() {
                Some(until) if until <= now => return,
                Some(until) => glommio::timer::sleep(until - now).await,
                None => glommio::timer::sleep(LOOK_AGAIN).await,
            }
        }
    }
}
