//! What the connections measure of their paths, and what follows from it: the memory of the shard,
//! and replacements for connections whose profile the path contradicts.
//!
//! Invariants
//! 1. Only the side that dialled replaces a connection; the first packet's ID tells the other side
//!    which profile to take, unless its own config names one.
//! 2. A connection is replaced at the age of [`REPLACE_AFTER`](crate::connection::REPLACE_AFTER) at
//!    the earliest. Where the dial fails, the next one comes after twice the time.
//! 3. A dial is made again only by another profile.

use std::time::{Duration, Instant};

use millrace_edge_policy::admission::Entitlement;
use millrace_edge_policy::proof;
use millrace_protocol::id::NodeId;
use millrace_protocol::path::{PathProfile, RememberedPath};

use super::Endpoint;
use crate::connection::Connection;
use crate::counters::Counter;
use crate::phase::Phase;

/// Longest time between two dials that are to replace the same connection.
const REPLACE_INTERVAL_MAX: Duration = Duration::from_secs(600);

/// A bit of the nonce of a dial's proof: the dialler takes the LAN's profile.
const LAN_BIT: u8 = 1;

impl Endpoint {
    /// The profile of a dial to `peer`, and what is remembered of the path.
    pub(super) fn path_to(&self, peer: &NodeId) -> (PathProfile, Option<RememberedPath>) {
        let paths = &self.parts.paths;
        (paths.profile(peer), paths.get(peer))
    }

    /// The profile of a connection that a peer opens by `first_id`, and what is remembered of the
    /// path. The dialler chooses, and the ID says what. Without a proof it may be forged,
    /// which gains nothing: the LAN's profile promises less.
    pub(super) fn path_from(
        &self,
        by: Entitlement,
        first_id: &[u8],
    ) -> (PathProfile, Option<RememberedPath>) {
        let is_peer = |id: &NodeId, tag| proof::node_tag_of(id.as_bytes()) == tag;
        let (peer, nonce) = match by {
            Entitlement::Peer(tag) => {
                let mut ids = self.topology.iter().map(|(id, _)| id);
                (ids.find(|id| is_peer(id, tag)), proof::nonce_of(first_id))
            }
            Entitlement::Token(original) => (None, proof::nonce_of(original.as_bytes())),
            Entitlement::Unvalidated => (None, proof::nonce_of(first_id)),
        };
        let paths = &self.parts.paths;
        let chosen = match nonce {
            Some([first, ..]) if first & LAN_BIT != 0 => PathProfile::Lan,
            _ => PathProfile::Wan,
        };
        let named = peer.and_then(|peer| paths.fixed(peer));
        let named = named.or(self.parts.state.config.paths.profile);
        let profile = named.unwrap_or(chosen);
        (profile, peer.and_then(|peer| paths.get(peer)))
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

    /// In housekeeping, after packets: remembers the path, and replaces a connection with a wrong
    /// profile.
    pub(super) fn measure_path(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        let (Some(peer), Some(sample)) = (connection.up_peer(), connection.path_sample()) else {
            return;
        };
        if let Some(pacing) = &mut connection.pacing {
            pacing.set_rtt(sample.rtt);
        }
        self.parts.paths.measured(&peer, sample);
        if connection.is_server || connection.replace_at > now {
            return;
        }
        let (key, index, has) = (connection.key, connection.index, connection.profile);
        let wanted = self.parts.paths.contradicts(&peer, has, sample.rtt);
        // A full memory would choose the same again.
        let wanted = wanted.filter(|wanted| self.parts.paths.profile(&peer) == *wanted);
        if let (Some(wanted), Some(peers)) = (wanted, self.parts.peers.get_mut(index))
            && peers.replace(key, now)
        {
            connection.replace_later(now);
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
        if !is_first || contradicts.is_none() {
            return false;
        }
        self.parts.paths.measured(peer, sample);
        // A full memory would choose the same again.
        self.parts.paths.profile(peer) != connection.profile
    }
}

impl Connection {
    /// A dial that is to replace it has begun.
    fn replace_later(&mut self, now: Instant) {
        self.replace_interval = (2 * self.replace_interval).min(REPLACE_INTERVAL_MAX);
        self.replace_at = now + self.replace_interval;
    }

    /// The peer, while the connection is in use.
    fn up_peer(&self) -> Option<NodeId> {
        let session = self.session.as_ref()?;
        (self.phase == Phase::Up).then(|| session.peer())
    }
}
