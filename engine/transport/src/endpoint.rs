//! All connections of one shard: routes datagrams, accepts and dials, drives timers and builds trains.
//!
//! This is what the transport plugs into the shard's loop. Cost per packet: one comparison of a connection ID, quiche, nothing of ours.
//!
//! Invariants
//! 1. A connection ID of ours names a slot and is compared whole: a packet for an older tenant of the slot finds nobody.
//! 2. A slot is in `dirty` at least once while its connection has something to send; a spurious entry costs one `send` that says `Done`.
//! 3. Decisions about who may be connected are [`Peers`]'; this file carries them out.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_protocol::budget::{ReceiveBudget, Reservation};
use millrace_protocol::cid::{LocalCid, dcid_of, initial_dcid};
use millrace_protocol::frame::{Hello, Kind, PROTOCOL_VERSION};
use millrace_protocol::health::{Health, HealthConfig};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::knock::Knock;
use millrace_protocol::peers::{Action, Attempt, CloseKind, ConnKey, Direction, Peers, Refusal};
use millrace_protocol::timer::{TimerId, Wheel};
use millrace_protocol::topology::Topology;
use millrace_shards::chunk::ChunkPool;
use millrace_shards::datapath::{Datagrams, Datapath, Trains, Transmit};
use millrace_shards::stats::ShardStats;
use ring::rand::SecureRandom;

use crate::buffers::Buffers;
use crate::config::TransportConfig;
use crate::connection::{Connection, EXCHANGE_PACKETS, Events, Phase, Sent};
use crate::counters::{Counter, Counters, Family, TlsRefusal};
use crate::inbox::Room;
use crate::link::{Link, Shared};
use crate::message::Handler;
use crate::quic::CloseCode;
use crate::start::Message;
use crate::status::{PeerStatus, StatusBoard};
use crate::tls::{self, Members};

/// TLS alert `certificate_required` as a QUIC error code (RFC 9001, 4.8).
const CERTIFICATE_REQUIRED: u64 = 0x100 + 116;

/// Datagrams outside connections that may wait for the next turn; more are dropped.
const REPLIES_MAX: usize = 64;

#[derive(Clone, Copy, Debug)]
enum Timer {
    Connection(usize),
    Peers(usize),
}

/// Room for the bodies of one peer.
struct PeerRoom<'a> {
    budget: &'a mut ReceiveBudget,
    pool: &'a ChunkPool,
    peer: NodeId,
}

impl Room for PeerRoom<'_> {
    fn reserve(&mut self, bytes: u64) -> Option<Reservation> {
        self.budget.try_reserve(self.peer, bytes).ok()
    }

    fn release(&mut self, reservation: Reservation) {
        self.budget.release(reservation);
    }

    fn pool(&self) -> &ChunkPool {
        self.pool
    }
}

/// What an endpoint is made of; see [`crate::start`].
pub(crate) struct EndpointParts {
    pub(crate) me: NodeId,
    pub(crate) local: SocketAddr,
    pub(crate) shard: usize,
    pub(crate) shards: usize,
    pub(crate) generation: u8,
    pub(crate) server: quiche::Config,
    pub(crate) client: quiche::Config,
    pub(crate) members: Members,
    /// One machine for each connection of a pair of nodes, by index.
    pub(crate) peers: Vec<Peers>,
    pub(crate) budget: ReceiveBudget,
    pub(crate) pool: ChunkPool,
    pub(crate) shared: Rc<Shared>,
    pub(crate) board: Arc<StatusBoard>,
    pub(crate) now: Instant,
}

/// The transport of one shard.
pub(crate) struct Endpoint<H> {
    parts: EndpointParts,
    handler: H,
    connections: Vec<Option<Box<Connection>>>,
    free: Vec<usize>,
    live: usize,
    handshakes: usize,
    /// Connections by the ID that a client chose for its first packets.
    initial: BTreeMap<Vec<u8>, usize>,
    wheel: Wheel<Timer>,
    peers_timers: Vec<Option<TimerId>>,
    due: Vec<Timer>,
    scratch: Box<[u8]>,
    random: ring::rand::SystemRandom,
    topology: Arc<Topology>,
    /// Datagrams that quiche answered by itself (version negotiation), sent with the next turn.
    replies: Vec<(Vec<u8>, SocketAddr)>,
    stop_at: Option<Instant>,
}

