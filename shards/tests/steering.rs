//! The classic steering program, which every kernel takes without privilege.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "common/steering.rs"]
mod steering;

use millrace_shards::attach_classic_steering;
use steering::assert_steers_by_connection_id;

#[test]
fn the_classic_program_steers_by_connection_id() {
    for shards in [1, 2, 3] {
        assert_steers_by_connection_id(shards, |sockets| attach_classic_steering(sockets).unwrap());
    }
}
