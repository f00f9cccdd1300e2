//! One simulated node: the product's machines and sessions, over modelled connections.
//!
//! It is what the endpoint of a shard is in the product, without what only sockets have: connection
//! IDs, TLS, admission, addresses that change, trains.
//!
//! Invariants
//! 1. What [`Peers`] holds current is what its actions said, and exists.
//! 2. A crash leaves nothing: no word to peers, no timer, no chunk.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_protocol::dial_request::DialRequest;
use millrace_protocol::frame::{Hello, VersionRange};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::peers::{Action, Attempt, CloseKind, ConnKey, Direction, Peers};
use millrace_protocol::timer::{TimerId, Wheel};
use millrace_protocol::topology::Topology;
use millrace_shards::chunk::ChunkPool;
use millrace_transport::carrier::Progress;
use millrace_transport::counters::{Counter, Family};
use millrace_transport::driver::{
    BodyAllocator, Expired, Phase, Session, ShardState, StreamPath, linger, peers_config,
};
use millrace_transport::{CloseCode, PathInfo, Router, TransportConfig};

use crate::memnet::{Endpoint, MemNet};
use crate::messenger::{Parts, Paths, SimMessenger};
use crate::quic::packet::Packet;
use crate::quic::{Connection as QuicConnection, End};
use crate::tasks::Tasks;
use crate::wire::{endpoint, endpoint_of, room};

/// How often connections are looked at for losses, as a shard of the product does.
const HOUSEKEEPING: Duration = Duration::from_millis(100);
/// What a lane brings at a time; a shard of the product has as much.
const SCRATCH_BYTES: usize = 64 << 10;

#[derive(Clone, Copy, Debug)]
enum Timer {
    Connection(usize),
    Peers,
    Housekeeping,
}

#[derive(Debug)]
struct Connection {
    quic: QuicConnection,
    key: ConnKey,
    /// Where the peer is.
    remote: Endpoint,
    /// The node that was dialled, or that dialled: what the peer's certificate says.
    peer: NodeId,
    /// The dial that this is, until its handshake is done.
    attempt: Option<Attempt>,
    phase: Phase,
    session: Option<Session>,
    timer: Option<TimerId>,
    /// When the link will have room again, while something waits for that.
    room_at: Option<Instant>,
    is_dirty: bool,
}

/// A node, running or not.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    index: usize,
    pool: ChunkPool,
    /// What its registry folder says: it survives a crash.
    topology: Arc<Topology>,
    /// What its release speaks.
    pub(crate) versions: VersionRange,
    /// Connections that the node ever had, so that no two have a name in common.
    connections_made: u64,
    running: Option<Running>,
}

