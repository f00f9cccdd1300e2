//! The world: nodes, network, virtual clock.
//!
//! 1. Events happen in the order of their times; messages before timers, lower nodes first.
//! 2. After every event the nodes that it touched are checked.

use crate::{
    conn::Packet,
    memnet::{Endpoint, LinkConfig, MemNet},
    node::{Node, address_of},
};
use millrace_protocol::{
    health::HealthConfig,
    id::{ConnectionNumber, NodeId, SubnetId},
    identity::{PublicKey, SigningKey},
    peers::PeersConfig,
    registry::NodeRecord,
    rng::Rng,
    topology::{Member, Topology},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Long enough for a packet with a full payload; only links with a capacity notice.
const PACKET_BYTES: u64 = 1200;

/// A world before it runs.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Nodes, all members of the first topology.
    pub nodes: u32,
    /// The network between them.
    pub link: LinkConfig,
    /// Their connection management.
    pub peers: PeersConfig,
    /// Their probes.
    pub health: HealthConfig,
    /// Silence that ends a connection.
    pub idle_timeout: Duration,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            nodes: 5,
            link: LinkConfig {
                latency: Duration::from_millis(5),
                jitter: Duration::from_millis(5),
                ..LinkConfig::default()
            },
            peers: PeersConfig::default(),
            health: HealthConfig::default(),
            idle_timeout: Duration::from_secs(3),
        }
    }
}

/// Simulated nodes over a simulated network. Node 0 has the lowest id, so it dials all others.
#[derive(Debug)]
pub struct Sim {
    config: SimConfig,
    origin: Instant,
    now: Instant,
    nodes: Vec<Node>,
    keys: Vec<PublicKey>,
    net: MemNet<Packet>,
    rng: Rng,
    events: u64,
    digest: u64,
}

impl Sim {
    /// Starts all nodes at `origin`, with a topology of all.
    pub fn new(config: SimConfig, seed: u64, origin: Instant) -> Self {
        let mut rng = Rng::new(seed);
        let mut keys: Vec<PublicKey> = (0..config.nodes)
            .map(|_| {
                let mut secret = [0; 32];
                rng.fill(&mut secret);
                SigningKey::from_seed(secret).public_key()
            })
            .collect();
        keys.sort_by_key(PublicKey::node_id);
        let nodes = keys
            .iter()
            .zip(0..)
            .map(|(key, n)| Node::new(key.node_id(), n, config.idle_timeout, config.health))
            .collect();
        let net = MemNet::new(config.link, rng.next_u64());
        let mut sim = Self {
            config,
            origin,
            now: origin,
            nodes,
            keys,
            net,
            rng,
            events: 0,
            digest: 0,
        };
        let all: Vec<usize> = (0..sim.len()).collect();
        let topology = Arc::new(sim.topology(&all, 1));
        for node in 0..sim.len() {
            sim.set_topology(node, Arc::clone(&topology));
            sim.restart(node);
        }
        sim
    }

    /// Number of nodes, crashed ones included.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// No nodes.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Name of a node.
    pub fn id(&self, node: usize) -> NodeId {
        self.nodes[node].id
    }

    /// Virtual time since the start.
    pub fn elapsed(&self) -> Duration {
        self.now - self.origin
    }

    /// A topology of these nodes.
    pub fn topology(&self, members: &[usize], version: u64) -> Topology {
        let member = |n: &usize| Member {
            public_key: self.keys[*n],
            addresses: vec![address_of(*n as u32)],
        };
        Topology::from_members(members.iter().map(member), version)
    }

    /// A registry record of a node.
    pub fn record(&self, node: usize, subnet: SubnetId) -> NodeRecord {
        let public_key = self.keys[node];
        let addresses = vec![address_of(node as u32)];
        NodeRecord {
            id: public_key.node_id(),
            public_key,
            subnet,
            addresses,
        }
    }

    /// Gives a node a topology; a crashed one starts with it.
    pub fn set_topology(&mut self, node: usize, topology: Arc<Topology>) {
        self.nodes[node].set_topology(topology, self.now);
        self.flush(node);
    }

    /// Cuts two nodes off from each other.
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

    /// Changes the network.
    pub fn set_link(&mut self, link: LinkConfig) {
        self.net.set_default(link);
    }

    /// Stops a node as kill -9 does.
    pub fn crash(&mut self, node: usize) {
        self.nodes[node].crash();
    }

    /// Whether a node runs.
    pub fn is_running(&self, node: usize) -> bool {
        self.nodes[node].peers.is_some()
    }

    /// Starts a crashed node; nothing happens to one that runs.
    pub fn restart(&mut self, node: usize) {
        if self.is_running(node) {
            return;
        }
        let seed = self.rng.next_u64();
        self.nodes[node].start(self.config.peers.clone(), seed, self.now);
        self.flush(node);
    }

    /// Whether both nodes count the same connection between them as current.
    pub fn connected(&self, a: usize, b: usize) -> bool {
        let ends = |x: usize, y: usize| self.nodes[x].current(&self.nodes[y].id);
        match (ends(a, b), ends(b, a)) {
            (Some((a, remote_of_a)), Some((b, remote_of_b))) => {
                remote_of_a == Some(b) && remote_of_b == Some(a)
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
        let current = self.nodes[a].peers.as_ref()?.current(&self.nodes[b].id);
        current.map(|(_, number)| number)
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

    /// Lets time pass.
    pub fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.step(end) {}
        self.now = end;
    }

    /// Lets time pass until `done` or the limit; true if done.
    pub fn run_until(&mut self, limit: Duration, done: impl Fn(&Self) -> bool) -> bool {
        let end = self.now + limit;
        while !done(self) {
            if !self.step(end) {
                self.now = end;
                return done(self);
            }
        }
        true
    }

    /// Events so far, and a digest of them: equal runs have equal ones.
    pub fn digest(&self) -> (u64, u64) {
        (self.events, self.digest)
    }

    /// The next moment at which something happens; false if that is after `end`.
    fn step(&mut self, end: Instant) -> bool {
        let timers = self.nodes.iter().filter_map(Node::poll_timeout);
        let Some(next) = timers.chain(self.net.poll_timeout()).min() else {
            return false;
        };
        if next > end {
            return false;
        }
        self.now = self.now.max(next);
        while let Some(delivery) = self.net.poll(self.now) {
            let Endpoint(to) = delivery.to;
            let sender = self.nodes[delivery.from.0 as usize].id;
            self.note(to.into(), &delivery.message);
            self.nodes[to as usize].receive(delivery.from, sender, delivery.message, self.now);
            self.flush(to as usize);
        }
        for node in 0..self.len() {
            if self.nodes[node]
                .poll_timeout()
                .is_some_and(|at| at <= self.now)
            {
                self.nodes[node].handle_timeout(self.now);
                self.flush(node);
            }
        }
        true
    }

    fn flush(&mut self, node: usize) {
        let from = self.nodes[node].endpoint;
        for (to, packet) in std::mem::take(&mut self.nodes[node].out) {
            self.net.send(from, to, packet, PACKET_BYTES, self.now);
        }
        self.nodes[node].check();
    }

    fn note(&mut self, to: u64, packet: &Packet) {
        self.events += 1;
        let text = format!("{:?} {to} {packet:?}", self.elapsed());
        // FNV-1a: the digest must not change with the standard library's hasher.
        for byte in text.bytes() {
            self.digest = (self.digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
