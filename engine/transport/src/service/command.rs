//! What crosses into a shard by its mailbox.

use std::sync::Arc;

use millrace_protocol::frame::{Class, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::topology::Topology;

use super::message::{Payload, Request};
use super::remote::{CallId, RemoteCompletion};
use crate::pair_keys::DialKeys;
use crate::quic::ShardTls;

/// A message to a shard. Small, since its mailbox holds room for thousands: what is larger is
/// boxed.
#[derive(Debug)]
pub(crate) enum Command {
    /// Who the members are now, and what dials to them prove themselves with.
    Topology(Arc<Topology>, DialKeys),
    /// The TLS key and certificate of connections to come.
    Tls(Box<ShardTls>),
    /// Asks a peer.
    Request(Box<RemoteRequest>),
    /// The asker no longer wants the answer.
    Cancel(Box<CallId>),
    /// Tells peers of this shard.
    Send(Box<RemoteSend>),
    /// Waits until a peer's queue takes messages again.
    OnWritable(Box<RemoteWait>),
}

/// A request of another shard or thread.
#[derive(Debug)]
pub(crate) struct RemoteRequest {
    pub(crate) peer: NodeId,
    pub(crate) request: Request,
    pub(crate) completion: RemoteCompletion,
}

/// A one-way message of another shard or thread.
#[derive(Debug)]
pub(crate) struct RemoteSend {
    pub(crate) peers: Recipients,
    pub(crate) class: Class,
    pub(crate) method: Method,
    pub(crate) body: Payload,
}

/// A wait of another shard for room to send.
#[derive(Debug)]
pub(crate) struct RemoteWait {
    pub(crate) peer: NodeId,
    pub(crate) class: Class,
    pub(crate) completion: RemoteCompletion,
}

/// Peers of one shard.
#[derive(Debug)]
pub(crate) enum Recipients {
    One(NodeId),
    /// All of a fan-out that this shard owns.
    Many(Vec<NodeId>),
}

impl Recipients {
    pub(crate) fn as_slice(&self) -> &[NodeId] {
        match self {
            Self::One(peer) => std::slice::from_ref(peer),
            Self::Many(peers) => peers,
        }
    }
}

/// What the shard's memory budget counts for a message.
const _: () = assert!(size_of::<Command>() <= 64);
