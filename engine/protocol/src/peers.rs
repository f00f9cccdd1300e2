//! Connections of one shard: which peer to dial, which connection counts, when to try again.
//!
//! The shell makes and ends QUIC connections as the actions say, and reports what happened to
//! them; this machine decides. One machine per shard and connection index. After every input,
//! drain [`Peers::poll_action`], and call [`Peers::handle_timeout`] at [`Peers::poll_timeout`].
//!
//! 1. Only members of the topology whose owner is this shard have a connection; the lower id dials.
//! 2. A peer has at most one current connection, at most one that is not yet up, and at most one
//!    that drains: [`CONNECTIONS_PER_PEER_MAX`].
//! 3. A connection is up at the peer's first hello. It then gets a number above all earlier ones,
//!    and replaces the current one, which drains: as long as its messages come forward, up to
//!    `drain_max`, or until the next one is replaced.
//! 4. A dialler has at most one attempt under way per peer, always with a deadline; when it has
//!    no connection and no attempt, a redial is scheduled.
//!    At most `dials_max` attempts that are not slow are under way; further peers are queued.
//! 5. Redials back off from `base` to `cap`; only a connection that was up for `stable_after`
//!    resets that, so a peer that accepts and closes at once is not dialled in a loop.
//! 6. A connection is replaced while it is in use, on the shell's word, by one attempt: one that
//!    fails leaves the connection as it is.
//! 7. A dial request is authentic: the shell checked its MAC. It can bring a dial forward, name the
//!    address to dial next, and have a connection proved alive; `candidate.rs` bounds the second.
//! 8. Connections of one peer that come from one address and another in turn are of two nodes with
//!    one key: the newcomer is refused for longer each time; see `contest.rs`.

mod api;
mod candidate;
mod connection;
mod contest;
mod dial;
mod state;
#[cfg(test)]
mod tests;

pub use api::{
    Action, Attempt, CONNECTIONS_PER_PEER_MAX, CloseKind, CloseReason, ConnKey, Direction,
    PeersConfig, PeersCounters, Refusal,
};

use crate::{
    backoff::{Backoff, BackoffConfig},
    dial_request::DialRequest,
    id::{ConnectionNumber, NodeId},
    rng::Rng,
    timer::{TimerId, Wheel},
    topology::Topology,
};
use candidate::Candidate;
use contest::Contest;
use state::{Connection, Dial, State};
use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

/// Connection management of one shard.
#[derive(Debug)]
pub struct Peers {
    id: NodeId,
    config: PeersConfig,
    topology: Arc<Topology>,
    peers: BTreeMap<NodeId, Peer>,
    connections: BTreeMap<ConnKey, Connection>,
    timers: Wheel<Timer>,
    actions: VecDeque<Action>,
    rng: Rng,
    numbers_base: u64,
    numbers_given: u64,
    attempts: u64,
    counters: PeersCounters,
    /// Since all peers were last checked, in builds that check.
    unchecked_inputs: usize,
}

#[derive(Debug)]
struct Peer {
    /// Those of the topology; none while no name of the peer is resolved.
    addresses: Vec<SocketAddr>,
    next_address: usize,
    candidate: Candidate,
    contest: Contest,
    /// The address that was dialled last.
    dialled: Option<SocketAddr>,
    current: Option<ConnKey>,
    pending: Option<ConnKey>,
    draining: Option<ConnKey>,
    dial: Dial,
    last_dial: Option<Instant>,
    /// Attempts that dial requests cut short since the last connection: each grants the next more
    /// time.
    dial_request_restarts: u32,
    backoff: Backoff,
    /// Next dial, deadline of the attempt, or next dial request.
    timer: Option<TimerId>,
}

#[derive(Clone, Copy, Debug)]
enum Timer {
    Peer(NodeId),
    Connection(ConnKey),
}

impl Peers {
    /// A machine without peers. Connection numbers start above `numbers_base`, and differ from
    /// those of the process's other machines, of whatever shard and index, when all have the same
    /// base.
    pub fn new(
        id: NodeId,
        config: PeersConfig,
        numbers_base: u64,
        seed: u64,
        now: Instant,
    ) -> Self {
        Self {
            id,
            config,
            topology: Arc::new(Topology::empty()),
            peers: BTreeMap::new(),
            connections: BTreeMap::new(),
            timers: Wheel::with_resolution(now, Duration::from_millis(1)),
            actions: VecDeque::new(),
            rng: Rng::new(seed),
            numbers_base,
            numbers_given: 0,
            attempts: 0,
            counters: PeersCounters::default(),
            unchecked_inputs: 0,
        }
    }

    /// Takes a new topology: closes connections of nodes that are no longer members, and dials new
    /// members.
    pub fn set_topology(&mut self, topology: Arc<Topology>, now: Instant) {
        self.topology = topology;
        let gone: Vec<NodeId> = self
            .peers
            .keys()
            .filter(|id| !self.should_have(id))
            .copied()
            .collect();
        for peer in gone {
            self.remove_peer(peer);
        }
        self.counters.members_left_out = 0;
        let topology = Arc::clone(&self.topology);
        for (id, member) in topology.iter() {
            if self.should_have(id) {
                self.update_peer(*id, &member.addresses, now);
            }
        }
        self.dial_queued(now);
        self.invariants();
    }

