//! Finds the connection of a datagram: connection IDs from their issue to their retirement, and
//! peers that change their address.
//!
//! Invariants
//! 1. An ID of ours names a slot and is compared whole with the live IDs of the slot's connection:
//!    a packet for an older tenant of the slot finds no connection.
//! 2. Until its handshake is done, a peer has an ID that holds for its address only; roaming IDs
//!    are for proven peers.
//! 3. A connection follows its peer to another port once the peer has shown that it is there; it
//!    keeps its shard, since its ID steers.

use std::net::SocketAddr;
use std::time::Instant;

use millrace_edge_policy::cid::{LocalCid, Place, dcid_of, reissue_at};
use millrace_protocol::frame::Kind;

use super::Endpoint;
use crate::ids::IdBytes;
use crate::random::random_bytes;

impl Endpoint {
    /// The slot of the connection that a datagram belongs to.
    pub(super) fn route(&self, datagram: &[u8]) -> Option<usize> {
        let (dcid, is_long) = dcid_of(datagram)?;
        if let Some(cid) = LocalCid::decode(dcid) {
            let slot = cid.slot as usize;
            if let Some(Some(connection)) = self.connections.get(slot)
                && connection.ids.contains(dcid)
            {
                return Some(slot);
            }
        }
        if is_long {
            self.initial.get(dcid).copied()
        } else {
            None
        }
    }

    /// An ID for a connection that begins, to be used by `peer` alone.
    pub(super) fn handshake_id(&mut self, slot: usize, peer: SocketAddr, now: Instant) -> IdBytes {
        self.issued = self.issued.wrapping_add(1);
        let (place, nonce) = (self.place(slot), self.issued);
        let now_ns = self.parts.clock.ns(now);
        LocalCid::issue_handshake(place, nonce, peer, &self.parts.admission.keys(), now_ns)
    }

    fn place(&self, slot: usize) -> Place {
        Place {
            shard: self.parts.shard as u8,
            generation: self.parts.generation,
            slot: slot as u32,
        }
    }

    /// Gives the peer of an established connection fresh IDs for those that it lacks, or that will
    /// end.
    pub(super) fn renew_ids(&mut self, slot: usize, now: Instant) {
        let now_ns = self.parts.clock.ns(now);
        let place = self.place(slot);
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        if connection.session.is_none() || !connection.ids.wants_another(now_ns) {
            return;
        }
        let keys = self.parts.admission.keys();
        while connection.ids.wants_another(now_ns) {
            self.issued = self.issued.wrapping_add(1);
            let id = LocalCid::issue_roaming(place, self.issued, &keys, now_ns);
            let reset_token = u128::from_le_bytes(random_bytes());
            // It fails only for reasons that `wants_another` has ruled out.
            if !connection.quic.issue_id(&id, reset_token) {
                break;
            }
            connection.ids.push(id, reissue_at(now_ns));
        }
        self.mark_dirty(slot);
    }

    /// Renews the IDs of all connections whose IDs are due.
    pub(super) fn renew_all_ids(&mut self, now: Instant) {
        let now_ns = self.parts.clock.ns(now);
        for slot in 0..self.connections.len() {
            if let Some(connection) = &self.connections[slot]
                && connection.ids.wants_another(now_ns)
            {
                self.renew_ids(slot, now);
            }
        }
    }

    /// After packets: retires the IDs that the peer gave up.
    pub(super) fn drop_retired_ids(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        let mut retired = false;
        while let Some(id) = connection.quic.retired_id_next() {
            connection.ids.retire(&id);
            connection.retired_ids += 1;
            retired = true;
        }
        if retired {
            self.renew_ids(slot, now);
        }
    }

    /// Authentic packets came from a new port of the peer: it may have moved there. Challenges it,
    /// if that is due.
    pub(super) fn follow_peer(
        &mut self,
        slot: usize,
        from: SocketAddr,
        bytes: usize,
        now: Instant,
    ) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        // A peer may move only once it has proven its identity.
        let Some(session) = &connection.session else {
            return;
        };
        if let Some(challenge) = connection.address.seen(from, bytes, now, random_bytes) {
            session.handle.datagram(Kind::Probe, challenge);
        }
    }
}
