//! A node that runs: what it holds, and the parts that carry it out.
//!
//! Invariants
//! 1. What [`Peers`] holds current is what its actions said, and exists.

mod connections;
mod decisions;
mod receiving;
mod sending;
mod timing;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::VersionRange;
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::peers::{Attempt, ConnKey, Peers};
use millrace_protocol::timer::{TimerId, Wheel};
use millrace_protocol::topology::Topology;
use millrace_shards::chunk::ChunkPool;
use millrace_transport::Router;
use millrace_transport::driver::{
    BodyAllocator, Phase, Session, ShardState, dial_requests, peers_config,
};

use crate::memnet::Endpoint;
use crate::messenger::Paths;
use crate::quic::Connection as QuicConnection;
use crate::quic::packet::Packet;

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

/// What a node is started with.
pub(super) struct Start {
    pub(super) id: NodeId,
    pub(super) endpoint: Endpoint,
    pub(super) router: Router,
    pub(super) state: Rc<ShardState>,
    pub(super) paths: Paths,
    pub(super) pool: ChunkPool,
    pub(super) versions: VersionRange,
    /// By its runs before this one.
    pub(super) connections_made: u64,
    pub(super) seed: u64,
    /// When the simulation began.
    pub(super) origin: Instant,
    pub(super) now: Instant,
}

/// A node that runs.
pub(super) struct Running {
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
    origin: Instant,
    now: Instant,
}

impl Running {
    /// A node without members.
    pub(super) fn new(start: Start) -> Self {
        let Start {
            id,
            endpoint,
            router,
            state,
            paths,
            pool,
            versions,
            connections_made,
            seed,
            origin,
            now,
        } = start;
        let mut wheel = Wheel::new(now);
        wheel.schedule(Timer::Housekeeping, now + HOUSEKEEPING);
        let peers = peers_config(state.config(), 0, 0, 1);
        Self {
            id,
            endpoint,
            router,
            paths,
            bodies: BodyAllocator::new(state.config().receive_budget(), pool),
            state,
            topology: Arc::new(Topology::empty()),
            versions,
            peers: Peers::new(id, peers, 0, seed, now),
            peers_timer: None,
            connections: BTreeMap::new(),
            connections_made,
            wheel,
            scratch: vec![0; SCRATCH_BYTES],
            out: Vec::new(),
            ups: BTreeMap::new(),
            origin,
            now,
        }
    }

    /// Ends the node without a word; gives the number of connections that it made.
    pub(super) fn abandon(self) -> u64 {
        self.state.stop();
        for connection in self.connections.into_values() {
            if let Some(session) = connection.session {
                session.abandon();
            }
        }
        self.connections_made
    }

    pub(super) fn set_topology(&mut self, topology: Arc<Topology>) {
        self.topology = Arc::clone(&topology);
        self.peers.set_topology(topology, self.now);
        self.run_actions();
    }

    pub(super) fn set_now(&mut self, now: Instant) {
        self.now = now;
        self.state.set_now(now);
    }

    /// The wall clock of every node, in milliseconds since 1970.
    fn wall_ms(&self) -> u64 {
        const WALL_MS: u64 = 1_800_000_000_000;
        WALL_MS + (self.now - self.origin).as_millis() as u64
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.wheel.next()
    }

    /// The current connection to a peer: its number, and what both ends call it.
    pub(super) fn current(
        &self,
        peer: &NodeId,
    ) -> Option<(ConnectionNumber, ConnKey, Option<ConnKey>)> {
        let (key, number) = self.peers.current(peer)?;
        let connection = self.connections.get(&slot_of(key))?;
        Some((number, key, connection.quic.remote()))
    }

    pub(super) fn check(&self) {
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

/// A key that two nodes have in common, and no other pair has. No node here forges, so it need be
/// no secret.
fn pair_key(a: &NodeId, b: &NodeId) -> dial_requests::Key {
    let half = |id: &NodeId| id.as_bytes()[..8].try_into().map_or(0, u64::from_le_bytes);
    let (k0, k1) = (half(a.min(b)), half(a.max(b)));
    dial_requests::Key { k0, k1 }
}

fn slot_of(key: ConnKey) -> usize {
    (key.0 & ((1 << KEY_SHIFT) - 1)) as usize
}
