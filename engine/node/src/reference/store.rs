//! Artifacts that this node holds: bodies in chunks, bounded, the oldest dropped for new ones.
//!
//! What the store holds is charged to the peers that sent it (`millrace_transport`). So a body that
//! is about to come is expected: the store drops old bodies of the same peer at once, until the
//! receive budget has space for it. Bodies of other peers are dropped when it is whole and
//! verified: a peer whose bodies never come drops nothing but its own.
//!
//! The receive budget is at least twice `bytes_max` (a check of the config), and gives a peer that
//! holds something more only while it would hold no more than what stays free. So a peer has space
//! for a body of `n` bytes when `n`, the bytes that it holds, and half of those that the other
//! peers hold are at most `bytes_max`; or when it holds nothing.
//!
//! 1. What all bodies take is at most `bytes_max`; a body counts in units of 64 KiB, as in the
//!    pool.
//! 2. `order` lists exactly the ids of `bodies` and who sent them, oldest first.
//! 3. `peers` has what the bodies of each peer take, and those that are expected of it; no zeros.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_protocol::id::{ArtifactId, NodeId};
use millrace_shards::chunk::{Body, taken_bytes};

/// The body is larger than the whole store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the body takes {needed_bytes} bytes, the store holds {bytes_max}")]
pub struct TooLarge {
    /// What the body takes, in units of 64 KiB.
    pub needed_bytes: u64,
    /// What the store may hold.
    pub bytes_max: u64,
}

#[derive(Debug, Default)]
struct Held {
    bodies: BTreeMap<ArtifactId, Body>,
    /// Without a peer: published at this node, and charged to none.
    order: VecDeque<(ArtifactId, Option<NodeId>)>,
    bytes: u64,
    peers: BTreeMap<NodeId, PeerBytes>,
    dropped: u64,
}

/// Bytes of one peer.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct PeerBytes {
    held: u64,
    /// What bodies that are about to come will take.
    expected: u64,
}

impl Held {
    /// Drops the oldest bodies until `bytes` more fit, or none is left.
    fn make_room(&mut self, bytes: u64, bytes_max: u64) {
        while self.bytes + bytes > bytes_max && self.drop_at(0) {}
    }

    /// Drops the oldest bodies of `peer` until the receive budget has space for `bytes` more of it,
    /// beside those that are expected of it; or none of its own is left.
    fn make_own_room(&mut self, peer: NodeId, bytes: u64, bytes_max: u64) {
        let others = self.peers.iter().filter(|(of, _)| **of != peer);
        let others: u64 = others.map(|(_, of_peer)| of_peer.held).sum();
        loop {
            let own = self.peers.get(&peer).copied().unwrap_or_default();
            if own.held + own.expected + bytes + others / 2 <= bytes_max {
                return;
            }
            let oldest = self.order.iter().position(|(_, of)| *of == Some(peer));
            if !oldest.is_some_and(|at| self.drop_at(at)) {
                return;
            }
        }
    }

    fn drop_at(&mut self, at: usize) -> bool {
        let Some((id, from)) = self.order.remove(at) else {
            return false;
        };
        if let Some(body) = self.bodies.remove(&id) {
            let bytes = in_units(body.len() as u64);
            self.bytes -= bytes;
            self.dropped += 1;
            if let Some(peer) = from {
                self.count(peer, |of_peer| of_peer.held -= bytes);
            }
        }
        true
    }

    fn count(&mut self, peer: NodeId, change: impl FnOnce(&mut PeerBytes)) {
        let of_peer = self.peers.entry(peer).or_default();
        change(of_peer);
        if *of_peer == PeerBytes::default() {
            self.peers.remove(&peer);
        }
    }
}

/// A body that is about to come; until this is dropped.
#[derive(Debug)]
pub(crate) struct Expected {
    store: Arc<Store>,
    peer: NodeId,
    bytes: u64,
}

impl Drop for Expected {
    fn drop(&mut self) {
        let mut held = self.store.lock();
        held.count(self.peer, |of_peer| of_peer.expected -= self.bytes);
    }
}

#[derive(Debug)]
pub(crate) struct Store {
    bytes_max: u64,
    held: Mutex<Held>,
}

/// How full the store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Artifacts held.
    pub artifacts: u64,
    /// Bytes they take, in units of 64 KiB.
    pub bytes: u64,
    /// What the store may hold.
    pub bytes_max: u64,
    /// Artifacts that were dropped to make room for new ones.
    pub dropped: u64,
}

