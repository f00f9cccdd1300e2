//! Requests that are given up when nothing of them comes forward any more, on slow and long paths.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use millrace_protocol::frame::{Class, FailureCode, Method};
use millrace_sim::memnet::LinkConfig;
use millrace_sim::{Sim, SimConfig};
use millrace_transport::counters::Family;
use millrace_transport::{Deadline, Messenger, ProfileConfig, Request, RpcError, TransportConfig};

const SECOND: Duration = Duration::from_secs(1);
/// Virtual: costs nothing.
const HOURS: Duration = Duration::from_secs(10 * 3_600);
const MIB: usize = 1 << 20;

/// Two nodes that are connected by such a link.
fn testbed(link: LinkConfig, transport: TransportConfig) -> Testbed {
    Testbed::connected(SimConfig {
        link,
        transport: TransportConfig {
            lan: ProfileConfig {
                initial_rtt: 333 * MS,
                ..transport.lan
            },
            ..transport
        },
        pool_bytes: 192 << 20,
        seed: 5,
        ..SimConfig::default()
    })
}

/// A path of 310 ms each way. What waits for it waits at the sender.
fn slow(bytes_per_second: u64) -> LinkConfig {
    LinkConfig {
        latency: 310 * MS,
        bytes_per_second: Some(bytes_per_second),
        queue_bytes_max: 64 << 10,
        ..LinkConfig::default()
    }
}

/// A request with a body, whose answer may be as long.
fn long(testbed: &Testbed, method: Method, len: usize) -> Request {
    Request {
        deadline: Deadline::Progress {
            answer_bytes_max: len as u64,
            patience: None,
        },
        ..request(method, Class::Bulk, payload(&testbed.node(0), 1, len))
    }
}

/// What becomes of a request, and how long that takes.
fn ask(testbed: &mut Testbed, request: Request) -> (Result<u64, RpcError>, Duration) {
    let began_at = testbed.sim.now();
    let answer = testbed.node(0).request(testbed.id(1), request);
    let answer = testbed.sim.run(HOURS, answer).expect("every request ends");
    (answer.map(|body| body.len()), testbed.sim.now() - began_at)
}

// Protects what is slow: 128 MiB take 15 minutes at 1.2 Mbit/s; and on a path of a quarter of the
// least rate a body takes as long as it takes, there and back. And what is long: a round trip of
// 150 ms at 300 Mbit/s. No answer is taken for one that is not read.
#[test]
fn a_body_that_comes_forward_arrives() {
    let long_path = LinkConfig {
        latency: 75 * MS,
        queue_bytes_max: 4 << 20,
        ..slow(37_500_000)
    };
    for (link, len) in [
        (slow(150_000), 128 * MIB),
        (slow(31_250), 24 * MIB),
        (long_path, 128 * MIB),
    ] {
        let bytes_per_second = link.bytes_per_second.unwrap();
        let mut testbed = testbed(link, TransportConfig::default());
        let request = long(&testbed, ECHO, len);
        let (answer, took) = ask(&mut testbed, request);
        assert_eq!(answer, Ok(len as u64));
        let least = Duration::from_secs(2 * len as u64 / bytes_per_second);
        assert!(took > least, "{took:?}");
        let unread = testbed
            .node(1)
            .counters()
            .reason(Family::Failed, "answer_unread");
        assert_eq!(unread, 0);
    }
}

// Protects the asker from a peer that stops in the middle, and the peer from an asker that does:
// both give up what stands still, long before its deadline, and keep the connection.
#[test]
fn a_body_that_stands_still_is_given_up_after_the_time_for_progress() {
    let mut testbed = testbed(slow(150_000), TransportConfig::default());
    let connection = testbed.sim.number(0, 1);
    let request = long(&testbed, ECHO, 128 * MIB);
    let answer = testbed.node(0).request(testbed.id(1), request);
    testbed.sim.run_for(100 * SECOND);
    // Enough for probes and their replies, and less than 64 KiB in a minute.
    let trickle = LinkConfig {
        queue_bytes_max: 5 << 10,
        ..slow(700)
    };
    testbed.sim.set_link(0, 1, trickle);
    let answer = testbed.sim.run(200 * SECOND, answer);
    let error = answer.expect("it is given up").unwrap_err();
    // Who gives it up first, this node or the peer.
    let by_peer = RpcError::Peer(FailureCode::DeadlineExceeded);
    let expected = [RpcError::Timeout, by_peer];
    assert!(expected.contains(&error), "{error}");
    testbed.sim.set_link(0, 1, slow(150_000));
    testbed.sim.run_for(200 * SECOND);
    assert_nothing_held(&testbed.node(1), "the part that had arrived");
    assert_eq!(testbed.sim.number(0, 1), connection);
}