impl<H> std::fmt::Debug for Endpoint<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("me", &self.parts.me)
            .field("connections", &self.live)
            .finish_non_exhaustive()
    }
}

impl<H: Handler> Endpoint<H> {
    pub(crate) fn new(parts: EndpointParts, topology: Arc<Topology>, handler: H) -> Self {
        let now = parts.now;
        let machines = parts.peers.len();
        let mut endpoint = Self {
            parts,
            handler,
            connections: Vec::new(),
            free: Vec::new(),
            live: 0,
            handshakes: 0,
            initial: BTreeMap::new(),
            wheel: Wheel::new(now),
            peers_timers: vec![None; machines],
            due: Vec::new(),
            scratch: vec![0; 64 << 10].into_boxed_slice(),
            random: ring::rand::SystemRandom::new(),
            topology: Arc::clone(&topology),
            replies: Vec::new(),
            stop_at: None,
        };
        endpoint.set_topology(topology, now);
        endpoint
    }

    fn counters(&self) -> &Counters {
        &self.parts.shared.counters
    }

    fn set_topology(&mut self, topology: Arc<Topology>, now: Instant) {
        self.parts.members.replace(Arc::clone(&topology));
        for peers in &mut self.parts.peers {
            peers.set_topology(Arc::clone(&topology), now);
        }
        self.topology = topology;
        self.run_actions(now);
    }

    // --- routing ---

    /// The slot of the connection that a datagram belongs to.
    fn route(&self, datagram: &[u8]) -> Option<usize> {
        let (dcid, is_long) = dcid_of(datagram)?;
        if let Some(cid) = LocalCid::decode(dcid) {
            let slot = cid.slot as usize;
            if let Some(Some(connection)) = self.connections.get(slot)
                && connection.cid == dcid
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

    fn new_cid(&self, slot: usize) -> [u8; 16] {
        let mut tag = [0; 10];
        // The system's generator does not fail once it was seeded; an all-zero tag would only be guessable.
        self.random.fill(&mut tag).ok();
        let shard = self.parts.shard as u8;
        LocalCid {
            shard,
            generation: self.parts.generation,
            slot: slot as u32,
            tag,
        }
        .encode()
    }

    fn take_slot(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        })
    }

    fn key_of(slot: usize, cid: &[u8; 16]) -> ConnKey {
        let [.., a, b, c, d] = *cid;
        ConnKey((slot as u64) << 32 | u64::from(u32::from_le_bytes([a, b, c, d])))
    }

    fn slot_of(&self, key: ConnKey) -> Option<usize> {
        let slot = (key.0 >> 32) as usize;
        self.connections
            .get(slot)?
            .as_ref()
            .filter(|c| c.key == key)
            .map(|_| slot)
    }

    /// Something of a connection is to be sent this turn.
    fn mark_dirty(&mut self, slot: usize) {
        if let Some(Some(connection)) = self.connections.get_mut(slot) {
            connection.must_send = true;
        }
        self.mark_received(slot);
    }

    /// A connection has received something that is to be acknowledged, now or soon.
    fn mark_received(&mut self, slot: usize) {
        if let Some(Some(connection)) = self.connections.get_mut(slot)
            && !std::mem::replace(&mut connection.is_dirty, true)
        {
            self.parts.shared.dirty.borrow_mut().push_back(slot);
        }
    }

    // --- opening ---

    fn insert(&mut self, slot: usize, connection: Connection) {
        self.connections[slot] = Some(Box::new(connection));
        self.live += 1;
        self.handshakes += 1;
    }

