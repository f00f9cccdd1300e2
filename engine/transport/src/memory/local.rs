//! The handle of one node of the memory network.

use std::future::Future;
use std::rc::Rc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::rpc::RpcError;
use millrace_shards::chunk::ChunkPool;

use super::tasks::Tasks;
use crate::counters::Counters;
use crate::service::handle::{PendingAnswer, ShardState};
use crate::service::message::{Payload, Request};
use crate::service::messenger::Messenger;

/// Handle of one node: what [`crate::ShardMessenger`] is on a shard. Cheap to clone.
#[derive(Clone, Debug)]
pub struct MemoryLocal {
    me: NodeId,
    node: usize,
    shared: Rc<ShardState>,
    pool: ChunkPool,
    tasks: Tasks,
}

impl MemoryLocal {
    pub(super) fn new(
        me: NodeId,
        node: usize,
        shared: Rc<ShardState>,
        pool: ChunkPool,
        tasks: Tasks,
    ) -> Self {
        Self {
            me,
            node,
            shared,
            pool,
            tasks,
        }
    }

    /// Whose handle this is.
    pub fn node_id(&self) -> NodeId {
        self.me
    }

    /// The virtual time.
    pub fn now(&self) -> Instant {
        self.tasks.now()
    }

    /// Waits for a virtual time to pass.
    pub fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static {
        self.tasks.sleep(duration)
    }

    /// Runs a task of this node; it ends with the node.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.tasks.spawn(Some(self.node), task);
    }

    /// What this node's transport counts.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }
}

impl Messenger for MemoryLocal {
    fn request(&self, peer: &NodeId, request: Request) -> PendingAnswer {
        self.shared.request(peer, request)
    }

    fn send(
        &self,
        peer: &NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError> {
        self.shared.send(peer, class, method, body)
    }

    fn peers(&self) -> Vec<NodeId> {
        self.shared.peers()
    }

    fn pool(&self) -> &ChunkPool {
        &self.pool
    }
}
