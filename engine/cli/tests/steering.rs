//! The steering program in eBPF, put to the tests of the classic one. Here, since only this crate
//! knows both groups and programs.
#![allow(clippy::unwrap_used, reason = "test code")]

#[path = "../../../shards/tests/common/steering.rs"]
mod steering;

use std::os::fd::AsFd as _;

use millrace_edge::privileges::missing;
use millrace_edge::steer::Steering;
use millrace_shards::{ShardSocket, attach_steering};
use millrace_testkit::skip;
use steering::assert_steers_by_connection_id;

/// As a node does.
fn attach(sockets: &[ShardSocket]) {
    let steering = Steering::load(sockets.len() as u32).unwrap_or_else(|error| panic!("{error}"));
    for (shard, socket) in (0..).zip(sockets) {
        steering.set_socket(shard, socket.as_fd()).unwrap();
    }
    attach_steering(sockets, steering.program().unwrap().as_fd()).unwrap();
}

// Protects connections when a node gets or loses privileges: both programs send an ID to the same
// shard.
#[test]
fn the_ebpf_program_steers_by_connection_id() {
    if !skip::has_all("the_ebpf_program_steers_by_connection_id", &missing()) {
        return;
    }
    for shards in [2, 3] {
        assert_steers_by_connection_id(shards, attach);
    }
}