impl Node {
    pub(crate) fn new(id: NodeId, index: usize, pool: ChunkPool, topology: Arc<Topology>) -> Self {
        Self {
            id,
            index,
            pool,
            topology,
            versions: Hello::VERSIONS,
            connections_made: 0,
            running: None,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Starts the node; `make` makes its services.
    pub(crate) fn start(
        &mut self,
        config: &TransportConfig,
        seed: u64,
        now: Instant,
        tasks: &Tasks,
        make: &dyn Fn(SimMessenger) -> Router,
    ) -> SimMessenger {
        let state = ShardState::for_driver(config.clone(), now);
        let paths = Paths::default();
        let messenger = SimMessenger::new(Parts {
            id: self.id,
            node: self.index,
            state: Rc::clone(&state),
            paths: Rc::clone(&paths),
            pool: self.pool.clone(),
            tasks: tasks.clone(),
        });
        let mut wheel = Wheel::new(now);
        wheel.schedule(Timer::Housekeeping, now + HOUSEKEEPING);
        let mut running = Running {
            id: self.id,
            endpoint: endpoint(self.index),
            router: make(messenger.clone()),
            state,
            paths,
            bodies: BodyAllocator::new(config.receive_budget(), self.pool.clone()),
            topology: Arc::new(Topology::empty()),
            versions: self.versions,
            peers: Peers::new(self.id, peers_config(config, 0, 0, 1), 0, seed, now),
            peers_timer: None,
            connections: BTreeMap::new(),
            connections_made: self.connections_made,
            wheel,
            scratch: vec![0; SCRATCH_BYTES],
            out: Vec::new(),
            ups: BTreeMap::new(),
            now,
        };
        running.set_topology(Arc::clone(&self.topology));
        self.running = Some(running);
        messenger
    }

    /// As kill -9: nothing is sent, nothing is kept.
    pub(crate) fn crash(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        self.connections_made = running.connections_made;
        running.state.stop();
        for connection in running.connections.into_values() {
            if let Some(session) = connection.session {
                session.abandon();
            }
        }
    }

    pub(crate) fn set_topology(&mut self, topology: Arc<Topology>) {
        self.topology = Arc::clone(&topology);
        if let Some(running) = &mut self.running {
            running.set_topology(topology);
        }
    }

    pub(crate) fn set_now(&mut self, now: Instant) {
        if let Some(running) = &mut self.running {
            running.now = now;
            running.state.set_now(now);
        }
    }

    /// When [`Self::on_timeout`] is due.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.running.as_ref()?.wheel.next()
    }

    pub(crate) fn on_timeout(&mut self) {
        if let Some(running) = &mut self.running {
            running.on_timeout();
        }
    }

    /// Takes a packet. `sender` is what the sender's key proves, where a key is involved.
    pub(crate) fn receive(&mut self, from: Endpoint, sender: NodeId, packet: Packet) {
        if let Some(running) = &mut self.running {
            running.receive(from, sender, packet);
        }
    }

    /// Sends what is to be sent; false when there was nothing.
    pub(crate) fn flush(&mut self, net: &mut MemNet<Packet>) -> bool {
        let running = self.running.as_mut();
        running.is_some_and(|running| running.flush(net))
    }

    /// The current connection to a peer: its number, and what both ends call it.
    pub(crate) fn current(
        &self,
        peer: &NodeId,
    ) -> Option<(ConnectionNumber, ConnKey, Option<ConnKey>)> {
        let running = self.running.as_ref()?;
        let (key, number) = running.peers.current(peer)?;
        let connection = running.connections.get(&slot_of(key))?;
        Some((number, key, connection.quic.remote()))
    }

    /// What must hold after every step.
    pub(crate) fn check(&self) {
        if let Some(running) = &self.running {
            running.check();
        }
    }
}

/// A node that runs.
struct Running {
    id: NodeId,
    endpoint: Endpoint,
    router: Router,
    state: Rc<ShardState>,
    paths: Paths,
    bodies: BodyAllocator,
    topology: Arc<Topology>,
    versions: VersionRange,
    peers: Peers,
    peers_timer: Option<TimerId>,
    connections: BTreeMap<usize, Connection>,
    connections_made: u64,
    wheel: Wheel<Timer>,
    scratch: Vec<u8>,
    /// Datagrams outside of connections.
    out: Vec<(Endpoint, Packet)>,
    /// What the actions of `peers` said is current.
    ups: BTreeMap<NodeId, (ConnKey, ConnectionNumber)>,
    now: Instant,
}

impl Running {
    fn set_topology(&mut self, topology: Arc<Topology>) {
        self.topology = Arc::clone(&topology);
        self.peers.set_topology(topology, self.now);
        self.run_actions();
    }

    // --- what arrives ---

