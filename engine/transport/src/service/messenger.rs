//! The transport as the code above it is written against: on sockets and in the simulator alike.
//! [`Messenger`] states which messages keep their order.

use std::future::Future;
use std::time::{Duration, Instant};

use bytes::Bytes;
use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::rpc::RpcError;
use millrace_shards::Queue;
use millrace_shards::chunk::ChunkPool;

use super::message::{Payload, Request};
use super::pending::PendingAnswer;
use crate::config::PerClass;

/// What is known of the way to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathInfo {
    /// Smoothed round-trip time as QUIC measures it (RFC 9002, 5.3); `None` before the first
    /// sample.
    pub rtt: Option<Duration>,
    /// Body and frame bytes that wait to be sent, for each class; small frames of class bulk count
    /// as normal.
    pub queued_bytes: PerClass<u64>,
    /// Packets sent since the connection began.
    pub packets_sent: u64,
    /// Of them, packets that were declared lost.
    pub packets_lost: u64,
}

impl PathInfo {
    /// Two connections to one peer: the shorter round trip, the sum of the rest.
    pub(crate) fn beside(&self, other: &Self) -> Self {
        let rtts = [self.rtt, other.rtt].into_iter().flatten();
        let (one, two) = (&self.queued_bytes, &other.queued_bytes);
        Self {
            rtt: rtts.min(),
            queued_bytes: PerClass {
                latency: one.latency + two.latency,
                normal: one.normal + two.normal,
                bulk: one.bulk + two.bulk,
            },
            packets_sent: self.packets_sent + other.packets_sent,
            packets_lost: self.packets_lost + other.packets_lost,
        }
    }
}

/// Requests and one-way messages to the peers of a node, from one of its shards.
///
/// A peer that another shard owns is reached by that shard's mailbox. Cheap to clone; stays on its
/// shard.
///
/// # Order of one-way messages
///
/// Messages of class [`Class::Latency`] that one messenger, or one thread with a
/// [`Transport`](crate::Transport), sends to a peer arrive in the order in which they were sent.
/// Messages of the classes normal and bulk arrive in any order: a later one may come first. The
/// order holds within a connection, which [`Inbound::connection`](crate::Inbound::connection)
/// names: when it ends, its last messages are lost, and a connection that is replaced may still
/// deliver some of them after the first of the new one. Requests and answers keep no order.
pub trait Messenger: Clone + 'static {
    /// This node.
    fn node_id(&self) -> NodeId;

    /// Asks `peer`. The answer comes to the returned future; dropping that takes the request back.
    fn request(&self, peer: NodeId, request: Request) -> PendingAnswer;

    /// Tells `peer`, without an answer. The message is lost with its connection. Only class latency
    /// keeps the order of messages.
    ///
    /// # Errors
    /// [`RpcError::NotConnected`]; [`RpcError::LocalBusy`] when the queue of its class is full;
    /// [`RpcError::LocalTooLarge`] above the limit of bodies, and in class latency above that of
    /// lanes (16 KiB). For a peer of another shard only what its mailbox says: what the shard
    /// refuses later is counted there.
    fn send(
        &self,
        peer: NodeId,
        class: Class,
        method: Method,
        body: Payload,
    ) -> Result<(), RpcError>;

    /// As [`Self::send`] for a small body, which is copied once, into the packets' buffer.
    ///
    /// # Errors
    /// As [`Self::send`].
    fn send_slice(
        &self,
        peer: NodeId,
        class: Class,
        method: Method,
        body: &[u8],
    ) -> Result<(), RpcError> {
        self.send(peer, class, method, Bytes::copy_from_slice(body).into())
    }

    /// Tells all `peers` the same: one mailbox message for each shard that owns some of them, and
    /// one buffer for all. Which peers were refused, and why; see [`Self::send`].
    #[must_use = "these peers are not told"]
    fn send_to_all(
        &self,
        peers: &[NodeId],
        class: Class,
        method: Method,
        body: Payload,
    ) -> Vec<(NodeId, RpcError)>;

    /// Ready once all that refused a message of `class` to `peer` has fallen under half of its
    /// bound: queues (`lane_queue_bytes` for small messages, `stream_queue_messages` for the
    /// others) and requests in flight (`requests_out_max`). Ready at once when nothing has refused.
    /// Dropping the future ends the wait.
    ///
    /// Where several connections carry class bulk to `peer`: on a shard that has some of them, one
    /// of these with room is enough. On any other shard messages take turns over the shards that
    /// have some, and the wait is for the one that sends the next message. With a message of
    /// another task in between, the next one is another shard's, and may be refused again.
    ///
    /// # Errors
    /// [`RpcError::NotConnected`]; [`RpcError::ConnectionLost`] when the connection ends meanwhile;
    /// [`RpcError::LocalBusy`] when 1,024 futures wait for the connection already.
    fn on_writable(
        &self,
        peer: NodeId,
        class: Class,
    ) -> impl Future<Output = Result<(), RpcError>> + 'static;

    /// The peers of the whole node that are up, each once, in the order of their ids.
    fn peers(&self) -> Vec<NodeId>;

    /// What is known of the way to `peer`; `None` when it is not up. Up to 100 ms old.
    fn path(&self, peer: NodeId) -> Option<PathInfo>;

    /// Where bodies are put: this shard's chunks.
    fn pool(&self) -> &ChunkPool;

    /// The time; virtual in the simulator.
    fn now(&self) -> Instant;

    /// Waits for a time to pass.
    fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + 'static;

    /// Runs a task on this shard. It ends with the shard.
    fn spawn(&self, queue: Queue, task: impl Future<Output = ()> + 'static);
}
