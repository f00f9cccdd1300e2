//! What the tests of a node share.

use millrace_node::config::{Cores, HugePages};
use millrace_node::{ByteSize, NodeConfig};

/// A node of one shard and little memory, on a port that the kernel chooses.
pub(crate) fn config() -> NodeConfig {
    let mut config = NodeConfig::default();
    config.listen.address = "127.0.0.1:0".parse().unwrap();
    config.shards.cores = Cores::List(vec![0]);
    config.shards.defaults.chunk_pool_bytes = ByteSize::mib(8);
    config.shards.defaults.huge_pages = HugePages::Never;
    config
}
