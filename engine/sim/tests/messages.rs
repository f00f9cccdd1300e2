//! Requests, bodies and failures between simulated nodes: as on sockets, under a virtual clock.

mod common;

use std::time::Duration;

use common::*;
use millrace_protocol::frame::{Class, FailureCode, Method};
use millrace_protocol::id::NodeId;
use millrace_protocol::rng::Rng;
use millrace_shards::chunk::ChunkPool;
use millrace_sim::SimConfig;
use millrace_sim::memnet::LinkConfig;
use millrace_transport::counters::{Counter, Family};
use millrace_transport::{Messenger, Payload, Responder, RpcError, TransportConfig};

#[test]
fn every_class_and_size_is_answered_and_gives_its_memory_back() {
    let mut testbed = Testbed::connected(SimConfig::default());
    for class in Class::ALL {
        for len in [
            4,
            100,
            16 << 10,
            (16 << 10) + 1,
            64 << 10,
            (64 << 10) + 1,
            1 << 20,
            3 << 20,
        ] {
            let question = payload(&testbed.node(0), 7, len);
            let answer = testbed.ask(0, 1, request(ECHO, class, question)).unwrap();
            assert!(
                content(&answer) == bytes(7, len),
                "{class:?} of {len} bytes"
            );
        }
        let answer = testbed
            .ask(1, 0, request(ECHO, class, Payload::Empty))
            .unwrap();
        assert!(answer.is_empty());
    }
    testbed.sim.run_for(1000 * MS);
    for node in 0..2 {
        assert_nothing_held(&testbed.node(node), "a chunk is held");
    }
}

#[test]
fn answers_may_come_later_and_requests_may_be_refused() {
    let mut testbed = Testbed::connected(SimConfig::default());
    let answer = testbed
        .ask(0, 1, request(LATER, Class::Normal, vec![0; 4]))
        .unwrap();
    assert_eq!(content(&answer), b"later");
    let unknown = testbed.ask(0, 1, request(Method(99), Class::Normal, vec![0; 4]));
    assert_eq!(
        unknown.unwrap_err(),
        RpcError::Peer(FailureCode::UnknownMethod)
    );
    let nobody = NodeId::from_bytes([9; 29]);
    let unsent = testbed
        .node(0)
        .request(nobody, request(ECHO, Class::Normal, Payload::Empty));
    assert_eq!(
        testbed.sim.run(PATIENCE, unsent).unwrap().unwrap_err(),
        RpcError::NotConnected
    );
    // A body above the receiver's budget for one peer is refused without its bytes.
    let mut config = SimConfig::default();
    config.transport.receive_budget_peer_bytes = 1 << 20;
    let mut testbed = Testbed::connected(config);
    let large = payload(&testbed.node(0), 1, 2 << 20);
    let refused = testbed.ask(0, 1, request(ECHO, Class::Bulk, large));
    assert_eq!(refused.unwrap_err(), RpcError::Peer(FailureCode::TooLarge));
    let counters = testbed.node(1);
    let reason = "budget_peer_too_large";
    assert_eq!(counters.counters().reason(Family::Rejected, reason), 1);
}

// Protects the promise of the classes: bulk delays latency by a train, not by itself.
#[test]
fn latency_passes_bulk() {
    let mut testbed = Testbed::connected(SimConfig {
        link: capacity(10_000_000),
        ..SimConfig::default()
    });
    let (a, b) = (testbed.node(0), testbed.id(1));
    let bulk: Vec<_> = (0..3)
        .map(|n| a.request(b, request(ECHO, Class::Bulk, body(&a, n, 3 << 20))))
        .collect();
    testbed.sim.run_for(100 * MS);
    let from = testbed.sim.elapsed();
    for len in [64, 32 << 10] {
        testbed
            .ask(0, 1, request(ECHO, Class::Latency, bytes(9, len)))
            .unwrap();
    }
    // Each waits for at most a train of 64 KiB and a packet there, 8 ms: the way back is free.
    let took = testbed.sim.elapsed() - from;
    assert!(took <= 32 * MS, "{took:?}");
    let from = testbed.sim.elapsed();
    for answer in bulk {
        testbed.sim.run(PATIENCE, answer).unwrap().unwrap();
    }
    let took = testbed.sim.elapsed() - from;
    assert!(took > 500 * MS, "9 MiB at 10 MB/s: {took:?}");
}

