//! What two nodes say to each other over real sockets: requests, bodies, one-way messages,
//! cancellation, membership.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Barrier;
use std::time::{Duration, Instant};

use common::*;
use millrace_protocol::frame::{Class, FailureCode, Method};
use millrace_transport::counters::Family;
use millrace_transport::{Payload, RpcError, TransportConfig};

#[test]
fn a_request_is_answered_in_every_class_and_size() {
    let (a, b) = pair(&TransportConfig::default(), 64 << 20);
    for class in Class::ALL {
        for len in [
            0,
            1,
            1_000,
            16 << 10,
            (16 << 10) + 1,
            64 << 10,
            (64 << 10) + 1,
            3 << 20,
        ] {
            let body = if len > 64 << 10 {
                Payload::Chunks(a.body(len))
            } else {
                vec![len as u8; len].into()
            };
            let wanted = bytes_of(&body);
            let answer = a
                .transport
                .request(b.id(), request(ECHO, class, body))
                .wait(PATIENCE)
                .unwrap();
            assert_eq!(bytes_of(&answer), wanted, "{class:?} {len}");
        }
    }
    let refused = a
        .transport
        .request(b.id(), request(Method(99), Class::Normal, vec![1]))
        .wait(PATIENCE);
    assert_eq!(
        refused.unwrap_err(),
        RpcError::Peer(FailureCode::UnknownMethod)
    );
    let nobody = a
        .transport
        .request(key(9).node_id(), request(ECHO, Class::Normal, vec![1]))
        .wait(PATIENCE);
    assert_eq!(nobody.unwrap_err(), RpcError::NotConnected);
}

#[test]
fn bodies_of_100_mb_cross_both_ways_at_once() {
    const LEN: usize = 100_000_000;
    let (a, b) = pair(&TransportConfig::default(), 320 << 20);
    let to_b = a
        .transport
        .request(b.id(), request(ECHO, Class::Bulk, a.body(LEN)));
    let to_a = b
        .transport
        .request(a.id(), request(ECHO, Class::Bulk, b.body(LEN)));
    let (from_b, from_a) = (
        to_b.wait(PATIENCE * 4).unwrap(),
        to_a.wait(PATIENCE * 4).unwrap(),
    );
    let wanted: Vec<u8> = (0..LEN).map(|i| ((i * 31) >> 5) as u8).collect();
    assert!(bytes_of(&from_b) == wanted);
    assert!(bytes_of(&from_a) == wanted);
    drop((from_a, from_b));
}

#[test]
fn one_way_messages_arrive() {
    let (a, b) = pair(&TransportConfig::default(), 16 << 20);
    for i in 0..100 {
        a.transport
            .send(b.id(), Class::Normal, Method(7), vec![0; i].into())
            .unwrap();
    }
    for i in 0..100 {
        assert_eq!(
            b.wait_for(|e| matches!(e, Event::Message(..))),
            Event::Message(a.id(), i)
        );
    }
}

#[test]
fn refused_bodies_cost_the_connection_nothing() {
    let config = TransportConfig {
        receive_budget_peer_bytes: 128 << 10,
        ..Default::default()
    };
    let (a, b) = pair(&config, 16 << 20);
    let too_large = a.body(200_000);
    // More than the streams that a peer may have open: each one refused must be given back.
    for round in 0..12 {
        let refused: Vec<_> = (0..100)
            .map(|_| {
                let request = request(ECHO, Class::Bulk, too_large.clone());
                a.transport.request(b.id(), request)
            })
            .collect();
        for answer in refused {
            let error = answer.wait(PATIENCE).unwrap_err();
            assert_eq!(
                error,
                RpcError::Peer(FailureCode::TooLarge),
                "round {round}"
            );
        }
    }
    let fits = request(LENGTH, Class::Bulk, a.body(90_000));
    let answer = a.transport.request(b.id(), fits).wait(PATIENCE).unwrap();
    assert_eq!(bytes_of(&answer), 90_000_u64.to_le_bytes());
    assert_eq!(b.reason(Family::Rejected, "budget_peer_too_large"), 1_200);
    let downs = a
        .events
        .try_iter()
        .filter(|event| matches!(event, Event::Down(..)));
    assert_eq!(downs.count(), 0, "the connection lives on");
}

#[test]
fn a_deadline_ends_the_wait_of_the_asker() {
    let (a, b) = pair(&TransportConfig::default(), 16 << 20);
    let mut hang = request(HANG, Class::Normal, vec![1]);
    hang.deadline = Duration::from_millis(200).into();
    let late = a.transport.request(b.id(), hang).wait(PATIENCE);
    assert_eq!(late.unwrap_err(), RpcError::Timeout);
    assert_eq!(a.reason(Family::Failed, "timeout"), 1);
}

#[test]
fn requests_in_flight_are_bounded_and_fail_with_the_connection() {
    let mut config = TransportConfig::default();
    config.requests_in_max.normal = 4;
    let (a, b) = pair(&config, 16 << 20);
    let hanging: Vec<_> = (0..4)
        .map(|_| {
            a.transport
                .request(b.id(), request(HANG, Class::Normal, vec![1]))
        })
        .collect();
    let busy = a
        .transport
        .request(b.id(), request(HANG, Class::Normal, vec![1]))
        .wait(PATIENCE);
    assert_eq!(busy.unwrap_err(), RpcError::Peer(FailureCode::Busy));
    b.transport.shutdown();
    for answer in hanging {
        assert!(matches!(
            answer.wait(PATIENCE).unwrap_err(),
            RpcError::ConnectionLost | RpcError::Peer(_)
        ));
    }
}

