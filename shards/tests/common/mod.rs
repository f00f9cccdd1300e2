//! What the tests of this crate share.
#![allow(dead_code, reason = "each test takes what it needs")]

use millrace_shards::{HugePages, ShardConfig, ShardSocket, UdpGroupConfig, bind_group};

/// The defaults, without chunks: most tests move none.
pub(crate) fn config() -> ShardConfig {
    ShardConfig {
        chunk_pool_bytes: 0,
        huge_pages: HugePages::Never,
        ..ShardConfig::default()
    }
}

/// A socket of a group of one; port 0 takes a free one.
pub(crate) fn socket(local: &str) -> ShardSocket {
    let group = UdpGroupConfig {
        local: local.parse().unwrap(),
        ..UdpGroupConfig::default()
    };
    bind_group(&group).unwrap().remove(0)
}