#[test]
fn a_cut_ends_the_connection_and_a_heal_brings_it_back() {
    let mut testbed = Testbed::connected(SimConfig {
        nodes: 3,
        ..SimConfig::default()
    });
    let (a, b, c) = (testbed.node(0), testbed.id(1), testbed.id(2));
    let waiting = a.request(b, request(HANG, Class::Normal, vec![0; 4]));
    let large = a.request(b, request(ECHO, Class::Bulk, body(&a, 1, 3 << 20)));
    testbed.sim.run_for(MS / 2);
    testbed.sim.cut(0, 1);
    for answer in [waiting, large] {
        let lost = testbed.sim.run(PATIENCE, answer).unwrap();
        assert_eq!(lost.unwrap_err(), RpcError::ConnectionLost);
    }
    assert_eq!(a.peers(), [c]);
    let refused = testbed.ask(0, 1, request(ECHO, Class::Normal, Payload::Empty));
    assert_eq!(refused.unwrap_err(), RpcError::NotConnected);
    let none = a.send(b, Class::Normal, ECHO, Payload::Empty);
    assert_eq!(none.unwrap_err(), RpcError::NotConnected);
    testbed
        .ask(0, 2, request(ECHO, Class::Normal, Payload::Empty))
        .unwrap();
    testbed.sim.heal(0, 1);
    assert!(testbed.sim.run_until(PATIENCE, |_| a.peers().len() == 2));
    testbed
        .ask(0, 1, request(ECHO, Class::Normal, vec![1; 4]))
        .unwrap();
    assert_eq!(testbed.links(0, b), [true, false, true]);
    assert_nothing_held(&a, "chunks of the lost body");
}

#[test]
fn a_crash_is_noticed_and_a_restart_joins() {
    let mut testbed = Testbed::connected(SimConfig::default());
    let (a, b) = (testbed.node(0), testbed.id(1));
    let waiting = a.request(b, request(LATER, Class::Normal, vec![0; 4]));
    testbed.sim.run_for(10 * MS);
    testbed.sim.crash(1);
    let lost = testbed.sim.run(PATIENCE, waiting).unwrap();
    assert_eq!(lost.unwrap_err(), RpcError::ConnectionLost);
    assert!(a.peers().is_empty() && testbed.node(1).peers().is_empty());
    testbed.sim.restart(1);
    assert!(testbed.sim.run_until(PATIENCE, |_| a.peers() == [b]));
    testbed
        .ask(1, 0, request(ECHO, Class::Normal, vec![0; 4]))
        .unwrap();
    // At once: the peer has not noticed that the one it talks to is gone.
    testbed.sim.crash(1);
    testbed.sim.restart(1);
    let again = testbed.node(1);
    let ups = |testbed: &Testbed| {
        let links = testbed.links(0, b);
        links.iter().filter(|up| **up).count()
    };
    assert_eq!((ups(&testbed), a.peers()), (2, vec![b]));
    let until = testbed.sim.elapsed() + PATIENCE;
    while ups(&testbed) < 3 {
        assert!(testbed.sim.elapsed() < until, "it does not come up again");
        testbed.sim.run_for(MS);
    }
    assert_eq!(again.peers(), [a.node_id()]);
    testbed
        .ask(0, 1, request(ECHO, Class::Normal, vec![0; 4]))
        .unwrap();
}

