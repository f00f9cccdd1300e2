//! All connections of one shard: routes datagrams, accepts and dials, drives timers and builds
//! trains.
//!
//! The endpoint plugs into the shard's loop. Cost per packet: one comparison of a connection ID,
//! and quiche.
//!
//! Invariants
//! 1. A slot is in `dirty` at least once while its connection has something to send; a spurious
//!    entry costs one `send` that says `Done`.
//! 2. Decisions about who may be connected are [`Peers`]'; this file carries them out.

mod decisions;
mod duplicates;
mod established;
mod floods;
mod heap;
mod keys;
mod opening;
mod paths;
mod receiving;
mod routing;
mod timing;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use millrace_edge_policy::cid::SLOTS_MAX;
use millrace_protocol::flood::Penalties;
use millrace_protocol::id::NodeId;
use millrace_protocol::path::PathMemory;
use millrace_protocol::peers::{CONNECTIONS_PER_PEER_MAX, ConnKey, Peers};
use millrace_protocol::timer::{TimerId, Wheel};
use millrace_protocol::tls_keys::KeyReplacements;
use millrace_protocol::topology::Topology;
use millrace_shards::datapath::{Datagrams, Datapath, Refused, Trains, Transmit};

use crate::admission::AdmissionControl;
use crate::allocator::BodyAllocator;
use crate::clock::Clock;
use crate::connection::{Connection, EXCHANGE_PACKETS, Sent};
use crate::counters::{Counter, Counters, Family};
use crate::log_limit::LogLimit;
use crate::pair_keys::DialKeys;
use crate::phase::Phase;
use crate::quic::{CloseCode, ShardTls};
use crate::random::random_bytes;
use crate::service::command::Command;
use crate::service::handle::ShardState;
use crate::service::remote::CallId;
use crate::service::router::Router;
use crate::service::routes::Routes;
use crate::session::Session;
use crate::status::{Load, PeerStatus, StatusBoard};
use crate::stop::{CLOSE_TIMEOUT, StopMode};
use crate::tls::Members;

/// How often the admission is ticked, if that is ours to do.
const ADMISSION_TICK: Duration = Duration::from_secs(1);

/// Datagrams outside connections that may wait for the next turn; more are dropped.
const REPLIES_MAX: usize = 64;

/// The two addresses of a datagram that came. An answer goes the other way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    /// The peer's address.
    pub(crate) from: SocketAddr,
    /// The address of this host that it came to, where the listen address is open.
    pub(crate) at: Option<IpAddr>,
}

#[derive(Clone, Copy, Debug)]
enum Timer {
    Connection(usize),
    Peers(usize),
}

/// What an endpoint is made of; see [`crate::start`].
pub(crate) struct EndpointParts {
    pub(crate) me: NodeId,
    pub(crate) local: SocketAddr,
    pub(crate) shard: usize,
    pub(crate) shards: usize,
    /// What hellos say; the node raises it.
    pub(crate) registry_version: Arc<AtomicU64>,
    pub(crate) generation: u8,
    pub(crate) tls: ShardTls,
    /// What is known of the paths to this shard's peers.
    pub(crate) paths: PathMemory,
    pub(crate) members: Members,
    /// One machine for each connection of a pair of nodes, by index.
    pub(crate) peers: Vec<Peers>,
    pub(crate) bodies: BodyAllocator,
    pub(crate) state: Rc<ShardState>,
    pub(crate) board: Arc<StatusBoard>,
    pub(crate) routes: Arc<Routes>,
    pub(crate) admission: AdmissionControl,
    /// Whether this endpoint ticks the admission.
    pub(crate) ticks_admission: bool,
    pub(crate) clock: Clock,
    /// What first packets prove themselves with, by the peer that is dialled.
    pub(crate) dial_keys: DialKeys,
    pub(crate) stop_mode: Arc<StopMode>,
    pub(crate) now: Instant,
}

