//! Space for the bodies that peers send to one shard: the receive budget, and the chunk pool.
//!
//! Invariants
//! 1. What a peer holds of the budget is what its bodies take: from before their first byte until
//!    the last handle to each of their chunks is dropped, on whatever shard, whether or not the
//!    peer's connection still exists. Inline bodies take from the peer's allowance for them; one
//!    above it lies in the pool, and takes from its share.
//! 2. Space that came back on another thread is counted before a peer is refused for want of it.
//! 3. There are accounts for each peer that holds something, and for no other after
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

/// What comes back of the space of one peer.
#[derive(Debug, Default)]
struct Accounts {
    share: Arc<Account>,
    inline: Arc<Account>,
}

/// Gives out space for the bodies that peers send to one shard.
#[derive(Debug)]
pub struct BodyAllocator {
    budget: ReceiveBudget,
    accounts: BTreeMap<NodeId, Accounts>,
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
        if len <= INLINE_BYTES_MAX
            && let Some(charge) = self.charge_inline(peer, bytes.into())
        {
            return Ok(Space::Inline(Vec::with_capacity(len), charge));
        }
        let charged_bytes = taken_bytes(bytes.into());
        self.reserve(peer, charged_bytes)?;
        if let Some(mut body) = BodyMut::with_len(&self.pool, len) {
            body.charge(&self.accounts.entry(peer).or_default().share);
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

    /// Charges an inline body to the peer's allowance, if that has room.
    fn charge_inline(&mut self, peer: NodeId, bytes: u64) -> Option<Charge> {
        let mut is_reserved = self.budget.reserve_inline(peer, bytes);
        if !is_reserved && let Some(accounts) = self.accounts.get(&peer) {
            let credited_bytes = accounts.inline.settle();
            self.budget.release_inline(&peer, credited_bytes);
            is_reserved = self.budget.reserve_inline(peer, bytes);
        }
        if !is_reserved && bytes > self.budget.inline_free_bytes() {
            self.settle();
            is_reserved = self.budget.reserve_inline(peer, bytes);
        }
        is_reserved.then(|| {
            let accounts = self.accounts.entry(peer).or_default();
            Charge::new(&accounts.inline, bytes)
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

    /// What `peer` would have to hold less for a body of `bytes` to be granted: see
    /// [`ReceiveBudget::shortfall_bytes`].
    pub(crate) fn shortfall_bytes(&self, peer: &NodeId, bytes: u32) -> Option<u64> {
        self.budget.shortfall_bytes(peer, taken_bytes(bytes.into()))
    }

    /// Counts what came back, for every peer that holds something. To be called now and then: until
    /// then a peer that holds nothing any more keeps its account.
    pub fn settle(&mut self) {
        let budget = &mut self.budget;
        self.accounts.retain(|peer, Accounts { share, inline }| {
            // Asked first: what the last charge of an account gave back is settled below.
            let is_charged = Arc::get_mut(share).is_none() | Arc::get_mut(inline).is_none();
            budget.release(peer, share.settle());
            budget.release_inline(peer, inline.settle());
            is_charged
        });
    }

    /// Bytes that bodies of `peer` take of its share, as of the last [`Self::settle`].
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

    /// The allowance for inline bodies: one of the longest, and a part of another.
    const PEER_INLINE_BYTES_MAX: u64 = 100_000;
    /// For all peers: two and a half allowances.
    const ALL_INLINE_BYTES_MAX: u64 = 250_000;

    fn allocator(total_bytes: u64, peer_bytes_max: u64, pool_bytes: u64) -> BodyAllocator {
        let config = BudgetConfig {
            total_bytes,
            peer_bytes_max,
            peer_inline_bytes_max: PEER_INLINE_BYTES_MAX,
            inline_bytes_max: ALL_INLINE_BYTES_MAX,
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

    // Protects the small messages of a peer whose kept bodies fill its share, and bounds them.
    #[test]
    fn a_full_share_has_space_for_inline_bodies_only() {
        let mut allocator = allocator(8 << 20, 4 << 20, 8 << 20);
        let kept = allocator.allocate(peer(1), 4 << 20).unwrap();
        let reason = |space: Result<Space, Refusal>| space.err().map(|refusal| refusal.reason);
        let inline = allocator.allocate(peer(1), 64 << 10).unwrap();
        let small = allocator.allocate(peer(1), 20).unwrap();
        for bytes in [64 << 10, (64 << 10) + 1] {
            let refused = reason(allocator.allocate(peer(1), bytes));
            assert_eq!(refused, Some("budget_peer_share"), "{bytes}");
        }
        drop((inline, small));
        for _ in 0..100 {
            assert_eq!(reason(allocator.allocate(peer(1), 64 << 10)), None);
        }
        drop(kept);
        allocator.settle();
        assert!(allocator.accounts.is_empty(), "no account is left behind");
    }

    // Protects the memory beside the pool: small bodies of many peers lie in the pool when they
    // fill what all peers have there, and are taken all the same.
    #[test]
    fn small_bodies_beyond_what_all_peers_have_lie_in_the_pool() {
        let mut allocator = allocator(8 << 20, 4 << 20, 8 << 20);
        let mut allocate = |n| allocator.allocate(peer(n), 64 << 10).unwrap();
        let held: Vec<Space> = (1..=5).map(&mut allocate).collect();
        let inline = |space: &&Space| matches!(space, Space::Inline(..));
        assert_eq!(held.iter().filter(inline).count(), 3);
        // What one peer gave back is there for another.
        drop(held);
        assert!(inline(&&allocate(6)));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u8, u32),
        /// Drops a chunk of a reservation.
        Drop(usize),
    }

    /// The account that pays for a part of a body.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Of {
        /// Chunks, which count in the share.
        Pool,
        Allowance,
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
            // The peer, the bytes, the account that pays, and the part to drop.
            let mut held: Vec<(u8, u64, Of, Box<dyn Any>)> = Vec::new();
            let sum = |held: &[(u8, u64, Of, Box<dyn Any>)], n, of| -> u64 {
                let of_peer = held.iter().filter(|(peer, ..)| *peer == n);
                let of_peer = of_peer.filter(|(_, _, its, _)| *its == of);
                of_peer.map(|(_, bytes, ..)| bytes).sum()
            };
            for step in steps {
                match step {
                    Step::Allocate(n, bytes) => match allocator.allocate(peer(n), bytes) {
                        Ok(Space::Chunks(body)) => {
                            for chunk in body.freeze().chunks() {
                                let taken = taken_bytes(chunk.len() as u64);
                                held.push((n, taken, Of::Pool, Box::new(chunk.clone())));
                            }
                        }
                        Ok(inline) => {
                            let bytes = u64::from(bytes);
                            held.push((n, bytes, Of::Allowance, Box::new(inline)));
                            let own = sum(&held, n, Of::Allowance);
                            prop_assert!(own <= PEER_INLINE_BYTES_MAX);
                            let all: u64 = (0..3).map(|n| sum(&held, n, Of::Allowance)).sum();
                            prop_assert!(all <= ALL_INLINE_BYTES_MAX);
                        }
                        Err(_) => {}
                    },
                    Step::Drop(_) if held.is_empty() => {}
                    Step::Drop(at) => drop(held.swap_remove(at % held.len())),
                }
                allocator.settle();
                for n in 0..3 {
                    let share = sum(&held, n, Of::Pool);
                    prop_assert_eq!(allocator.held_bytes(&peer(n)), share);
                    let inline = sum(&held, n, Of::Allowance);
                    prop_assert_eq!(allocator.budget.inline_bytes(&peer(n)), inline);
                }
                let taken: u64 = (0..3).map(|n| sum(&held, n, Of::Pool)).sum();
                prop_assert_eq!(pool.total_bytes() - pool.free_bytes(), taken);
            }
            drop(held);
            allocator.settle();
            prop_assert!(allocator.accounts.is_empty());
            prop_assert_eq!(allocator.budget.used_bytes(), 0);
        }
    }
}
