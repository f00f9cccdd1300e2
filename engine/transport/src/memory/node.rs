//! One node of the memory network: its connections to the others, and the handler above them.
//!
//! Invariants
//! 1. Of two nodes, the one with the lower id dials; a later attempt replaces an earlier one.
//! 2. A connection that both sides do not know ends: a packet for it is answered with `Gone`.
//! 3. The handler hears `on_up` before anything of a connection and `on_down` after all of it.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

use millrace_protocol::backoff::{Backoff, BackoffConfig};
use millrace_protocol::budget::BudgetConfig;
use millrace_protocol::frame::{Hello, Method, Negotiated};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::rng::Rng;
use millrace_protocol::timer::{TimerId, Wheel};
use millrace_shards::chunk::ChunkPool;
use millrace_sim::memnet::{Endpoint, MemNet};

use super::connection::{Connection, State};
use super::inbox::PeerBodies;
use super::packet::{Content, PIECE_BYTES, Packet, TRAIN_BYTES};
use crate::allocator::BodyAllocator;
use crate::counters::{Counter, Family};
use crate::inbox::StreamFault;
use crate::outbox::Outbox;
use crate::service::handle::{ConnectionHandle, ShardState};
use crate::service::router::{Dispatch, Service};
use crate::session::{Delivery, Received, on_fault};

/// What the nodes of a network share. Nodes are named by their index.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) net: MemNet<Packet>,
    /// One timer for each pair of nodes and side.
    pub(super) wheel: Wheel<(usize, usize)>,
    pub(super) rng: Rng,
    pub(super) now: Instant,
    attempts: u64,
}

impl Wire {
    pub(super) fn new(net: MemNet<Packet>, rng: Rng, now: Instant) -> Self {
        Self {
            net,
            wheel: Wheel::new(now),
            rng,
            now,
            attempts: 0,
        }
    }

    fn next_attempt(&mut self) -> u64 {
        self.attempts += 1;
        self.attempts
    }

    fn send(&mut self, from: usize, to: usize, attempt: u64, content: Content) {
        let bytes = content.wire_bytes();
        let packet = Packet { attempt, content };
        // What the network drops is repeated by its sender, or lost; it counts that itself.
        let _ = self
            .net
            .send(endpoint(from), endpoint(to), packet, bytes, self.now);
    }

    /// Bytes that may wait on a link that has a capacity.
    fn train_bytes(&self, from: usize, to: usize) -> Option<u64> {
        let config = self.net.link(endpoint(from), endpoint(to));
        config.bytes_per_second?;
        // The packet that fills the train may be larger than what was left.
        let queue_bytes = config
            .queue_bytes_max
            .saturating_sub(PIECE_BYTES as u64 + 256);
        Some(TRAIN_BYTES.min(queue_bytes).max(1))
    }

    fn room_bytes(&self, from: usize, to: usize) -> u64 {
        let waiting_bytes = self
            .net
            .waiting_bytes(endpoint(from), endpoint(to), self.now);
        let train_bytes = self.train_bytes(from, to);
        train_bytes.map_or(u64::MAX, |train_bytes| {
            train_bytes.saturating_sub(waiting_bytes)
        })
    }

    /// When a good part of a train fits again.
    fn room_at(&self, from: usize, to: usize) -> Instant {
        let half_bytes = self.train_bytes(from, to).unwrap_or(0) / 2;
        self.net
            .drained_to(endpoint(from), endpoint(to), half_bytes, self.now)
    }
}

pub(super) fn endpoint(node: usize) -> Endpoint {
    Endpoint(node as u32)
}

#[derive(Debug)]
struct Peer {
    id: NodeId,
    state: State,
    backoff: Backoff,
    timer: Option<TimerId>,
    /// The latest attempt of the peer's that was accepted.
    accepted: u64,
}

/// A node of the memory network has one service, for all methods.
struct Only<'a, H>(&'a mut H);

impl<H: Service> Dispatch for Only<'_, H> {
    fn service_of(&mut self, _method: Method) -> Option<&mut dyn Service> {
        Some(self.0)
    }
}

/// One node.
pub(super) struct Node<H> {
    id: NodeId,
    index: usize,
    pub(super) handler: H,
    pub(super) shared: Rc<ShardState>,
    bodies: BodyAllocator,
    peers: BTreeMap<usize, Peer>,
    last_number: u64,
}

impl<H: Service> Node<H> {
    pub(super) fn new(
        id: NodeId,
        index: usize,
        handler: H,
        shared: Rc<ShardState>,
        pool: ChunkPool,
    ) -> Self {
        let budget = BudgetConfig {
            total_bytes: shared.config.receive_budget_bytes,
            peer_bytes_max: shared.config.receive_budget_peer_bytes,
        };
        let bodies = BodyAllocator::new(budget, pool);
        let peers = BTreeMap::new();
        Self {
            id,
            index,
            handler,
            shared,
            bodies,
            peers,
            last_number: 0,
        }
    }

    pub(super) fn id(&self) -> NodeId {
        self.id
    }