// Protects a body whose connection is replaced under it: it arrives, a minute after
// `drain_timeout`; and the node from a replaced connection on which nothing comes forward.
#[test]
fn a_replaced_connection_finishes_its_body() {
    let mut testbed = testbed(slow(150_000), TransportConfig::default());
    let replace = |testbed: &mut Testbed| {
        let before = testbed.sim.number(0, 1);
        assert!(testbed.sim.replace(0, 1));
        let is_new = |sim: &Sim| sim.connected(0, 1) && sim.number(0, 1) > before;
        assert!(testbed.sim.run_until(20 * SECOND, is_new));
    };
    let len = 8 * MIB;
    let request = long(&testbed, ECHO, len);
    let answer = testbed.node(0).request(testbed.id(1), request);
    testbed.sim.run_for(20 * SECOND);
    replace(&mut testbed);
    let replaced_at = testbed.sim.now();
    let answer = testbed.sim.run(HOURS, answer).expect("it ends");
    assert_eq!(answer.map(|body| body.len()), Ok(len as u64));
    assert!(testbed.sim.now() - replaced_at > 60 * SECOND);

    let request = long(&testbed, HANG, MIB);
    let answer = testbed.node(0).request(testbed.id(1), request);
    testbed.sim.run_for(20 * SECOND);
    replace(&mut testbed);
    let answer = testbed.sim.run(5 * SECOND, answer).expect("it ends");
    assert_eq!(answer.unwrap_err(), RpcError::ConnectionLost);
}

// Protects a fetch from a peer that is silent: 128 MiB may take 18 minutes, their first byte not.
#[test]
fn a_silent_peer_holds_a_request_for_the_patience_only() {
    let mut testbed = testbed(slow(10_000_000), TransportConfig::default());
    let patience = TransportConfig::default().body_patience;
    let silent = |patience| Request {
        deadline: Deadline::Progress {
            answer_bytes_max: 128 << 20,
            patience,
        },
        ..request(HANG, Class::Bulk, bytes(1, 32))
    };
    // An asker that has others to ask waits for less than an interval of progress.
    let short = 300 * MS;
    let cases = [
        (silent(None), patience, 15 * SECOND),
        (long(&testbed, HANG, MIB), patience, 15 * SECOND),
        (silent(Some(short)), short, 10 * MS),
    ];
    for (request, patience, slack) in cases {
        let (answer, took) = ask(&mut testbed, request);
        assert_eq!(answer, Err(RpcError::Timeout));
        let over = took.saturating_sub(patience);
        assert!(took >= patience && over < slack, "{took:?}");
    }
    // The peer heard that it is given up.
    testbed.sim.run_for(SECOND);
    let parked = testbed.with(1, |heard| std::mem::take(&mut heard.parked));
    assert!(parked.len() == 3 && parked.iter().all(|one| one.is_cancelled()));
}

// Protects a body behind others: it waits for longer than its own time, here and at the peer, whose
// answers wait behind each other too.
#[test]
fn a_body_that_waits_behind_others_is_not_given_up() {
    let transport = TransportConfig {
        receive_budget_peer_bytes: 80 << 20,
        receive_budget_bytes: 160 << 20,
        ..TransportConfig::default()
    };
    let mut testbed = testbed(slow(125_000), transport);
    let (count, len) = (24, 2 * MIB);
    let answers: Vec<_> = (0..count)
        .map(|_| {
            let request = long(&testbed, ECHO, len);
            testbed.node(0).request(testbed.id(1), request)
        })
        .collect();
    let all = async move {
        let mut arrived = 0;
        for answer in answers {
            assert_eq!(answer.await.map(|body| body.len()), Ok(len as u64));
            arrived += 1;
        }
        arrived
    };
    assert_eq!(testbed.sim.run(HOURS, all), Some(count));
    let its_own_time = Duration::from_secs(30 + 2 * len as u64 / 125_000);
    assert!(testbed.sim.elapsed() > 4 * its_own_time);
    for node in 0..2 {
        let stalled = testbed
            .node(node)
            .counters()
            .reason(Family::Rejected, "peer_stalled");
        let unread = testbed
            .node(node)
            .counters()
            .reason(Family::Failed, "answer_unread");
        assert_eq!((stalled, unread), (0, 0));
    }
}
