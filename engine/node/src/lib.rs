//! A node of a subnet as a library: transport, registry, services, admin socket and edge, wired
//! together.
//!
//! [`Node::start`] starts one from a [`NodeConfig`] and [`NodeParts`]. `docs/embedding.md` walks
//! through an example. Nothing here prints, ends the process or reads the command line; errors are
//! enums by whose fault it is.
//!
//! | module | job |
//! |---|---|
//! | `node`, `parts` | the node: start, handle, end of life |
//! | `services` | the services of the node and of its embedder |
//! | `core` | what the threads of a node share |
//! | `reference` | the reference application: artifacts |
//! | `registry`, `topology`, `peers` | follows the registry; who is a member, who is near |
//! | `room` | whether all members have room on the shards |
//! | `admin`, `status`, `metrics` | the admin socket and what it shows |
//! | `edge` | what a node gives to its edge and hears from it |
//! | `tls_keys` | the TLS key in use and its certificate: rotated and renewed while the node runs |
//! | `state_lock`, `address` | what a node must have for itself alone: its state folder, its address |
//! | `mapping`, `budget`, `host`, `paths` | from the config to the parts; memory, host and files |

pub mod address;
pub mod admin;
pub mod budget;
mod core;
pub mod edge;
mod error;
pub mod host;
pub mod mapping;
mod metrics;
mod node;
mod parts;
mod path_memory;
mod paths;
mod payload;
mod peers;
pub mod reference;
pub mod registry;
mod room;
mod services;
mod state_lock;
pub mod status;
mod tls_keys;
mod topology;

pub use error::{NotConnected, NotReady, StartError};
pub use node::Node;
pub use parts::NodeParts;
pub use paths::Paths;
pub use registry::{Kept, RegistrySource};
pub use services::{FIRST_FREE_METHOD, Services};
pub use state_lock::StateLock;

// What a user of a node needs: one dependency is enough.
pub use millrace_protocol::frame::{Class, FailureCode, Method};
pub use millrace_protocol::id::{ArtifactId, ConnectionNumber, NodeId, SubnetId};
pub use millrace_protocol::identity::{PublicKey, SigningKey};
pub use millrace_protocol::registry::{RegistryError, RegistryVersion, SignedVersion};
pub use millrace_registry::{Draft, DraftError, KeyError, Versions, folder, keys};
pub use millrace_shards::chunk::{BodyMut, Chunk, ChunkPool};
pub use millrace_shards::config::ShardConfig;
pub use millrace_shards::{CountingAllocator, Queue};
pub use millrace_transport::{
    Answer, Body, BodyHead, BodyMode, BodySink, Defer, INLINE_BYTES_MAX, Inbound, InboundBody,
    Messenger, Negotiated, PathInfo, Payload, PeerStatus, PendingAnswer, PerClass, RemoteAnswer,
    Request, Responder, RpcError, Service, ShardMessenger, StatusBoard, StreamedBody, Transport,
};
pub use millrace_tuning::config;
pub use millrace_tuning::{ByteSize, NodeConfig, Parsed, Period, Problem, parse};