    /// Judges a connection whose handshake has proved the peer's identity. On `Ok` the shell sends
    /// its hello and waits for the peer's.
    ///
    /// # Errors
    /// The reason why the shell must close the connection.
    pub fn handshake_done(
        &mut self,
        conn: ConnKey,
        peer: NodeId,
        direction: Direction,
        now: Instant,
    ) -> Result<(), Refusal> {
        let judged = self
            .judge(peer, direction)
            .and_then(|()| self.judge_source(peer, direction, now));
        if let Err(refusal) = judged {
            self.counters.refused += 1;
            return Err(refusal);
        }
        self.add_pending(conn, peer, direction, now);
        self.invariants();
        Ok(())
    }

    /// Takes the peer's hello: the connection is up.
    pub fn hello_received(&mut self, conn: ConnKey, now: Instant) {
        self.bring_up(conn, now);
        self.dial_queued(now);
        self.invariants();
    }

    /// Takes the report that a connection has ended.
    pub fn closed(&mut self, conn: ConnKey, kind: CloseKind, now: Instant) {
        self.forget(conn, kind, now);
        self.dial_queued(now);
        self.invariants();
    }

    /// Takes the report that a dial ended before its handshake was done.
    pub fn dial_failed(&mut self, attempt: Attempt, now: Instant) {
        let dialled = |peer: &Peer| peer.dial.attempt() == Some(attempt) && peer.pending.is_none();
        let found = self
            .peers
            .iter()
            .find(|(_, peer)| dialled(peer))
            .map(|(id, _)| *id);
        if let Some(peer) = found {
            self.redial_later(peer, now);
        }
        self.dial_queued(now);
        self.invariants();
    }

    /// Takes a dial request that came from `from`, is authentic, and is addressed to this node's
    /// machine of this index. `wall_ms` is the time in milliseconds since 1970.
    pub fn dial_requested(
        &mut self,
        request: &DialRequest,
        from: SocketAddr,
        wall_ms: u64,
        now: Instant,
    ) {
        self.heed_dial_request(request, from, wall_ms, now);
        self.dial_queued(now);
        self.invariants();
    }

    /// Grants the connection that [`Action::Verify`] named this time from now to show a sign of
    /// life; less than [`PeersConfig::verify_timeout`] changes nothing.
    pub fn verify_within(&mut self, conn: ConnKey, wait: Duration, now: Instant) {
        let verifying = self.connections.get(&conn).is_some_and(|c| c.verifying);
        if verifying && wait > self.config.verify_timeout {
            self.set_connection_timer(conn, now + wait);
        }
    }

    /// Takes the report that the peer sent something on a connection that [`Action::Verify`] named.
    pub fn verified(&mut self, conn: ConnKey) {
        if let Some(connection) = self.connections.get_mut(&conn)
            && connection.verifying
        {
            connection.verifying = false;
            self.stop_connection_timer(conn);
        }
    }

    /// Takes the report that messages of a replaced connection come forward: it is closed at
    /// `until` if no later report follows, and [`PeersConfig::drain_max`] after its replacement at
    /// the latest. A report never brings the end forward.
    pub fn drains_on(&mut self, conn: ConnKey, until: Instant) {
        self.drain_on(conn, until);
        self.invariants();
    }

    /// The current connection is to be replaced: dials its peer again while it goes on. Nothing
    /// happens where the peer dials, or where a dial is under way. Whether one began.
    pub fn replace(&mut self, conn: ConnKey, now: Instant) -> bool {
        let begun = self.dial_replacement(conn, now);
        self.invariants();
        begun
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        let mut due = Vec::new();
        self.timers.poll(now, &mut |timer| due.push(timer));
        for timer in due {
            match timer {
                Timer::Peer(peer) => self.peer_timeout(peer, now),
                Timer::Connection(conn) => self.connection_timeout(conn, now),
            }
        }
        self.dial_queued(now);
        self.invariants();
    }

    /// When to call [`Self::handle_timeout`]; none while nothing waits.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The connection to send on.
    pub fn current(&self, peer: &NodeId) -> Option<(ConnKey, ConnectionNumber)> {
        let conn = self.peers.get(peer)?.current?;
        match self.connections.get(&conn)?.state {
            State::Up { number, .. } => Some((conn, number)),
            _ => None,
        }
    }

    /// The peer of a connection that this machine knows.
    pub fn peer_of(&self, conn: ConnKey) -> Option<NodeId> {
        self.connections
            .get(&conn)
            .map(|connection| connection.peer)
    }