    fn accept(&mut self, datagram: &mut [u8], from: SocketAddr, now: Instant) -> Option<usize> {
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

    fn negotiate_version(&mut self, header: &quiche::Header<'_>, to: SocketAddr) {
        let mut reply = vec![0; 128];
        if let Ok(len) = quiche::negotiate_version(&header.scid, &header.dcid, &mut reply) {
            reply.truncate(len);
            self.reply(reply, to);
        }
    }

    fn dial(&mut self, index: usize, peer: NodeId, to: SocketAddr, attempt: Attempt, now: Instant) {
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
    fn on_established(&mut self, slot: usize, now: Instant) {
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

    // --- what Peers decided ---

    fn run_actions(&mut self, now: Instant) {
        if self.stop_at.is_some() {
            return;
        }
        for index in 0..self.parts.peers.len() {
            while let Some(action) = self.parts.peers[index].poll_action() {
                self.run_action(index, action, now);
            }
            if let Some(at) = self.parts.peers[index].poll_timeout() {
                self.peers_timers[index] = Some(self.wheel.replace(
                    self.peers_timers[index],
                    Timer::Peers(index),
                    at,
                ));
            }
        }
    }

    fn run_action(&mut self, index: usize, action: Action, now: Instant) {
        match action {
            Action::Dial {
                peer,
                address,
                attempt,
            } => self.dial(index, peer, address, attempt, now),
            Action::Abandon { attempt } => {
                let abandoned = |c: &Connection| c.index == index && c.attempt == Some(attempt);
                let slot = self
                    .connections
                    .iter()
                    .position(|c| c.as_deref().is_some_and(abandoned));
                if let Some(slot) = slot {
                    self.close(slot, CloseCode::Done);
                }
            }
            Action::Knock { peer, address } => {
                let knock = Knock {
                    sender: self.parts.me,
                    target: peer,
                };
                self.reply(knock.encode(index as u8).to_vec(), address);
            }
            Action::Verify { conn } => {
                if let Some(slot) = self.slot_of(conn)
                    && let Some(Some(connection)) = self.connections.get_mut(slot)
                {
                    // A knock is not signed: it must not end a connection whose answer merely takes long. The idle timeout does.
                    if connection.ask_for_life() {
                        self.mark_dirty(slot);
                    } else if let Some(peers) = self.parts.peers.get_mut(index) {
                        peers.verified(conn);
                    }
                }
            }
            Action::Close { conn, reason } => {
                if let Some(slot) = self.slot_of(conn) {
                    self.take_down(slot);
                    self.close(slot, CloseCode::of_reason(reason));
                }
            }
            Action::Drain { conn } => {
                if let Some(slot) = self.slot_of(conn) {
                    self.take_down(slot);
                    if let Some(Some(connection)) = self.connections.get_mut(slot) {
                        connection.phase = Phase::Draining {
                            until: None,
                            code: CloseCode::Replaced,
                        };
                    }
                    self.mark_dirty(slot);
                }
            }
            Action::Up { peer, conn, number } => self.on_up(peer, conn, number, now),
            // Told connection by connection, when it is gone.
            Action::Down { .. } => {}
        }
    }

    fn on_up(&mut self, peer: NodeId, conn: ConnKey, number: ConnectionNumber, now: Instant) {
        let Some(slot) = self.slot_of(conn) else {
            return;
        };
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        let Some(link) = connection.link.clone() else {
            return;
        };
        connection.phase = Phase::Up;
        connection.start_keep_alive(self.parts.shared.config.keep_alive, now);
        connection.health = Some(Health::new(health_config(&self.parts.shared.config), now));
        link.number.set(number);
        self.parts
            .shared
            .up
            .borrow_mut()
            .entry(peer)
            .or_default()
            .push(link);
        self.handler.on_up(peer, number);
        self.publish();
    }

    fn reply(&mut self, datagram: Vec<u8>, to: SocketAddr) {
        if self.replies.len() < REPLIES_MAX {
            self.replies.push((datagram, to));
        }
    }

    /// Takes a connection out of use for new messages.
    fn take_down(&mut self, slot: usize) {
        let Some(Some(connection)) = self.connections.get(slot) else {
            return;
        };
        let Some(peer) = connection.peer() else {
            return;
        };
        let mut up = self.parts.shared.up.borrow_mut();
        if let Some(links) = up.get_mut(&peer) {
            links.retain(|link| link.slot != slot);
            if links.is_empty() {
                up.remove(&peer);
            }
        }
    }

    fn close(&mut self, slot: usize, code: CloseCode) {
        if let Some(Some(connection)) = self.connections.get_mut(slot) {
            connection.close(code);
        }
        self.mark_dirty(slot);
    }

    /// The connection is gone: tell everybody, and free its slot.
    fn remove(&mut self, slot: usize, now: Instant) {
        self.take_down(slot);
        let Some(mut connection) = self.connections.get_mut(slot).and_then(Option::take) else {
            return;
        };
        self.free.push(slot);
        self.live -= 1;
        if let Some(id) = connection.timer {
            self.wheel.cancel(id);
        }
        self.handshakes -= usize::from(connection.is_handshaking);
        if let Some(initial) = connection.initial.take() {
            self.initial.remove(&initial);
        }
        let kind = self.judge_end(&connection);
        if let Some(link) = connection.link.take() {
            let mut room = PeerRoom {
                budget: &mut self.parts.budget,
                pool: &self.parts.pool,
                peer: link.peer,
            };
            connection.inbox.clear(&mut room);
            link.close();
            if link.number.get() > ConnectionNumber(0) {
                self.handler.on_down(link.peer, link.number.get());
            }
        }
        if let Some(peers) = self.parts.peers.get_mut(connection.index) {
            match connection.attempt {
                Some(attempt) => peers.dial_failed(attempt, now),
                None => peers.closed(connection.key, kind, now),
            }
        }
        self.run_actions(now);
    }

    /// Counts why a connection ended, and says whether it may be dialled again at once.
    fn judge_end(&self, connection: &Connection) -> CloseKind {
        let counters = self.counters();
        let quic = &connection.quic;
        if connection.is_server
            && quic
                .local_error()
                .is_some_and(|e| !e.is_app && e.error_code == CERTIFICATE_REQUIRED)
        {
            counters.tls_refused(TlsRefusal::NoCertificate);
        }
        let (reason, kind) = match (quic.peer_error(), quic.local_error()) {
            _ if quic.is_timed_out() => ("timed_out", CloseKind::Lost),
            (Some(error), _) if error.is_app && error.error_code == CloseCode::Done as u64 => {
                ("peer_done", CloseKind::Clean)
            }
            (Some(error), _) if error.is_app && error.error_code == CloseCode::Replaced as u64 => {
                ("peer_replaced", CloseKind::Clean)
            }
            (Some(error), _) if error.is_app => ("peer_closed", CloseKind::Refused),
            (Some(_), _) => ("peer_transport_error", CloseKind::Lost),
            (None, Some(error)) if error.is_app && error.error_code == CloseCode::Done as u64 => {
                ("done", CloseKind::Clean)
            }
            (None, Some(error)) if error.is_app => ("closed", CloseKind::Clean),
            (None, Some(_)) => ("transport_error", CloseKind::Lost),
            (None, None) => ("lost", CloseKind::Lost),
        };
        counters.count(Family::Closed, reason);
        kind
    }

    // --- receiving ---

    /// After the packets of one receive completion: everything they made possible.
    fn on_packets(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        if matches!(connection.phase, Phase::Handshake { .. }) && connection.quic.is_established() {
            self.on_established(slot, now);
        }
        self.notice_life(slot, now);
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        if let Some(peer) = connection.peer() {
            let mut events = Events::default();
            let mut room = PeerRoom {
                budget: &mut self.parts.budget,
                pool: &self.parts.pool,
                peer,
            };
            connection.read(
                &mut self.handler,
                &mut self.scratch,
                &mut room,
                now,
                &mut events,
            );
            for reservation in events.reservations.drain(..) {
                self.parts.budget.release(reservation);
            }
            let opened = connection.inbox.take_opened();
            if opened > 0 {
                self.parts.shared.counters.add(Counter::StreamsIn, opened);
                if connection.judge_at.is_none() && connection.inbox.unfinished() > 0 {
                    connection.judge_at =
                        Some(now + self.parts.shared.config.stream_progress_interval);
                }
            }
            if let Some(health) = &mut connection.health {
                for sequence in events.probe_replies.drain(..) {
                    health.reply_received(sequence, now);
                }
            }
            if events.fault.is_some() {
                self.close(slot, CloseCode::Violation);
            }
        }
        self.mark_received(slot);
    }

    /// Brings a connection up when the peer's first bytes are there, before they are read; and takes a packet for the sign of life
    /// that a knock made us ask for.
    fn notice_life(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        let key = connection.key;
        let peers = self.parts.peers.get_mut(connection.index);
        if connection.phase == Phase::AwaitHello
            && (connection.quic.is_readable() || connection.quic.dgram_recv_queue_len() > 0)
        {
            if let Some(peers) = peers {
                peers.hello_received(key, now);
            }
            self.run_actions(now);
        } else if connection
            .verify_from
            .is_some_and(|seen| connection.quic.stats().recv > seen)
        {
            connection.verify_from = None;
            if let Some(peers) = peers {
                peers.verified(key);
            }
        }
    }

    fn on_knock(&mut self, knock: &Knock, now: Instant) {
        if knock.target == self.parts.me {
            for peers in &mut self.parts.peers {
                peers.knocked(knock.sender, now);
            }
            self.run_actions(now);
        }
    }

    // --- timers ---

    fn arm(&mut self, slot: usize) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        match connection.next_timeout() {
            Some(at) => {
                connection.timer = Some(self.wheel.replace(
                    connection.timer,
                    Timer::Connection(slot),
                    at,
                ));
            }
            None => {
                if let Some(id) = connection.timer.take() {
                    self.wheel.cancel(id);
                }
            }
        }
    }

    fn on_connection_timeout(&mut self, slot: usize, now: Instant) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        connection.timer = None;
        if connection
            .quic
            .timeout_instant()
            .is_some_and(|at| at <= now)
        {
            connection.quic.on_timeout();
        }
        let mut close = None;
        match connection.phase {
            Phase::Handshake { until } if until <= now => {
                self.parts
                    .shared
                    .counters
                    .count(Family::Refused, "connect_timeout");
                close = Some(CloseCode::Done);
            }
            Phase::Draining {
                until: Some(until),
                code,
            }
            | Phase::Lingering { until, code }
                if until <= now =>
            {
                close = Some(code);
            }
            _ => {}
        }
        if let Some(link) = &connection.link {
            link.expire(now);
        }
        connection.keep_alive(self.parts.shared.config.keep_alive, now);
        if let Some(health) = &mut connection.health {
            health.handle_timeout(now);
            if connection.probe(now) {
                close = Some(CloseCode::Unhealthy);
            }
        }
        if let (Some(at), Some(peer)) = (connection.judge_at, connection.peer())
            && at <= now
        {
            let mut room = PeerRoom {
                budget: &mut self.parts.budget,
                pool: &self.parts.pool,
                peer,
            };
            connection.judge_streams(&mut room, now, &self.parts.shared.config);
        }
        if let Some(code) = close {
            connection.close(code);
        }
        self.mark_dirty(slot);
    }

    // --- sending ---

    /// Sends what one connection has. True when it has more than this turn's budget.
    fn flush(&mut self, slot: usize, trains: &mut Trains<'_>, now: Instant) -> Sent {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return Sent::All;
        };
        connection.is_dirty = false;
        if connection.may_wait(now) {
            self.arm(slot);
            return Sent::All;
        }
        if let Some(link) = &connection.link {
            link.clear_dirty();
        }
        if let Phase::Draining { until, code } = connection.phase
            && connection.link.as_ref().is_none_or(|link| link.is_idle())
        {
            let linger = now + connection.linger();
            connection.phase = Phase::Lingering {
                until: until.map_or(linger, |until| until.min(linger)),
                code,
            };
        }
        let sent = connection.transmit(
            trains,
            &self.parts.shared.config,
            &self.parts.shared.counters,
        );
        // The kernel steers a train by the connection ID of its first packet: trains do not mix connections.
        trains.finish();
        // A draining connection (RFC 9000, 10.2.2) has nothing to say any more; late packets for it find nobody.
        if connection.quic.is_closed() || connection.quic.is_draining() {
            self.remove(slot, now);
            return Sent::All;
        }
        self.arm(slot);
        if sent == Sent::Budget {
            self.mark_dirty(slot);
        }
        sent
    }