impl Store {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self {
            bytes_max,
            held: Mutex::default(),
        }
    }

    /// Whether a body of this length could be held at all.
    pub(crate) fn fits(&self, length: u64) -> bool {
        in_units(length) <= self.bytes_max
    }

    /// Makes room for a body of this length among those of its peer; `None` when it could not be
    /// held at all.
    pub(crate) fn expect(store: &Arc<Self>, peer: NodeId, length: u64) -> Option<Expected> {
        let bytes = in_units(length);
        if bytes > store.bytes_max {
            return None;
        }
        let mut held = store.lock();
        held.make_own_room(peer, bytes, store.bytes_max);
        held.count(peer, |of_peer| of_peer.expected += bytes);
        Some(Expected {
            store: Arc::clone(store),
            peer,
            bytes,
        })
    }

    /// Holds a body under the id that its bytes have; the caller computed it. `from`: the peer that
    /// sent it.
    pub(crate) fn insert(
        &self,
        from: Option<NodeId>,
        id: ArtifactId,
        body: Body,
    ) -> Result<(), TooLarge> {
        let needed_bytes = in_units(body.len() as u64);
        if needed_bytes > self.bytes_max {
            return Err(TooLarge {
                needed_bytes,
                bytes_max: self.bytes_max,
            });
        }
        let mut held = self.lock();
        if held.bodies.contains_key(&id) {
            return Ok(());
        }
        if let Some(peer) = from {
            // What is expected of the peer keeps its space.
            held.make_own_room(peer, needed_bytes, self.bytes_max);
            held.count(peer, |of_peer| of_peer.held += needed_bytes);
        }
        held.make_room(needed_bytes, self.bytes_max);
        held.bytes += needed_bytes;
        held.order.push_back((id, from));
        held.bodies.insert(id, body);
        Ok(())
    }

    pub(crate) fn get(&self, id: &ArtifactId) -> Option<Body> {
        self.lock().bodies.get(id).cloned()
    }

    pub(crate) fn contains(&self, id: &ArtifactId) -> bool {
        self.lock().bodies.contains_key(id)
    }

    pub(crate) fn usage(&self) -> Usage {
        let held = self.lock();
        Usage {
            artifacts: held.bodies.len() as u64,
            bytes: held.bytes,
            bytes_max: self.bytes_max,
            dropped: held.dropped,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn in_units(length: u64) -> u64 {
    // An empty body takes nothing, and yet an entry: it counts as one unit, so that entries are
    // bounded.
    taken_bytes(length.max(1))
}

#[cfg(test)]
mod tests {
    use millrace_protocol::budget::{BudgetConfig, ReceiveBudget};
    use millrace_shards::chunk::{ChunkPool, UNIT_BYTES};
    use millrace_shards::config::HugePages;
    use proptest::prelude::*;

    use super::*;

    fn peer(n: u8) -> NodeId {
        NodeId::from_bytes([n; 29])
    }

    fn id(n: u8) -> ArtifactId {
        ArtifactId::from_bytes([n; 32])
    }

    /// The oldest goes first, what it took returns to the pool, and the bound counts units.
    #[test]
    fn the_oldest_bodies_make_room_and_give_their_chunks_back() {
        let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
        let store = Store::new(2 * UNIT_BYTES as u64);
        for n in 1..=3 {
            store
                .insert(None, id(n), Body::copy_from_slice(&pool, &[n; 10]).unwrap())
                .unwrap();
        }
        assert!(!store.contains(&id(1)) && store.contains(&id(2)) && store.contains(&id(3)));
        assert_eq!(store.get(&id(3)).unwrap().chunks()[0][..], [3; 10]);
        assert_eq!(
            pool.total_bytes() - pool.free_bytes(),
            2 * UNIT_BYTES as u64
        );
        let usage = Usage {
            artifacts: 2,
            bytes: 2 * UNIT_BYTES as u64,
            bytes_max: 2 * UNIT_BYTES as u64,
            dropped: 1,
        };
        assert_eq!(store.usage(), usage);
    }

    /// Room is made when a body is announced, and what is expected is not given to another body.
    #[test]
    fn an_expected_body_makes_room_before_it_comes() {
        const UNIT: u64 = UNIT_BYTES as u64;
        let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
        let store = Arc::new(Store::new(3 * UNIT));
        let insert = |n| {
            let body = Body::copy_from_slice(&pool, &[n; 10]).unwrap();
            store.insert(Some(peer(1)), id(n), body).unwrap();
        };
        (1..=3).for_each(insert);
        let expected = Store::expect(&store, peer(1), UNIT + 1).unwrap();
        assert_eq!(pool.total_bytes() - pool.free_bytes(), UNIT);
        assert!(store.contains(&id(3)) && !store.contains(&id(2)));
        insert(4);
        assert_eq!(store.usage().artifacts, 1, "two are kept free");
        drop(expected);
        (5..=6).for_each(insert);
        assert_eq!(store.usage().artifacts, 3);
        assert!(Store::expect(&store, peer(1), 3 * UNIT + 1).is_none());
        assert_eq!(store.usage().artifacts, 3, "what never fits drops nothing");
    }

    /// A peer whose bodies never come drops none of another; one that comes whole drops the oldest.
    #[test]
    fn what_never_comes_drops_nothing_of_other_peers() {
        const UNIT: u64 = UNIT_BYTES as u64;
        let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
        let store = Arc::new(Store::new(6 * UNIT));
        let insert = |from: Option<NodeId>, n: u8| {
            let body = Body::copy_from_slice(&pool, &[n; 10]).unwrap();
            store.insert(from, id(n), body).unwrap();
        };
        insert(None, 1);
        (2..=4).for_each(|n| insert(Some(peer(1)), n));
        (5..=6).for_each(|n| insert(Some(peer(2)), n));
        let holds = |ids: &[u8]| {
            assert!(ids.iter().all(|n| store.contains(&id(*n))), "{ids:?}");
            assert_eq!(store.usage().artifacts, ids.len() as u64);
        };
        holds(&[1, 2, 3, 4, 5, 6]);
        // Two of its own, two to come and half of three are not more than six.
        let begun = Store::expect(&store, peer(2), 2 * UNIT);
        holds(&[1, 2, 3, 4, 5, 6]);
        let stalled: Vec<_> = (0..100)
            .map(|_| Store::expect(&store, peer(2), 6 * UNIT).unwrap())
            .collect();
        holds(&[1, 2, 3, 4]);
        // Another peer has its room all the same.
        insert(Some(peer(1)), 7);
        insert(Some(peer(3)), 8);
        holds(&[1, 2, 3, 4, 7, 8]);
        drop((stalled, begun));
        insert(Some(peer(2)), 9);
        holds(&[2, 3, 4, 7, 8, 9]);
        assert_eq!(store.lock().peers[&peer(1)].held, 4 * UNIT);
    }

    proptest! {
        /// A receive budget of twice the store's size has space for a body that is expected,
        /// however the peers share the store.
        #[test]
        fn the_receive_budget_has_space_for_what_is_expected(
            steps in proptest::collection::vec((0u8..4, 1u64..=8), 1..60),
        ) {
            const UNIT: u64 = UNIT_BYTES as u64;
            const MAX: u64 = 16 * UNIT;
            let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
            let store = Arc::new(Store::new(MAX));
            for (n, (from, units)) in (0..).zip(steps) {
                let from = (from > 0).then(|| peer(from));
                let expected = from.map(|peer| Store::expect(&store, peer, units * UNIT).unwrap());
                let mut budget = ReceiveBudget::new(BudgetConfig {
                    total_bytes: 2 * MAX,
                    peer_bytes_max: MAX,
                    peer_inline_bytes_max: 0,
                    inline_bytes_max: 0,
                });
                for (peer, bytes) in &store.lock().peers {
                    // Each at once: no order of theirs is above its share.
                    prop_assert_eq!(budget.reserve(*peer, bytes.held), Ok(()));
                }
                if let Some(peer) = from {
                    prop_assert_eq!(budget.reserve(peer, units * UNIT), Ok(()));
                }
                drop(expected);
                let body = Body::copy_from_slice(&pool, &vec![n; (units * UNIT) as usize]);
                store.insert(from, id(n), body.unwrap()).unwrap();
                let held = store.lock();
                let bytes = held.bodies.values().map(|body| body.len() as u64);
                prop_assert_eq!(bytes.sum::<u64>(), held.bytes);
                prop_assert!(held.bytes <= MAX && held.order.len() == held.bodies.len());
            }
        }
    }

    #[test]
    fn a_body_is_held_once_and_one_that_never_fits_is_refused() {
        let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
        let store = Store::new(1 << 20);
        let body = Body::copy_from_slice(&pool, &[1; 10]).unwrap();
        store.insert(None, id(1), body.clone()).unwrap();
        store.insert(Some(peer(1)), id(1), body).unwrap();
        assert_eq!(store.usage().artifacts, 1);
        let large = Body::copy_from_slice(&pool, &vec![0; (1 << 20) + 1]).unwrap();
        assert_eq!(
            store
                .insert(Some(peer(1)), id(2), large)
                .unwrap_err()
                .needed_bytes,
            (1 << 20) + UNIT_BYTES as u64
        );
        assert!(store.contains(&id(1)), "what is refused drops nothing");
        assert!(!store.fits((1 << 20) + 1) && store.fits(1 << 20));
    }
}
