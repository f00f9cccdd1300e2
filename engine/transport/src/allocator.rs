//! Space for the bodies that peers send to one shard: the receive budget, and the chunk pool.
//!
//! Invariants
//! 1. What a peer holds of the budget is what its bodies take: from before their first byte until
//!    the last handle to each of their chunks is dropped, on whatever shard, whether or not the
//!    peer's connection still exists.
//! 2. Space that came back on another thread is counted before a peer is refused for want of it.
//! 3. There is an account for each peer that holds something, and for no other after
//!    [`BodyAllocator::settle`].

use std::collections::BTreeMap;
use std::sync::Arc;

use millrace_protocol::budget::{BudgetConfig, ReceiveBudget};
use millrace_protocol::frame::FailureCode;
use millrace_protocol::id::NodeId;
use millrace_shards::chunk::{Account, BodyMut, Charge, ChunkPool, taken_bytes};

use crate::service::body::INLINE_BYTES_MAX;

/// Why a body gets no space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// What the peer hears: not now ([`FailureCode::Busy`]) or never ([`FailureCode::TooLarge`]).
    pub(crate) code: FailureCode,
    /// Label on `/metrics`.
    pub(crate) reason: &'static str,
}

/// Space for one body.
#[derive(Debug)]
pub(crate) enum Space {
    /// Up to [`INLINE_BYTES_MAX`]: plain memory, and what it is charged.
    Inline(Vec<u8>, Charge),
    /// Chunks, charged one by one.
    Chunks(BodyMut),
}

/// Gives out space for the bodies that peers send to one shard.
#[derive(Debug)]
pub struct BodyAllocator {
    budget: ReceiveBudget,
    accounts: BTreeMap<NodeId, Arc<Account>>,
    pool: ChunkPool,
}

impl BodyAllocator {
    /// All of the budget and the pool is free.
    pub fn new(config: BudgetConfig, pool: ChunkPool) -> Self {
        Self {
            budget: ReceiveBudget::new(config),
            accounts: BTreeMap::new(),
            pool,
        }
    }

    /// Space for `bytes` of `peer`.
    pub(crate) fn allocate(&mut self, peer: NodeId, bytes: u32) -> Result<Space, Refusal> {
        let len = bytes as usize;
        let charged_bytes = if len <= INLINE_BYTES_MAX {
            bytes.into()
        } else {
            taken_bytes(bytes.into())
        };
        self.reserve(peer, charged_bytes)?;
        let account = self.accounts.entry(peer).or_default();
        if len <= INLINE_BYTES_MAX {
            let charge = Charge::new(account, charged_bytes);
            return Ok(Space::Inline(Vec::with_capacity(len), charge));
        }
        if let Some(mut body) = BodyMut::with_len(&self.pool, len) {
            body.charge(account);
            return Ok(Space::Chunks(body));
        }
        self.budget.release(&peer, charged_bytes);
        Err(if charged_bytes > self.pool.total_bytes() {
            Refusal {
                code: FailureCode::TooLarge,
                reason: "pool_too_small",
            }
        } else {
            Refusal {
                code: FailureCode::Busy,
                reason: "pool_exhausted",
            }
        })
    }

    fn reserve(&mut self, peer: NodeId, bytes: u64) -> Result<(), Refusal> {
        let mut reserved = self.budget.reserve(peer, bytes);
        // What came back in the meantime only ever turns a refusal into a grant.
        if reserved.is_err_and(|error| error.failure_code() == FailureCode::Busy) {
            self.settle();
            reserved = self.budget.reserve(peer, bytes);
        }
        reserved.map_err(|error| Refusal {
            code: error.failure_code(),
            reason: error.reason(),
        })
    }

    /// Counts what came back, for every peer that holds something. To be called now and then: until
    /// then a peer that holds nothing any more keeps its account.
    pub fn settle(&mut self) {
        let budget = &mut self.budget;
        self.accounts.retain(|peer, account| {
            // Asked first: what the last charge of an account gave back is settled below.
            let is_charged = Arc::get_mut(account).is_none();
            budget.release(peer, account.settle());
            is_charged
        });
    }

    /// Bytes that bodies of `peer` take, as of the last [`Self::settle`].
    pub fn held_bytes(&self, peer: &NodeId) -> u64 {
        self.budget.held_bytes(peer)
    }
}

#[cfg(test)]
mod tests {
    use std::any::Any;

    use millrace_shards::HugePages;
    use millrace_shards::chunk::{Body, CHUNK_BYTES, Chunk, ChunkSlice, UNIT_BYTES};
    use proptest::prelude::*;

    use super::*;

    const UNIT: u64 = UNIT_BYTES as u64;

    fn peer(n: u8) -> NodeId {
        NodeId::from_bytes([n; 29])
    }

    fn allocator(total_bytes: u64, peer_bytes_max: u64, pool_bytes: u64) -> BodyAllocator {
        let config = BudgetConfig {
            total_bytes,
            peer_bytes_max,
        };
        BodyAllocator::new(
            config,
            ChunkPool::new(pool_bytes, HugePages::Never).unwrap(),
        )
    }

    fn chunks(space: Space) -> BodyMut {
        match space {
            Space::Chunks(body) => body,
            Space::Inline(..) => panic!("a body in chunks was asked for"),
        }
    }

