//! Which peers are up, and how far they are.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use millrace_protocol::id::NodeId;
use millrace_transport::{PeerStatus, Transport};

/// The peers that are up, each with the shortest round trip of its connections; none while that is
/// not measured.
pub(crate) fn round_trips(transport: &Transport) -> BTreeMap<NodeId, Option<Duration>> {
    let mut peers: BTreeMap<NodeId, Option<Duration>> = BTreeMap::new();
    for peer in transport.status().peers() {
        let held = peers.entry(peer.node_id).or_default();
        *held = held.iter().copied().chain(peer.rtt).min();
    }
    peers
}

/// The peers that are up, each once, by ascending round trip.
pub(crate) fn nearest(transport: &Transport) -> Vec<NodeId> {
    let mut peers: Vec<_> = round_trips(transport).into_iter().collect();
    peers.sort_by_key(|(_, rtt)| rtt.unwrap_or(Duration::MAX));
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
