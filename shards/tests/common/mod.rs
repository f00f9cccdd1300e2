//! What the tests of this crate share.
#![allow(dead_code, reason = "each test takes what it needs")]

use std::time::Instant;

use millrace_shards::{
    Datagrams, Datapath, HugePages, ShardConfig, ShardSocket, Trains, Transmit, UdpGroupConfig,
    bind_group,
};

/// A datapath of a shard that only starts and stops.
pub(crate) struct Nothing;

impl Datapath for Nothing {
    type Message = ();

    fn on_message(&mut self, (): (), _: Instant) {}

    fn on_datagrams(&mut self, _: Datagrams<'_>, _: Instant) {}

    fn transmit(&mut self, _: &mut Trains<'_>, _: Instant) -> Transmit {
        Transmit::Done
    }

    fn has_pending(&self) -> bool {
        false
    }
}

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
