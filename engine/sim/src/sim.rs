//! The simulation: nodes, network, virtual clock.
//!
//! 1. Events happen in the order of their times; messages before timers, lower nodes first.
//! 2. After every step the nodes to which something happened are checked; where they are more than
//!    32, each after some of its steps.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::VersionRange;
use millrace_protocol::id::{ConnectionNumber, NodeId, SubnetId};
use millrace_protocol::identity::{PublicKey, SigningKey};
use millrace_protocol::registry::NodeRecord;
use millrace_protocol::rng::Rng;
use millrace_protocol::topology::{Member, Topology};
use millrace_shards::chunk::{ChunkPool, PoolError};
use millrace_shards::config::HugePages;
use millrace_transport::{Router, TransportConfig};

use crate::memnet::{Endpoint, LinkConfig, MemNet, NetCounters};
use crate::messenger::SimMessenger;
use crate::node::Node;
use crate::quic::digest::Digest;
use crate::quic::packet::Packet;
use crate::tasks::Tasks;
use crate::wire::{address_of, endpoint};

/// A simulation before it runs.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Nodes, all members of the first topology; at least one.
    pub nodes: usize,
    /// Bounds and times of every node. What a model has no use for is without effect: congestion
    /// control, MTU discovery, bounds of handshakes, connections per peer.
    pub transport: TransportConfig,
    /// Links that are not set by [`Sim::set_link`]. With a capacity, `queue_bytes_max` must be over
    /// 4 KiB.
    pub link: LinkConfig,
    /// Chunk pool of each node, bytes.
    pub pool_bytes: u64,
    /// One pool for all nodes instead: its pages are touched once, which is most of the cost of a
    /// small simulation.
    pub shared_pool: Option<ChunkPool>,
    /// What chance follows from, keys of nodes included.
    pub seed: u64,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            nodes: 2,
            transport: TransportConfig::default(),
            link: LinkConfig::default(),
            pool_bytes: 16 << 20,
            shared_pool: None,
            seed: 0,
        }
    }
}

/// Simulated nodes over a simulated network, named by their indices. Node 0 has the lowest id, so
/// it dials all others.
pub struct Sim {
    config: SimConfig,
    origin: Instant,
    now: Instant,
    nodes: Vec<Node>,
    messengers: Vec<SimMessenger>,
    keys: Vec<PublicKey>,
    make: Box<dyn Fn(SimMessenger) -> Router>,
    net: MemNet<Packet>,
    tasks: Tasks,
    rng: Rng,
    events: u64,
    digest: Digest,
}

impl std::fmt::Debug for Sim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sim")
            .field("nodes", &self.nodes.len())
            .field("elapsed", &self.elapsed())
            .finish_non_exhaustive()
    }
}

impl Sim {
    /// Starts all nodes at `origin`, with a topology of all. `make` is called for each start of a
    /// node, and makes its services.
    ///
    /// # Errors
    /// When there is no memory for the nodes' pools.
    pub fn new(
        config: SimConfig,
        origin: Instant,
        make: impl Fn(SimMessenger) -> Router + 'static,
    ) -> Result<Self, PoolError> {
        let mut rng = Rng::new(config.seed);
        let mut keys: Vec<PublicKey> = (0..config.nodes)
            .map(|_| {
                let mut secret = [0; 32];
                rng.fill(&mut secret);
                SigningKey::from_seed(secret).public_key()
            })
            .collect();
        keys.sort_by_key(PublicKey::node_id);
        let net = MemNet::new(config.link, rng.next_u64());
        let mut sim = Self {
            config,
            origin,
            now: origin,
            nodes: Vec::new(),
            messengers: Vec::new(),
            keys,
            make: Box::new(make),
            net,
            tasks: Tasks::new(origin),
            rng,
            events: 0,
            digest: Digest::default(),
        };
        let all: Vec<usize> = (0..sim.keys.len()).collect();
        let topology = Arc::new(sim.topology(&all, 1));
        for index in all {
            let pool = match &sim.config.shared_pool {
                Some(pool) => pool.clone(),
                None => ChunkPool::new(sim.config.pool_bytes, HugePages::Never)?,
            };
            let id = sim.keys[index].node_id();
            sim.nodes
                .push(Node::new(id, index, pool, Arc::clone(&topology)));
            let messenger = sim.start(index);
            sim.messengers.push(messenger);
        }
        Ok(sim)
    }

    // --- nodes ---