    /// Peers of this shard and their current connections, in the order of ids.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, Option<(ConnKey, ConnectionNumber)>)> {
        self.peers.keys().map(|id| (*id, self.current(id)))
    }

    /// Counts of events since the machine was made.
    pub fn counters(&self) -> PeersCounters {
        self.counters
    }

    /// Whether this machine keeps a connection to `peer`.
    fn should_have(&self, peer: &NodeId) -> bool {
        let PeersConfig {
            shard,
            shards,
            index,
            ..
        } = self.config;
        *peer != self.id
            && peer.owner_shard(index, shards) == shard
            && self.topology.member(&self.id).is_some()
            && self.topology.member(peer).is_some()
    }

    fn judge(&self, id: NodeId, direction: Direction) -> Result<(), Refusal> {
        let PeersConfig {
            shard,
            shards,
            index,
            ..
        } = self.config;
        if id == self.id {
            return Err(Refusal::SelfConnection);
        }
        if self.topology.member(&id).is_none() || self.topology.member(&self.id).is_none() {
            return Err(Refusal::NotAMember);
        }
        let is_inbound = matches!(direction, Direction::Inbound { .. });
        if is_inbound && id > self.id {
            return Err(Refusal::WrongDirection);
        }
        if id.owner_shard(index, shards) != shard {
            return Err(Refusal::WrongShard);
        }
        let Some(peer) = self.peers.get(&id) else {
            return Err(Refusal::TooMany);
        };
        match direction {
            Direction::Outbound(attempt)
                if peer.dial.attempt() != Some(attempt) || peer.pending.is_some() =>
            {
                Err(Refusal::StaleAttempt)
            }
            _ => Ok(()),
        }
    }

    fn update_peer(&mut self, id: NodeId, addresses: &[SocketAddr], now: Instant) {
        if let Some(peer) = self.peers.get_mut(&id) {
            if peer.addresses != addresses {
                peer.addresses = addresses.to_vec();
                peer.next_address = 0;
                peer.candidate.forget();
                self.addresses_changed(id, now);
            }
            return;
        }
        if self.peers.len() >= self.config.peers_max {
            self.counters.members_left_out += 1;
            return;
        }
        let dial_requests = BackoffConfig {
            base: self
                .config
                .backoff
                .base
                .min(self.config.dial_request_interval),
            cap: self.config.dial_request_interval,
        };
        let dials = self.id < id;
        let peer = Peer {
            addresses: addresses.to_vec(),
            next_address: 0,
            candidate: Candidate::default(),
            contest: Contest::default(),
            dialled: None,
            current: None,
            pending: None,
            draining: None,
            dial: if dials { Dial::Idle } else { Dial::Listening },
            last_dial: None,
            dial_request_restarts: 0,
            backoff: Backoff::new(if dials {
                self.config.backoff
            } else {
                dial_requests
            }),
            timer: None,
        };
        self.peers.insert(id, peer);
        self.seek(id, now);
    }

    fn remove_peer(&mut self, id: NodeId) {
        let Some(peer) = self.peers.remove(&id) else {
            return;
        };
        if let Some(timer) = peer.timer {
            self.timers.cancel(timer);
        }
        if let (Some(attempt), None) = (peer.dial.attempt(), peer.pending) {
            self.actions.push_back(Action::Abandon { attempt });
        }
        let reason = CloseReason::NotAMember;
        for conn in [peer.pending, peer.draining, peer.current]
            .into_iter()
            .flatten()
        {
            let state = self
                .drop_connection(conn)
                .map(|connection| connection.state);
            self.actions.push_back(Action::Close { conn, reason });
            if let Some(State::Up { number, .. }) = state {
                self.counters.downs += 1;
                self.actions.push_back(Action::Down { peer: id, number });
            }
        }
    }

    fn invariants(&mut self) {
        if !cfg!(debug_assertions) {
            return;
        }
        // With hundreds of peers, to look at all of them after each input takes most of the time.
        self.unchecked_inputs += 1;
        if self.unchecked_inputs * 32 < self.peers.len() {
            return;
        }
        self.unchecked_inputs = 0;
        let mut named = 0;
        for (id, peer) in &self.peers {
            assert!(self.should_have(id), "1: {id} is no peer of this shard");
            for conn in [peer.current, peer.pending, peer.draining]
                .into_iter()
                .flatten()
            {
                assert_eq!(self.connections.get(&conn).map(|c| c.peer), Some(*id), "2");
                named += 1;
            }
            let state = |conn: Option<ConnKey>| conn.map(|conn| &self.connections[&conn].state);
            assert!(
                matches!(state(peer.current), None | Some(State::Up { .. })),
                "2"
            );
            assert!(
                matches!(state(peer.pending), None | Some(State::Pending(_))),
                "2"
            );
            assert!(
                matches!(state(peer.draining), None | Some(State::Draining { .. })),
                "2"
            );
            assert_eq!(self.id < *id, peer.dial != Dial::Listening, "1");
            let seeks = peer.current.is_none() && peer.pending.is_none();
            assert!(
                !seeks || peer.timer.is_some(),
                "4: this node neither dials {id} nor asks it to"
            );
            assert!(
                peer.dial.attempt().is_none() || peer.current.is_none() || self.id < *id,
                "4"
            );
        }
        assert_eq!(
            named,
            self.connections.len(),
            "2: a connection without its peer"
        );
    }
}
