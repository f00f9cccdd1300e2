//! What the tests of a node share.
#![allow(dead_code, reason = "shared by test crates")]

use std::net::SocketAddr;

use millrace_node::config::{Cores, HugePages, PathChoice};
use millrace_node::{ByteSize, CountingAllocator, Draft, Node, NodeConfig, PublicKey, SigningKey};
use millrace_testkit::PATIENCE;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new(std::alloc::System);

/// A node of one shard and little memory, on a port that the kernel chooses.
pub(crate) fn config() -> NodeConfig {
    let mut config = NodeConfig::default();
    config.listen.address = "127.0.0.1:0".parse().unwrap();
    // On a busy host too, no connection is dialled again for its profile.
    config.transport.path = PathChoice::Lan;
    config.shards.cores = Cores::List(vec![0]);
    config.shards.defaults.chunk_pool_bytes = ByteSize::mib(8);
    config.shards.defaults.huge_pages = HugePages::Never;
    config
}

/// Two nodes that `start` makes, by their index, connected to each other by version 1 of the
/// registry; and the draft of it.
pub(crate) fn pair(registry: &SigningKey, start: impl FnMut(usize) -> Node) -> ([Node; 2], Draft) {
    let nodes = [0, 1].map(start);
    let first = Draft::with_nodes("test", &nodes.each_ref().map(record)).unwrap();
    let signed = first.sign(registry).unwrap();
    for node in &nodes {
        assert!(node.offer_version(signed.clone()).unwrap());
    }
    for node in &nodes {
        node.wait_for_peers(1, PATIENCE).unwrap();
    }
    (nodes, first)
}

/// What the registry says of a node.
pub(crate) fn record(node: &Node) -> (PublicKey, SocketAddr) {
    (node.public_key(), node.address())
}