    /// Number of nodes, crashed ones included.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// No nodes.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Name of a node.
    ///
    /// # Panics
    /// Here and below: when there is no node of this index.
    pub fn id(&self, node: usize) -> NodeId {
        self.nodes[node].id
    }

    /// The handle of a node, of its last start.
    pub fn messenger(&self, node: usize) -> &SimMessenger {
        &self.messengers[node]
    }

    /// Stops a node as kill -9 does: its tasks end, its peers are not told.
    pub fn crash(&mut self, node: usize) {
        self.nodes[node].crash();
        self.tasks.end(node);
    }

    /// Whether a node runs.
    pub fn is_running(&self, node: usize) -> bool {
        self.nodes[node].is_running()
    }

    /// Starts a crashed node; nothing happens to one that runs.
    pub fn restart(&mut self, node: usize) {
        if !self.is_running(node) {
            self.messengers[node] = self.start(node);
        }
    }

    /// Starts a crashed node at an address of its own that no topology of [`Self::topology`] names;
    /// nothing happens to one that runs. `place` tells its addresses apart; 0 is the one that
    /// topologies name.
    pub fn restart_at(&mut self, node: usize, place: usize) {
        if !self.is_running(node) {
            self.nodes[node].endpoint = endpoint(node + place * self.nodes.len());
            self.restart(node);
        }
    }

    /// Gives a node the release that speaks these versions, from its next start.
    pub fn set_versions(&mut self, node: usize, versions: VersionRange) {
        self.nodes[node].versions = versions;
    }

    fn start(&mut self, node: usize) -> SimMessenger {
        let seed = self.rng.next_u64();
        let config = &self.config.transport;
        let (origin, now) = (self.origin, self.now);
        self.nodes[node].start(config, seed, origin, now, &self.tasks, &*self.make)
    }

    // --- membership ---

    /// A topology of these nodes.
    pub fn topology(&self, members: &[usize], version: u64) -> Topology {
        let member = |n: &usize| Member::new(self.keys[*n], vec![address_of(endpoint(*n))]);
        let members = members.iter().map(member);
        Topology::from_members(members, version)
    }

    /// The record of a node in a registry version.
    pub fn record(&self, node: usize, subnet: SubnetId) -> NodeRecord {
        let addresses = vec![address_of(endpoint(node)).into()];
        NodeRecord::new(self.keys[node], subnet, addresses)
    }

    /// Tells a node of a topology; it keeps it over a crash.
    pub fn set_topology(&mut self, node: usize, topology: Arc<Topology>) {
        self.nodes[node].set_topology(topology);
    }

    // --- the network ---

    /// Cuts two nodes off from each other; what is under way between them is lost.
    pub fn cut(&mut self, a: usize, b: usize) {
        self.net.cut(self.nodes[a].endpoint, self.nodes[b].endpoint);
    }

    /// Undoes a cut.
    pub fn heal(&mut self, a: usize, b: usize) {
        self.net
            .heal(self.nodes[a].endpoint, self.nodes[b].endpoint);
    }

    /// Undoes all cuts.
    pub fn heal_all(&mut self) {
        self.net.heal_all();
    }

    /// Sets one direction between two nodes.
    pub fn set_link(&mut self, from: usize, to: usize, config: LinkConfig) {
        let (from, to) = (self.nodes[from].endpoint, self.nodes[to].endpoint);
        self.net.set_link(from, to, config);
    }

    /// Sets what links are like that were not set.
    pub fn set_default_link(&mut self, config: LinkConfig) {
        self.net.set_default(config);
    }

    /// Packets since the start.
    pub fn net_counters(&self) -> NetCounters {
        self.net.counters()
    }

    // --- connections ---

    /// Has a node replace its current connection to another while that goes on, as for a path that
    /// turned out to be another than its connection was made for. False where the other one dials.
    pub fn replace(&mut self, node: usize, other: usize) -> bool {
        let peer = self.nodes[other].id;
        self.nodes[node].replace(&peer)
    }

    /// Whether both nodes count the same connection between them as current.
    pub fn connected(&self, a: usize, b: usize) -> bool {
        let current = |x: usize, y: usize| self.nodes[x].current(&self.nodes[y].id);
        match (current(a, b), current(b, a)) {
            (Some((_, of_a, remote_of_a)), Some((_, of_b, remote_of_b))) => {
                remote_of_a == Some(of_b) && remote_of_b == Some(of_a)
            }
            _ => false,
        }
    }

