//! How connections begin: accepting and dialling.
//!
//! Invariants
//! 1. A datagram opens a connection only when it has the size and the IDs that RFC 9000 requires of
//!    a client's first one, and when [`Admission`](millrace_edge_policy::admission::Admission)
//!    accepts it.
//! 2. Handshakes and connections are bounded before anything is allocated for a new one, for each
//!    source and each peer too. Non-members get a Retry, which costs no memory, long before the
//!    bound; and they never take the connections that peers need.
//! 3. A dial proves in its first packet which node it comes from.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use millrace_edge_policy::admission::{Entitlement, First, Full};
use millrace_edge_policy::cid::{LocalCid, initial_dcid};
use millrace_edge_policy::packet::Quic;
use millrace_edge_policy::proof;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::token::Minted;
use millrace_protocol::id::NodeId;
use millrace_protocol::path::PathProfile;
use millrace_protocol::peers::Attempt;
use millrace_shards::socket::source_address;
use quiche::ConnectionId;

use super::{Arrival, Endpoint};
use crate::buffers::Buffers;
use crate::clock::wall_ns;
use crate::connection::Connection;
use crate::counters::{Counter, Family};
use crate::quic_connection::QuicConnection;
use crate::random::random_bytes;
use crate::tls;

impl Endpoint {
    fn insert(&mut self, slot: usize, connection: Connection) {
        self.live += 1;
        self.handshakes += 1;
        self.half_open += usize::from(connection.is_server);
        self.connections[slot] = Some(Box::new(connection));
    }

    /// Opens a connection for a datagram that belongs to none, if admission accepts it.
    pub(super) fn accept(
        &mut self,
        datagram: &mut [u8],
        arrival: Arrival,
        now: Instant,
    ) -> Option<usize> {
        let from = arrival.from;
        let header = self.first_header(datagram, arrival)?;
        // Our own dials do not count: they are as many as peers, and the table has room for those.
        if self.half_open >= self.parts.state.config.handshakes_max || !self.has_room() {
            self.counters().count(Family::Refused, Full::Shard.label());
            return None;
        }
        // Without room for clients that prove nothing, the shard is full for them alone.
        let half_open = if self.has_room_for_unproven() {
            self.half_open
        } else {
            usize::MAX
        };
        let now_ns = self.parts.clock.ns(now);
        let admission = &self.parts.admission;
        match admission.first_packet(&header, from, half_open, now_ns, wall_ns()) {
            First::Accept(by) => {
                let permit = admission.hold(from, by);
                let slot = self.open(&header, by, arrival, now)?;
                if let Some(Some(connection)) = self.connections.get_mut(slot) {
                    connection.is_uncharged = by == Entitlement::Unvalidated;
                    connection.is_unproven = !matches!(by, Entitlement::Peer(_));
                    self.unproven += usize::from(connection.is_unproven);
                    connection.handshake_permit = Some(permit);
                }
                Some(slot)
            }
            First::Retry(minted) => {
                self.retry(&header, &minted, arrival);
                None
            }
            // A late packet: the connection that had this ID is gone.
            First::Drop(Reason::QuicUnknownId) => {
                self.counters().add(Counter::DatagramsUnroutable, 1);
                None
            }
            First::Drop(reason) => {
                self.counters().count(Family::Refused, reason.label());
                None
            }
            First::Full(full) => {
                self.counters().count(Family::Refused, full.label());
                None
            }
        }
    }

