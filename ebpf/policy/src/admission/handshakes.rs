//! Counts of half-open handshakes, exact for each source and each registry peer.
//!
//! 1. No count passes its bound: `source_max` for a source, [`LEVEL_FACTORS`] times that for the
//!    prefixes around it, `peer_max` for a peer.
//! 2. Handshakes without a token take at most half of a source's or prefix's bound, so that a
//!    sender of forged addresses leaves the other half to their owner. Handshakes of proven peers
//!    count for the peer alone, whatever address they come from.
//! 3. A source or peer without a handshake is in no map. So each map has at most as many entries as
//!    handshakes are half open, which the shards bound (`handshakes_max`), and no map is ever full.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Entitlement, Full};
use crate::source::{LEVELS_MAX, Source};

/// What the prefixes around a source may have together, in bounds of one source: IPv4 /24 and IPv6
/// /56, then IPv6 /48. The factors are smaller than for rates: an attacker with one address of such
/// a prefix often has all of them, and a handshake that it leaves half open costs it nothing more.
pub(super) const LEVEL_FACTORS: [u32; LEVELS_MAX] = [1, 2, 4];

#[derive(Debug)]
pub(super) struct HandshakeCounts {
    /// 0: no bound.
    source_max: u32,
    /// 0: no bound.
    peer_max: u32,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// A map for each level, because a prefix may also be a source, as 192.0.2.0 is.
    levels: [BTreeMap<Source, Tally>; LEVELS_MAX],
    peers: BTreeMap<u32, u32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    all: u32,
    /// The part of `all` that came without a token.
    unvalidated: u32,
}

impl HandshakeCounts {
    pub(super) fn new(source_max: u32, peer_max: u32) -> Self {
        Self {
            source_max,
            peer_max,
            held: Mutex::default(),
        }
    }

    /// Counts one more, or returns the bound that is reached and counts nothing. The caller must
    /// [end](Self::end) what was counted once.
    pub(super) fn begin(&self, source: Source, by: Entitlement) -> Result<(), Full> {
        let mut held = self.lock();
        if let Entitlement::Peer(tag) = by {
            let of_peer = held.peers.get(&tag).copied().unwrap_or(0);
            if self.peer_max != 0 && of_peer >= self.peer_max {
                return Err(Full::Peer);
            }
            held.peers.insert(tag, of_peer + 1);
            return Ok(());
        }
        let unvalidated = by == Entitlement::Unvalidated;
        let has_room = |level: usize| {
            let tally = held.levels[level].get(&source.at_level(level));
            self.has_room(level, tally.copied().unwrap_or_default(), unvalidated)
        };
        if !(0..source.levels()).all(has_room) {
            return Err(Full::Source);
        }
        for level in 0..source.levels() {
            let tally = held.levels[level]
                .entry(source.at_level(level))
                .or_default();
            tally.all += 1;
            tally.unvalidated += u32::from(unvalidated);
        }
        Ok(())
    }

    pub(super) fn end(&self, source: Source, by: Entitlement) {
        let mut held = self.lock();
        if let Entitlement::Peer(tag) = by {
            let Some(of_peer) = held.peers.get_mut(&tag) else {
                debug_assert!(false, "peer {tag} ended a handshake that it had not begun");
                return;
            };
            *of_peer -= 1;
            if *of_peer == 0 {
                held.peers.remove(&tag);
            }
            return;
        }
        for level in 0..source.levels() {
            let prefix = source.at_level(level);
            let Some(tally) = held.levels[level].get_mut(&prefix) else {
                debug_assert!(false, "{source} ended a handshake that it had not begun");
                return;
            };
            tally.all -= 1;
            tally.unvalidated -= u32::from(by == Entitlement::Unvalidated);
            if tally.all == 0 {
                held.levels[level].remove(&prefix);
            }
        }
    }

    /// Handshakes of non-members at this source.
    pub(super) fn of_source(&self, source: Source) -> u32 {
        let held = self.lock();
        let tally = held.levels[0].get(&source.cap_key());
        tally.map_or(0, |tally| tally.all)
    }

    /// Handshakes of the peer with this node tag.
    pub(super) fn of_peer(&self, tag: u32) -> u32 {
        self.lock().peers.get(&tag).copied().unwrap_or(0)
    }

    fn has_room(&self, level: usize, tally: Tally, unvalidated: bool) -> bool {
        let max = self.source_max.saturating_mul(LEVEL_FACTORS[level]);
        max == 0 || tally.all < max && (!unvalidated || tally.unvalidated < max / 2)
    }

    // Nothing in between can panic, so a poisoned lock holds true counts.
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