    /// Whether either node counts a connection to the other as current.
    pub fn half_connected(&self, a: usize, b: usize) -> bool {
        self.number(a, b).is_some() || self.number(b, a).is_some()
    }

    /// Number of `a`'s current connection to `b`.
    pub fn number(&self, a: usize, b: usize) -> Option<ConnectionNumber> {
        let current = self.nodes[a].current(&self.nodes[b].id);
        current.map(|(number, ..)| number)
    }

    /// Whether every pair of these nodes is connected.
    pub fn all_connected(&self, nodes: &[usize]) -> bool {
        let pairs = nodes
            .iter()
            .flat_map(|a| nodes.iter().map(move |b| (*a, *b)));
        pairs
            .filter(|(a, b)| a < b)
            .all(|(a, b)| self.connected(a, b))
    }

    // --- time ---

    /// The virtual time.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Virtual time since the start.
    pub fn elapsed(&self) -> Duration {
        self.now - self.origin
    }

    /// Lets time pass.
    pub fn run_for(&mut self, time: Duration) {
        self.run_until(time, |_| false);
    }

    /// Lets time pass until `done`, asked whenever something happened. False when it was not in
    /// `limit`.
    pub fn run_until(&mut self, limit: Duration, mut done: impl FnMut(&Self) -> bool) -> bool {
        let end = self.now + limit;
        loop {
            self.settle();
            if done(self) {
                return true;
            }
            if !self.advance(end) {
                return false;
            }
        }
    }

    /// Runs until a future is ready, and returns what it gave; `None` when it was not in `limit`.
    pub fn run<T: 'static>(
        &mut self,
        limit: Duration,
        future: impl Future<Output = T> + 'static,
    ) -> Option<T> {
        let output = Rc::new(RefCell::new(None));
        let place = Rc::clone(&output);
        self.spawn(async move {
            let value = future.await;
            *place.borrow_mut() = Some(value);
        });
        self.run_until(limit, |_| output.borrow().is_some());
        output.take()
    }

    /// Runs a task that belongs to no node.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.tasks.spawn(None, task);
    }

    /// Events so far, and a digest of them: equal runs have equal ones.
    pub fn digest(&self) -> (u64, u64) {
        (self.events, self.digest.value())
    }

    /// Does all there is to do at this time.
    fn settle(&mut self) {
        loop {
            let mut any = self.tasks.run();
            for node in &mut self.nodes {
                any |= node.flush(&mut self.net);
            }
            if !any {
                break;
            }
        }
        let count = self.nodes.len();
        for node in &mut self.nodes {
            node.check(count);
        }
    }

    /// Moves to the next time at which something happens. False when that is after `end`.
    fn advance(&mut self, end: Instant) -> bool {
        let nodes = self.nodes.iter().filter_map(Node::next_timeout);
        let others = [self.net.poll_timeout(), self.tasks.next_timeout()];
        let next = nodes.chain(others.into_iter().flatten()).min();
        let next = next.filter(|next| *next <= end);
        self.set_now(next.unwrap_or(end));
        if next.is_none() {
            return false;
        }
        while let Some(delivery) = self.net.poll(self.now) {
            // A node's endpoints are its index, and that plus multiples of the number of nodes.
            let node = |endpoint: Endpoint| endpoint.0 as usize % self.nodes.len();
            let (from, to) = (node(delivery.from), node(delivery.to));
            self.note(to, &delivery.message);
            let sender = self.nodes[from].id;
            // What goes to an address that a node has left is lost.
            if self.nodes[to].endpoint == delivery.to {
                self.nodes[to].receive(delivery.from, sender, delivery.message);
            }
        }
        for node in &mut self.nodes {
            if node.next_timeout().is_some_and(|at| at <= self.now) {
                node.on_timeout();
            }
        }
        true
    }

    fn set_now(&mut self, now: Instant) {
        self.now = self.now.max(now);
        for node in &mut self.nodes {
            node.set_now(self.now);
        }
        self.tasks.set_now(self.now);
    }

    fn note(&mut self, to: usize, packet: &Packet) {
        self.events += 1;
        let at = self.elapsed().as_nanos() as u64;
        self.digest.add_all([at, to as u64]);
        packet.note(&mut self.digest);
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        // Tasks, sessions and services hold each other: let go of them one by one.
        self.tasks.end_all();
        for node in &mut self.nodes {
            node.crash();
        }
    }
}