#[test]
fn a_deadline_ends_the_wait_at_its_time() {
    let mut testbed = Testbed::connected(SimConfig::default());
    let mut hang = request(HANG, Class::Latency, vec![0; 4]);
    hang.deadline = (250 * MS).into();
    let from = testbed.sim.elapsed();
    assert_eq!(testbed.ask(0, 1, hang).unwrap_err(), RpcError::Timeout);
    let took = testbed.sim.elapsed() - from;
    assert!((250 * MS..252 * MS).contains(&took), "{took:?}");
    let a = testbed.node(0);
    assert_eq!(a.counters().reason(Family::Failed, "timeout"), 1);
}

#[test]
fn the_server_sees_what_is_taken_back() {
    let mut testbed = Testbed::connected(SimConfig {
        link: capacity(10_000_000),
        ..SimConfig::default()
    });
    let (a, b) = (testbed.node(0), testbed.id(1));
    let dropped = a.request(b, request(HANG, Class::Normal, vec![0; 4]));
    let kept = a.request(b, request(HANG, Class::Normal, vec![0; 4]));
    testbed.sim.run_for(10 * MS);
    drop(dropped);
    testbed.sim.run_for(10 * MS);
    let cancelled: Vec<_> = testbed.with(1, |heard| {
        heard.parked.iter().map(Responder::is_cancelled).collect()
    });
    assert_eq!(cancelled, [true, false]);
    // Half of a body is there: its chunks go back, and no service hears of it.
    let large = a.request(b, request(ECHO, Class::Bulk, body(&a, 77, 3 << 20)));
    testbed.sim.run_for(100 * MS);
    let pool = testbed.node(1).pool().clone();
    let free = pool.free_chunks();
    assert_eq!(free + 3, pool.total_chunks());
    drop(large);
    testbed.sim.run_for(100 * MS);
    assert_eq!(pool.free_chunks(), free + 3);
    assert_eq!(a.pool().free_chunks(), free + 3);
    assert_eq!(testbed.with(1, |heard| heard.times.get(&77).copied()), None);
    let counters = testbed.node(1);
    assert_eq!(counters.counters().get(Counter::RequestsCancelled), 2);
    drop(kept);
}

// Protects a peer that sends a little too fast: reading that was held back goes on by its own
// timer, when nothing else happens on the connection, and nothing is lost.
#[test]
fn frames_that_were_held_back_are_read_when_their_time_has_come() {
    const SENT: u32 = 10_000;
    const PER_SECOND: u64 = 4_000;
    let mut config = SimConfig::default();
    config.transport.frames_per_second_max = PER_SECOND;
    config.transport.probe_interval = PATIENCE;
    config.transport.keep_alive = PATIENCE;
    let mut testbed = Testbed::connected(config);
    let (node, peer) = (testbed.node(0), testbed.id(1));
    for number in 0..SENT {
        let number = &number.to_le_bytes();
        node.send_slice(peer, Class::Normal, ECHO, number).unwrap();
    }
    let came = |testbed: &Testbed| testbed.with(1, |heard| heard.sends.len());
    testbed.sim.run_for(500 * MS);
    assert!(came(&testbed) < SENT as usize, "they are held back");
    assert_eq!(testbed.node(1).counters().get(Counter::FramesHeld), 1);
    let time = Duration::from_secs(u64::from(SENT) / PER_SECOND);
    testbed.sim.run_for(time);
    assert_eq!(came(&testbed), SENT as usize);
    testbed.with(1, |heard| {
        assert!((0..SENT).eq(heard.sends.iter().copied()));
    });
}