    fn receive(&mut self, from: Endpoint, sender: NodeId, packet: Packet) {
        let now = self.now;
        self.state.counters().add(Counter::DatagramsReceived, 1);
        match packet {
            Packet::Initial { client, repeat } => {
                let is_known = |connection: &&mut Connection| {
                    let is_client = connection.quic.remote() == Some(client);
                    is_client && connection.remote == from && connection.quic.is_server()
                };
                let held = self.connections.values_mut().find(is_known);
                let slot = match held {
                    Some(connection) => slot_of(connection.key),
                    None => self.accept(from, sender, client),
                };
                if let Some(connection) = self.connections.get_mut(&slot) {
                    connection.quic.on_initial(repeat, now);
                }
                self.mark_dirty(slot);
            }
            Packet::Accept {
                client,
                server,
                repeat,
            } => {
                let slot = slot_of(client);
                let Some(connection) = self.find(client) else {
                    return;
                };
                if connection.peer != sender {
                    // Its certificate has not the key that was pinned.
                    self.state.counters().count(Family::Refused, "wrong_key");
                    self.remove(slot);
                    return;
                }
                connection.quic.on_accept(server, repeat, now);
                self.on_packets(slot);
            }
            Packet::Protected {
                to,
                number,
                acked,
                frames,
            } => {
                let Some(connection) = self.find(to) else {
                    self.state.counters().add(Counter::DatagramsUnroutable, 1);
                    return;
                };
                connection.quic.on_protected(number, &acked, frames, now);
                self.on_packets(slot_of(to));
            }
            Packet::Close { to, code } => {
                if let Some(connection) = self.find(to) {
                    connection.quic.on_close(code);
                    self.remove(slot_of(to));
                }
            }
            Packet::DialRequest { datagram } => {
                let request = DialRequest::decode(&datagram);
                if let Some(request) = request.filter(|request| request.target == self.id) {
                    self.peers.dial_requested(request.sender, now);
                    self.run_actions();
                }
            }
        }
    }

    fn find(&mut self, key: ConnKey) -> Option<&mut Connection> {
        let connection = self.connections.get_mut(&slot_of(key));
        connection.filter(|connection| connection.key == key)
    }

    /// After a packet: everything that it made possible.
    fn on_packets(&mut self, slot: usize) {
        let now = self.now;
        let Some(connection) = self.connections.get(&slot) else {
            return;
        };
        if connection.quic.end().is_some() {
            self.remove(slot);
            return;
        }
        if matches!(connection.phase, Phase::Handshake { .. }) && connection.quic.is_established() {
            self.on_established(slot);
        }
        self.confirm_liveness(slot);
        let Some(connection) = self.connections.get_mut(&slot) else {
            return;
        };
        if let Some(session) = &mut connection.session {
            let received = session.receive(
                &mut connection.quic,
                &mut self.router,
                &mut self.scratch,
                &mut self.bodies,
                now,
            );
            for sequence in received.probe_replies {
                session.on_probe_reply(sequence, now);
            }
            if received.fault.is_some() {
                self.close(slot, CloseCode::Violation);
            }
        }
        self.mark_dirty(slot);
    }

    /// The handshake is done on our side, so that the peer is known: asks whether it may stay.
    fn on_established(&mut self, slot: usize) {
        let (now, topology) = (self.now, Arc::clone(&self.topology));
        let Some(connection) = self.connections.get_mut(&slot) else {
            return;
        };
        let (direction, counter) = match connection.attempt.take() {
            Some(attempt) => (Direction::Outbound(attempt), Counter::ConnectionsOut),
            None => (Direction::Inbound, Counter::ConnectionsIn),
        };
        self.state.counters().add(counter, 1);
        let (key, peer) = (connection.key, connection.peer);
        if let Err(refusal) = self.peers.handshake_done(key, peer, direction, now) {
            let counters = self.state.counters();
            counters.count(Family::Refused, refusal.reason());
            self.close(slot, CloseCode::of_refusal(refusal));
            return;
        }
        connection.phase = Phase::AwaitHello;
        let hello = Hello {
            versions: self.versions,
            ..Hello::new(topology.newest_version(), 1)
        };
        let is_server = connection.quic.is_server();
        let session = Session::new(&self.state, slot, peer, is_server, &hello);
        connection.session = Some(session);
        self.run_actions();
    }

    /// Brings a connection up when the peer's hello is there, before anything else is read; and
    /// takes a packet for the sign of life that a dial request made us ask for.
    fn confirm_liveness(&mut self, slot: usize) {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&slot) else {
            return;
        };
        let Some(session) = &mut connection.session else {
            return;
        };
        let key = connection.key;
        if connection.phase == Phase::AwaitHello {
            match session.receive_hello(&mut connection.quic) {
                None => {}
                Some(Ok(_)) => {
                    self.peers.hello_received(key, now);
                    self.run_actions();
                }
                Some(Err(error)) => self.close(slot, CloseCode::of_hello(&error)),
            }
        } else if session.take_liveness(&connection.quic) {
            self.peers.verified(key);
        }
    }

