//! Who may fill how much receive memory.
//!
//! A body announces its length; its chunks are reserved here before a byte of it is read, or its
//! stream is refused.
//!
//! 1. Reserved bytes never exceed `total_bytes`, nor `peer_bytes_max` for one peer.
//! 2. A peer that holds something gets more only while it would hold no more than what stays
//!    free, so the first comers leave room for others: one peer alone reaches half of the total,
//!    n together n/(n+1). A peer that holds nothing gets what fits.
//! 3. What is reserved is released once, by the token that the reservation gave.

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
}

/// Memory that is granted: give it back with [`ReceiveBudget::release`].
#[derive(Debug)]
#[must_use = "reserved memory stays reserved until it is released"]
pub struct Reservation {
    peer: NodeId,
    bytes: u64,
}

impl Reservation {
    /// Bytes that are granted.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whose body they are for.
    pub fn peer(&self) -> NodeId {
        self.peer
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

    /// Reserves memory for a body of `peer`.
    pub fn try_reserve(&mut self, peer: NodeId, bytes: u64) -> Result<Reservation, BudgetError> {
        let max_bytes = self.config.peer_bytes_max.min(self.config.total_bytes);
        if bytes > max_bytes {
            return Err(BudgetError::PeerTooLarge { bytes, max_bytes });
        }
        let free_bytes = self.free_bytes();
        if bytes > free_bytes {
            return Err(BudgetError::LocalExhausted { bytes, free_bytes });
        }
        let held_bytes = self.peers.get(&peer).copied().unwrap_or(0);
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
        Ok(Reservation { peer, bytes })
    }

    /// Gives memory back, when the body has left it or will not come.
    pub fn release(&mut self, reservation: Reservation) {
        let Reservation { peer, bytes } = reservation;
        if let Some(held) = self.peers.get_mut(&peer) {
            *held -= bytes;
            self.used_bytes -= bytes;
            if *held == 0 {
                self.peers.remove(&peer);
            }
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

    // Protects other peers from one that announces bodies without end.
    #[test]
    fn one_peer_leaves_room_for_others() {
        let mut budget = ReceiveBudget::new(BudgetConfig {
            total_bytes: 100,
            peer_bytes_max: 80,
        });
        let reason = |result: Result<Reservation, BudgetError>| result.err().map(|e| e.reason());
        assert_eq!(
            reason(budget.try_reserve(peer(1), 81)),
            Some("budget_peer_too_large")
        );
        let mut held: Vec<_> =
            std::iter::from_fn(|| budget.try_reserve(peer(1), 10).ok()).collect();
        assert_eq!(budget.held_bytes(&peer(1)), 50);
        assert_eq!(
            reason(budget.try_reserve(peer(1), 10)),
            Some("budget_peer_share")
        );
        held.push(budget.try_reserve(peer(2), 40).unwrap());
        assert_eq!(
            reason(budget.try_reserve(peer(3), 11)),
            Some("budget_exhausted")
        );
        held.push(budget.try_reserve(peer(3), 10).unwrap());
        assert_eq!((budget.free_bytes(), budget.used_bytes()), (0, 100));
        for reservation in held {
            assert!(reservation.bytes() >= 10 && reservation.peer() <= peer(3));
            budget.release(reservation);
        }
        // One body of the largest size always fits an idle budget.
        assert_eq!(budget.try_reserve(peer(1), 80).unwrap().bytes(), 80);
    }

    proptest! {
        #[test]
        fn never_over_the_total(
            steps in proptest::collection::vec((any::<bool>(), 0u8..4, 0u64..60), 1..100),
        ) {
            let config = BudgetConfig { total_bytes: 100, peer_bytes_max: 50 };
            let mut budget = ReceiveBudget::new(config);
            let mut held: Vec<Reservation> = Vec::new();
            for (reserve, n, bytes) in steps {
                let of = |held: &[Reservation], n| {
                    held.iter().filter(|r| r.peer() == peer(n)).map(Reservation::bytes).sum::<u64>()
                };
                if reserve {
                    let (mine, all) = (of(&held, n), held.iter().map(Reservation::bytes).sum::<u64>());
                    let free: u64 = 100 - all;
                    let fits = bytes <= free && mine + bytes <= 50;
                    let fair = mine == 0 || mine + bytes <= free - bytes.min(free);
                    let result = budget.try_reserve(peer(n), bytes);
                    prop_assert_eq!(result.is_ok(), fits && fair);
                    held.extend(result);
                } else if !held.is_empty() {
                    budget.release(held.swap_remove(bytes as usize % held.len()));
                }
                prop_assert_eq!(budget.held_bytes(&peer(n)), of(&held, n));
            }
            held.into_iter().for_each(|reservation| budget.release(reservation));
            prop_assert_eq!(budget.used_bytes(), 0);
        }
    }
}
