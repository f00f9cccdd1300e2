//! How connections begin: accepting, dialling, and what follows when TLS has said who the peer is.
//!
//! Invariants
//! 1. A datagram opens a connection only when it has the size and the IDs that RFC 9000 asks of a client's first one.
//! 2. Handshakes and connections are bounded before anything is allocated for a new one.

use std::net::SocketAddr;
use std::time::Instant;

use millrace_protocol::cid::{LocalCid, initial_dcid};
use millrace_protocol::frame::{Hello, Kind, PROTOCOL_VERSION};
use millrace_protocol::id::NodeId;
use millrace_protocol::peers::{Attempt, Direction, Refusal};
use ring::rand::SecureRandom;

use super::Endpoint;
use crate::buffers::Buffers;
use crate::connection::{Connection, Phase};
use crate::counters::{Counter, Family};
use crate::link::Link;
use crate::message::Handler;
use crate::quic::CloseCode;
use crate::tls;

impl<H: Handler> Endpoint<H> {
    pub(super) fn insert(&mut self, slot: usize, connection: Connection) {
        self.connections[slot] = Some(Box::new(connection));
        self.live += 1;
        self.handshakes += 1;
    }

    pub(super) fn accept(
        &mut self,
        datagram: &mut [u8],
        from: SocketAddr,
        now: Instant,
    ) -> Option<usize> {
        // RFC 9000, 14.1: a datagram that opens a connection has at least 1,200 bytes, and so has one that asks for a version.
        const OPENING_BYTES_MIN: usize = 1_200;
        let len = datagram.len();
        let header = quiche::Header::from_slice(datagram, LocalCid::BYTES);
        let header = header.ok().filter(|_| len >= OPENING_BYTES_MIN);
        // RFC 9000, 7.2: a client's first ID has at least 8 bytes.
        let Some(header) = header.filter(|header| header.dcid.len() >= 8) else {
            self.counters().add(Counter::DatagramsUnroutable, 1);
            return None;
        };
        if header.ty != quiche::Type::Initial || self.stop_at.is_some() {
            if header.ty != quiche::Type::VersionNegotiation
                && !quiche::version_is_supported(header.version)
            {
                self.negotiate_version(&header, from);
            }
            self.counters().add(Counter::DatagramsUnroutable, 1);
            return None;
        }
        if !quiche::version_is_supported(header.version) {
            self.negotiate_version(&header, from);
            return None;
        }
        let config = &self.parts.shared.config;
        if self.handshakes >= config.handshakes_max || self.live >= config.connections_max {
            self.counters().count(Family::Refused, "handshakes_full");
            return None;
        }
        let slot = self.take_slot();
        let cid = self.new_cid(slot);
        let scid = quiche::ConnectionId::from_ref(&cid);
        let quic = quiche::accept_with_buf_factory::<Buffers>(
            &scid,
            None,
            self.parts.local,
            from,
            &mut self.parts.server,
        );
        let Ok(quic) = quic else {
            self.free.push(slot);
            self.counters().count(Family::Refused, "quic_accept");
            return None;
        };
        let key = Self::key_of(slot, &cid);
        let mut connection = Connection::new(quic, key, cid, true, &self.parts.shared.config, now);
        let dcid = header.dcid.to_vec();
        self.initial.insert(dcid.clone(), slot);
        connection.initial = Some(dcid);
        self.insert(slot, connection);
        Some(slot)
    }

    pub(super) fn negotiate_version(&mut self, header: &quiche::Header<'_>, to: SocketAddr) {
        let mut reply = vec![0; 128];
        if let Ok(len) = quiche::negotiate_version(&header.scid, &header.dcid, &mut reply) {
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
        let room = self.live < self.parts.shared.config.connections_max;
        let Some(key) = self
            .topology
            .member(&peer)
            .filter(|_| room)
            .map(|member| member.public_key)
        else {
            self.parts.peers[index].dial_failed(attempt, now);
            return;
        };
        // As the shard's socket will name the peer.
        let to = SocketAddr::new(to.ip().to_canonical(), to.port());
        let slot = self.take_slot();
        let cid = self.new_cid(slot);
        let mut random = [0; 15];
        self.random.fill(&mut random).ok();
        let dcid = initial_dcid(self.parts.me.spread().wrapping_add(index as u8), random);
        let opened = quiche::connect_with_dcid_and_buffer_factory::<Buffers>(
            None,
            &quiche::ConnectionId::from_ref(&cid),
            &quiche::ConnectionId::from_ref(&dcid),
            self.parts.local,
            to,
            &mut self.parts.client,
        );
        let Ok(mut quic) = opened else {
            self.free.push(slot);
            self.counters().count(Family::Refused, "quic_connect");
            self.parts.peers[index].dial_failed(attempt, now);
            return;
        };
        tls::pin(quic.as_mut(), key, &self.parts.shared.counters);
        let key = Self::key_of(slot, &cid);
        let mut connection = Connection::new(quic, key, cid, false, &self.parts.shared.config, now);
        connection.attempt = Some(attempt);
        connection.index = index;
        self.insert(slot, connection);
        self.mark_dirty(slot);
    }

    /// TLS is done on our side: learn who it is, and ask whether it may stay.
    pub(super) fn on_established(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        self.handshakes -= usize::from(std::mem::take(&mut connection.is_handshaking));
        let steering = connection
            .initial
            .as_ref()
            .and_then(|dcid| dcid.first())
            .copied();
        if let Some(initial) = connection.initial.take() {
            self.initial.remove(&initial);
        }
        let peer =
            tls::peer_key(connection.quic.as_mut()).and_then(|key| self.topology.node_of_key(&key));
        let Some(peer) = peer else {
            // Passed the callback, and left the registry since.
            self.parts
                .shared
                .counters
                .count(Family::Refused, CloseCode::NotAMember.reason());
            connection.close(CloseCode::NotAMember);
            return;
        };
        let direction = match connection.attempt.take() {
            Some(attempt) => {
                self.parts.shared.counters.add(Counter::ConnectionsOut, 1);
                Direction::Outbound(attempt)
            }
            None => {
                // The dialler says in its first connection ID which connection of the pair this is.
                connection.index =
                    steering.map_or(0, |byte| usize::from(byte.wrapping_sub(peer.spread())));
                self.parts.shared.counters.add(Counter::ConnectionsIn, 1);
                Direction::Inbound
            }
        };
        let allowed = match self.parts.peers.get_mut(connection.index) {
            Some(peers) => peers.handshake_done(connection.key, peer, direction, now),
            None => Err(Refusal::TooMany),
        };
        if let Err(refusal) = allowed {
            self.parts
                .shared
                .counters
                .count(Family::Refused, refusal.reason());
            connection.close(CloseCode::of_refusal(refusal));
            self.mark_dirty(slot);
            return;
        }
        connection.phase = Phase::AwaitHello;
        let link = Link::new(&self.parts.shared, slot, peer, connection.is_server);
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            registry_version: self.topology.newest_version(),
            features: 0,
            shards: self.parts.shards as u8,
        };
        link.control(Kind::Hello, 0, &hello.encode());
        connection.link = Some(link);
        self.run_actions(now);
    }
}