    // Protects the meaning of Busy and TooLarge: each cause of a refusal says whether to try again.
    #[test]
    fn a_refusal_says_whether_it_is_for_good() {
        let refused = |allocator: &mut BodyAllocator, n, bytes| {
            let refusal = allocator.allocate(peer(n), bytes).unwrap_err();
            (refusal.code, refusal.reason)
        };
        const MIB: u32 = 1 << 20;
        let mut small_pool = allocator(64 << 20, 64 << 20, 2 << 20);
        assert_eq!(
            refused(&mut small_pool, 1, 2 * MIB + 1),
            (FailureCode::TooLarge, "pool_too_small")
        );
        let held = small_pool.allocate(peer(1), 2 * MIB).unwrap();
        assert_eq!(
            refused(&mut small_pool, 2, MIB),
            (FailureCode::Busy, "pool_exhausted")
        );
        assert_eq!(small_pool.held_bytes(&peer(2)), 0, "nothing is kept of it");
        drop(held);
        let mut budget = allocator(8 << 20, 6 << 20, 16 << 20);
        assert_eq!(
            refused(&mut budget, 1, 6 * MIB + 1),
            (FailureCode::TooLarge, "budget_peer_too_large")
        );
        let held = budget.allocate(peer(1), 6 * MIB).unwrap();
        assert_eq!(
            refused(&mut budget, 1, MIB),
            (FailureCode::Busy, "budget_peer_share")
        );
        assert_eq!(
            refused(&mut budget, 2, 3 * MIB),
            (FailureCode::Busy, "budget_exhausted")
        );
        drop(held);
        assert!(budget.allocate(peer(1), 6 * MIB).is_ok());
    }

    // Protects other peers: what a body took stays charged to its peer while any part of it is
    // held, on another thread too, and comes back chunk by chunk.
    #[test]
    fn space_is_held_until_the_last_handle_is_dropped_elsewhere() {
        let mut allocator = allocator(8 << 20, 8 << 20, 8 << 20);
        let len = 2 * CHUNK_BYTES + 3 * UNIT_BYTES - 5;
        let body = chunks(allocator.allocate(peer(1), len as u32).unwrap()).freeze();
        let all = taken_bytes(len as u64);
        let kept: Chunk = body.chunks()[2].clone();
        let sent: ChunkSlice = body.slice_at(CHUNK_BYTES, 100).unwrap();
        let clone: Body = body.clone();
        let mut held = || {
            allocator.settle();
            allocator.held_bytes(&peer(1))
        };
        drop(body);
        assert_eq!(held(), all, "a clone holds all of it");
        std::thread::spawn(move || drop(clone)).join().unwrap();
        assert_eq!(held(), CHUNK_BYTES as u64 + 3 * UNIT, "two chunks are held");
        std::thread::spawn(move || drop(sent)).join().unwrap();
        assert_eq!(held(), 3 * UNIT);
        drop(kept);
        assert_eq!(held(), 0);
        assert!(allocator.accounts.is_empty(), "no account is left behind");
    }

    // Protects a store that outlives the shard: its chunks stay readable, and no account gets them
    // back.
    #[test]
    fn a_body_outlives_its_allocator() {
        let mut allocator = allocator(8 << 20, 8 << 20, 8 << 20);
        let pool = allocator.pool.clone();
        let mut body = chunks(allocator.allocate(peer(1), 100_000).unwrap());
        body.spare().fill(7);
        let body = body.freeze();
        drop(allocator);
        assert!(body.chunks()[0].iter().all(|byte| *byte == 7));
        drop(body);
        assert_eq!(pool.free_chunks(), pool.total_chunks());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u8, u32),
        /// Drops a chunk of a reservation.
        Drop(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0u8..3, prop_oneof![0u32..70_000, 60_000u32..3_000_000])
                .prop_map(|(peer, bytes)| Step::Allocate(peer, bytes)),
            any::<usize>().prop_map(Step::Drop),
        ];
        proptest::collection::vec(step, 1..80)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Against plain sums: each peer holds what the living parts of its bodies take, the pool
        /// too, and everything comes back, dropped in any order.
        #[test]
        fn peers_hold_what_their_bodies_take(steps in steps()) {
            let mut allocator = allocator(8 << 20, 6 << 20, 8 << 20);
            let pool = allocator.pool.clone();
            // Whose, how many bytes, whether of the pool, and what to drop.
            let mut held: Vec<(u8, u64, bool, Box<dyn Any>)> = Vec::new();
            for step in steps {
                match step {
                    Step::Allocate(n, bytes) => match allocator.allocate(peer(n), bytes) {
                        Ok(Space::Chunks(body)) => {
                            for chunk in body.freeze().chunks() {
                                let taken = taken_bytes(chunk.len() as u64);
                                held.push((n, taken, true, Box::new(chunk.clone())));
                            }
                        }
                        Ok(inline) => held.push((n, bytes.into(), false, Box::new(inline))),
                        Err(_) => {}
                    },
                    Step::Drop(_) if held.is_empty() => {}
                    Step::Drop(at) => drop(held.swap_remove(at % held.len())),
                }
                allocator.settle();
                for n in 0..3 {
                    let of_peer = held.iter().filter(|(of, ..)| *of == n);
                    let sum: u64 = of_peer.map(|(_, bytes, ..)| bytes).sum();
                    prop_assert_eq!(allocator.held_bytes(&peer(n)), sum);
                }
                let in_chunks = held.iter().filter(|(_, _, is_of_pool, _)| *is_of_pool);
                let taken: u64 = in_chunks.map(|(_, bytes, ..)| bytes).sum();
                prop_assert_eq!(pool.total_bytes() - pool.free_bytes(), taken);
            }
            drop(held);
            allocator.settle();
            prop_assert!(allocator.accounts.is_empty());
            prop_assert_eq!(allocator.budget.used_bytes(), 0);
        }
    }
}
