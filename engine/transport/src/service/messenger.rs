//! The transport as the code above it is written against: on real sockets and in memory alike.

use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::rpc::RpcError;
use millrace_shards::chunk::ChunkPool;

use crate::service::handle::PendingAnswer;
use crate::service::message::{Payload, Request};
use crate::service::shard_messenger::ShardMessenger;

/// Requests and one-way messages to peers, from one shard.
pub trait Messenger {
    /// Asks `peer`. The answer comes to the returned future; dropping that takes the request back.
    fn request(&self, peer: &NodeId, request: Request) -> PendingAnswer;

    /// Tells `peer`, without an answer; the message is lost with its connection.
    fn send(
        &self,
        peer: &NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError>;

    /// Peers that are up and owned by this shard.
    fn peers(&self) -> Vec<NodeId>;

    /// Where bodies are put.
    fn pool(&self) -> &ChunkPool;
}

impl Messenger for ShardMessenger {
    fn request(&self, peer: &NodeId, request: Request) -> PendingAnswer {
        self.request(peer, request)
    }

    fn send(
        &self,
        peer: &NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError> {
        self.send(peer, class, method, body)
    }

    fn peers(&self) -> Vec<NodeId> {
        self.peers()
    }

    fn pool(&self) -> &ChunkPool {
        self.pool()
    }
}
