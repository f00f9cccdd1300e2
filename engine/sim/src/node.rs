//! One simulated node: the product's machines and sessions, over modelled connections.
//!
//! It is what the endpoint of a shard is in the product, without what only sockets have: connection
//! IDs, TLS, admission, addresses that change, trains.
//!
//! Invariants
//! 1. A crash leaves nothing: no word to peers, no timer, no chunk.

mod running;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use millrace_protocol::frame::{Hello, VersionRange};
use millrace_protocol::id::{ConnectionNumber, NodeId};
use millrace_protocol::peers::ConnKey;
use millrace_protocol::topology::Topology;
use millrace_shards::chunk::ChunkPool;
use millrace_transport::driver::ShardState;
use millrace_transport::{Router, TransportConfig};

use crate::memnet::{Endpoint, MemNet};
use crate::messenger::{Parts, Paths, SimMessenger};
use crate::quic::packet::Packet;
use crate::tasks::Tasks;
use crate::wire::endpoint;
use running::{Running, Start};

/// Peers that are checked for each step.
const PEERS_CHECKED: usize = 32;

/// A node, running or not.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    index: usize,
    /// Where it is from its next start.
    pub(crate) endpoint: Endpoint,
    pool: ChunkPool,
    /// What its registry folder says: it survives a crash.
    topology: Arc<Topology>,
    /// What its release speaks.
    pub(crate) versions: VersionRange,
    /// Connections that the node ever had, so that no two have a name in common.
    connections_made: u64,
    running: Option<Running>,
    /// Steps in which something happened since the last check.
    unchecked_steps: usize,
}

impl Node {
    pub(crate) fn new(id: NodeId, index: usize, pool: ChunkPool, topology: Arc<Topology>) -> Self {
        Self {
            id,
            index,
            endpoint: endpoint(index),
            pool,
            topology,
            versions: Hello::VERSIONS,
            connections_made: 0,
            running: None,
            unchecked_steps: 0,
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
        origin: Instant,
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
        let mut running = Running::new(Start {
            id: self.id,
            endpoint: self.endpoint,
            router: make(messenger.clone()),
            state,
            paths,
            pool: self.pool.clone(),
            versions: self.versions,
            connections_made: self.connections_made,
            seed,
            origin,
            now,
        });
        running.set_topology(Arc::clone(&self.topology));
        self.running = Some(running);
        self.unchecked_steps += 1;
        messenger
    }

    /// As kill -9: nothing is sent, nothing is kept.
    pub(crate) fn crash(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        self.connections_made = running.abandon();
    }

    pub(crate) fn set_topology(&mut self, topology: Arc<Topology>) {
        self.topology = Arc::clone(&topology);
        self.unchecked_steps += 1;
        if let Some(running) = &mut self.running {
            running.set_topology(topology);
        }
    }

    pub(crate) fn set_now(&mut self, now: Instant) {
        if let Some(running) = &mut self.running {
            running.set_now(now);
        }
    }

    /// When [`Self::on_timeout`] is due.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.running.as_ref()?.next_timeout()
    }

    pub(crate) fn on_timeout(&mut self) {
        self.unchecked_steps += 1;
        if let Some(running) = &mut self.running {
            running.on_timeout();
        }
    }

    /// Takes a packet. `sender` is what the sender's key proves, where a key is involved.
    pub(crate) fn receive(&mut self, from: Endpoint, sender: NodeId, packet: Packet) {
        self.unchecked_steps += 1;
        if let Some(running) = &mut self.running {
            running.receive(from, sender, packet);
        }
    }

    /// Sends what is to be sent; false when there was nothing.
    pub(crate) fn flush(&mut self, net: &mut MemNet<Packet>) -> bool {
        let running = self.running.as_mut();
        let has_sent = running.is_some_and(|running| running.flush(net));
        self.unchecked_steps += usize::from(has_sent);
        has_sent
    }

    /// Replaces the current connection to a peer, if this node dials it. Whether that has begun.
    pub(crate) fn replace(&mut self, peer: &NodeId) -> bool {
        self.unchecked_steps += 1;
        let running = self.running.as_mut();
        running.is_some_and(|running| running.replace(peer))
    }

    /// The current connection to a peer: its number, and what both ends call it.
    pub(crate) fn current(
        &self,
        peer: &NodeId,
    ) -> Option<(ConnectionNumber, ConnKey, Option<ConnKey>)> {
        self.running.as_ref()?.current(peer)
    }

    /// What must hold after every step. It looks at all peers: of a node with more than
    /// [`PEERS_CHECKED`], after some steps only.
    pub(crate) fn check(&mut self, nodes: usize) {
        if self.unchecked_steps == 0 || self.unchecked_steps * PEERS_CHECKED < nodes {
            return;
        }
        self.unchecked_steps = 0;
        if let Some(running) = &self.running {
            running.check();
        }
    }
}
