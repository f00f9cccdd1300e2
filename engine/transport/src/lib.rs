//! QUIC connections on shards: mutual TLS pinned to the registry, lanes, message streams, RPC, bulk
//! bodies.
//!
//! One `endpoint` for each shard plugs into the shard's loop. What speaks to peers is a
//! [`Service`]: it owns a range of methods in the [`Router`] of each shard and talks through a
//! [`Messenger`]. Other threads talk through [`Transport`].
//!
//! Invariants of the crate
//! 1. A connection belongs to one shard from its first packet to its last; nothing of it is shared.
//! 2. A body is received into chunks and sent from chunks: there is no `Vec<u8>` of it anywhere.
//! 3. What a peer can make grow has a bound in [`TransportConfig`], and a counter with a reason for
//!    what the bound refused.
#![forbid(unsafe_code)]

mod address;
mod admission;
mod allocator;
mod answers;
mod buffers;
pub mod carrier;
mod clock;
mod close_sender;
pub mod config;
mod connection;
pub mod counters;
mod dial_requests;
pub mod driver;
mod endpoint;
mod handshake_end;
mod heap_excess;
mod ids;
mod inbox;
mod log_limit;
mod mtu;
mod mtu_probe;
mod outbox;
mod pacing;
mod pair_keys;
mod path;
mod phase;
mod progress;
mod queue_account;
mod quic;
mod quic_connection;
#[cfg(test)]
mod quic_pair;
mod random;
#[cfg(test)]
mod room;
mod service;
mod session;
mod start;
mod status;
mod stop;
mod streams;
mod tls;
mod transport;
mod unread;

pub use admission::ConnectionCounts;
pub use clock::Clock;
pub use config::{CongestionControl, PerClass, ProfileConfig, TransportConfig};
pub use handshake_end::HandshakeRefusal;
pub use millrace_protocol::flood::FloodRates;
pub use millrace_protocol::frame::Negotiated;
pub use millrace_protocol::path::{PathConfig, PathProfile, RememberedPath};
pub use millrace_protocol::rpc::RpcError;
// What a service names, so that it needs no other crate.
pub use millrace_shards::Queue;
pub use millrace_shards::chunk::Body;
pub use quic::CloseCode;
pub use service::body::{BodyHead, BodyMode, BodySink, INLINE_BYTES_MAX, StreamedBody};
pub use service::message::{Answer, Deadline, Inbound, InboundBody, Payload, Request};
pub use service::messenger::{Messenger, PathInfo};
pub use service::pending::PendingAnswer;
pub use service::remote::RemoteAnswer;
pub use service::responder::{Defer, Responder};
pub use service::router::{Router, RouterError, Service};
pub use service::shard_messenger::ShardMessenger;
pub use start::{EdgeStart, StartError, TransportStart};
pub use status::{PeerStatus, ShardStatus, StatusBoard};
pub use tls::{Credentials, TlsError};
pub use transport::Transport;
