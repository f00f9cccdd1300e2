//! The end of shards leaves no thread behind. One test: it counts the threads of its process.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use common::{Nothing, config};
use millrace_shards::{ShardHandle, spawn};
use millrace_testkit::{threads_with, until};

fn start(index: usize) -> ShardHandle<()> {
    spawn(config(), index, 2, None, |_| Nothing).unwrap()
}

fn stop(shard: ShardHandle<()>) {
    shard.stop();
    shard.join().unwrap();
}

fn watchdogs() -> usize {
    threads_with(|name| name == "millrace-watch")
}

#[test]
fn the_watchdog_ends_with_the_last_shard_and_starts_again() {
    for _ in 0..3 {
        let (first, second) = (start(0), start(1));
        // A new thread gives itself its name, a moment after its start.
        until("the watchdog is there", || watchdogs() == 1);
        stop(first);
        assert_eq!(watchdogs(), 1, "a shard is left");
        stop(second);
        // The kernel takes a thread out of the list a moment after the join.
        until("all threads end", || {
            threads_with(|name| name.starts_with("millrace")) == 0
        });
    }
}
