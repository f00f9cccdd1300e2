//! Keys and node ids from small numbers: the same number gives the same node in every run.

use millrace_protocol::{id::NodeId, identity::SigningKey};

/// The key whose seed is 32 times `seed`.
pub fn key(seed: u8) -> SigningKey {
    SigningKey::from_seed([seed; 32])
}

/// The node of [`key`].
pub fn node_id(seed: u8) -> NodeId {
    key(seed).node_id()
}
