//! What the edge asks of the node that it runs in.

use std::collections::BTreeMap;

use millrace_edge_policy::siphash::Key;

use crate::plan::Firewall;

/// What the edge's threads ask of the node that they run in.
pub trait NodeProbe: Send + Sync + 'static {
    /// QUIC handshakes in progress on all shards, and the most that there may be.
    fn half_open(&self) -> (usize, usize);

    /// Keys of the registry peers, by node tag.
    fn peer_keys(&self) -> BTreeMap<u32, Key>;

    /// What the registry says now to a node with these roles.
    fn firewall(&self, roles: &[String]) -> Firewall;
}