    /// Learns of another node, and dials it if that is for us to do.
    pub(super) fn meet(&mut self, other: usize, id: NodeId, wire: &mut Wire) {
        let config = &self.shared.config;
        let backoff = BackoffConfig {
            base: config.redial_delay_min,
            cap: config.redial_delay_max,
        };
        self.peers.entry(other).or_insert_with(|| Peer {
            id,
            state: State::Idle,
            backoff: Backoff::new(backoff),
            timer: None,
            accepted: 0,
        });
        self.redial(other, wire, true);
    }

    /// Ends without a word, as a process that is killed.
    pub(super) fn crash(&mut self, wire: &mut Wire) {
        self.shared.stopping.set(true);
        self.shared.clear();
        for peer in self.peers.values_mut() {
            if let Some(timer) = peer.timer.take() {
                wire.wheel.cancel(timer);
            }
            if let State::Up(connection) = std::mem::replace(&mut peer.state, State::Idle) {
                connection.link.close();
            }
        }
    }

    // --- what arrives ---

    pub(super) fn receive(&mut self, from: usize, packet: Packet, wire: &mut Wire) {
        let Packet { attempt, content } = packet;
        let Some(peer) = self.peers.get(&from) else {
            return;
        };
        if matches!(content, Content::Open) {
            self.on_open(from, attempt, wire);
            return;
        }
        let is_gone = matches!(content, Content::Gone);
        match &peer.state {
            State::Up(connection) if connection.attempt == attempt && is_gone => {
                self.down(from, "peer_gone", wire);
            }
            State::Up(connection) if connection.attempt == attempt => {
                self.on_content(from, content, wire);
            }
            // Whatever answers the attempt shows that the other side has it.
            State::Dialling { attempt: ours, .. } if *ours == attempt && !is_gone => {
                self.up(from, attempt, wire);
                self.on_content(from, content, wire);
            }
            _ if is_gone => {}
            _ => wire.send(self.index, from, attempt, Content::Gone),
        }
    }

    fn on_open(&mut self, from: usize, attempt: u64, wire: &mut Wire) {
        let Some(peer) = self.peers.get_mut(&from) else {
            return;
        };
        if attempt < peer.accepted || self.id < peer.id {
            return;
        }
        let held = match &peer.state {
            State::Up(connection) => Some(connection.attempt),
            State::Idle | State::Dialling { .. } => None,
        };
        peer.accepted = attempt;
        if held != Some(attempt) {
            if held.is_some() {
                self.down(from, "replaced", wire);
            }
            self.up(from, attempt, wire);
        }
        wire.send(self.index, from, attempt, Content::Accept);
    }

    fn on_content(&mut self, from: usize, content: Content, wire: &mut Wire) {
        let now = wire.now;
        let Some(peer) = self.peers.get_mut(&from) else {
            return;
        };
        let State::Up(connection) = &mut peer.state else {
            return;
        };
        let link = Rc::clone(&connection.link);
        let mut bodies = PeerBodies {
            bodies: &mut self.bodies,
            peer: peer.id,
        };
        let mut events = Received::default();
        let services = &mut Only(&mut self.handler);
        let mut arrivals = Delivery {
            handle: &link,
            services,
            now,
            received: &mut events,
        };
        let (inbox, path) = (&mut connection.inbox, &mut connection.path);
        let result = match content {
            Content::Frames { sequence, frames } => inbox
                .on_frames(sequence, &frames, &mut arrivals)
                .map_err(|fault| (fault, None)),
            Content::Piece(piece) => inbox.on_piece(&piece, &mut bodies, path, &mut arrivals),
            Content::Reset { transfer } => match inbox.on_reset(transfer, path) {
                Some(header) => Err((StreamFault::Reset, Some(header))),
                None => Ok(()),
            },
            Content::Ack {
                transfer,
                index,
                sent_at,
            } => {
                if let Some(memory) = link.out.borrow_mut().memory() {
                    memory.on_ack(transfer, index, sent_at, now);
                }
                Ok(())
            }
            Content::Stop { transfer } => {
                if let Some(memory) = link.out.borrow_mut().memory() {
                    memory.on_stop(transfer);
                }
                Ok(())
            }
            Content::Ping => {
                path.push(Content::Pong);
                Ok(())
            }
            Content::Open | Content::Accept | Content::Pong | Content::Gone => Ok(()),
        };
        connection.heard(now);
        if let Err((fault, header)) = result {
            on_fault(&link, fault, header, &mut events);
        }
        if let Some(reason) = events.fault {
            wire.send(self.index, from, connection.attempt, Content::Gone);
            self.down(from, reason, wire);
            return;
        }
        link.mark_dirty();
    }

    // --- what happens to a connection ---