/// The transport of one shard.
pub(crate) struct Endpoint {
    parts: EndpointParts,
    router: Router,
    connections: Vec<Option<Box<Connection>>>,
    free: Vec<usize>,
    live: usize,
    handshakes: usize,
    /// Of them, those that peers began.
    half_open: usize,
    /// Heap bytes that quiche holds for all of them.
    heap_bytes: u64,
    /// Whether a packet, a command or a timer came, or a connection had something to send, since
    /// the last housekeeping. An idle shard does not look at all its peers ten times a second.
    is_touched: bool,
    /// Connections that clients without a proof began, and that have not been found to be a
    /// member's.
    unproven: usize,
    /// Connections that are kept for peers.
    kept_for_peers: usize,
    log_limit: LogLimit,
    /// Serial number of the last connection, for keys that no two tenants of a slot share.
    opened: u32,
    /// Serial number of the last connection ID.
    issued: u16,
    /// Peers whose connections were cut for a flood.
    penalties: Penalties,
    /// Connections that were.
    floods_cut: u64,
    /// Connections by the ID that a client chose for its first packets.
    initial: BTreeMap<Vec<u8>, usize>,
    /// When connections are replaced for their keys.
    key_replacements: KeyReplacements,
    wheel: Wheel<Timer>,
    peers_timers: Vec<Option<TimerId>>,
    due: Vec<Timer>,
    scratch: Box<[u8]>,
    topology: Arc<Topology>,
    /// Datagrams outside connections (version negotiation, Retry, dial requests), sent with the
    /// next turn.
    replies: Vec<(Vec<u8>, Arrival)>,
    stop_at: Option<Instant>,
    /// Whether connections were closed at once when the stop began, or since.
    closed_at_once: bool,
    admission_tick_at: Instant,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("me", &self.parts.me)
            .field("connections", &self.live)
            .finish_non_exhaustive()
    }
}

/// Also after a panic of a service: the other threads must not count on this shard any longer.
impl Drop for Endpoint {
    fn drop(&mut self) {
        let shard = self.parts.shard;
        let has_panicked = std::thread::panicking();
        if has_panicked {
            tracing::error!(
                shard,
                "the shard panicked and has ended; fix: restart the node"
            );
        }
        self.parts.board.end(shard, has_panicked);
    }
}

impl Endpoint {
    pub(crate) fn new(parts: EndpointParts, topology: Arc<Topology>, router: Router) -> Self {
        let now = parts.now;
        let machines = parts.peers.len();
        let mut endpoint = Self {
            parts,
            router,
            connections: Vec::new(),
            free: Vec::new(),
            live: 0,
            handshakes: 0,
            half_open: 0,
            heap_bytes: 0,
            is_touched: true,
            unproven: 0,
            kept_for_peers: 0,
            log_limit: LogLimit::default(),
            opened: 0,
            issued: u16::from_le_bytes(random_bytes()),
            penalties: Penalties::default(),
            floods_cut: 0,
            initial: BTreeMap::new(),
            key_replacements: KeyReplacements::default(),
            wheel: Wheel::new(now),
            peers_timers: vec![None; machines],
            due: Vec::new(),
            scratch: vec![0; 64 << 10].into_boxed_slice(),
            topology: Arc::clone(&topology),
            replies: Vec::new(),
            stop_at: None,
            closed_at_once: false,
            admission_tick_at: now,
        };
        endpoint.set_topology(topology, now);
        endpoint
    }

    fn counters(&self) -> &Counters {
        &self.parts.state.counters
    }

    /// Counts and logs a connection that is refused.
    fn refuse(
        &mut self,
        reason: &'static str,
        source: SocketAddr,
        peer: Option<NodeId>,
        now: Instant,
    ) {
        self.counters().count(Family::Refused, reason);
        if let Some(left_out) = self.log_limit.admit(reason, now) {
            tracing::warn!(
                reason,
                %source,
                peer = peer.map(tracing::field::display),
                left_out,
                "a connection is refused"
            );
        }
    }

