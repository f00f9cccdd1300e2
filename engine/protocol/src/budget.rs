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
}

impl Default for BudgetConfig {
    fn default() -> Self {
        Self {
            total_bytes: 512 << 20,
            peer_bytes_max: 256 << 20,
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
}

impl ReceiveBudget {
    /// A budget of which nothing is in use.
    pub fn new(config: BudgetConfig) -> Self {
        Self {
            config,
            used_bytes: 0,
            peers: BTreeMap::new(),
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

    /// Gives back `bytes` that are reserved for `peer`. More than it holds is a fault of the
    /// caller: a debug build panics, another gives back what it holds.
    pub fn release(&mut self, peer: &NodeId, bytes: u64) {
        let Some(held) = self.peers.get_mut(peer) else {
            debug_assert_eq!(bytes, 0, "released for a peer that holds nothing");
            return;
        };
        debug_assert!(bytes <= *held, "released {bytes} of {held} bytes");
        let bytes = bytes.min(*held);
        *held -= bytes;
        self.used_bytes -= bytes;
        if *held == 0 {
            self.peers.remove(peer);
        }
        self.invariants();
    }

    /// Reserved by all peers.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Not reserved.
    pub fn free_bytes(&self) -> u64 {
        self.config.total_bytes - self.used_bytes
    }

    /// Reserved by one peer.
    pub fn held_bytes(&self, peer: &NodeId) -> u64 {
        self.peers.get(peer).copied().unwrap_or(0)
    }

    fn invariants(&self) {
        debug_assert!(self.used_bytes <= self.config.total_bytes);
        debug_assert_eq!(self.used_bytes, self.peers.values().sum::<u64>());
        debug_assert!(
            self.peers
                .values()
                .all(|held| (1..=self.config.peer_bytes_max).contains(held))
        );
    }
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

    proptest! {
        /// Against plain sums: what is granted is what the rules say, and what is held is what was
        /// granted less what came back, in whatever pieces.
        #[test]
        fn holds_what_was_granted_and_not_released(
            steps in proptest::collection::vec((any::<bool>(), 0u8..4, 0u64..60), 1..100),
        ) {
            const TOTAL: u64 = 100;
            const MAX: u64 = 50;
            let mut budget = ReceiveBudget::new(BudgetConfig {
                total_bytes: TOTAL,
                peer_bytes_max: MAX,
            });
            let mut held = [0u64; 4];
            for (reserve, n, bytes) in steps {
                let mine = held[usize::from(n)];
                let free = TOTAL - held.iter().sum::<u64>();
                if reserve {
                    let left = free.checked_sub(bytes);
                    let is_fair = |left| mine == 0 || mine + bytes <= left;
                    let granted = mine + bytes <= MAX && left.is_some_and(is_fair);
                    let result = budget.reserve(peer(n), bytes);
                    prop_assert_eq!(result.is_ok(), granted);
                    let for_good = result.is_err_and(|e| e.failure_code() == FailureCode::TooLarge);
                    prop_assert_eq!(for_good, bytes > MAX);
                    held[usize::from(n)] += if granted { bytes } else { 0 };
                } else {
                    let bytes = bytes.min(mine);
                    budget.release(&peer(n), bytes);
                    held[usize::from(n)] -= bytes;
                }
                for (n, held) in (0..).zip(held) {
                    prop_assert_eq!(budget.held_bytes(&peer(n)), held);
                }
                prop_assert_eq!(budget.used_bytes(), held.iter().sum::<u64>());
            }
        }
    }
}