#[test]
fn a_topology_change_cuts_and_joins_live_nodes() {
    let mut keys = [key(1), key(2), key(3)];
    keys.sort_by_key(|key| key.node_id());
    let [a, b, c] = keys;
    let addrs = [free_addr(), free_addr(), free_addr()];
    let all = [
        member(&a, addrs[0]),
        member(&b, addrs[1]),
        member(&c, addrs[2]),
    ];
    let two = topology(all[..2].to_vec(), 1);
    let three = topology(all.to_vec(), 2);
    let start = |key, addr, topology| {
        Node::start(key, addr, topology, TransportConfig::default(), 16 << 20)
    };
    let (a, b) = (start(a, addrs[0], &two), start(b, addrs[1], &two));
    let c = start(c, addrs[2], &three);
    a.wait_for_peers(&[b.id()]);
    // c knows the others, but they do not know it yet.
    c.wait_for_reason(Family::Closed, "transport_error", 0);
    for node in [&a, &b] {
        assert!(node.transport.update_topology(&three));
    }
    a.wait_for_peers(&[b.id(), c.id()]);
    b.wait_for_peers(&[a.id(), c.id()]);
    c.wait_for_peers(&[a.id(), b.id()]);
    for node in [&a, &b] {
        assert!(
            node.transport
                .update_topology(&topology(all[..2].to_vec(), 3))
        );
    }
    a.wait_for_peers(&[b.id()]);
    b.wait_for_peers(&[a.id()]);
    c.wait_for_peers(&[]);
    // Connection numbers rise when it comes back.
    let four = topology(all.to_vec(), 4);
    for node in [&a, &b] {
        assert!(node.transport.update_topology(&four));
    }
    a.wait_for_peers(&[b.id(), c.id()]);
    let number = || match a.wait_for(|e| matches!(e, Event::Up(peer, _) if *peer == c.id())) {
        Event::Up(_, number) => number,
        other => panic!("{other:?}"),
    };
    assert!(number() < number());
    // A thread that comes late with an older topology changes nothing.
    let older = topology(all[..2].to_vec(), 3);
    assert!(a.transport.update_topology(&older));
    assert_eq!(a.transport.peer_keys().len(), 2);
    let answer = a
        .transport
        .request(c.id(), request(ECHO, Class::Normal, vec![7]));
    assert_eq!(bytes_of(&answer.wait(PATIENCE).unwrap()), [7]);
}

#[test]
fn each_of_two_threads_that_shut_down_waits_for_the_end() {
    let (a, b) = pair(&TransportConfig::default(), 16 << 20);
    // It makes the end take as long as connections may drain.
    let _hanging = a
        .transport
        .request(b.id(), request(HANG, Class::Normal, vec![1]));
    b.wait_for(|event| matches!(event, Event::Hanging));
    let (transport, peer, both) = (&a.transport, b.id(), Barrier::new(2));
    std::thread::scope(|scope| {
        let shut_down = || {
            both.wait();
            transport.shutdown();
            let body = vec![1].into();
            let told = transport.send(peer, Class::Normal, TELL, body);
            assert_eq!(told, Err(RpcError::LocalShuttingDown));
        };
        let other = scope.spawn(shut_down);
        shut_down();
        other.join().unwrap();
    });
}

// Protects the end of a node from an orderly one that another thread began and that takes long.
#[test]
fn a_close_cuts_a_shutdown_short() {
    let config = TransportConfig {
        drain_timeout: 2 * PATIENCE,
        ..TransportConfig::default()
    };
    let (a, b) = pair(&config, 16 << 20);
    let hanging = a
        .transport
        .request(b.id(), request(HANG, Class::Normal, vec![1]));
    b.wait_for(|event| matches!(event, Event::Hanging));
    let began_at = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| a.transport.shutdown());
        let status = a.transport.status();
        assert!(status.wait(PATIENCE, <[_]>::is_empty), "it has begun");
        a.transport.close();
    });
    // Within a second, it says.
    assert!(began_at.elapsed() < PATIENCE);
    assert_eq!(
        hanging.wait(PATIENCE).unwrap_err(),
        RpcError::ConnectionLost
    );
}

#[test]
fn shards_share_the_work_and_each_peer_has_its_owner() {
    let keys: Vec<_> = (1..=6).map(key).collect();
    let addrs: Vec<_> = keys.iter().map(|_| free_addr()).collect();
    let topology = topology(
        keys.iter()
            .zip(&addrs)
            .map(|(key, addr)| member(key, *addr)),
        1,
    );
    let nodes: Vec<_> = keys
        .into_iter()
        .zip(&addrs)
        .map(|(key, addr)| {
            let shards = (0..3).map(|_| shard_config(16 << 20)).collect();
            Node::start_shards(key, *addr, &topology, TransportConfig::default(), shards)
        })
        .collect();
    for node in &nodes {
        let others: Vec<_> = nodes
            .iter()
            .map(Node::id)
            .filter(|id| *id != node.id())
            .collect();
        node.wait_for_peers(&others);
        for peer in node.transport.status().peers() {
            assert_eq!(peer.shard, usize::from(peer.node_id.owner_shard(0, 3)));
            let answer = node
                .transport
                .request(peer.node_id, request(ECHO, Class::Normal, vec![7; 100]))
                .wait(PATIENCE);
            assert_eq!(bytes_of(&answer.unwrap()), vec![7; 100]);
        }
    }
}
