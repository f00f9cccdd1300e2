//! Two nodes with one key: what their operators are told, at the peer that refuses one of them, and
//! at the node that is refused. [`Peers`](millrace_protocol::peers::Peers) decides who is.

use std::time::Instant;

use millrace_protocol::id::NodeId;
use millrace_protocol::peers::Refusal;

use super::Endpoint;
use crate::connection::Connection;
use crate::counters::Family;
use crate::quic::CloseCode;

/// Kind of line that a node writes when a peer refuses it.
const OWN_KEY: &str = "duplicate_of_this_node";

impl Endpoint {
    /// Counts a connection that is refused because two nodes have the key of its peer. Names the
    /// peer and both addresses, once for each contest.
    ///
    /// The connections of a pair are judged one by one, on different shards. Both nodes dial all of
    /// them, so the line about the first one is that of all.
    pub(super) fn refuse_duplicate(&mut self, newcomer: &Connection, peer: &NodeId, now: Instant) {
        let reason = Refusal::DuplicateIdentity.reason();
        self.counters().count(Family::Refused, reason);
        let Some(peers) = self.parts.peers.get_mut(newcomer.index) else {
            return;
        };
        let is_due = newcomer.index == 0 && peers.has_untold_duplicate(peer);
        if !is_due || self.log_limit.admit(reason, now).is_none() {
            return;
        }
        peers.duplicate_told(peer);
        let current = peers
            .current(peer)
            .and_then(|(conn, _)| self.slot_of(conn))
            .and_then(|slot| self.connections[slot].as_deref());
        tracing::error!(
            %peer,
            connected = current.map(|held| tracing::field::display(held.address.current())),
            refused = %newcomer.address.first(),
            "two nodes have the key of this peer, and take its connection from each other; the one \
             that comes is refused, longer each time; fix: give one of them a key of its own"
        );
    }

    /// Tells the operator, if the peer closed this connection because another node has the key of
    /// this one.
    pub(super) fn tell_if_duplicate(&mut self, connection: &Connection, now: Instant) {
        const CODE: u64 = CloseCode::DuplicateIdentity as u64;
        let error = connection.quic.peer_error();
        if !error.is_some_and(|error| error.is_app && error.error_code == CODE) {
            return;
        }
        if let Some(left_out) = self.log_limit.admit(OWN_KEY, now) {
            tracing::error!(
                peer = %connection.address.current(),
                left_out,
                "a peer refuses this node: another node with the same key is connected to it; fix: \
                 give one of them a key of its own"
            );
        }
    }
}
