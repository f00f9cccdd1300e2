//! Two nodes with one key: each dials the listener, and each would take the peer's place from the
//! other for ever.
//!
//! A connection of a peer is replaced by a newer one: so a node that restarts, or moves, is back at
//! once. Two nodes with one key look the same, but that they keep coming: the one that lost its
//! place dials again. So one change of the address is taken at once, and what comes from yet
//! another address soon after waits, longer each time.
//!
//! 1. Only a connection that would replace a living one from another address is judged here. What
//!    comes from the same address is the same node.
//! 2. The first change is always taken.
//! 3. A newcomer that is refused has the connection in place proved alive: one that is dead makes
//!    room within the time of a probe, so a node that moves twice is not kept out.

use std::time::{Duration, Instant};

/// A change of the address this long after the last one, or after the last attempt at one, is a
/// first one again. A node that is refused dials again after ten seconds at the latest.
pub(super) const WINDOW: Duration = Duration::from_secs(30);
/// How long the first newcomer is refused. Without, two nodes change places about once a second.
pub(super) const INTERVAL_MIN: Duration = Duration::from_secs(10);
/// How long a newcomer is refused at most: the time doubles with each change.
pub(super) const INTERVAL_MAX: Duration = Duration::from_secs(320);

/// What one peer's connections have done to each other.
#[derive(Debug, Default)]
pub(super) struct Contest {
    /// The last attempt to take the place.
    last: Option<Instant>,
    /// From when the next one succeeds, and how long that was.
    until: Option<Instant>,
    interval: Duration,
    refused: u64,
}

impl Contest {
    /// Whether a connection from another address may take the place of the living one.
    pub(super) fn may_take(&mut self, now: Instant) -> bool {
        let is_first = self.last.is_none_or(|last| now >= last + WINDOW);
        if is_first {
            *self = Self::default();
        }
        self.last = Some(now);
        if is_first {
            return true;
        }
        match self.until {
            Some(until) if now >= until => {
                self.interval = (2 * self.interval).min(INTERVAL_MAX);
                self.until = Some(now + self.interval);
                true
            }
            Some(_) => {
                self.refused += 1;
                false
            }
            None => {
                self.interval = INTERVAL_MIN;
                self.until = Some(now + INTERVAL_MIN);
                self.refused += 1;
                false
            }
        }
    }

    /// Connections refused since the first change.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }
}