/// Requests and messages of all sizes over a bad network, in half of the runs with a cut that lasts
/// longer than an idle connection; returns the trace and how many requests failed.
fn storm(seed: u64, pool: &ChunkPool) -> (Vec<String>, usize) {
    let mut rng = Rng::new(seed);
    let link = LinkConfig {
        latency: rng.duration(MS / 10, 30 * MS),
        jitter: rng.duration(Duration::ZERO, 20 * MS),
        loss_ppm: rng.below(300_000) as u32,
        duplicate_ppm: rng.below(200_000) as u32,
        bytes_per_second: (rng.below(2) == 0).then(|| 5_000_000 + rng.below(100_000_000)),
        ordered: rng.below(2) == 0,
        ..LinkConfig::default()
    };
    let mut testbed = Testbed::connected(SimConfig {
        nodes: 3,
        link,
        // Shorter than the cut.
        transport: TransportConfig {
            idle_timeout: 3_000 * MS,
            ..TransportConfig::default()
        },
        seed,
        shared_pool: Some(pool.clone()),
        ..SimConfig::default()
    });
    let mut asked = Vec::new();
    for number in 0..12 {
        let (from, to) = (
            (number % 3) as usize,
            ((number / 3 + number + 1) % 3) as usize,
        );
        let to = if from == to { (to + 1) % 3 } else { to };
        let len = [20, 5_000, 40_000, 100_000, 700_000][rng.below(5) as usize];
        let class = Class::ALL[rng.below(3) as usize];
        let (messenger, peer) = (testbed.node(from), testbed.id(to));
        let sent = payload(&messenger, number, len);
        let mut echo = request(ECHO, class, sent);
        echo.deadline = Duration::from_secs(20).into();
        asked.push((number, len, to, messenger.request(peer, echo)));
        let message = payload(&messenger, 1000 + number, 4 + len / 10);
        messenger.send(peer, class, ECHO, message).ok();
        testbed.sim.run_for(rng.duration(Duration::ZERO, 5 * MS));
        if number == 6 && rng.below(2) == 0 {
            testbed.sim.cut(0, 1);
        }
    }
    testbed.sim.run_for(5000 * MS);
    testbed.sim.heal_all();
    let mut failed = 0;
    for (number, len, to, answer) in asked {
        let answer = testbed
            .sim
            .run(PATIENCE, answer)
            .expect("a deadline ends every request");
        let seen = testbed.with(to, |heard| heard.times.get(&number).copied());
        match answer {
            Ok(answer) => {
                assert!(
                    content(&answer) == bytes(number, len),
                    "seed {seed}, request {number}"
                );
                assert_eq!(seen, Some(1), "seed {seed}, request {number}");
            }
            Err(error) => {
                failed += 1;
                assert!(seen.unwrap_or(0) <= 1, "seed {seed}, request {number}");
                // No room: chunks that all requests want at a time are not there.
                let expected = [
                    RpcError::Timeout,
                    RpcError::ConnectionLost,
                    RpcError::NotConnected,
                    RpcError::LocalNoBudget,
                    RpcError::Peer(FailureCode::TooLarge),
                ];
                assert!(expected.contains(&error), "seed {seed}: {error}");
            }
        }
    }
    for node in 0..3 {
        let again = testbed.with(node, |heard| {
            let mut times = heard.times.iter();
            times.find(|(_, times)| **times > 1).map(|(n, _)| *n)
        });
        assert_eq!(again, None, "seed {seed}");
    }
    testbed.sim.run_for(5000 * MS);
    assert_nothing_held(&testbed.node(0), &format!("seed {seed}"));
    let trace = testbed.trace.take();
    (trace, failed)
}

#[test]
fn loss_delivers_once_or_says_so() {
    let pool = pool(24 << 20);
    // What the network drops is repeated; what fails was between the nodes that a cut parted.
    let failed: usize = (0..200).map(|seed| storm(seed, &pool).1).sum();
    assert!(
        (1..600).contains(&failed),
        "{failed} of 2,400 requests failed"
    );
}

#[test]
fn the_same_seed_is_the_same_run() {
    let pool = pool(24 << 20);
    for seed in [3, 4, 5, 6] {
        let (first, second) = (storm(seed, &pool), storm(seed, &pool));
        assert!(first.0.len() > 20);
        assert_eq!(first, second);
    }
    assert_ne!(storm(3, &pool), storm(4, &pool));
}