    fn publish(&mut self) {
        let peers = self
            .connections
            .iter_mut()
            .flatten()
            .filter_map(|connection| {
                if let (Some(link), true) = (&connection.link, connection.phase == Phase::Up) {
                    let path = connection.quic.path_stats().next();
                    let stats = connection.quic.stats();
                    return Some(PeerStatus {
                        node_id: link.peer,
                        connection: link.number.get(),
                        address: path.as_ref().map(|p| p.peer_addr),
                        rtt: path.as_ref().map(|p| p.rtt),
                        probe_rtt: connection
                            .health
                            .as_ref()
                            .and_then(Health::rtt)
                            .map(|rtt| rtt.smoothed),
                        congestion_window_bytes: path.as_ref().map_or(0, |p| p.cwnd as u64),
                        packets_sent: stats.sent as u64,
                        packets_lost: stats.lost as u64,
                        bytes_sent: stats.sent_bytes,
                        bytes_received: stats.recv_bytes,
                        shard: self.parts.shard,
                    });
                }
                None
            });
        self.parts.board.publish(
            self.parts.shard,
            peers.collect(),
            self.live,
            self.handshakes,
        );
    }
}

fn health_config(config: &TransportConfig) -> HealthConfig {
    HealthConfig {
        interval: config.probe_interval,
        missed_max: config.probe_failures_max,
        ..Default::default()
    }
}

