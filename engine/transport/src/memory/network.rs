//! N nodes in one thread over virtual time.
//!
//! Invariants
//! 1. Time moves only when nothing is left to do at the present.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_protocol::id::NodeId;
use millrace_protocol::rng::Rng;
use millrace_shards::chunk::{ChunkPool, PoolError};
use millrace_shards::config::HugePages;
use millrace_sim::memnet::{LinkConfig, MemNet, NetCounters};

use super::local::MemoryLocal;
use super::node::{Node, Wire, endpoint};
use super::tasks::Tasks;
use crate::config::TransportConfig;
use crate::counters::Counters;
use crate::service::handle::ShardState;
use crate::service::router::Service;

/// What a [`MemoryNetwork`] is like.
#[derive(Clone, Debug)]
pub struct MemoryConfig {
    /// Bounds and times of every node.
    pub transport: TransportConfig,
    /// Links that are not set by [`MemoryNetwork::set_link`]. With a capacity, `queue_bytes_max` must
    /// be over 17 KiB.
    pub link: LinkConfig,
    /// Chunk pool of each node.
    pub pool_bytes: u64,
    /// One pool for all nodes instead: its pages are touched once, which is most of the cost of a
    /// small network.
    pub shared_pool: Option<ChunkPool>,
    /// What chance follows from.
    pub seed: u64,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            transport: TransportConfig::default(),
            link: LinkConfig::default(),
            pool_bytes: 16 << 20,
            shared_pool: None,
            seed: 0,
        }
    }
}

/// Nodes, each with a handler, and the network between them.
pub struct MemoryNetwork<H: Service> {
    config: MemoryConfig,
    wire: Wire,
    /// A node that crashed leaves its place to the next of its id.
    nodes: Vec<Option<Node<H>>>,
    indices: BTreeMap<NodeId, usize>,
    tasks: Tasks,
    start: Instant,
}

impl<H: Service> std::fmt::Debug for MemoryNetwork<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryNetwork")
            .field("nodes", &self.indices)
            .field("elapsed", &self.elapsed())
            .finish_non_exhaustive()
    }
}

impl<H: Service> MemoryNetwork<H> {
    /// A network without nodes.
    pub fn new(config: MemoryConfig) -> Self {
        // The only look at a clock: times are counted from here.
        let start = Instant::now();
        let mut rng = Rng::new(config.seed);
        let net = MemNet::new(config.link, rng.next_u64());
        Self {
            config,
            wire: Wire::new(net, rng, start),
            nodes: Vec::new(),
            indices: BTreeMap::new(),
            tasks: Tasks::new(start),
            start,
        }
    }

    /// Starts a node that connects to all others, or starts one again that crashed.
    ///
    /// # Errors
    /// When there is no memory for its pool.
    ///
    /// # Panics
    /// When a node of this id runs.
    pub fn add_node(
        &mut self,
        id: NodeId,
        handler: impl FnOnce(MemoryLocal) -> H,
    ) -> Result<MemoryLocal, PoolError> {
        let pool = match &self.config.shared_pool {
            Some(pool) => pool.clone(),
            None => ChunkPool::new(self.config.pool_bytes, HugePages::Never)?,
        };
        let index = *self.indices.entry(id).or_insert(self.nodes.len());
        if index == self.nodes.len() {
            self.nodes.push(None);
        }
        assert!(self.nodes[index].is_none(), "the node runs");
        let transport = self.config.transport.clone();
        let now = self.wire.now;
        let shared = Rc::new(ShardState::new(
            transport,
            Arc::new(Counters::default()),
            now,
        ));
        let local = MemoryLocal::new(
            id,
            index,
            Rc::clone(&shared),
            pool.clone(),
            self.tasks.clone(),
        );
        let mut node = Node::new(id, index, handler(local.clone()), shared, pool);
        for (at, other) in self.nodes.iter_mut().enumerate() {
            if let Some(other) = other {
                other.meet(index, id, &mut self.wire);
                node.meet(at, other.id(), &mut self.wire);
            }
        }
        self.nodes[index] = Some(node);
        Ok(local)
    }

    /// Kills a node: its tasks end, and its peers are not told.
    pub fn crash(&mut self, id: &NodeId) {
        let index = self.index(id);
        if let Some(mut node) = self.nodes[index].take() {
            node.crash(&mut self.wire);
            self.tasks.end(index);
        }
    }

