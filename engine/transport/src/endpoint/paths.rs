//! What the connections measure of their paths, and what follows from it: the memory of the shard,
//! and replacements for connections whose profile the path contradicts.
//!
//! Invariants
//! 1. Only the side that dialled replaces a connection; the first packet's ID tells the other side
//!    which profile to take.
//! 2. A connection is replaced once at most in [`REPLACE_INTERVAL`] of its life.

use std::time::{Duration, Instant};

use millrace_edge_policy::admission::Entitlement;
use millrace_edge_policy::proof;
use millrace_protocol::id::NodeId;
use millrace_protocol::path::{PathProfile, RememberedPath};

use super::Endpoint;
use crate::connection::Connection;
use crate::counters::Counter;
use crate::phase::Phase;

/// How old a connection is at least when it is replaced: its least RTT has been measured by then,
/// also on a host that was busy when the connection began.
const REPLACE_INTERVAL: Duration = Duration::from_secs(1);

/// A bit of the nonce of a dial's proof: the dialler takes the LAN's profile.
const LAN_BIT: u8 = 1;

impl Endpoint {
    /// The profile of a dial to `peer`, and what is remembered of the path.
    pub(super) fn path_to(&self, peer: &NodeId) -> (PathProfile, Option<RememberedPath>) {
        let paths = &self.parts.paths;
        (paths.profile(peer), paths.get(peer))
    }

    /// The profile of a connection that a peer opens by `first_id`, and what is remembered of the
    /// path. The dialler chooses, and a proven ID says what; anyone else has an unknown path.
    pub(super) fn path_from(
        &self,
        by: Entitlement,
        first_id: &[u8],
    ) -> (PathProfile, Option<RememberedPath>) {
        let Entitlement::Peer(tag) = by else {
            return (PathProfile::Wan, None);
        };
        let is_peer = |id: &NodeId| proof::node_tag_of(id.as_bytes()) == tag;
        let peer = self
            .topology
            .iter()
            .map(|(id, _)| id)
            .find(|id| is_peer(id));
        let is_lan = proof::nonce_of(first_id).is_some_and(|nonce| nonce[0] & LAN_BIT != 0);
        let profile = if is_lan {
            PathProfile::Lan
        } else {
            PathProfile::Wan
        };
        (profile, peer.and_then(|peer| self.parts.paths.get(peer)))
    }

    /// The nonce of a dial with this profile.
    pub(super) fn nonce(random: [u8; 6], profile: PathProfile) -> [u8; 6] {
        let [first, rest @ ..] = random;
        let bit = match profile {
            PathProfile::Lan => LAN_BIT,
            PathProfile::Wan => 0,
        };
        let [b1, b2, b3, b4, b5] = rest;
        [first & !LAN_BIT | bit, b1, b2, b3, b4, b5]
    }

    /// In every housekeeping: remembers the paths, and replaces connections with a wrong profile.
    pub(super) fn measure_paths(&mut self, now: Instant) {
        for slot in 0..self.connections.len() {
            let Some(Some(connection)) = self.connections.get_mut(slot) else {
                continue;
            };
            let Some(peer) = connection.up_peer() else {
                continue;
            };
            let Some(sample) = connection.path_sample() else {
                continue;
            };
            if let Some(pacing) = &mut connection.pacing {
                pacing.set_rtt(sample.rtt);
            }
            self.parts.paths.measured(&peer, sample);
            let is_due = !connection.is_server && connection.since + REPLACE_INTERVAL <= now;
            if !is_due {
                continue;
            }
            let (key, index, has) = (connection.key, connection.index, connection.profile);
            let wanted = self.parts.paths.contradicts(&peer, has, sample.rtt);
            if let (Some(wanted), Some(peers)) = (wanted, self.parts.peers.get_mut(index))
                && peers.replace(key, now)
            {
                connection.since = now;
                self.counters().add(Counter::PathsReplaced, 1);
                tracing::info!(
                    %peer,
                    rtt = ?sample.rtt,
                    from = has.label(),
                    to = wanted.label(),
                    "a connection is replaced: its path is another than it was tuned for"
                );
                self.run_actions(now);
            }
        }
    }

    /// The handshake of a dial is done: whether its RTT contradicts the profile of an unknown peer.
    /// The peer is known then.
    pub(super) fn is_other_path(&mut self, connection: &Connection, peer: &NodeId) -> bool {
        let Some(sample) = connection.path_sample() else {
            return false;
        };
        let is_first = self.parts.paths.get(peer).is_none();
        let contradicts = self
            .parts
            .paths
            .contradicts(peer, connection.profile, sample.rtt);
        if is_first && contradicts.is_some() {
            self.parts.paths.measured(peer, sample);
        }
        is_first && contradicts.is_some()
    }
}

impl Connection {
    /// The peer, while the connection is in use.
    fn up_peer(&self) -> Option<NodeId> {
        let session = self.session.as_ref()?;
        (self.phase == Phase::Up).then(|| session.peer())
    }
}
