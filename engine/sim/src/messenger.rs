//! The handle of one simulated node.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::time::{Duration, Instant};

use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_shards::Queue;
use millrace_shards::chunk::ChunkPool;
use millrace_transport::counters::Counters;
use millrace_transport::driver::ShardState;
use millrace_transport::{Messenger, PathInfo, Payload, PendingAnswer, Request, RpcError};

use crate::tasks::Tasks;

/// What is known of the ways to the peers that are up; a node publishes it every 100 ms, as a shard
/// of the product does.
pub(crate) type Paths = Rc<RefCell<BTreeMap<NodeId, PathInfo>>>;

/// The [`Messenger`] of one simulated node. After its node has crashed, every request and message
/// fails.
#[derive(Clone, Debug)]
pub struct SimMessenger {
    parts: Rc<Parts>,
}

#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) id: NodeId,
    pub(crate) node: usize,
    pub(crate) state: Rc<ShardState>,
    pub(crate) paths: Paths,
    pub(crate) pool: ChunkPool,
    pub(crate) tasks: Tasks,
}

impl SimMessenger {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            parts: Rc::new(parts),
        }
    }

    /// What this node's transport counts.
    pub fn counters(&self) -> &Counters {
        self.parts.state.counters()
    }
}

impl Messenger for SimMessenger {
    fn node_id(&self) -> NodeId {
        self.parts.id
    }

    fn request(&self, peer: NodeId, request: Request) -> PendingAnswer {
        self.parts.state.request(&peer, request)
    }

    fn send(
        &self,
        peer: NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError> {
        self.parts.state.send(&peer, class, method, body)
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
        let wait = self.parts.state.on_writable(&peer, class);
        async move { wait.await.map(drop) }
    }

    fn peers(&self) -> Vec<NodeId> {
        self.parts.state.peers()
    }

    fn path(&self, peer: NodeId) -> Option<PathInfo> {
        self.parts.paths.borrow().get(&peer).copied()
    }

    fn pool(&self) -> &ChunkPool {
        &self.parts.pool
    }

    fn now(&self) -> Instant {
        self.parts.tasks.now()
    }

    fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static {
        self.parts.tasks.sleep(duration)
    }

    /// A node has one thread of tasks: `queue` is without effect.
    fn spawn(&self, _queue: Queue, task: impl Future<Output = ()> + 'static) {
        self.parts.tasks.spawn(Some(self.parts.node), task);
    }
}
