//! Which connections are dialled again because a key of theirs is not the newest any more.

use crate::id::NodeId;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// The first dial comes this long after a key changed. A node takes a new key up a little after its
/// peers heard of it: a dial before that gives the older key again.
const WAIT_MIN: Duration = Duration::from_secs(2);
/// The longest wait, for a peer that does not take up the key that its record names.
const WAIT_MAX: Duration = Duration::from_secs(600);

/// Which connection of which peer.
type Pair = (NodeId, usize);

#[derive(Clone, Copy, Debug)]
struct Wait {
    until: Instant,
    next: Duration,
}

/// When the connections of a shard are replaced for their keys.
///
/// 1. A connection that was made with the newest keys of both ends waits for nothing.
/// 2. While the replacements of a peer give an older key again, the waits for it double.
#[derive(Debug, Default)]
pub struct KeyReplacements {
    waits: BTreeMap<Pair, Wait>,
}

impl KeyReplacements {
    /// Looks at the current connection of this index to `peer`: whether it is to be replaced now.
    pub fn is_due(&mut self, peer: NodeId, index: usize, is_older: bool, now: Instant) -> bool {
        let pair = (peer, index);
        if !is_older {
            self.waits.remove(&pair);
            return false;
        }
        let wait = self.waits.entry(pair).or_insert(Wait {
            until: now + WAIT_MIN,
            next: WAIT_MIN,
        });
        now >= wait.until
    }

    /// A dial that is to replace the connection has begun: the next one comes after twice the time.
    pub fn began(&mut self, peer: NodeId, index: usize, now: Instant) {
        if let Some(wait) = self.waits.get_mut(&(peer, index)) {
            wait.next = (2 * wait.next).min(WAIT_MAX);
            wait.until = now + wait.next;
        }
    }

    /// Forgets the peers that are no members any more: so it is bounded by their number.
    pub fn retain(&mut self, is_member: impl Fn(&NodeId) -> bool) {
        self.waits.retain(|(peer, _), _| is_member(peer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> NodeId {
        NodeId::from_bytes([1; 29])
    }

    // Protects peers of a node that does not take up its new key: they dial it again in ever longer
    // steps, and at once when its record changes the next time.
    #[test]
    fn waits_double_until_the_newest_key_is_there() {
        let start = Instant::now();
        let mut replacements = KeyReplacements::default();
        let mut due = Vec::new();
        for second in 0..2_000 {
            let now = start + Duration::from_secs(second);
            if replacements.is_due(peer(), 0, true, now) {
                replacements.began(peer(), 0, now);
                due.push(second);
            }
        }
        assert_eq!(due, [2, 6, 14, 30, 62, 126, 254, 510, 1_022, 1_622]);

        let now = start + Duration::from_secs(2_000);
        assert!(!replacements.is_due(peer(), 0, false, now));
        assert!(!replacements.is_due(peer(), 0, true, now));
        assert!(replacements.is_due(peer(), 0, true, now + WAIT_MIN));
    }

    // Protects the memory: what is kept is of members.
    #[test]
    fn who_left_is_forgotten() {
        let mut replacements = KeyReplacements::default();
        for index in 0..2 {
            assert!(!replacements.is_due(peer(), index, true, Instant::now()));
        }
        replacements.retain(|_| true);
        assert_eq!(replacements.waits.len(), 2);
        replacements.retain(|_| false);
        assert!(replacements.waits.is_empty());
    }
}