    // --- what the machine decides ---

    fn run_actions(&mut self) {
        while let Some(action) = self.peers.poll_action() {
            self.run_action(action);
        }
        if let Some(at) = self.peers.poll_timeout() {
            let timer = self.wheel.replace(self.peers_timer, Timer::Peers, at);
            self.peers_timer = Some(timer);
        }
    }

    fn run_action(&mut self, action: Action) {
        match action {
            Action::Dial {
                peer,
                address,
                attempt,
            } => self.dial(peer, endpoint_of(address), attempt),
            Action::Abandon { attempt } => {
                let is_it = |connection: &&Connection| connection.attempt == Some(attempt);
                let dialled = self.connections.values().find(is_it);
                if let Some(key) = dialled.map(|connection| connection.key) {
                    self.close(slot_of(key), CloseCode::Done);
                }
            }
            Action::RequestDial { peer, address } => {
                let request = DialRequest {
                    sender: self.id,
                    target: peer,
                };
                let datagram = request.encode(0);
                let packet = Packet::DialRequest { datagram };
                self.out.push((endpoint_of(address), packet));
            }
            Action::Verify { conn } => {
                let Some(connection) = self.find(conn) else {
                    return;
                };
                let asked = connection
                    .session
                    .as_mut()
                    .is_some_and(|session| session.probe_liveness(&mut connection.quic));
                if asked {
                    self.mark_dirty(slot_of(conn));
                } else {
                    self.peers.verified(conn);
                }
            }
            Action::Close { conn, reason } => {
                self.take_down(conn);
                self.close(slot_of(conn), CloseCode::of_reason(reason));
            }
            Action::Drain { conn } => {
                self.take_down(conn);
                let connection = self.find(conn).expect("a connection that drains is there");
                connection.phase = Phase::Draining {
                    until: None,
                    code: CloseCode::Replaced,
                };
                self.mark_dirty(slot_of(conn));
            }
            Action::Up { peer, conn, number } => self.up(peer, conn, number),
            Action::Down { peer, number } => {
                let up = self.ups.remove(&peer);
                assert_eq!(up.map(|(_, n)| n), Some(number), "down without its up");
            }
        }
    }

    fn up(&mut self, peer: NodeId, key: ConnKey, number: ConnectionNumber) {
        let before = self.ups.insert(peer, (key, number));
        let is_above = before.is_none_or(|(_, before)| before < number);
        assert!(is_above, "numbers must rise");
        let now = self.now;
        let connection = self.connections.get_mut(&slot_of(key));
        let connection = connection.expect("a connection that comes up is there");
        assert_eq!(connection.peer, peer);
        connection.phase = Phase::Up;
        let session = connection.session.as_mut();
        let session = session.expect("a connection that comes up has a session");
        session.up(&connection.quic, number, now);
        let hello = session.negotiated();
        let hello = hello.expect("a connection comes up by its hello");
        // Before the services hear of it: they may ask who is up.
        self.publish();
        self.router.on_up(peer, number, &hello);
    }

    fn take_down(&mut self, key: ConnKey) {
        let session = self.find(key).and_then(|held| held.session.as_ref());
        if let Some(session) = session {
            session.take_down();
        }
    }

    // --- connections ---

    fn dial(&mut self, peer: NodeId, to: Endpoint, attempt: Attempt) {
        self.state.counters().add(Counter::Dials, 1);
        let key = self.next_key();
        let quic = QuicConnection::dial(key, self.state.config(), self.now);
        self.insert(quic, key, to, peer, Some(attempt));
    }

    fn accept(&mut self, from: Endpoint, sender: NodeId, client: ConnKey) -> usize {
        let key = self.next_key();
        let quic = QuicConnection::accept(key, client, self.state.config(), self.now);
        self.insert(quic, key, from, sender, None);
        slot_of(key)
    }