    fn up(&mut self, other: usize, attempt: u64, wire: &mut Wire) {
        let Some(peer) = self.peers.get_mut(&other) else {
            return;
        };
        peer.backoff.reset();
        self.last_number += 1;
        let number = ConnectionNumber(self.last_number);
        let out = Outbox::in_memory(&self.shared.config);
        let link = ConnectionHandle::with_outbox(&self.shared, other, peer.id, out);
        link.number.set(number);
        let connection = Connection::new(attempt, Rc::clone(&link), wire.now);
        peer.state = State::Up(Box::new(connection));
        let id = peer.id;
        self.shared.insert(link);
        let direction = if self.id < id {
            Counter::ConnectionsOut
        } else {
            Counter::ConnectionsIn
        };
        self.shared.counters.add(direction, 1);
        // The memory network has one release and no registry.
        let hello = Negotiated {
            version: Hello::VERSIONS.max,
            features: Hello::FEATURES,
            registry_version: 0,
            shards: 1,
        };
        self.handler.on_up(id, number, &hello);
        self.arm(other, wire);
    }

    fn down(&mut self, other: usize, reason: &'static str, wire: &mut Wire) {
        let Some(peer) = self.peers.get_mut(&other) else {
            return;
        };
        let State::Up(connection) = std::mem::replace(&mut peer.state, State::Idle) else {
            return;
        };
        let id = peer.id;
        self.shared.remove(&connection.link);
        connection.link.close();
        self.shared.counters.count(Family::Closed, reason);
        self.handler.on_down(id, connection.link.number.get());
        self.redial(other, wire, false);
    }

    fn redial(&mut self, other: usize, wire: &mut Wire, at_once: bool) {
        let Some(peer) = self.peers.get_mut(&other) else {
            return;
        };
        if self.id < peer.id && matches!(peer.state, State::Idle) {
            let attempt = wire.next_attempt();
            let delay = peer.backoff.next(&mut wire.rng);
            let at = if at_once { wire.now } else { wire.now + delay };
            peer.state = State::Dialling { attempt, at };
        }
        self.arm(other, wire);
    }

    fn arm(&mut self, other: usize, wire: &mut Wire) {
        let Some(peer) = self.peers.get_mut(&other) else {
            return;
        };
        let at = match &peer.state {
            State::Idle => None,
            State::Dialling { at, .. } => Some(*at),
            State::Up(connection) => Some(connection.next_timeout()),
        };
        match (at, peer.timer.take()) {
            (Some(at), timer) => {
                peer.timer = Some(wire.wheel.replace(timer, (self.index, other), at));
            }
            (None, Some(timer)) => {
                wire.wheel.cancel(timer);
            }
            (None, None) => {}
        }
    }

    pub(super) fn on_timer(&mut self, other: usize, wire: &mut Wire) {
        let now = wire.now;
        let Some(peer) = self.peers.get_mut(&other) else {
            return;
        };
        peer.timer = None;
        match &mut peer.state {
            State::Idle => {}
            State::Dialling { attempt, at } => {
                if *at <= now {
                    *at = now + peer.backoff.next(&mut wire.rng);
                    self.shared.counters.add(Counter::Dials, 1);
                    wire.send(self.index, other, *attempt, Content::Open);
                }
                self.arm(other, wire);
            }
            State::Up(connection) if connection.is_lost(now) => {
                self.down(other, "timed_out", wire);
            }
            State::Up(connection) => {
                let link = Rc::clone(&connection.link);
                link.expire(now);
                if connection.take_ping(now) {
                    connection.path.push(Content::Ping);
                }
                let config = &self.shared.config;
                if connection.take_judgement(now, config) {
                    let (inbox, path) = (&mut connection.inbox, &mut connection.path);
                    let bytes = config.stream_progress_bytes;
                    inbox.cut_stalled(bytes, path, &mut |header| {
                        on_fault(
                            &link,
                            StreamFault::Stalled,
                            Some(header),
                            &mut Received::default(),
                        );
                    });
                }
                // Armed again when it was fed.
                link.mark_dirty();
            }
        }
    }

    // --- sending ---

    /// Sends what the connections have that are marked. False when none was.
    pub(super) fn flush(&mut self, wire: &mut Wire) -> bool {
        let mut any = false;
        // Nothing that runs here marks a connection.
        while let Some(other) = self.next_dirty() {
            any = true;
            self.flush_one(other, wire);
        }
        any
    }

    fn next_dirty(&self) -> Option<usize> {
        self.shared.dirty.borrow_mut().pop_front()
    }

    fn flush_one(&mut self, other: usize, wire: &mut Wire) {
        let Some(peer) = self.peers.get_mut(&other) else {
            return;
        };
        let State::Up(connection) = &mut peer.state else {
            return;
        };
        connection.link.clear_dirty();
        connection
            .path
            .begin(wire.now, wire.room_bytes(self.index, other));
        connection
            .link
            .out
            .borrow_mut()
            .feed_memory(&mut connection.path);
        let packets = connection.path.take();
        self.shared
            .counters
            .add(Counter::PacketsSent, packets.len() as u64);
        for content in packets {
            wire.send(self.index, other, connection.attempt, content);
        }
        let is_blocked = connection.path.is_blocked();
        connection.room_at = is_blocked.then(|| wire.room_at(self.index, other));
        self.arm(other, wire);
    }
}