impl<H: Handler> Datapath for Endpoint<H> {
    type Message = Message;

    fn on_message(&mut self, message: Message, now: Instant) {
        self.parts.shared.now.set(now);
        match message {
            Message::Topology(topology) => self.set_topology(topology, now),
            Message::Run(run) => run(&self.parts.shared),
        }
    }

    fn on_datagrams(&mut self, datagrams: Datagrams<'_>, now: Instant) {
        self.parts.shared.now.set(now);
        self.counters()
            .add(Counter::DatagramsReceived, datagrams.count() as u64);
        let info = quiche::RecvInfo {
            from: datagrams.from(),
            to: self.parts.local,
        };
        let mut touched: Option<(usize, [u8; 16])> = None;
        for datagram in datagrams.into_segments() {
            if let Some(knock) = Knock::decode(datagram) {
                self.on_knock(&knock, now);
                continue;
            }
            let slot = match touched {
                // The short headers of one flow name the same connection nearly always.
                Some((slot, cid))
                    if datagram.get(1..17) == Some(cid.as_slice()) && datagram[0] & 0x80 == 0 =>
                {
                    slot
                }
                _ => {
                    let Some(slot) = self
                        .route(datagram)
                        .or_else(|| self.accept(datagram, info.from, now))
                    else {
                        continue;
                    };
                    let Some(Some(connection)) = self.connections.get(slot) else {
                        continue;
                    };
                    let cid = connection.cid;
                    if let Some((last, _)) = touched.replace((slot, cid))
                        && last != slot
                    {
                        self.on_packets(last, now);
                    }
                    slot
                }
            };
            let Some(Some(connection)) = self.connections.get_mut(slot) else {
                continue;
            };
            connection.unanswered_bytes += datagram.len();
            if connection.quic.recv(datagram, info).is_err() {
                self.counters().add(Counter::DatagramsInvalid, 1);
            }
        }
        if let Some((slot, _)) = touched {
            self.on_packets(slot, now);
        }
    }

