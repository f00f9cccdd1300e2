//! Two nodes with one key: each dials the listener, and each would take the peer's place from the
//! other for ever.
//!
//! A connection of a peer is replaced by a newer one: so a node that restarts, or moves, is back at
//! once. Two nodes with one key look the same, but that they keep coming: the one that lost its
//! place dials again. So one change of the address is taken at once, and what comes from yet
//! another address soon after waits, longer each time.
//!
//! 1. Only a connection that would replace a living one from another address is judged here. What
//!    comes from the same address is the same node.
//! 2. The first change is always taken.
//! 3. A newcomer that is refused has the connection in place proved alive: one that is dead makes
//!    room within the time of a probe, so a node that moves twice is not kept out.
//! 4. The operator is told of a contest once. It lasts as long as each attempt to take the place
//!    comes within [`WINDOW`] of the last one.

use std::time::{Duration, Instant};

use super::{Direction, Peers, Refusal};
use crate::id::NodeId;

/// A change of the address this long after the last one, or after the last attempt at one, is a
/// first one again. A node that is refused dials again after ten seconds at the latest.
pub(super) const WINDOW: Duration = Duration::from_secs(30);
/// How long the first newcomer is refused. Without, two nodes change places about once a second.
pub(super) const INTERVAL_MIN: Duration = Duration::from_secs(10);
/// How long a newcomer is refused at most: the time doubles with each change.
pub(super) const INTERVAL_MAX: Duration = Duration::from_secs(320);

/// What one peer's connections have done to each other.
#[derive(Debug, Default)]
pub(super) struct Contest {
    /// The last attempt to take the place.
    last: Option<Instant>,
    /// From when the next one succeeds, and how long that was.
    until: Option<Instant>,
    interval: Duration,
    refused: u64,
    is_told: bool,
}

impl Contest {
    /// Whether a connection from another address may take the place of the living one.
    pub(super) fn may_take(&mut self, now: Instant) -> bool {
        let is_first = self.last.is_none_or(|last| now >= last + WINDOW);
        if is_first {
            *self = Self::default();
        }
        self.last = Some(now);
        if is_first {
            return true;
        }
        match self.until {
            Some(until) if now >= until => {
                self.interval = (2 * self.interval).min(INTERVAL_MAX);
                self.until = Some(now + self.interval);
                true
            }
            Some(_) => {
                self.refused += 1;
                false
            }
            None => {
                self.interval = INTERVAL_MIN;
                self.until = Some(now + INTERVAL_MIN);
                self.refused += 1;
                false
            }
        }
    }
}

impl Peers {
    /// Connections refused as [`Refusal::DuplicateIdentity`] since this peer's address first
    /// changed, in a time in which that goes on.
    pub fn duplicates_refused(&self, peer: &NodeId) -> u64 {
        let peer = self.peers.get(peer);
        peer.map_or(0, |peer| peer.contest.refused)
    }

    /// Whether connections of this peer are refused as [`Refusal::DuplicateIdentity`], and the
    /// operator has not been told.
    pub fn has_untold_duplicate(&self, peer: &NodeId) -> bool {
        let contest = self.peers.get(peer).map(|peer| &peer.contest);
        contest.is_some_and(|contest| contest.refused > 0 && !contest.is_told)
    }

    /// Takes the report that the operator has been told of the two nodes with this peer's key.
    pub fn duplicate_told(&mut self, peer: &NodeId) {
        if let Some(peer) = self.peers.get_mut(peer) {
            peer.contest.is_told = true;
        }
    }

    /// Refuses a connection that would take the place of a living one from another address, where
    /// that has just happened.
    pub(super) fn judge_source(
        &mut self,
        id: NodeId,
        direction: Direction,
        now: Instant,
    ) -> Result<(), Refusal> {
        let Direction::Inbound { from } = direction else {
            return Ok(());
        };
        let Some(peer) = self.peers.get_mut(&id) else {
            return Ok(());
        };
        let current = peer.current.and_then(|conn| self.connections.get(&conn));
        let is_elsewhere = current
            .and_then(|held| held.from)
            .is_some_and(|held| held != from);
        if !is_elsewhere || peer.contest.may_take(now) {
            return Ok(());
        }
        self.verify_current(id, now);
        Err(Refusal::DuplicateIdentity)
    }
}
