//! Artifacts that this node holds: bodies in chunks, bounded, old ones dropped for new ones.
//!
//! A new body takes the place of the oldest of the publisher that would hold most, its own first;
//! this node is a publisher too. So one that sends without end drops its own bodies once it holds
//! most. Others lose to it what they hold beyond an equal share of the store, and at most as much
//! as one body more: a body may be longer than a share.
//!
//! What the store holds is charged to the peers that sent it (`millrace_transport`), until it drops
//! it: a publisher does not pay for those who read its bodies and do not end. So a body that is
//! about to come is expected: the store drops old bodies of the same peer at once, until the
//! receive budget has space for it. Bodies of other peers are dropped when it is whole and
//! verified: a peer whose bodies never come drops nothing but its own.
//!
//! The receive budget is at least twice `bytes_max` (a check of the config), and gives a peer that
//! holds something more only while it would hold no more than what stays free. So a peer has space
//! for a body of `n` bytes when `n`, the bytes that it holds, and half of those that the other
//! peers hold are at most `bytes_max`; or when it holds nothing. Other peers may hold more than the
//! store knows of, in bodies that are under way: where there is no space for a body of a peer, the
//! transport has the store drop as many of the oldest that are charged to that peer as are enough.
//!
//! 1. What all bodies take is at most `bytes_max`; a body counts in units of 64 KiB, as in the
//!    pool.
//! 2. The ids of all publishers are exactly those of `bodies`, each once.
//! 3. A publisher that holds nothing, and of which nothing is expected, has no entry.

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

/// The peer that sent a body; none: published at this node, and charged to no peer.
type Publisher = Option<NodeId>;

/// Publishers whose drops are counted apart: more than a subnet has members, and a bound for a node
/// that sees members come and go for years.
const DROPPED_OF_MAX: usize = 4_096;

#[derive(Debug, Default)]
struct Held {
    bodies: BTreeMap<ArtifactId, Body>,
    bytes: u64,
    publishers: BTreeMap<Publisher, Share>,
    /// Bodies that were dropped, by publisher; at most [`DROPPED_OF_MAX`] of them.
    dropped_of: BTreeMap<Publisher, u64>,
    /// Bodies that were dropped, of all.
    dropped: u64,
}

/// What the store holds of one publisher.
#[derive(Debug, Default)]
struct Share {
    /// Its bodies, the oldest first.
    ids: VecDeque<ArtifactId>,
    /// What they take.
    held: u64,
    /// What bodies that are about to come will take.
    expected: u64,
}

impl Held {
    /// Drops bodies until `bytes` more of `publisher` fit, or none is left.
    fn make_room(&mut self, publisher: Publisher, bytes: u64, bytes_max: u64) {
        while self.bytes + bytes > bytes_max {
            // With what is to come: otherwise equal ones would take from each other in turns.
            let would_hold = |(of, share): &(&Publisher, &Share)| {
                let is_own = **of == publisher;
                (share.held + if is_own { bytes } else { 0 }, is_own)
            };
            let holding = self.publishers.iter().filter(|(_, of)| of.held > 0);
            let most = holding.max_by_key(would_hold).map(|(of, _)| *of);
            if !most.is_some_and(|of| self.drop_oldest_of(of)) {
                return;
            }
        }
    }

    /// Drops the oldest bodies of `peer` until the receive budget has space for `bytes` more of it,
    /// beside those that are expected of it; or none of its own is left.
    fn make_own_room(&mut self, peer: NodeId, bytes: u64, bytes_max: u64) {
        let is_other_peer = |of: &Publisher| of.is_some() && *of != Some(peer);
        let others = self.publishers.iter().filter(|(of, _)| is_other_peer(of));
        let others: u64 = others.map(|(_, of_peer)| of_peer.held).sum();
        loop {
            let own = self.publishers.get(&Some(peer));
            let own = own.map_or(0, |own| own.held + own.expected);
            let fits = own + bytes + others / 2 <= bytes_max;
            if fits || !self.drop_oldest_of(Some(peer)) {
                return;
            }
        }
    }

    /// Whether there was one.
    fn drop_oldest_of(&mut self, publisher: Publisher) -> bool {
        let share = self.publishers.get(&publisher);
        let Some(id) = share.and_then(|share| share.ids.front().copied()) else {
            return false;
        };
        self.drop_of(publisher, &id);
        true
    }

    fn drop_of(&mut self, publisher: Publisher, id: &ArtifactId) {
        if let Some(share) = self.publishers.get_mut(&publisher)
            && let Some(at) = share.ids.iter().position(|its| its == id)
        {
            share.ids.remove(at);
        }
        if let Some(body) = self.bodies.remove(id) {
            // What peers read of it still is theirs: they have a bound for that.
            body.uncharge();
            let bytes = in_units(body.len() as u64);
            self.bytes -= bytes;
            self.change(publisher, |share| share.held -= bytes);
            self.count_dropped(publisher);
        }
    }

    fn change(&mut self, publisher: Publisher, change: impl FnOnce(&mut Share)) {
        let share = self.publishers.entry(publisher).or_default();
        change(share);
        if share.ids.is_empty() && share.expected == 0 {
            self.publishers.remove(&publisher);
        }
    }

    fn count_dropped(&mut self, publisher: Publisher) {
        self.dropped += 1;
        let has_room = self.dropped_of.len() < DROPPED_OF_MAX;
        if has_room || self.dropped_of.contains_key(&publisher) {
            *self.dropped_of.entry(publisher).or_default() += 1;
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
        held.change(Some(self.peer), |share| share.expected -= self.bytes);
    }
}

#[derive(Debug)]
pub(crate) struct Store {
    bytes_max: u64,
    held: Mutex<Held>,
}

/// How full the store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Artifacts held.
    pub artifacts: u64,
    /// Bytes they take, in units of 64 KiB.
    pub bytes: u64,
    /// What the store may hold.
    pub bytes_max: u64,
    /// Artifacts that were dropped to make room for new ones.
    pub dropped: u64,
    /// Of them, those of each publisher: a peer, or this node (none). For the first 4,096 that lose
    /// one.
    pub dropped_of: BTreeMap<Option<NodeId>, u64>,
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
        held.change(Some(peer), |share| share.expected += bytes);
        Some(Expected {
            store: Arc::clone(store),
            peer,
            bytes,
        })
    }

    /// Drops the oldest bodies that are charged to this peer, until they take `bytes` together; or
    /// none, where all of them take less. Whether it did.
    pub(crate) fn drop_charged(&self, peer: NodeId, bytes: u64) -> bool {
        let mut held = self.lock();
        let held = &mut *held;
        let Some(share) = held.publishers.get(&Some(peer)) else {
            return false;
        };
        let mut dropped = 0;
        let mut ids = Vec::new();
        for id in &share.ids {
            if dropped >= bytes {
                break;
            }
            if let Some(body) = held.bodies.get(id).filter(|body| body.is_charged()) {
                dropped += in_units(body.len() as u64);
                ids.push(*id);
            }
        }
        if dropped < bytes {
            return false;
        }
        ids.iter().for_each(|id| held.drop_of(Some(peer), id));
        true
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
        }
        held.make_room(from, needed_bytes, self.bytes_max);
        held.bytes += needed_bytes;
        held.change(from, |share| {
            share.held += needed_bytes;
            share.ids.push_back(id);
        });
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
            dropped_of: held.dropped_of.clone(),
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
mod tests;