    /// The handler of a node that runs.
    pub fn handler(&mut self, id: &NodeId) -> Option<&mut H> {
        let index = *self.indices.get(id)?;
        self.nodes[index].as_mut().map(|node| &mut node.handler)
    }

    // --- the network ---

    /// Cuts two nodes off from each other; what is under way between them is lost.
    ///
    /// # Panics
    /// Here and below: when the network has no such node.
    pub fn cut(&mut self, a: &NodeId, b: &NodeId) {
        let (a, b) = (self.index(a), self.index(b));
        self.wire.net.cut(endpoint(a), endpoint(b));
    }

    /// Undoes a cut.
    pub fn heal(&mut self, a: &NodeId, b: &NodeId) {
        let (a, b) = (self.index(a), self.index(b));
        self.wire.net.heal(endpoint(a), endpoint(b));
    }

    /// Undoes all cuts.
    pub fn heal_all(&mut self) {
        self.wire.net.heal_all();
    }

    /// Sets one direction between two nodes.
    pub fn set_link(&mut self, from: &NodeId, to: &NodeId, config: LinkConfig) {
        let (from, to) = (self.index(from), self.index(to));
        self.wire.net.set_link(endpoint(from), endpoint(to), config);
    }

    /// Sets what links are like that were not set.
    pub fn set_default_link(&mut self, config: LinkConfig) {
        self.wire.net.set_default(config);
    }

    /// Packets since the start.
    pub fn net_counters(&self) -> NetCounters {
        self.wire.net.counters()
    }

    // --- time ---

    /// The virtual time.
    pub fn now(&self) -> Instant {
        self.wire.now
    }

    /// Virtual time since the start.
    pub fn elapsed(&self) -> Duration {
        self.wire.now - self.start
    }

    /// Runs for a virtual time.
    pub fn run_for(&mut self, duration: Duration) {
        self.run_until(duration, |_| false);
    }

    /// Runs until `done`, asked whenever something happened. False when it was not in `limit`.
    pub fn run_until(&mut self, limit: Duration, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        let until = self.wire.now + limit;
        loop {
            self.settle();
            if done(self) {
                return true;
            }
            if !self.advance(until) {
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

    /// Does all there is to do at this time.
    fn settle(&mut self) {
        loop {
            let mut any = self.tasks.run();
            for node in self.nodes.iter_mut().flatten() {
                any |= node.flush(&mut self.wire);
            }
            if !any {
                return;
            }
        }
    }

    /// Moves to the next time at which something happens. False when that is after `until`.
    fn advance(&mut self, until: Instant) -> bool {
        let waits = [
            self.wire.net.poll_timeout(),
            self.wire.wheel.next(),
            self.tasks.next_timeout(),
        ];
        let next = waits
            .into_iter()
            .flatten()
            .min()
            .filter(|next| *next <= until);
        self.set_now(next.unwrap_or(until));
        if next.is_none() {
            return false;
        }
        let now = self.wire.now;
        let mut due = Vec::new();
        self.wire.wheel.poll(now, &mut |timer| due.push(timer));
        for (node, other) in due {
            if let Some(node) = &mut self.nodes[node] {
                node.on_timer(other, &mut self.wire);
            }
        }
        while let Some(delivery) = self.wire.net.poll(now) {
            let (from, to) = (delivery.from.0 as usize, delivery.to.0 as usize);
            if let Some(node) = &mut self.nodes[to] {
                node.receive(from, delivery.message, &mut self.wire);
            }
        }
        true
    }

    fn set_now(&mut self, now: Instant) {
        let now = self.wire.now.max(now);
        self.wire.now = now;
        for node in self.nodes.iter().flatten() {
            node.shared.now.set(now);
        }
        self.tasks.set_now(now);
    }

    fn index(&self, id: &NodeId) -> usize {
        match self.indices.get(id) {
            Some(index) => *index,
            None => panic!("no node {id} in this network"),
        }
    }
}

impl<H: Service> Drop for MemoryNetwork<H> {
    fn drop(&mut self) {
        // Tasks, links and nodes hold each other: let go of them one by one.
        self.tasks.end_all();
        for node in self.nodes.iter_mut().flatten() {
            node.crash(&mut self.wire);
        }
    }
}
