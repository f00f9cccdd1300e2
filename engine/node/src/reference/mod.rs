//! The reference application: artifacts by SHA-256, published to all peers and fetched from any.
//!
//! A thin use of the transport. A publisher first announces id and length, so that a peer that has
//! the artifact is not sent it again, then sends the body as the body of a request. The peer
//! answers with the hash that it computed. A node that fetches asks some peers at once whether they
//! hold the artifact, and then one that does for its body.
//!
//! | file | job |
//! |---|---|
//! | `artifacts.rs` | a node's artifacts, for threads that are no shard |
//! | `publish.rs`, `fetch.rs` | sends an artifact to all peers; fetches one from one of them |
//! | `network.rs` | what these two need of the node: requests to peers |
//! | `candidates.rs` | which peers are asked, and in which order |
//! | `waits.rs` | how long a peer is waited for |
//! | `racing.rs` | futures that run beside each other |
//! | `service.rs` | answers peers, on each shard |
//! | `announced.rs` | what peers announced and have not sent yet |
//! | `store.rs` | what is held |
//! | `hash.rs` | the id of a body |
//! | `wire.rs` | methods and the forms of their bodies |
//!
//! 1. The store holds only bodies whose hash was computed here.
//! 2. A body that its peer did not announce, or that has another hash, is refused.
//! 3. Nothing here copies a body of more than 64 KiB.

pub(crate) mod announced;
pub(crate) mod artifacts;
mod candidates;
mod fetch;
pub(crate) mod hash;
mod network;
mod publish;
mod racing;
mod receiving;
pub(crate) mod service;
pub(crate) mod store;
mod waits;
pub mod wire;

pub use artifacts::Artifacts;
pub use fetch::FetchError;
pub use hash::{Hasher, of_body};
pub use publish::Delivery;
pub use store::{TooLarge, Usage};
