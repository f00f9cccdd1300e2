//! How long the next connections of a peer are refused after one was cut for a flood.
//!
//! Without it a peer that is cut dials again at once, and floods for as long as its allowances
//! last: some ten milliseconds of a core each time.
//!
//! Invariants
//! 1. Only members have penalties, since only a proven peer is cut: there are at most as many as
//!    members, and [`Penalties::retain`] drops those of nodes that left.
//! 2. Each penalty is twice as long as the one before, up to [`LONGEST`], until a peer has behaved
//!    for [`FORGIVEN_AFTER`].

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::id::NodeId;

/// The first penalty: a peer whose software runs wild once loses a second.
const FIRST: Duration = Duration::from_secs(1);
/// The longest one: an operator who has mended a node waits no longer for it.
const LONGEST: Duration = Duration::from_secs(60);
/// After so long without a flood a peer begins anew.
const FORGIVEN_AFTER: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, Debug)]
struct Penalty {
    until: Instant,
    length: Duration,
}

/// Peers that were cut, and until when their next connections are refused.
#[derive(Debug, Default)]
pub struct Penalties {
    of: BTreeMap<NodeId, Penalty>,
}

impl Penalties {
    /// A connection of this peer was cut. How long the next ones are refused.
    pub fn cut(&mut self, peer: NodeId, now: Instant) -> Duration {
        let length = match self.of.get(&peer) {
            // Another connection of the same peer, cut in the same flood.
            Some(last) if now < last.until => return last.until - now,
            Some(last) if now < last.until + FORGIVEN_AFTER => (2 * last.length).min(LONGEST),
            _ => FIRST,
        };
        let penalty = Penalty {
            until: now + length,
            length,
        };
        self.of.insert(peer, penalty);
        length
    }

    /// Whether a connection of this peer is to be refused.
    pub fn refuses(&self, peer: &NodeId, now: Instant) -> bool {
        self.of.get(peer).is_some_and(|last| now < last.until)
    }

    /// Forgets the peers that are no members any more.
    pub fn retain(&mut self, is_member: impl Fn(&NodeId) -> bool) {
        self.of.retain(|peer, _| is_member(peer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> NodeId {
        NodeId::from_bytes([n; 29])
    }

    // Protects a shard from a peer that dials again as soon as it was cut, and a peer that ran wild
    // once from a ban.
    #[test]
    fn each_flood_costs_twice_as_much_until_it_is_forgiven() {
        let mut penalties = Penalties::default();
        let mut now = Instant::now();
        assert!(!penalties.refuses(&peer(1), now));
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            let length = Duration::from_secs(seconds);
            assert_eq!(penalties.cut(peer(1), now), length);
            assert!(penalties.refuses(&peer(1), now));
            assert!(!penalties.refuses(&peer(2), now), "it is the peer's own");
            // Its other connections, cut with it, make it no longer.
            now += length / 2;
            assert_eq!(penalties.cut(peer(1), now), length - length / 2);
            now += length - length / 2;
            assert!(!penalties.refuses(&peer(1), now));
        }
        now += FORGIVEN_AFTER;
        assert_eq!(penalties.cut(peer(1), now), FIRST);
    }

    #[test]
    fn a_node_that_left_has_no_penalty() {
        let mut penalties = Penalties::default();
        let now = Instant::now();
        penalties.cut(peer(1), now);
        penalties.cut(peer(2), now);
        penalties.retain(|id| *id == peer(2));
        assert!(!penalties.refuses(&peer(1), now) && penalties.refuses(&peer(2), now));
    }
}
