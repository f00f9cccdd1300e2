//! Which peer may fill how much receive memory.
//!
//! A body announces its length; what it takes is reserved here before a byte of it is read, or its
//! stream is refused. The caller releases bytes as they become free again, in any pieces: a body
//! that is kept stays reserved for its peer, chunk by chunk, until the last handle is dropped.
//!
//! 1. Reserved bytes never exceed `total_bytes`, nor `peer_bytes_max` for one peer.
//! 2. A peer that holds something gets more only while it would hold no more than what stays
//!    free, so the first comers leave room for others: one peer alone reaches half of the total,
//!    n together n/(n+1). A peer that holds nothing gets what fits.
//! 3. What a peer holds is what was reserved for it less what was released for it.
//! 4. Inline bodies, which are small and given back right after their handler, have an allowance
//!    beside the total: `peer_inline_bytes_max` for each peer, and `inline_bytes_max` for all. So a
//!    peer whose kept bodies fill its share still gets its small messages through. One above the
//!    allowance is reserved as any other.

use crate::frame::FailureCode;
use crate::id::NodeId;
use std::collections::BTreeMap;
use thiserror::Error;

/// Sizes of a [`ReceiveBudget`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetConfig {
    /// For all peers.
    pub total_bytes: u64,
    /// For one peer.
    pub peer_bytes_max: u64,
    /// For inline bodies of one peer, beside the other two.
    pub peer_inline_bytes_max: u64,
    /// For inline bodies of all peers, beside the total.
    pub inline_bytes_max: u64,
}

impl Default for BudgetConfig {
    fn default() -> Self {
        Self {
            total_bytes: 512 << 20,
            peer_bytes_max: 256 << 20,
            peer_inline_bytes_max: 1 << 20,
            inline_bytes_max: 32 << 20,
        }
    }
}

/// Why memory is not granted.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BudgetError {
    /// It never will be: the body is above what one peer may ever fill.
    #[error("{bytes} bytes are above the most that one peer may fill, {max_bytes}")]
    PeerTooLarge {
        /// Asked for.
        bytes: u64,
        /// Allowed.
        max_bytes: u64,
    },
    /// This peer fills its share; others are not affected.
    #[error("peer holds {held_bytes} bytes and may not have {bytes} more now")]
    PeerShare {
        /// Asked for.
        bytes: u64,
        /// Held by the peer.
        held_bytes: u64,
    },
    /// All of it is in use.
    #[error("{bytes} bytes are asked for and {free_bytes} are free")]
    LocalExhausted {
        /// Asked for.
        bytes: u64,
        /// Free.
        free_bytes: u64,
    },
}

impl BudgetError {
    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::PeerTooLarge { .. } => "budget_peer_too_large",
            Self::PeerShare { .. } => "budget_peer_share",
            Self::LocalExhausted { .. } => "budget_exhausted",
        }
    }

    /// What to answer the peer: whether it may try again.
    pub fn failure_code(&self) -> FailureCode {
        match self {
            Self::PeerTooLarge { .. } => FailureCode::TooLarge,
            Self::PeerShare { .. } | Self::LocalExhausted { .. } => FailureCode::Busy,
        }
    }
}

/// Receive memory of a shard.
#[derive(Debug)]
pub struct ReceiveBudget {
    config: BudgetConfig,
    used_bytes: u64,
    /// Peers that hold something: as many as have a body in flight, at most.
    peers: BTreeMap<NodeId, u64>,
    /// Peers that hold something of their allowance.
    inline: BTreeMap<NodeId, u64>,
    inline_used_bytes: u64,
}

impl ReceiveBudget {
    /// A budget of which nothing is in use.
    pub fn new(config: BudgetConfig) -> Self {
        Self {
            config,
            used_bytes: 0,
            peers: BTreeMap::new(),
            inline: BTreeMap::new(),
            inline_used_bytes: 0,
        }
    }