    fn set_topology(&mut self, topology: Arc<Topology>, now: Instant) {
        self.parts.members.replace(Arc::clone(&topology));
        for peers in &mut self.parts.peers {
            peers.set_topology(Arc::clone(&topology), now);
        }
        let peers: usize = self.parts.peers.iter().map(|of| of.iter().count()).sum();
        self.kept_for_peers = peers * CONNECTIONS_PER_PEER_MAX;
        let is_member = |peer: &NodeId| topology.member(peer).is_some();
        // A node that has no registry version yet knows no members.
        if topology.iter().next().is_some() {
            self.parts.paths.retain(is_member);
        }
        self.key_replacements.retain(is_member);
        self.penalties.retain(is_member);
        self.topology = topology;
        self.run_actions(now);
        self.end_retired();
        self.is_touched = true;
    }

    fn take_slot(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        })
    }

    fn connections_max(&self) -> usize {
        let connections_max = self.parts.state.config.connections_max;
        connections_max.min(SLOTS_MAX as usize)
    }

    /// Whether one more connection may be held.
    fn has_room(&self) -> bool {
        self.live < self.connections_max()
    }

    /// Whether a client without a proof may begin a connection: what peers need is kept for them.
    fn has_room_for_unproven(&self) -> bool {
        let left = self.connections_max().saturating_sub(self.kept_for_peers);
        self.unproven < left
    }

    fn new_key(&mut self, slot: usize) -> ConnKey {
        self.opened = self.opened.wrapping_add(1);
        ConnKey((slot as u64) << 32 | u64::from(self.opened))
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
        self.is_touched = true;
        if let Some(Some(connection)) = self.connections.get_mut(slot)
            && !std::mem::replace(&mut connection.is_dirty, true)
        {
            self.parts.state.dirty.borrow_mut().push_back(slot);
        }
    }

    /// Takes back a request of another shard or thread, if it is still in flight.
    fn cancel(&self, call: &CallId) {
        if let Some(Some(connection)) = self.connections.get(call.slot)
            && let Some(session) = &connection.session
        {
            session.cancel(call);
        }
    }

    // --- sending ---

    /// Sends what one connection has. True when it has more than this turn's budget.
    fn flush(&mut self, slot: usize, trains: &mut Trains<'_>, now: Instant) -> Sent {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return Sent::All;
        };
        connection.is_dirty = false;
        connection.is_touched = true;
        self.is_touched = true;
        if connection.may_delay_ack(&self.parts.state.config, now) {
            self.arm(slot);
            return Sent::All;
        }
        if matches!(connection.phase, Phase::Draining { .. })
            && connection.session.as_ref().is_none_or(Session::is_idle)
        {
            connection.phase.linger(now + connection.linger());
        }
        connection.send_mtu_probes(trains, &self.parts.state.counters, now);
        let (config, counters) = (&self.parts.state.config, &self.parts.state.counters);
        let sent = connection.transmit(trains, config, counters, now);
        // The kernel steers a train by the connection ID of its first packet: trains do not mix
        // connections.
        trains.finish();
        // The bytes that may be sent to an unvalidated address may be used up, also for the closing
        // frame.
        let is_cut_short =
            connection.is_handshaking && connection.phase == Phase::Closing && sent != Sent::NoSlot;
        let is_given_up = is_cut_short || connection.close_sender.is_over();
        // A draining connection (RFC 9000, 10.2.2) sends nothing any more; late packets for it are
        // dropped.
        if connection.quic.is_closed() || connection.quic.is_draining() || is_given_up {
            self.remove(slot, now);
            return Sent::All;
        }
        self.arm(slot);
        if sent == Sent::Budget {
            self.mark_dirty(slot);
        }
        sent
    }

    /// Takes up what the connections have seen since the last time, and what is published of them.
    fn housekeep_connections(&mut self, has_abandoned: bool, now: Instant) {
        for slot in 0..self.connections.len() {
            let Some(Some(connection)) = self.connections.get_mut(slot) else {
                continue;
            };
            if has_abandoned && let Some(session) = &mut connection.session {
                session.cancel_abandoned();
            }
            let drains = matches!(connection.phase, Phase::Draining { until: None, .. });
            // With many peers, most of them are idle: asking quiche about them costs more than all
            // else that an idle node does.
            if !std::mem::take(&mut connection.is_touched) && !drains {
                continue;
            }
            let Some(session) = &mut connection.session else {
                continue;
            };
            let is_lossy = session.housekeep(&mut connection.quic);
            // Both end with time.
            connection.is_touched = is_lossy;
            self.is_touched |= drains || is_lossy;
            if drains
                && let Some(until) = session.drains_until(&connection.quic, now)
                && let Some(peers) = self.parts.peers.get_mut(connection.index)
            {
                peers.drains_on(connection.key, until);
            }
            if is_lossy {
                connection.follow_mtu(&self.parts.state.counters, now);
            }
            self.measure_path(slot, now);
            self.look_at(slot);
        }
    }

    /// Takes down what is published of a connection.
    fn look_at(&mut self, slot: usize) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        let Some(session) = &connection.session else {
            return;
        };
        let (peer, path) = (session.peer(), connection.path());
        let stats = connection.quic.stats();
        connection.seen = Some(PeerStatus {
            node_id: peer,
            connection: session.number(),
            address: Some(connection.address.current()),
            profile: connection.profile,
            remembered: self.parts.paths.get(&peer),
            rtt: path.as_ref().map(|p| p.rtt),
            probe_rtt: session.probe_rtt().map(|rtt| rtt.smoothed),
            queued_bytes: session.queued_bytes(),
            congestion_window_bytes: path.as_ref().map_or(0, |p| p.cwnd as u64),
            udp_payload_bytes: connection.mtu.bytes(),
            frames_held: session.holds(),
            packets_sent: stats.sent as u64,
            packets_lost: stats.lost as u64,
            bytes_sent: stats.sent_bytes,
            bytes_received: stats.recv_bytes,
            duplicates_refused: 0,
            shard: self.parts.shard,
        });
    }

    fn publish(&mut self) {
        let peers = self.connections.iter().flatten().filter_map(|connection| {
            let seen = connection.seen.as_ref()?;
            let peers = self.parts.peers.get(connection.index);
            (connection.phase == Phase::Up).then(|| PeerStatus {
                duplicates_refused: peers
                    .map_or(0, |peers| peers.duplicates_refused(&seen.node_id)),
                ..seen.clone()
            })
        });
        self.parts.board.publish(
            self.parts.shard,
            peers.collect(),
            Load {
                connections: self.live,
                handshakes: self.handshakes,
                quic_heap_bytes: self.heap_bytes,
                by_older_key: self.by_older_key(),
                floods_cut: self.floods_cut,
                queue_bytes: self.parts.state.queues.used_bytes(),
                unread_answer_bytes: self.parts.state.unread.borrow().used_bytes(),
            },
        );
    }
}

