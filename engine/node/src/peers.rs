//! Which peers to ask, and in which order.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use millrace_protocol::id::NodeId;
use millrace_transport::{PeerStatus, Transport};

/// The peers that are up, each once, by ascending round trip.
pub(crate) fn nearest(transport: &Transport) -> Vec<NodeId> {
    let mut nearest: BTreeMap<NodeId, Duration> = BTreeMap::new();
    for peer in transport.status().peers() {
        let rtt = peer.rtt.unwrap_or(Duration::MAX);
        let held = nearest.entry(peer.node_id).or_insert(rtt);
        *held = rtt.min(*held);
    }
    let mut peers: Vec<_> = nearest.into_iter().collect();
    peers.sort_by_key(|(_, rtt)| *rtt);
    peers.into_iter().map(|(peer, _)| peer).collect()
}

/// The peers that are up.
pub(crate) fn all(transport: &Transport) -> BTreeSet<NodeId> {
    let peers = transport.status().peers();
    peers.iter().map(|peer| peer.node_id).collect()
}

/// How many peers there are among these connections.
pub(crate) fn distinct(connections: &[PeerStatus]) -> usize {
    let peers: BTreeSet<NodeId> = connections.iter().map(|one| one.node_id).collect();
    peers.len()
}