    fn next_key(&mut self) -> ConnKey {
        self.connections_made += 1;
        ConnKey(u64::from(self.endpoint.0) << KEY_SHIFT | self.connections_made)
    }

    fn insert(
        &mut self,
        quic: QuicConnection,
        key: ConnKey,
        remote: Endpoint,
        peer: NodeId,
        attempt: Option<Attempt>,
    ) {
        let until = self.now + self.state.config().connect_timeout;
        let connection = Connection {
            quic,
            key,
            remote,
            peer,
            attempt,
            phase: Phase::Handshake { until },
            session: None,
            timer: None,
            room_at: None,
            is_dirty: false,
        };
        self.connections.insert(slot_of(key), connection);
        self.mark_dirty(slot_of(key));
    }

    fn close(&mut self, slot: usize, code: CloseCode) {
        if let Some(connection) = self.connections.get_mut(&slot)
            && connection.phase != Phase::Closing
        {
            connection.phase = Phase::Closing;
            connection.quic.close(code as u64);
            self.mark_dirty(slot);
        }
    }

    /// Forgets a connection that is gone, and tells every waiter of it.
    fn remove(&mut self, slot: usize) {
        let Some(mut connection) = self.connections.remove(&slot) else {
            return;
        };
        if let Some(timer) = connection.timer {
            self.wheel.cancel(timer);
        }
        let (reason, kind) = match connection.quic.end() {
            Some(End::TimedOut) => ("timed_out", CloseKind::Lost),
            Some(End::Violation) => ("transport_error", CloseKind::Lost),
            Some(End::PeerClosed(code)) => CloseCode::end_by_peer(code),
            Some(End::Closed(code)) => CloseCode::end_by_us(code),
            None => ("lost", CloseKind::Lost),
        };
        self.state.counters().count(Family::Closed, reason);
        if let Some(session) = connection.session.take() {
            session.close(&mut self.router);
        }
        match connection.attempt {
            Some(attempt) => self.peers.dial_failed(attempt, self.now),
            None => self.peers.closed(connection.key, kind, self.now),
        }
        self.run_actions();
    }

    fn mark_dirty(&mut self, slot: usize) {
        if let Some(connection) = self.connections.get_mut(&slot)
            && !std::mem::replace(&mut connection.is_dirty, true)
        {
            self.state.mark_dirty(slot);
        }
    }

    // --- time ---

    fn on_timeout(&mut self) {
        let mut due = Vec::new();
        self.wheel.poll(self.now, &mut |timer| due.push(timer));
        for timer in due {
            match timer {
                Timer::Connection(slot) => self.on_connection_timeout(slot),
                Timer::Peers => {
                    self.peers_timer = None;
                    self.peers.handle_timeout(self.now);
                    self.run_actions();
                }
                Timer::Housekeeping => {
                    for connection in self.connections.values_mut() {
                        if let Some(session) = &mut connection.session {
                            session.housekeep(&mut connection.quic);
                        }
                    }
                    self.bodies.settle();
                    self.publish();
                    let next = self.now + HOUSEKEEPING;
                    self.wheel.schedule(Timer::Housekeeping, next);
                }
            }
        }
    }

    /// Says what is known of the ways to the peers that are up.
    fn publish(&self) {
        let known = self.ups.iter().filter_map(|(peer, (key, _))| {
            let connection = self.connections.get(&slot_of(*key))?;
            let stats = connection.quic.stats();
            let info = PathInfo {
                rtt: stats.rtt,
                queued_bytes: connection.session.as_ref()?.queued_bytes(),
                packets_sent: stats.sent as u64,
                packets_lost: stats.lost as u64,
            };
            Some((*peer, info))
        });
        *self.paths.borrow_mut() = known.collect();
    }