impl Datapath for Endpoint {
    type Message = Command;

    fn on_message(&mut self, command: Command, now: Instant) {
        self.is_touched = true;
        self.parts.state.now.set(now);
        match command {
            Command::Topology(topology, dial_keys) => {
                self.parts.dial_keys = dial_keys;
                self.set_topology(topology, now);
            }
            Command::Tls(tls) => self.parts.tls = *tls,
            Command::Request(remote) => self.parts.state.request_remote(*remote),
            Command::Cancel(call) => self.cancel(&call),
            Command::Send(remote) => self.parts.state.send_remote(*remote),
            Command::OnWritable(remote) => self.parts.state.on_writable_remote(*remote),
        }
    }

    fn on_datagrams(&mut self, datagrams: Datagrams<'_>, now: Instant) {
        // Also where no connection takes them: who waits for a count of refusals is woken.
        self.is_touched = true;
        self.parts.state.now.set(now);
        self.counters()
            .add(Counter::DatagramsReceived, datagrams.count() as u64);
        self.receive(datagrams, now);
    }

    fn on_refused(&mut self, refused: &Refused, now: Instant) {
        let counters = Arc::clone(&self.parts.state.counters);
        for slot in 0..self.connections.len() {
            if let Some(Some(connection)) = self.connections.get_mut(slot)
                && connection.address.target().0 == refused.to
            {
                connection.on_refused(refused.packet_bytes, &counters, now);
                self.mark_dirty(slot);
            }
        }
    }

