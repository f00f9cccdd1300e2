//! What answers that their peers have not read may hold of the chunk pool.
//!
//! An answer in chunks holds them until its peer has acknowledged its last byte. Its service may
//! have dropped the body meanwhile: then it is the peer that does not read that decides when the
//! chunks are free again. So unread answers have a bound of their own, and each peer a share of it.
//!
//! 1. The bodies of unread answers take at most `total_bytes` together, each body once, however
//!    many peers read it; or they are one body, of any length.
//! 2. A peer with unread answers gets a further one only while all of its own would take no more
//!    than what stays free: one peer alone reaches half of the total, n together n/(n+1). A peer
//!    without one gets what fits.
//! 3. A peer whose answer was cut, because it did not read it, gets one at a time until it has read
//!    one to its end.
//! 4. There is an entry for each peer with unread answers, and for at most [`CUT_PEERS_MAX`] others
//!    whose answers were cut.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::NodeId;

/// Peers that are remembered because an answer to them was cut: more than a subnet has members. The
/// lowest id is forgotten for a further one.
pub const CUT_PEERS_MAX: usize = 4_096;

/// What names a body among those that are held: where its first chunk lies, and its length.
pub type BodyKey = (usize, u64);

/// Why an answer is not taken now. It may be later, whatever the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnreadError {
    /// The peer has its share of unread answers.
    Share,
    /// The unread answers of all peers leave no room.
    Exhausted,
}

impl UnreadError {
    /// Stable label for metrics and logs.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Share => "unread_answers_share",
            Self::Exhausted => "unread_answers_exhausted",
        }
    }
}

/// The unread answers of a shard.
#[derive(Debug)]
pub struct UnreadAnswers {
    total_bytes: u64,
    /// What the bodies take, each once.
    used_bytes: u64,
    /// How many answers have the body.
    bodies: BTreeMap<BodyKey, usize>,
    /// What the answers to each peer take, each in full.
    peers: BTreeMap<NodeId, u64>,
    /// Peers that get one answer at a time.
    cut: BTreeSet<NodeId>,
}

impl UnreadAnswers {
    /// There are none.
    pub fn new(total_bytes: u64) -> Self {
        Self {
            total_bytes,
            used_bytes: 0,
            bodies: BTreeMap::new(),
            peers: BTreeMap::new(),
            cut: BTreeSet::new(),
        }
    }

    /// An answer to `peer` is queued. The length in `body` is what its chunks take of the pool, and
    /// more than zero.
    ///
    /// # Errors
    /// When it is more than its share, or than all, now. Nothing changes then.
    pub fn add(&mut self, peer: NodeId, body: BodyKey) -> Result<(), UnreadError> {
        let bytes = body.1;
        let new_bytes = if self.bodies.contains_key(&body) {
            0
        } else {
            bytes
        };
        let free_bytes = self.total_bytes.saturating_sub(self.used_bytes);
        if new_bytes > free_bytes && self.used_bytes > 0 {
            return Err(UnreadError::Exhausted);
        }
        let held_bytes = self.held_bytes(&peer);
        if held_bytes > 0 {
            let free_after = free_bytes.saturating_sub(new_bytes);
            let has_share = held_bytes.saturating_add(bytes) <= free_after;
            if !has_share || self.cut.contains(&peer) {
                return Err(UnreadError::Share);
            }
        }
        *self.bodies.entry(body).or_default() += 1;
        self.peers.insert(peer, held_bytes + bytes);
        self.used_bytes += new_bytes;
        Ok(())
    }

    /// An answer that was added holds nothing any more.
    pub fn remove(&mut self, peer: &NodeId, body: BodyKey) {
        if let Some(answers) = self.bodies.get_mut(&body) {
            *answers -= 1;
            if *answers == 0 {
                self.bodies.remove(&body);
                self.used_bytes -= body.1;
            }
        }
        if let Some(held) = self.peers.get_mut(peer) {
            *held = held.saturating_sub(body.1);
            if *held == 0 {
                self.peers.remove(peer);
            }
        }
    }

    /// The peer read an answer to its end.
    pub fn on_read(&mut self, peer: &NodeId) {
        self.cut.remove(peer);
    }

    /// An answer was cut because the peer did not read it.
    pub fn on_cut(&mut self, peer: NodeId) {
        if self.cut.len() >= CUT_PEERS_MAX && !self.cut.contains(&peer) {
            self.cut.pop_first();
        }
        self.cut.insert(peer);
    }