    /// The header of a datagram that a client may begin with. Any other datagram is counted, or
    /// answered.
    fn first_header<'d>(
        &mut self,
        datagram: &'d mut [u8],
        arrival: Arrival,
    ) -> Option<quiche::Header<'d>> {
        // RFC 9000, 14.1: a datagram that opens a connection or asks for a version has at least
        // 1,200 bytes.
        const OPENING_BYTES_MIN: usize = 1_200;
        let len = datagram.len();
        // quiche reads the token of version 1 in any version, and fails where there is none.
        if let Ok(Quic::Version {
            destination_id,
            source_id,
        }) = Quic::parse(datagram)
        {
            self.negotiate_version(source_id, destination_id, arrival);
            return None;
        }
        let header = quiche::Header::from_slice(datagram, LocalCid::BYTES);
        let header = header.ok().filter(|_| len >= OPENING_BYTES_MIN);
        // RFC 9000, 7.2: a client's first ID has at least 8 bytes.
        let Some(header) = header.filter(|header| header.dcid.len() >= 8) else {
            self.counters().add(Counter::DatagramsUnroutable, 1);
            return None;
        };
        let is_initial =
            header.ty == quiche::Type::Initial && quiche::version_is_supported(header.version);
        if !is_initial || self.stop_at.is_some() {
            self.counters().add(Counter::DatagramsUnroutable, 1);
            return None;
        }
        Some(header)
    }

    /// Begins a connection with a client.
    fn open(
        &mut self,
        header: &quiche::Header<'_>,
        by: Entitlement,
        arrival: Arrival,
        now: Instant,
    ) -> Option<usize> {
        let from = arrival.from;
        // The ID of the client's first packet before a Retry.
        let original = match by {
            Entitlement::Token(original) => Some(original),
            Entitlement::Unvalidated | Entitlement::Peer(_) => None,
        };
        let (profile, remembered) = self.path_from(by, &header.dcid);
        let slot = self.take_slot();
        let id = self.handshake_id(slot, from, now);
        let scid = ConnectionId::from_ref(&id);
        let (local, config) = (self.parts.local, &self.parts.state.config);
        let server = self.parts.tls.server.of(profile, config, remembered);
        let quic = QuicConnection::new(|| match &original {
            None => quiche::accept_with_buf_factory::<Buffers>(&scid, None, local, from, server),
            Some(original) => quiche::accept_with_retry::<Buffers>(
                &scid,
                quiche::RetryConnectionIds {
                    original_destination_cid: &ConnectionId::from_ref(original.as_bytes()),
                    retry_source_cid: &header.dcid,
                },
                local,
                from,
                server,
            ),
        });
        let Ok(quic) = quic else {
            self.free.push(slot);
            self.counters().count(Family::Refused, "quic_accept");
            return None;
        };
        let key = self.new_key(slot);
        let config = &self.parts.state.config;
        let mut connection =
            Connection::new(quic, key, id, from, true, config, now).tuned_for(profile, config);
        connection.own_key = Some(self.parts.tls.key);
        let dcid = header.dcid.to_vec();
        self.initial.insert(dcid.clone(), slot);
        connection.initial = Some(dcid);
        connection.source = arrival.at;
        self.insert(slot, connection);
        Some(slot)
    }

    /// Asks a client to show that its address is its own. Keeps no state.
    fn retry(&mut self, header: &quiche::Header<'_>, minted: &Minted, to: Arrival) {
        let mut reply = vec![0; 128];
        let written = quiche::retry(
            &header.scid,
            &header.dcid,
            &ConnectionId::from_ref(&minted.retry_id),
            &minted.token,
            header.version,
            &mut reply,
        );
        if let Ok(len) = written {
            self.counters().add(Counter::Retries, 1);
            reply.truncate(len);
            self.reply(reply, to);
        }
    }

    /// Tells a client which versions this node speaks: `client_id` is the source ID of its packet
    /// (RFC 8999, section 6).
    fn negotiate_version(&mut self, client_id: &[u8], first_id: &[u8], to: Arrival) {
        let mut reply = vec![0; 128];
        let [client_id, first_id] = [client_id, first_id].map(ConnectionId::from_ref);
        if let Ok(len) = quiche::negotiate_version(&client_id, &first_id, &mut reply) {
            reply.truncate(len);
            self.reply(reply, to);
        }
    }

    pub(super) fn dial(
        &mut self,
        index: usize,
        peer: NodeId,
        to: SocketAddr,
        attempt: Attempt,
        now: Instant,
    ) {
        self.counters().add(Counter::Dials, 1);
        let Some(expected) = self
            .topology
            .member(&peer)
            .filter(|_| self.has_room())
            .map(|member| member.tls_keys)
        else {
            self.parts.peers[index].dial_failed(attempt, now);
            return;
        };
        // The form in which the shard's socket will name the peer.
        let to = match to.ip().to_canonical() {
            // Without its scope a link-local address leads nowhere. The kernel names no other
            // peer with one.
            IpAddr::V6(ip) if ip.is_unicast_link_local() => to,
            ip => SocketAddr::new(ip, to.port()),
        };
        let slot = self.take_slot();
        let id = self.handshake_id(slot, to, now);
        let (profile, remembered) = self.path_to(&peer);
        let first_id = self.first_id(index, &peer, profile, to);
        let config = &self.parts.state.config;
        let client = self.parts.tls.client.of(profile, config, remembered);
        let opened = QuicConnection::new(|| {
            quiche::connect_with_dcid_and_buffer_factory::<Buffers>(
                None,
                &ConnectionId::from_ref(&id),
                &first_id,
                self.parts.local,
                to,
                client,
            )
        });
        let Ok(mut quic) = opened else {
            self.free.push(slot);
            self.counters().count(Family::Refused, "quic_connect");
            self.parts.peers[index].dial_failed(attempt, now);
            return;
        };
        tls::pin(quic.as_mut(), expected);
        let key = self.new_key(slot);
        let config = &self.parts.state.config;
        let mut connection =
            Connection::new(quic, key, id, to, false, config, now).tuned_for(profile, config);
        connection.own_key = Some(self.parts.tls.key);
        connection.attempt = Some(attempt);
        connection.index = index;
        self.insert(slot, connection);
        self.mark_dirty(slot);
    }

    /// The destination ID of a dial's first packets: it steers them to the shard that will own the
    /// connection, proves which node dials, and says by which profile. Without a proof the dial
    /// goes on as any client's.
    fn first_id(
        &self,
        index: usize,
        peer: &NodeId,
        profile: PathProfile,
        to: SocketAddr,
    ) -> ConnectionId<'static> {
        let me = self.parts.me;
        let steer = me.spread().wrapping_add(index as u8);
        let key = self.parts.dial_keys.get(peer);
        let proof = key.and_then(|key| {
            let source = source_address(self.parts.local.ip(), to).ok()?;
            let tag = proof::node_tag_of(me.as_bytes());
            Some(proof::make(
                steer,
                tag,
                Self::nonce(random_bytes(), profile),
                source,
                wall_ns(),
                *key,
            ))
        });
        let id = proof.map_or_else(
            || initial_dcid(steer, random_bytes()).to_vec(),
            |proof| proof.to_vec(),
        );
        ConnectionId::from_vec(id)
    }
}
