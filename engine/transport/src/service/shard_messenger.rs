//! The transport as code on a shard sees it: requests and messages to peers that this shard owns, without a lock or a hop.

use std::future::Future;
use std::rc::Rc;

use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::rpc::RpcError;
use millrace_shards::chunk::ChunkPool;
use millrace_shards::{Queue, ShardContext};

use crate::service::handle::{PendingAnswer, ShardState};
use crate::service::message::{Payload, Request};
use crate::start::Transport;

/// Handle of one shard's transport. Cheap to clone; stays on its shard.
#[derive(Clone, Debug)]
pub struct ShardMessenger {
    state: Rc<ShardState>,
    context: ShardContext,
    transport: Transport,
}

impl ShardMessenger {
    pub(crate) fn new(state: Rc<ShardState>, context: ShardContext, transport: Transport) -> Self {
        Self {
            state,
            context,
            transport,
        }
    }

    /// Asks `peer`. The answer comes to the returned future; dropping that takes the request back.
    pub fn request(&self, peer: &NodeId, request: Request) -> PendingAnswer {
        self.state.request(peer, request)
    }

    /// Tells `peer`, without an answer; the message is lost with its connection.
    pub fn send(
        &self,
        peer: &NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError> {
        self.state.send(peer, class, method, body)
    }

    /// As [`ShardMessenger::send`] for a small body, which is copied straight into a lane.
    pub fn send_slice(
        &self,
        peer: &NodeId,
        class: Class,
        method: Method,
        body: &[u8],
    ) -> Result<(), RpcError> {
        let handle = self
            .state
            .handle_to(peer, false)
            .ok_or(RpcError::NotConnected)?;
        handle.send_slice(class, method, body)
    }

    /// Peers that are up and owned by this shard.
    pub fn peers(&self) -> Vec<NodeId> {
        self.state.peers()
    }

    /// Where bodies are put.
    pub fn pool(&self) -> &ChunkPool {
        &self.context.pool
    }

    /// Index of this shard.
    pub fn shard(&self) -> usize {
        self.context.index
    }

    /// Runs a task on this shard.
    pub fn spawn(&self, queue: Queue, task: impl Future<Output = ()> + 'static) {
        self.context.spawn_local(queue, task);
    }

    /// The node's transport, for peers of other shards.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }
}