    fn on_receive_batch_end(&mut self, _now: Instant) {}

    fn wants_to_send(&self) -> bool {
        self.parts.shared.exchanged.get() >= EXCHANGE_PACKETS
    }

    fn on_timeout(&mut self, now: Instant) {
        self.parts.shared.now.set(now);
        let mut due = std::mem::take(&mut self.due);
        self.wheel.poll(now, &mut |timer| due.push(timer));
        for timer in due.drain(..) {
            match timer {
                Timer::Connection(slot) => self.on_connection_timeout(slot, now),
                Timer::Peers(index) => {
                    self.peers_timers[index] = None;
                    self.parts.peers[index].handle_timeout(now);
                    self.run_actions(now);
                }
            }
        }
        self.due = due;
    }

    fn next_timeout(&mut self) -> Option<Instant> {
        self.wheel.next()
    }

    fn transmit(&mut self, trains: &mut Trains<'_>, now: Instant) -> Transmit {
        self.parts.shared.now.set(now);
        self.parts.shared.exchanged.set(0);
        for (reply, to) in std::mem::take(&mut self.replies) {
            let Some(buffer) = trains.packet(self.parts.shared.config.udp_payload_bytes_max) else {
                break;
            };
            buffer[..reply.len()].copy_from_slice(&reply);
            trains.push(reply.len(), to);
        }
        let turns = self.parts.shared.dirty.borrow().len();
        for _ in 0..turns {
            let Some(slot) = self.parts.shared.dirty.borrow_mut().pop_front() else {
                break;
            };
            if self.flush(slot, trains, now) == Sent::NoSlot {
                // First in the next turn, so that those behind it get theirs.
                if let Some(Some(connection)) = self.connections.get_mut(slot) {
                    connection.is_dirty = true;
                    connection.must_send = true;
                    self.parts.shared.dirty.borrow_mut().push_front(slot);
                }
                break;
            }
        }
        if !self.parts.shared.dirty.borrow().is_empty() {
            Transmit::More
        } else {
            Transmit::Done
        }
    }

