//! Where a peer's dial requests come from: an address to dial beside those of the topology.
//!
//! 1. A peer has at most one candidate. It is forgotten when a dial of it fails, when the topology
//!    gives the peer other addresses, and when the node stops.
//! 2. Only a request that was sent within [`FRESH_MS`] of this node's wall clock, and after every
//!    earlier one, names a candidate: a request that is repeated later names nothing.
//! 3. A peer's candidate changes at most once in [`CHANGE_INTERVAL_MIN`]. A member that gives other
//!    hosts' addresses for its own has one of them sent the packets of one dial in that time.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// How far two nodes' wall clocks may be apart; proofs of first packets assume the same.
pub(super) const FRESH_MS: u64 = 60_000;
/// Two requests of a peer that moves again are 0.5 s apart, so it waits for its third at most.
pub(super) const CHANGE_INTERVAL_MIN: Duration = Duration::from_secs(1);

/// What a peer's dial requests said of its address.
#[derive(Debug, Default)]
pub(super) struct Candidate {
    /// The last address taken.
    taken: Option<SocketAddr>,
    /// When it replaced another: the first address of a peer does not delay the second.
    changed: Option<Instant>,
    /// No dial of it failed since the last request from there.
    is_live: bool,
    /// The last dial was of it: the next is of an address of the topology.
    is_dialled: bool,
    /// When the newest request was sent.
    newest_ms: u64,
}

impl Candidate {
    /// Takes the source of a request that was sent at `sent_ms` by the peer's clock; this node's
    /// says `wall_ms`. True when it is not where the last candidate was.
    pub(super) fn hear(
        &mut self,
        from: SocketAddr,
        sent_ms: u64,
        wall_ms: u64,
        now: Instant,
    ) -> bool {
        if sent_ms.abs_diff(wall_ms) > FRESH_MS || sent_ms <= self.newest_ms || from.port() == 0 {
            return false;
        }
        self.newest_ms = sent_ms;
        if self.taken == Some(from) {
            self.is_live = true;
            return false;
        }
        if self
            .changed
            .is_some_and(|at| now < at + CHANGE_INTERVAL_MIN)
        {
            return false;
        }
        if self.taken.replace(from).is_some() {
            self.changed = Some(now);
        }
        (self.is_live, self.is_dialled) = (true, false);
        true
    }

    /// The address to dial next; none: one of the topology, if the peer `has_others`.
    pub(super) fn next(&mut self, has_others: bool) -> Option<SocketAddr> {
        let is_turn = self.is_live && !(self.is_dialled && has_others);
        self.is_dialled = is_turn;
        self.taken.filter(|_| is_turn)
    }

    /// Whether the last dial was of the candidate.
    pub(super) fn is_dialled(&self) -> bool {
        self.is_dialled
    }

    /// The last dial failed.
    pub(super) fn failed(&mut self) {
        self.is_live &= !self.is_dialled;
    }

    /// The peer is connected: when that ends, the candidate is dialled first.
    pub(super) fn connected(&mut self) {
        self.is_dialled = false;
    }

    /// The topology says where the peer is.
    pub(super) fn forget(&mut self) {
        self.is_live = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const WALL: u64 = 1_000_000;

    fn at(host: u8) -> SocketAddr {
        ([192, 0, 2, host], 4100).into()
    }

    // Protects the dialler: what is old, repeated, too frequent or undiallable moves nothing.
    #[test]
    fn a_request_names_a_candidate_once_and_while_it_is_fresh() {
        let start = Instant::now();
        let port_0 = SocketAddr::new(at(1).ip(), 0);
        // Source, sent, seconds since the start; whether it is a change, and what is dialled then.
        let table = [
            ("too old", at(1), WALL - FRESH_MS - 1, 0, false, None),
            ("too far ahead", at(1), WALL + FRESH_MS + 1, 0, false, None),
            ("port 0", port_0, WALL, 0, false, None),
            ("fresh", at(1), WALL - FRESH_MS, 0, true, Some(at(1))),
            ("repeated", at(2), WALL - FRESH_MS, 0, false, Some(at(1))),
            ("earlier", at(2), WALL - FRESH_MS - 5, 0, false, Some(at(1))),
            ("again", at(1), WALL, 0, false, Some(at(1))),
            ("moved at once", at(2), WALL + 1, 0, true, Some(at(2))),
            ("too soon", at(3), WALL + 2, 0, false, Some(at(2))),
            ("in time", at(3), WALL + 3, 1, true, Some(at(3))),
        ];
        let mut candidate = Candidate::default();
        for (what, from, sent_ms, seconds, changes, dialled) in table {
            let now = start + seconds * SECOND;
            assert_eq!(candidate.hear(from, sent_ms, WALL, now), changes, "{what}");
            assert_eq!(candidate.next(false), dialled, "{what}");
        }
    }

    // Protects the peer whose requests come from an address that leads nowhere: those of the
    // topology get every other dial.
    #[test]
    fn a_candidate_takes_turns_and_is_forgotten_when_it_fails() {
        let now = Instant::now();
        let mut candidate = Candidate::default();
        assert_eq!(candidate.next(true), None);
        candidate.hear(at(1), WALL, WALL, now);
        let turns: Vec<_> = (0..4).map(|_| candidate.next(true)).collect();
        assert_eq!(turns, [Some(at(1)), None, Some(at(1)), None]);
        candidate.failed();
        assert_eq!(candidate.next(true), Some(at(1)), "another dial failed");
        candidate.failed();
        assert_eq!([candidate.next(true), candidate.next(false)], [None, None]);
        candidate.hear(at(1), WALL + 1, WALL, now);
        assert_eq!(candidate.next(true), Some(at(1)), "the peer is there again");
        candidate.connected();
        assert_eq!(
            candidate.next(true),
            Some(at(1)),
            "dialled first after a loss"
        );
        candidate.forget();
        assert_eq!(candidate.next(true), None);
    }
}