    /// Reserves `bytes` for a body of `peer`.
    ///
    /// # Errors
    /// [`BudgetError::PeerTooLarge`] when no state of this budget grants it; the others when it is
    /// not granted now. Nothing changes then.
    pub fn reserve(&mut self, peer: NodeId, bytes: u64) -> Result<(), BudgetError> {
        let max_bytes = self.config.peer_bytes_max.min(self.config.total_bytes);
        if bytes > max_bytes {
            return Err(BudgetError::PeerTooLarge { bytes, max_bytes });
        }
        let free_bytes = self.free_bytes();
        if bytes > free_bytes {
            return Err(BudgetError::LocalExhausted { bytes, free_bytes });
        }
        let held_bytes = self.held_bytes(&peer);
        let would_hold = held_bytes + bytes;
        let over_share = held_bytes > 0 && would_hold > free_bytes - bytes;
        if would_hold > max_bytes || over_share {
            return Err(BudgetError::PeerShare { bytes, held_bytes });
        }
        if bytes > 0 {
            self.peers.insert(peer, would_hold);
            self.used_bytes += bytes;
        }
        self.invariants();
        Ok(())
    }

    /// What `peer` would have to hold less for [`Self::reserve`] to grant it `bytes`. None where it
    /// is granted as it is, and where nothing that the peer holds is enough.
    pub fn shortfall_bytes(&self, peer: &NodeId, bytes: u64) -> Option<u64> {
        let max_bytes = self.config.peer_bytes_max.min(self.config.total_bytes);
        let (held_bytes, free_bytes) = (self.held_bytes(peer), self.free_bytes());
        if bytes > max_bytes || bytes > free_bytes + held_bytes {
            return None;
        }
        // What it lets go of is free for it, and counts twice in its share.
        let for_room = bytes.saturating_sub(free_bytes);
        let for_share = (held_bytes + 2 * bytes)
            .saturating_sub(free_bytes)
            .div_ceil(2);
        let for_bound = (held_bytes + bytes).saturating_sub(max_bytes);
        let least = for_room.max(for_share).max(for_bound).min(held_bytes);
        (least > 0).then_some(least)
    }

    /// Reserves `bytes` of the allowance of `peer` for an inline body. False when the allowance has
    /// not as much left; nothing changes then.
    #[must_use]
    pub fn reserve_inline(&mut self, peer: NodeId, bytes: u64) -> bool {
        let held_bytes = self.inline_bytes(&peer);
        let own_bytes = self.config.peer_inline_bytes_max - held_bytes;
        let all_bytes = self.config.inline_bytes_max - self.inline_used_bytes;
        if bytes > own_bytes.min(all_bytes) {
            return false;
        }
        if bytes > 0 {
            self.inline.insert(peer, held_bytes + bytes);
            self.inline_used_bytes += bytes;
        }
        self.invariants();
        true
    }

    /// Gives back `bytes` that are reserved for `peer`. More than it holds is a fault of the
    /// caller: a debug build panics, another gives back what it holds.
    pub fn release(&mut self, peer: &NodeId, bytes: u64) {
        self.used_bytes -= take_back(&mut self.peers, peer, bytes);
        self.invariants();
    }

    /// As [`Self::release`], of the allowance for inline bodies.
    pub fn release_inline(&mut self, peer: &NodeId, bytes: u64) {
        self.inline_used_bytes -= take_back(&mut self.inline, peer, bytes);
        self.invariants();
    }

    /// Reserved by all peers, without inline bodies of their allowances.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Not reserved.
    pub fn free_bytes(&self) -> u64 {
        self.config.total_bytes - self.used_bytes
    }

    /// Of the allowances for inline bodies together, not reserved.
    pub fn inline_free_bytes(&self) -> u64 {
        self.config.inline_bytes_max - self.inline_used_bytes
    }

    /// Reserved by one peer, without inline bodies of its allowance.
    pub fn held_bytes(&self, peer: &NodeId) -> u64 {
        self.peers.get(peer).copied().unwrap_or(0)
    }

    /// Reserved by one peer of its allowance for inline bodies.
    pub fn inline_bytes(&self, peer: &NodeId) -> u64 {
        self.inline.get(peer).copied().unwrap_or(0)
    }

