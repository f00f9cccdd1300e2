//! Keys that rotate: which connections end because a key of theirs was retired, and which are
//! replaced because it is not the newest any more.
//!
//! Invariants
//! 1. No connection outlives the topology that names the peer's key, drained ones included: what
//!    the registry retires may be in other hands.
//! 2. Only the side that dialled replaces a connection. The older one drains, so nothing is lost.
//! 3. At most one replacement begins in a turn of housekeeping: a node with many peers does not
//!    begin as many handshakes at once.

use std::time::Instant;

use super::Endpoint;
use crate::phase::Phase;
use crate::quic::CloseCode;
use crate::session::Session;

impl Endpoint {
    /// After a change of the topology: ends the connections that were made with a key which the
    /// peer does not have any more. Those of nodes that are no members have ended before.
    pub(super) fn end_retired(&mut self) {
        for slot in 0..self.connections.len() {
            let Some(Some(connection)) = self.connections.get(slot) else {
                continue;
            };
            let Some(peer) = connection.session.as_ref().map(Session::peer) else {
                continue;
            };
            let owner = |key| self.topology.node_of_key(&key);
            let is_retired = connection.peer_key.and_then(owner) != Some(peer);
            if is_retired && connection.phase != Phase::Closing {
                self.take_down(slot);
                self.close(slot, CloseCode::KeyRetired);
            }
        }
    }

    /// In every housekeeping: replaces a connection that this node dialled, if this node or the
    /// peer has a newer key than the one of its handshake.
    pub(super) fn replace_for_keys(&mut self, now: Instant) {
        if self.stop_at.is_some() {
            return;
        }
        for slot in 0..self.connections.len() {
            let Some(Some(connection)) = self.connections.get(slot) else {
                continue;
            };
            if connection.is_server || connection.phase != Phase::Up {
                continue;
            }
            let Some(peer) = connection.session.as_ref().map(Session::peer) else {
                continue;
            };
            let newest = self.topology.member(&peer).map(|of| of.tls_keys.newest());
            let is_older =
                connection.own_key != Some(self.parts.tls.key) || connection.peer_key != newest;
            let (key, index) = (connection.key, connection.index);
            let replacements = &mut self.key_replacements;
            // Not while an earlier one drains: its body would be cut.
            if replacements.is_due(peer, index, is_older, now)
                && let Some(peers) = self.parts.peers.get_mut(index)
                && peers.replace(key, now)
            {
                replacements.began(peer, index, now);
                tracing::info!(
                    %peer,
                    "a connection is replaced: one of its TLS keys is not the newest"
                );
                return self.run_actions(now);
            }
        }
    }

    /// Connections that use another TLS key of this node than the newest of its registry record.
    pub(super) fn by_older_key(&self) -> usize {
        let record = self.topology.member(&self.parts.me);
        let Some(newest) = record.map(|record| record.tls_keys.newest()) else {
            return 0;
        };
        let established = self.connections.iter().flatten();
        let established = established.filter(|connection| connection.session.is_some());
        established
            .filter(|connection| connection.own_key != Some(newest))
            .count()
    }
}
