//! The connection IDs that the peer of one connection may use: they route its packets to us.
//!
//! A connection begins with a handshake ID, which holds for one address and for half a minute. When
//! the handshake has completed the peer gets roaming IDs, and from then on fresh ones before the
//! old ones end; quiche asks it to give up the oldest for each one beyond the limit (*retire prior
//! to*, RFC 9000, 5.1.1).
//!
//! Invariants
//! 1. An ID is live from when it is issued until the peer has given it up (RETIRE_CONNECTION_ID).
//! 2. There is always one, and never more than [`LIVE_MAX`]: those that the peer may hold, and
//!    those that quiche asked it to give up.

use millrace_edge_policy::cid::LocalCid;

/// IDs that we let a peer give us, and that a peer of ours takes: as few as RFC 9000 (18.2) allows,
/// since no node changes its address by choice.
pub(crate) const ACTIVE_IDS: u64 = 2;

/// quiche keeps this many of its own while some are being replaced.
const LIVE_MAX: usize = 2 * ACTIVE_IDS as usize - 1;

/// An ID as it stands in packets.
pub(crate) type IdBytes = [u8; LocalCid::BYTES];

#[derive(Clone, Copy, Debug)]
struct Issued {
    id: IdBytes,
    /// When it must have been replaced.
    until_ns: u64,
}

/// The live IDs of one connection.
#[derive(Clone, Debug)]
pub(crate) struct LiveIds {
    issued: [Issued; LIVE_MAX],
    len: usize,
}

impl LiveIds {
    /// Begins with a handshake ID, which is to be replaced as soon as it can be.
    pub(crate) fn new(handshake: IdBytes) -> Self {
        let first = Issued {
            id: handshake,
            until_ns: 0,
        };
        Self {
            issued: [first; LIVE_MAX],
            len: 1,
        }
    }

    fn live(&self) -> &[Issued] {
        &self.issued[..self.len]
    }

    /// Whether a packet with this ID is for this connection.
    #[inline]
    pub(crate) fn contains(&self, id: &[u8]) -> bool {
        self.live().iter().any(|issued| issued.id == id)
    }

    /// The oldest.
    pub(crate) fn oldest(&self) -> IdBytes {
        self.issued[0].id
    }

    /// Whether the peer lacks fresh IDs and may be given one. Every peer takes as many as we give.
    pub(crate) fn wants_another(&self, now_ns: u64) -> bool {
        let fresh = self.live().iter().filter(|issued| issued.until_ns > now_ns);
        self.len < LIVE_MAX && fresh.count() < ACTIVE_IDS as usize
    }

    /// An ID was issued, to be replaced at `until_ns`.
    pub(crate) fn push(&mut self, id: IdBytes, until_ns: u64) {
        debug_assert!(self.len < LIVE_MAX, "asked `wants_another` first");
        if let Some(free) = self.issued.get_mut(self.len) {
            *free = Issued { id, until_ns };
            self.len += 1;
        }
    }

    /// The peer has given up an ID.
    pub(crate) fn retire(&mut self, id: &[u8]) {
        let at = self.live().iter().position(|issued| issued.id == id);
        if let Some(at) = at.filter(|_| self.len > 1) {
            self.issued[at..self.len].rotate_left(1);
            self.len -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> IdBytes {
        [n; LocalCid::BYTES]
    }

    /// Issues what is wanted, with IDs numbered from `next`; how many.
    fn fill(ids: &mut LiveIds, next: u8, now_ns: u64) -> u8 {
        let mut given = 0;
        while ids.wants_another(now_ns) {
            ids.push(id(next + given), now_ns + 100);
            given += 1;
        }
        given
    }

    // Protects routing: what was issued is known until it is given up, and nothing else is.
    #[test]
    fn an_id_lives_from_issue_to_retirement() {
        let mut ids = LiveIds::new(id(0));
        assert_eq!(fill(&mut ids, 1, 10), 2);
        assert!((0..=2).all(|n| ids.contains(&id(n))));
        assert!(!ids.contains(&id(3)) && !ids.contains(&id(0)[..15]));
        ids.retire(&id(9));
        ids.retire(&id(0));
        assert!(!ids.contains(&id(0)));
        assert_eq!(ids.oldest(), id(1));
        assert_eq!(fill(&mut ids, 5, 10), 0, "all are fresh");
    }

    // Protects the peer's limit: it never has more IDs than it may hold and was asked to give up,
    // however late it answers.
    #[test]
    fn replaces_all_within_bounds() {
        let mut ids = LiveIds::new(id(0));
        assert_eq!(fill(&mut ids, 1, 0), 2);
        ids.retire(&id(0));
        assert_eq!(fill(&mut ids, 10, 200), 1);
        assert_eq!(ids.live().len(), LIVE_MAX);
        ids.retire(&id(1));
        assert_eq!(fill(&mut ids, 20, 200), 1);
        ids.retire(&id(2));
        assert_eq!(fill(&mut ids, 30, 200), 0);
    }

    #[test]
    fn the_last_one_stays() {
        let mut ids = LiveIds::new(id(0));
        ids.retire(&id(0));
        assert!(ids.contains(&id(0)));
    }
}
