//! The handle of one node of the memory network.

use std::future::Future;
use std::rc::Rc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::rpc::RpcError;
use millrace_shards::Queue;
use millrace_shards::chunk::ChunkPool;

use super::tasks::Tasks;
use crate::counters::Counters;
use crate::service::handle::ShardState;
use crate::service::message::{Payload, Request};
use crate::service::messenger::{Messenger, PathInfo};
use crate::service::pending::PendingAnswer;

/// Handle of one node: what [`crate::ShardMessenger`] is on a shard. Cheap to clone.
#[derive(Clone, Debug)]
pub struct MemoryLocal {
    me: NodeId,
    node: usize,
    state: Rc<ShardState>,
    pool: ChunkPool,
    tasks: Tasks,
}

impl MemoryLocal {
    pub(super) fn new(
        me: NodeId,
        node: usize,
        state: Rc<ShardState>,
        pool: ChunkPool,
        tasks: Tasks,
    ) -> Self {
        Self {
            me,
            node,
            state,
            pool,
            tasks,
        }
    }

    /// What this node's transport counts.
    pub fn counters(&self) -> &Counters {
        &self.state.counters
    }
}

impl Messenger for MemoryLocal {
    fn node_id(&self) -> NodeId {
        self.me
    }

    fn request(&self, peer: NodeId, request: Request) -> PendingAnswer {
        self.state.request(&peer, request)
    }

    fn send(
        &self,
        peer: NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError> {
        self.state.send(&peer, class, method, body)
    }

    fn send_to_all(
        &self,
        peers: &[NodeId],
        class: Class,
        method: Method,
        body: Payload,
    ) -> Vec<(NodeId, RpcError)> {
        let send = |peer: &NodeId| {
            let sent = self.send(*peer, class, method, body.clone());
            sent.err().map(|error| (*peer, error))
        };
        peers.iter().filter_map(send).collect()
    }

    fn on_writable(
        &self,
        peer: NodeId,
        class: Class,
    ) -> impl Future<Output = Result<(), RpcError>> + 'static {
        let wait = self.state.on_writable(&peer, class);
        async move { wait.await.map(drop) }
    }

    fn peers(&self) -> Vec<NodeId> {
        self.state.peers()
    }

    fn path(&self, _peer: NodeId) -> Option<PathInfo> {
        None
    }

    fn pool(&self) -> &ChunkPool {
        &self.pool
    }

    fn now(&self) -> Instant {
        self.tasks.now()
    }

    fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static {
        self.tasks.sleep(duration)
    }

    fn spawn(&self, _queue: Queue, task: impl Future<Output = ()> + 'static) {
        self.tasks.spawn(Some(self.node), task);
    }
}