    fn wants_to_send(&self) -> bool {
        self.parts.state.exchanged.get() >= EXCHANGE_PACKETS
    }

    fn on_timeout(&mut self, now: Instant) {
        self.is_touched = true;
        self.parts.state.now.set(now);
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
        self.parts.state.now.set(now);
        self.parts.state.exchanged.set(0);
        for (reply, arrival) in std::mem::take(&mut self.replies) {
            trains.set_source(arrival.at);
            let Some(buffer) = trains.packet(self.parts.state.config.udp_payload_bytes_max) else {
                break;
            };
            buffer[..reply.len()].copy_from_slice(&reply);
            trains.push(reply.len(), arrival.from);
        }
        let turns = self.parts.state.dirty.borrow().len();
        for _ in 0..turns {
            let Some(slot) = self.parts.state.dirty.borrow_mut().pop_front() else {
                break;
            };
            if self.flush(slot, trains, now) == Sent::NoSlot {
                // First in the next turn, so that those behind it get theirs.
                if let Some(Some(connection)) = self.connections.get_mut(slot) {
                    connection.is_dirty = true;
                    connection.must_send = true;
                    self.parts.state.dirty.borrow_mut().push_front(slot);
                }
                break;
            }
        }
        if !self.parts.state.dirty.borrow().is_empty() {
            Transmit::More
        } else {
            Transmit::Done
        }
    }

    fn has_pending(&self) -> bool {
        !self.parts.state.dirty.borrow().is_empty()
    }

    fn on_housekeeping(&mut self, now: Instant) {
        self.parts.state.now.set(now);
        let has_abandoned = self.parts.routes.take_abandoned(self.parts.shard);
        if std::mem::take(&mut self.is_touched) || has_abandoned {
            self.housekeep_connections(has_abandoned, now);
            self.publish();
        }
        self.replace_for_keys(now);
        self.parts.bodies.settle();
        self.renew_all_ids(now);
        // An orderly stop that was under way.
        if self.stop_at.is_some() && !self.closed_at_once && self.parts.stop_mode.is_at_once() {
            self.on_stop(now);
        }
        if self.parts.ticks_admission && self.admission_tick_at <= now {
            self.admission_tick_at = now + ADMISSION_TICK;
            let now_ns = self.parts.clock.ns(now);
            self.parts.admission.policy.tick(now_ns, random_bytes);
        }
    }

    fn on_stop(&mut self, now: Instant) {
        self.parts.state.stopping.set(true);
        self.parts.board.begin_stop();
        self.parts.state.now.set(now);
        let at_once = self.parts.stop_mode.is_at_once();
        self.closed_at_once = at_once;
        let until = now
            + if at_once {
                CLOSE_TIMEOUT
            } else {
                self.parts.state.config.drain_timeout
            };
        self.stop_at = Some(until);
        for slot in 0..self.connections.len() {
            self.take_down(slot);
            if at_once {
                self.close(slot, CloseCode::Done);
            } else if let Some(connection) = &mut self.connections[slot]
                && connection.phase != Phase::Closing
            {
                connection.phase = Phase::Draining {
                    until: Some(until),
                    code: CloseCode::Done,
                };
                // From here on it counts what bodies move: their end is waited for.
                if let Some(session) = &mut connection.session {
                    session.drains_until(&connection.quic, now);
                }
            }
            self.mark_dirty(slot);
        }
    }

    fn is_stopped(&self, now: Instant) -> bool {
        // CONNECTION_CLOSE has left once every connection is closing; quiche's draining period is
        // for late packets, which a stopped process may leave unanswered.
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