    fn has_pending(&self) -> bool {
        !self.parts.shared.dirty.borrow().is_empty()
    }

    fn on_housekeeping(&mut self, now: Instant, _stats: &ShardStats) {
        self.parts.shared.now.set(now);
        for connection in self.connections.iter_mut().flatten() {
            let lossy = connection.has_lost_packets();
            connection.sweep_stopped_streams();
            if let Some(link) = &connection.link {
                link.out.borrow_mut().set_lossy(lossy);
            }
        }
        self.publish();
    }

    fn on_stop(&mut self, now: Instant) {
        self.parts.shared.stopping.set(true);
        self.parts.shared.now.set(now);
        let until = now + self.parts.shared.config.drain_timeout;
        self.stop_at = Some(until);
        for slot in 0..self.connections.len() {
            self.take_down(slot);
            if let Some(connection) = &mut self.connections[slot]
                && connection.phase != Phase::Closing
            {
                connection.phase = Phase::Draining {
                    until: Some(until),
                    code: CloseCode::Done,
                };
            }
            self.mark_dirty(slot);
        }
    }

    fn is_stopped(&self, now: Instant) -> bool {
        // CONNECTION_CLOSE has left once every connection is closing; quiche's draining period is for late packets, which a stopped
        // process may leave unanswered.
        let all_closing = self
            .connections
            .iter()
            .flatten()
            .all(|c| c.phase == Phase::Closing && !c.is_dirty);
        // The timers that close what still drains fire up to a tick late.
        const TICK: Duration = Duration::from_millis(2);
        self.stop_at
            .is_some_and(|at| all_closing || at + TICK <= now)
    }
}
