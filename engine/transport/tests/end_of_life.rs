//! The end of a transport: dropping its last handle stops its threads and frees its address.
//!
//! One test, in a program of its own: it counts the threads of the process.
#![allow(clippy::unwrap_used)]

mod common;

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use common::{Event, HANG, pair, request};
use millrace_protocol::frame::Class;
use millrace_testkit::{threads_with, until};
use millrace_transport::{RpcError, TransportConfig};

const OURS: &str = "millrace-";

/// Threads of shards, by the name that they are given: the shard's index. Helpers that a shard's
/// thread starts have its name too.
fn shard_threads() -> usize {
    threads_with(|name| {
        let index = name.strip_prefix(OURS);
        index.is_some_and(|index| index.parse::<usize>().is_ok())
    })
}

// Protects embedders: handles and messengers used to hold each other, so that the threads went on
// and the address stayed taken.
#[test]
fn the_last_handle_stops_the_threads_and_frees_the_address() {
    let config = TransportConfig {
        // Far beyond what is promised: a drop that waits for what is under way would be seen.
        drain_timeout: Duration::from_secs(60),
        ..TransportConfig::default()
    };
    let (a, b) = pair(&config, 16 << 20);
    let of_both = shard_threads();
    assert!(of_both >= 2 && of_both.is_multiple_of(2), "{of_both}");
    // A request that hangs is not waited for.
    let hanging = a
        .transport
        .request(b.id(), request(HANG, Class::Normal, vec![1]));
    b.wait_for(|event| matches!(event, Event::Hanging));
    let address = a.transport.local_addr();
    assert!(UdpSocket::bind(address).is_err(), "the address is taken");
    let clone = a.transport.clone();
    drop(a);
    assert_eq!(shard_threads(), of_both, "a clone holds the transport");
    let dropped_at = Instant::now();
    drop(clone);
    let of_one = of_both / 2;
    until("the threads of the shard end", || shard_threads() == of_one);
    until("the address can be bound", || {
        UdpSocket::bind(address).is_ok()
    });
    // Promised within a second; a test that times allows ten times of it.
    assert!(dropped_at.elapsed() < Duration::from_secs(10));
    let lost = hanging.wait(Duration::from_secs(30)).unwrap_err();
    let ends = [RpcError::ConnectionLost, RpcError::LocalShuttingDown];
    assert!(ends.contains(&lost), "{lost}");
    drop(b);
    until("the other threads end, and the watchdog's", || {
        threads_with(|name| name.starts_with(OURS)) == 0
    });
}
