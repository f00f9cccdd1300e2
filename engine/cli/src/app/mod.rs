//! The reference application: artifacts by SHA-256, published to all peers and fetched from any.
//!
//! A thin use of the transport. A publisher first announces id and length, so that a peer that has the artifact is
//! not sent it again, then sends the body as the body of a request; the peer answers with the hash that it computed.
//!
//! Invariants
//! 1. The store holds only bodies whose hash was computed here.
//! 2. A body that its peer did not announce, or has another hash, is refused.
//! 3. Nothing here copies a body of more than 64 KiB.

pub(crate) mod announced;
pub(crate) mod handler;
pub(crate) mod hash;
pub(crate) mod store;
pub(crate) mod wire;