    /// What the bodies of all unread answers take.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// What the unread answers to one peer take.
    pub fn held_bytes(&self, peer: &NodeId) -> u64 {
        self.peers.get(peer).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peer(n: u8) -> NodeId {
        NodeId::from_bytes([n; 29])
    }

    /// Answers of ten bytes with bodies of their own, until one is refused.
    fn fill(unread: &mut UnreadAnswers, n: u8) -> u64 {
        let mut bodies = (1_000 * usize::from(n)..).map(|at| (at, 10));
        while unread.add(peer(n), bodies.next().unwrap()).is_ok() {}
        unread.held_bytes(&peer(n))
    }

    // Protects honest peers, and the pool, from members that ask and do not read.
    #[test]
    fn peers_that_do_not_read_leave_room_for_one_that_has_none() {
        let mut unread = UnreadAnswers::new(1_000);
        assert_eq!(fill(&mut unread, 1), 500);
        assert_eq!(unread.add(peer(1), (1, 10)), Err(UnreadError::Share));
        assert_eq!(fill(&mut unread, 2), 250);
        assert_eq!(unread.add(peer(3), (2, 251)), Err(UnreadError::Exhausted));
        assert_eq!(unread.add(peer(3), (2, 250)), Ok(()));
        assert_eq!(unread.used_bytes(), 1_000);
        // What another peer reads already takes nothing, even so.
        assert_eq!(unread.add(peer(4), (2, 250)), Ok(()));
        assert_eq!(unread.used_bytes(), 1_000);
        unread.remove(&peer(3), (2, 250));
        assert_eq!(unread.used_bytes(), 1_000, "it is still read");
        unread.remove(&peer(4), (2, 250));
        assert_eq!(unread.used_bytes(), 750);
    }

    // Protects an answer that is longer than all may be, and the rest from a second one.
    #[test]
    fn one_answer_of_any_length_is_taken_alone() {
        let mut unread = UnreadAnswers::new(100);
        assert_eq!(unread.add(peer(1), (1, 300)), Ok(()));
        assert_eq!(unread.add(peer(2), (2, 1)), Err(UnreadError::Exhausted));
        assert_eq!(unread.add(peer(2), (1, 300)), Ok(()), "the same body");
        unread.remove(&peer(1), (1, 300));
        unread.remove(&peer(2), (1, 300));
        assert_eq!(unread.add(peer(2), (2, 1)), Ok(()));
        assert_eq!(unread.add(peer(1), (1, 300)), Err(UnreadError::Exhausted));
    }

    // Protects the pool from a peer that asks again for what was cut; and the peer, whose path was
    // broken for a moment.
    #[test]
    fn a_peer_whose_answer_was_cut_gets_one_at_a_time_until_it_reads_one() {
        let mut unread = UnreadAnswers::new(1_000);
        unread.on_cut(peer(1));
        assert_eq!(unread.add(peer(1), (1, 10)), Ok(()));
        assert_eq!(unread.add(peer(1), (2, 10)), Err(UnreadError::Share));
        assert_eq!(fill(&mut unread, 2), 490, "another peer");
        unread.remove(&peer(1), (1, 10));
        assert_eq!(unread.add(peer(1), (1, 10)), Ok(()));
        unread.on_read(&peer(1));
        assert_eq!(unread.add(peer(1), (2, 10)), Ok(()));
    }

    #[test]
    fn peers_that_are_remembered_are_bounded() {
        let mut unread = UnreadAnswers::new(1_000);
        for n in 0..2 * CUT_PEERS_MAX {
            let mut id = [0; 29];
            id[..8].copy_from_slice(&n.to_be_bytes());
            unread.on_cut(NodeId::from_bytes(id));
        }
        assert_eq!(unread.cut.len(), CUT_PEERS_MAX);
    }

    proptest! {
        /// Against plain sums: the bodies that are read take what they take once, within the bound,
        /// and no peer holds more than its share; all comes back.
        #[test]
        fn what_is_held_is_what_was_taken_and_not_removed(
            steps in proptest::collection::vec((any::<bool>(), 0u8..4, 0usize..6, 1u64..50), 1..200),
        ) {
            const TOTAL: u64 = 100;
            let mut unread = UnreadAnswers::new(TOTAL);
            let mut held: Vec<(u8, BodyKey)> = Vec::new();
            let used = |held: &[(u8, BodyKey)]| -> u64 {
                let bodies: BTreeSet<BodyKey> = held.iter().map(|(_, body)| *body).collect();
                bodies.iter().map(|(_, bytes)| bytes).sum()
            };
            let of = |held: &[(u8, BodyKey)], n| -> u64 {
                held.iter().filter(|(of, _)| *of == n).map(|(_, (_, bytes))| bytes).sum()
            };
            for (is_add, n, at, bytes) in steps {
                if is_add {
                    let before = (of(&held, n), used(&held));
                    let added = unread.add(peer(n), (at, bytes)).is_ok();
                    held.push((n, (at, bytes)));
                    let fits = used(&held) <= TOTAL;
                    let is_fair = before.0 == 0 || of(&held, n) <= TOTAL.saturating_sub(used(&held));
                    prop_assert_eq!(added, fits && is_fair);
                    if !added {
                        held.pop();
                    }
                } else if !held.is_empty() {
                    let (n, body) = held.swap_remove(at % held.len());
                    unread.remove(&peer(n), body);
                }
                prop_assert_eq!(unread.used_bytes(), used(&held));
                for n in 0..4 {
                    prop_assert_eq!(unread.held_bytes(&peer(n)), of(&held, n));
                }
            }
            for (n, body) in held {
                unread.remove(&peer(n), body);
            }
            prop_assert!(unread.used_bytes() == 0 && unread.bodies.is_empty());
            prop_assert!(unread.peers.is_empty());
        }
    }
}