    fn on_connection_timeout(&mut self, slot: usize) {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&slot) else {
            return;
        };
        connection.timer = None;
        connection.quic.on_timeout(now);
        if connection.quic.end().is_some() {
            self.remove(slot);
            return;
        }
        let mut close = match connection.phase.expired(now) {
            Some(Expired::Handshake) => {
                let counters = self.state.counters();
                counters.count(Family::Refused, "connect_timeout");
                Some(CloseCode::Done)
            }
            Some(Expired::Drained(code)) => Some(code),
            None => None,
        };
        if let Some(session) = &mut connection.session {
            let due = session.on_timeout(&mut connection.quic, now);
            close = due.or(close);
        }
        if let Some(code) = close {
            self.close(slot, code);
        }
        self.mark_dirty(slot);
    }

    fn arm(&mut self, slot: usize) {
        let Some(connection) = self.connections.get_mut(&slot) else {
            return;
        };
        let session = connection.session.as_ref().and_then(Session::next_timeout);
        let waits = [
            connection.quic.next_timeout(),
            connection.phase.next_timeout(),
            session,
            connection.room_at,
        ];
        let timer = connection.timer.take();
        match waits.into_iter().flatten().min() {
            Some(at) => {
                let timer = self.wheel.replace(timer, Timer::Connection(slot), at);
                connection.timer = Some(timer);
            }
            None => {
                if let Some(timer) = timer {
                    self.wheel.cancel(timer);
                }
            }
        }
    }

    // --- what leaves ---

    fn flush(&mut self, net: &mut MemNet<Packet>) -> bool {
        let mut any = !self.out.is_empty();
        for (to, packet) in std::mem::take(&mut self.out) {
            let bytes = packet.wire_bytes();
            // What the network drops it counts itself; here and below.
            let _ = net.send(self.endpoint, to, packet, bytes, self.now);
        }
        while let Some(slot) = self.state.next_dirty() {
            any = true;
            self.flush_connection(slot, net);
        }
        any
    }

    fn flush_connection(&mut self, slot: usize, net: &mut MemNet<Packet>) {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&slot) else {
            return;
        };
        connection.is_dirty = false;
        if matches!(connection.phase, Phase::Draining { .. })
            && connection.session.as_ref().is_none_or(Session::is_idle)
        {
            connection.phase.linger(now + linger(&connection.quic));
        }
        let mut is_more_waiting = false;
        if let Some(session) = &mut connection.session
            && connection.phase != Phase::Closing
        {
            let moved = session.poll_transmit(&mut connection.quic);
            is_more_waiting = moved.progress == Progress::More;
            if moved.is_stopped {
                connection.phase = Phase::Closing;
                connection.quic.close(CloseCode::Violation as u64);
            }
        }
        let (from, to) = (self.endpoint, connection.remote);
        let mut packets = 0;
        loop {
            let room = room(net, from, to, now);
            let Some(packet) = connection.quic.poll_transmit(now, room.bytes > 0) else {
                let is_blocked = room.bytes == 0 && connection.quic.wants_to_send();
                connection.room_at = is_blocked.then_some(room.again_at);
                break;
            };
            let bytes = packet.wire_bytes();
            let _ = net.send(from, to, packet, bytes, now);
            packets += 1;
        }
        self.state.counters().add(Counter::PacketsSent, packets);
        if connection.quic.end().is_some() {
            self.remove(slot);
            return;
        }
        if is_more_waiting {
            self.mark_dirty(slot);
        }
        self.arm(slot);
    }

    fn check(&self) {
        let current: BTreeMap<_, _> = self
            .peers
            .iter()
            .filter_map(|(id, current)| Some((id, current?)))
            .collect();
        assert_eq!(current, self.ups, "the machine and its actions disagree");
        for (peer, (key, _)) in &current {
            assert!(
                self.topology.member(peer).is_some(),
                "connected to a non-member"
            );
            let held = self.connections.get(&slot_of(*key));
            assert!(
                held.is_some_and(|connection| connection.key == *key),
                "the current connection is gone"
            );
        }
    }
}

/// A connection's name has its node above, and its slot below this bit.
const KEY_SHIFT: u32 = 40;

fn slot_of(key: ConnKey) -> usize {
    (key.0 & ((1 << KEY_SHIFT) - 1)) as usize
}