    fn invariants(&self) {
        debug_assert!(self.used_bytes <= self.config.total_bytes);
        debug_assert_eq!(self.used_bytes, self.peers.values().sum::<u64>());
        debug_assert!(self.inline_used_bytes <= self.config.inline_bytes_max);
        debug_assert_eq!(self.inline_used_bytes, self.inline.values().sum::<u64>());
        debug_assert!(
            self.peers
                .values()
                .all(|held| (1..=self.config.peer_bytes_max).contains(held))
        );
        debug_assert!(
            self.inline
                .values()
                .all(|held| (1..=self.config.peer_inline_bytes_max).contains(held))
        );
    }
}

/// Takes `bytes` from what `peer` holds, and says how many were there.
fn take_back(peers: &mut BTreeMap<NodeId, u64>, peer: &NodeId, bytes: u64) -> u64 {
    let Some(held) = peers.get_mut(peer) else {
        debug_assert_eq!(bytes, 0, "released for a peer that holds nothing");
        return 0;
    };
    debug_assert!(bytes <= *held, "released {bytes} of {held} bytes");
    let bytes = bytes.min(*held);
    *held -= bytes;
    if *held == 0 {
        peers.remove(peer);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peer(n: u8) -> NodeId {
        NodeId::from_bytes([n; 29])
    }

    // Protects other peers from one that announces bodies without end, and says which refusals are
    // for good.
    #[test]
    fn one_peer_leaves_room_for_others() {
        let mut budget = ReceiveBudget::new(BudgetConfig {
            total_bytes: 100,
            peer_bytes_max: 80,
            peer_inline_bytes_max: 0,
            inline_bytes_max: 0,
        });
        let refused =
            |result: Result<(), BudgetError>| result.err().map(|e| (e.reason(), e.failure_code()));
        assert_eq!(
            refused(budget.reserve(peer(1), 81)),
            Some(("budget_peer_too_large", FailureCode::TooLarge))
        );
        while budget.reserve(peer(1), 10).is_ok() {}
        assert_eq!(budget.held_bytes(&peer(1)), 50);
        assert_eq!(
            refused(budget.reserve(peer(1), 10)),
            Some(("budget_peer_share", FailureCode::Busy))
        );
        budget.reserve(peer(2), 40).unwrap();
        assert_eq!(
            refused(budget.reserve(peer(3), 11)),
            Some(("budget_exhausted", FailureCode::Busy))
        );
        budget.reserve(peer(3), 10).unwrap();
        assert_eq!((budget.free_bytes(), budget.used_bytes()), (0, 100));
        // In other pieces than it was reserved in.
        for (n, bytes) in [(1, 49), (2, 40), (1, 1), (3, 5), (3, 5)] {
            budget.release(&peer(n), bytes);
        }
        assert_eq!(budget.used_bytes(), 0);
        // One body of the largest size always fits an idle budget.
        assert_eq!(budget.reserve(peer(1), 80), Ok(()));
    }

    // Protects the small messages of a peer whose kept bodies fill its share, and bounds them.
    #[test]
    fn a_full_share_leaves_the_allowance_for_inline_bodies() {
        let mut budget = ReceiveBudget::new(BudgetConfig {
            total_bytes: 100,
            peer_bytes_max: 50,
            peer_inline_bytes_max: 10,
            inline_bytes_max: 25,
        });
        budget.reserve(peer(1), 50).unwrap();
        budget.reserve(peer(2), 50).unwrap();
        assert!(budget.reserve(peer(1), 1).is_err() && budget.reserve(peer(2), 1).is_err());
        assert!(budget.reserve_inline(peer(1), 7) && budget.reserve_inline(peer(2), 10));
        assert!(!budget.reserve_inline(peer(1), 4));
        assert!(budget.reserve_inline(peer(1), 3) && !budget.reserve_inline(peer(1), 1));
        budget.release_inline(&peer(1), 4);
        assert!(!budget.reserve_inline(peer(1), 5) && budget.reserve_inline(peer(1), 4));
        // All peers together have less than three allowances.
        assert!(!budget.reserve_inline(peer(3), 6) && budget.reserve_inline(peer(3), 5));
        assert_eq!(budget.inline_free_bytes(), 0);
    }

    proptest! {
        // Protects what a service keeps of a peer: it lets go of as much as is needed, of no byte
        // more, and of nothing where that is not enough.
        #[test]
        fn a_shortfall_is_the_least_that_helps(
            held in 0..100_u64, others in 0..100_u64, bytes in 1..120_u64, max in 1..120_u64,
        ) {
            let config = BudgetConfig {
                total_bytes: 100,
                peer_bytes_max: max,
                ..BudgetConfig::default()
            };
            let with = |held: u64| {
                let mut budget = ReceiveBudget::new(config);
                // Two others, who take what fits.
                for (n, bytes) in [(2, others / 2), (3, others - others / 2), (1, held)] {
                    if budget.reserve(peer(n), bytes).is_err() {
                        return None;
                    }
                }
                Some(budget)
            };
            let Some(mut budget) = with(held) else {
                return Ok(());
            };
            let shortfall = budget.shortfall_bytes(&peer(1), bytes);
            let granted_after = |released: u64| {
                with(held - released).is_some_and(|mut budget| budget.reserve(peer(1), bytes).is_ok())
            };
            let least = (0..=held).find(|released| granted_after(*released));
            prop_assert_eq!(shortfall, least.filter(|least| *least > 0));
            prop_assert_eq!(budget.reserve(peer(1), bytes).is_ok(), least == Some(0));
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Reserve,
        Release,
        ReserveInline,
        ReleaseInline,
    }

    fn any_step() -> impl Strategy<Value = Step> {
        use Step::*;
        proptest::sample::select(vec![Reserve, Release, ReserveInline, ReleaseInline])
    }

    proptest! {
        /// Against plain sums: what is granted is what the rules say, and what is held is what was
        /// granted less what came back, in whatever pieces.
        #[test]
        fn holds_what_was_granted_and_not_released(
            steps in proptest::collection::vec((any_step(), 0u8..4, 0u64..60), 1..100),
        ) {
            const TOTAL: u64 = 100;
            const MAX: u64 = 50;
            const INLINE_MAX: u64 = 70;
            const ALL_INLINE_MAX: u64 = 150;
            let mut budget = ReceiveBudget::new(BudgetConfig {
                total_bytes: TOTAL,
                peer_bytes_max: MAX,
                peer_inline_bytes_max: INLINE_MAX,
                inline_bytes_max: ALL_INLINE_MAX,
            });
            let mut held = [0u64; 4];
            let mut inline = [0u64; 4];
            for (step, n, bytes) in steps {
                let mine = held[usize::from(n)];
                let free = TOTAL - held.iter().sum::<u64>();
                let mine_inline = inline[usize::from(n)];
                match step {
                    Step::Reserve => {
                        let left = free.checked_sub(bytes);
                        let is_fair = |left| mine == 0 || mine + bytes <= left;
                        let granted = mine + bytes <= MAX && left.is_some_and(is_fair);
                        let result = budget.reserve(peer(n), bytes);
                        prop_assert_eq!(result.is_ok(), granted);
                        let code = result.err().map(|e| e.failure_code());
                        prop_assert_eq!(code == Some(FailureCode::TooLarge), bytes > MAX);
                        held[usize::from(n)] += if granted { bytes } else { 0 };
                    }
                    Step::Release => {
                        let bytes = bytes.min(mine);
                        budget.release(&peer(n), bytes);
                        held[usize::from(n)] -= bytes;
                    }
                    Step::ReserveInline => {
                        let all_inline = inline.iter().sum::<u64>() + bytes;
                        let granted =
                            mine_inline + bytes <= INLINE_MAX && all_inline <= ALL_INLINE_MAX;
                        prop_assert_eq!(budget.reserve_inline(peer(n), bytes), granted);
                        inline[usize::from(n)] += if granted { bytes } else { 0 };
                    }
                    Step::ReleaseInline => {
                        let bytes = bytes.min(mine_inline);
                        budget.release_inline(&peer(n), bytes);
                        inline[usize::from(n)] -= bytes;
                    }
                }
                for (n, inline) in (0..).zip(inline) {
                    prop_assert_eq!(budget.inline_bytes(&peer(n)), inline);
                }
                for (n, held) in (0..).zip(held) {
                    prop_assert_eq!(budget.held_bytes(&peer(n)), held);
                }
                prop_assert_eq!(budget.used_bytes(), held.iter().sum::<u64>());
            }
        }
    }
}
