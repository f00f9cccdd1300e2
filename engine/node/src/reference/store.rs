//! Artifacts that this node holds: bodies in chunks, bounded, the oldest dropped for new ones.
//!
//! A body that is about to come is expected: the store drops old ones for it at once, because what
//! it holds is charged to the peers that sent it (`millrace_transport`), and such a peer has no
//! space for another body before.
//!
//! 1. What all bodies take is at most `bytes_max`; a body counts in units of 64 KiB, as in the
//!    pool.
//! 2. `order` lists exactly the ids of `bodies`, oldest first.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_protocol::id::ArtifactId;
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
    order: VecDeque<ArtifactId>,
    bytes: u64,
    /// What bodies that are about to come will take.
    expected_bytes: u64,
    dropped: u64,
}

impl Held {
    /// Drops the oldest bodies until `bytes` more fit beside those that are expected, or none is
    /// left.
    fn make_room(&mut self, bytes: u64, bytes_max: u64) {
        while self.bytes + self.expected_bytes + bytes > bytes_max {
            let Some(oldest) = self.order.pop_front() else {
                break;
            };
            if let Some(body) = self.bodies.remove(&oldest) {
                self.bytes -= in_units(body.len() as u64);
                self.dropped += 1;
            }
        }
    }
}

/// A body that is about to come; until this is dropped.
#[derive(Debug)]
pub(crate) struct Expected {
    store: Arc<Store>,
    bytes: u64,
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.store.lock().expected_bytes -= self.bytes;
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

    /// Makes room for a body of this length; `None` when it could not be held at all.
    pub(crate) fn expect(store: &Arc<Self>, length: u64) -> Option<Expected> {
        let bytes = in_units(length);
        if bytes > store.bytes_max {
            return None;
        }
        let mut held = store.lock();
        held.make_room(bytes, store.bytes_max);
        held.expected_bytes += bytes;
        Some(Expected {
            store: Arc::clone(store),
            bytes,
        })
    }

    /// Holds a body under the id that its bytes have; the caller computed it.
    pub(crate) fn insert(&self, id: ArtifactId, body: Body) -> Result<(), TooLarge> {
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
        held.make_room(needed_bytes, self.bytes_max);
        held.bytes += needed_bytes;
        held.order.push_back(id);
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
    use millrace_shards::chunk::{ChunkPool, UNIT_BYTES};
    use millrace_shards::config::HugePages;

    use super::*;

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
                .insert(id(n), Body::copy_from_slice(&pool, &[n; 10]).unwrap())
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
            store.insert(id(n), body).unwrap();
        };
        (1..=3).for_each(insert);
        let expected = Store::expect(&store, UNIT + 1).unwrap();
        assert_eq!(pool.total_bytes() - pool.free_bytes(), UNIT);
        assert!(store.contains(&id(3)) && !store.contains(&id(2)));
        insert(4);
        assert_eq!(store.usage().artifacts, 1, "two are kept free");
        drop(expected);
        (5..=6).for_each(insert);
        assert_eq!(store.usage().artifacts, 3);
        assert!(Store::expect(&store, 3 * UNIT + 1).is_none());
        assert_eq!(store.usage().artifacts, 3, "what never fits drops nothing");
    }

    #[test]
    fn a_body_is_held_once_and_one_that_never_fits_is_refused() {
        let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
        let store = Store::new(1 << 20);
        let body = Body::copy_from_slice(&pool, &[1; 10]).unwrap();
        store.insert(id(1), body.clone()).unwrap();
        store.insert(id(1), body).unwrap();
        assert_eq!(store.usage().artifacts, 1);
        let large = Body::copy_from_slice(&pool, &vec![0; (1 << 20) + 1]).unwrap();
        assert_eq!(
            store.insert(id(2), large).unwrap_err().needed_bytes,
            (1 << 20) + UNIT_BYTES as u64
        );
        assert!(store.contains(&id(1)), "what is refused drops nothing");
        assert!(!store.fits((1 << 20) + 1) && store.fits(1 << 20));
    }
}
