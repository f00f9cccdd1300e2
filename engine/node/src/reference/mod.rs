//! The reference application: artifacts by SHA-256, published to all peers and fetched from any.
//!
//! A thin use of the transport. A publisher first announces id and length, so that a peer that has
//! the artifact is not sent it again, then sends the body as the body of a request. The peer
//! answers with the hash that it computed.
//!
//! | file | job |
//! |---|---|
//! | `artifacts.rs` | publishes and fetches, for threads that are no shard |
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
pub(crate) mod hash;
mod receiving;
pub(crate) mod service;
pub(crate) mod store;
pub mod wire;

pub use artifacts::{Artifacts, Delivery, FetchError};
pub use hash::{Hasher, of_body};
pub use store::{TooLarge, Usage};
