//! Which connection a datagram is for: connection IDs from their issue to their retirement, and peers that change their address.
//!
//! Invariants
//! 1. An ID of ours names a slot and is compared whole with the live IDs of its connection: a packet for an older tenant finds nobody.
//! 2. Until its handshake is done, a peer has an ID that holds for its address only; roaming IDs are for proven peers.
//! 3. A connection follows its peer to another address once the peer has shown that it is there (RFC 9000, 9.3); it keeps its shard,
//!    since its ID steers.

use std::net::SocketAddr;
use std::time::Instant;

use millrace_edge_policy::cid::{LocalCid, Place, dcid_of, reissue_at};

use super::Endpoint;
use crate::counters::Counter;
use crate::ids::{ACTIVE_IDS, IdBytes};
use crate::message::Handler;
use crate::random::random_bytes;

impl<H: Handler> Endpoint<H> {
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

    /// A live ID of the connection that this datagram was routed to: the datagram's own, if its header is a short one.
    pub(super) fn routed_by(&self, slot: usize, datagram: &[u8]) -> Option<IdBytes> {
        let (dcid, is_long) = dcid_of(datagram)?;
        match dcid.try_into() {
            Ok(id) if !is_long => Some(id),
            _ => Some(self.connections.get(slot)?.as_ref()?.ids.oldest()),
        }
    }

    /// An ID for a connection that begins, to be used by `peer` alone.
    pub(super) fn handshake_id(&mut self, slot: usize, peer: SocketAddr, now: Instant) -> IdBytes {
        self.issued = self.issued.wrapping_add(1);
        let (place, nonce) = (self.place(slot), self.issued);
        let now_ns = self.parts.clock.ns(now);
        LocalCid::issue_handshake(place, nonce, peer, &self.parts.gate.keys(), now_ns)
    }

    fn place(&self, slot: usize) -> Place {
        Place {
            shard: self.parts.shard as u8,
            generation: self.parts.generation,
            slot: slot as u32,
        }
    }

    /// Gives the peer of an established connection fresh IDs for those that it lacks, or that will end.
    pub(super) fn renew_ids(&mut self, slot: usize, now: Instant) {
        let now_ns = self.parts.clock.ns(now);
        let place = self.place(slot);
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        // RFC 9000, 18.2: who says nothing takes two.
        let limit = connection.quic.peer_transport_params();
        let limit = limit.map_or(2, |parameters| parameters.active_conn_id_limit);
        if connection.link.is_none() || !connection.ids.wants_another(limit, now_ns) {
            return;
        }
        let keys = self.parts.gate.keys();
        while connection.ids.wants_another(limit, now_ns) {
            self.issued = self.issued.wrapping_add(1);
            let id = LocalCid::issue_roaming(place, self.issued, &keys, now_ns);
            let reset_token = u128::from_le_bytes(random_bytes());
            let scid = quiche::ConnectionId::from_ref(&id);
            // Only for reasons that `wants_another` has ruled out.
            if connection.quic.new_scid(&scid, reset_token, true).is_err() {
                break;
            }
            connection.ids.push(id, reissue_at(now_ns));
        }
        self.mark_dirty(slot);
    }

    /// Renews what is due, of all connections.
    pub(super) fn renew_all_ids(&mut self, now: Instant) {
        let now_ns = self.parts.clock.ns(now);
        for slot in 0..self.connections.len() {
            if let Some(connection) = &self.connections[slot]
                && connection.ids.wants_another(ACTIVE_IDS, now_ns)
            {
                self.renew_ids(slot, now);
            }
        }
    }

    /// After packets: takes up which IDs the peer gave up, and whether it is at another address now.
    pub(super) fn follow_peer(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        let mut migrations = 0;
        while let Some(event) = connection.quic.path_event_next() {
            migrations += u64::from(matches!(event, quiche::PathEvent::PeerMigrated(..)));
        }
        let mut retired = false;
        while let Some(id) = connection.quic.retired_scid_next() {
            connection.ids.retire(&id);
            retired = true;
        }
        if migrations > 0 {
            self.counters().add(Counter::Migrations, migrations);
        }
        if retired {
            self.renew_ids(slot, now);
        }
    }
}
