//! Cancellations that came before their request.
//!
//! A cancellation is a small frame. A request on another lane, or on a stream of its own, may still
//! be on its way when the cancellation is there. It is remembered for a while, so that the request
//! is then thrown away and no service works on it. A request whose header is here already is not
//! remembered: the inbox cuts its body, however long that takes to arrive.
//!
//! Invariants
//! 1. At most [`IDS_MAX`] ids are remembered, each for at most [`KEPT_FOR`]: a peer fills no
//!    memory.
//! 2. An id comes back into use after 4 million requests at the least
//!    ([`REUSE_AFTER`](millrace_protocol::rpc::REUSE_AFTER) positions of 65,536 generations), which
//!    take longer than that: no other request is thrown away.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Ids that are remembered; the oldest makes room.
const IDS_MAX: usize = 256;
/// A request's header is not that much later than its cancellation: loss is repaired in a few round
/// trips.
const KEPT_FOR: Duration = Duration::from_secs(2);

/// The ids of one connection's early cancellations, oldest first.
#[derive(Debug, Default)]
pub(crate) struct EarlyCancels {
    ids: VecDeque<(u32, Instant)>,
}

impl EarlyCancels {
    /// A cancellation for a request that is not in flight: it was answered, or is still to come.
    pub(crate) fn insert(&mut self, id: u32, now: Instant) {
        if self.ids.len() == IDS_MAX {
            self.ids.pop_front();
        }
        self.ids.push_back((id, now));
    }

    /// Whether the request `id`, which has just arrived, was cancelled before.
    #[inline]
    pub(crate) fn take(&mut self, id: u32, now: Instant) -> bool {
        !self.ids.is_empty() && self.find(id, now)
    }

    fn find(&mut self, id: u32, now: Instant) -> bool {
        let is_old = |(_, at): &(u32, Instant)| *at + KEPT_FOR <= now;
        while self.ids.front().is_some_and(is_old) {
            self.ids.pop_front();
        }
        let at = self.ids.iter().position(|(held, _)| *held == id);
        at.and_then(|at| self.ids.remove(at)).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_thrown_away_once() {
        let now = Instant::now();
        let mut early = EarlyCancels::default();
        assert!(!early.take(7, now));
        early.insert(7, now);
        assert!(!early.take(8, now));
        assert!(early.take(7, now));
        assert!(!early.take(7, now));
    }

    // Protects later requests: an id is used again.
    #[test]
    fn a_cancellation_is_forgotten_in_time() {
        let now = Instant::now();
        let mut early = EarlyCancels::default();
        early.insert(7, now);
        let later = now + KEPT_FOR;
        early.insert(8, later);
        assert!(!early.take(7, later));
        assert!(early.take(8, later));
    }

    #[test]
    fn the_oldest_makes_room() {
        let now = Instant::now();
        let mut early = EarlyCancels::default();
        let count = IDS_MAX as u32 + 1;
        (0..count).for_each(|id| early.insert(id, now));
        assert_eq!(early.ids.len(), IDS_MAX);
        assert!(!early.take(0, now));
        assert!(early.take(1, now) && early.take(count - 1, now));
    }
}
