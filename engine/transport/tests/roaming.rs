//! Connection IDs after the handshake: they follow a peer whose NAT gives it another port, and they
//! are replaced before they end.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[path = "common/relay.rs"]
mod relay;

use std::net::UdpSocket;
use std::time::Duration;

use common::*;
use millrace_edge_policy::cid::{Kind, ROAMING_EPOCH_SHIFT};
use millrace_protocol::frame::Class;
use millrace_protocol::identity::SigningKey;
use millrace_transport::counters::Counter;
use millrace_transport::{Clock, EdgeStart, TransportConfig};
use relay::Relay;

const POOL_BYTES: u64 = 64 << 20;

/// A dialler that reaches its listener through a relay. Both have two shards and one clock.
struct Testbed {
    dialler: Node,
    listener: Node,
    relay: Relay,
    clock: Clock,
}

impl Testbed {
    fn new() -> Self {
        let mut keys = [key(1), key(2)];
        keys.sort_by_key(SigningKey::node_id);
        let [a, b] = keys;
        let (at, bt, nat) = (free_addr(), free_addr(), free_addr());
        // The listener does not know where the dialler is: it would request a dial, past the relay.
        let seen = |at, listener| topology([member(&a, at), member(&b, listener)], 1);
        let (inside, outside) = (seen(at, nat), seen(free_addr(), bt));
        let clock = Clock::new();
        let start = |key: &SigningKey, at, topology| {
            let shards = vec![shard_config(POOL_BYTES); 2];
            let config = TransportConfig::default();
            let edge = EdgeStart {
                clock: clock.clone(),
                ..EdgeStart::default()
            };
            Node::start_behind(key.clone(), at, topology, config, shards, edge)
        };
        let listener = start(&b, bt, &outside);
        let relay = Relay::start(nat, bt);
        let dialler = start(&a, at, &inside);
        dialler.wait_for_peers(&[listener.id()]);
        listener.wait_for_peers(&[dialler.id()]);
        Self {
            dialler,
            listener,
            relay,
            clock,
        }
    }

    /// Waits until both directions use IDs for which `wanted` holds, and nothing else, while small
    /// requests go to and fro.
    fn wait_for_ids(&self, wanted: impl Fn(Kind, u8) -> bool) {
        let until = std::time::Instant::now() + PATIENCE;
        loop {
            self.relay.forget();
            self.ask(100, Class::Normal);
            let held = self.relay.wait(Duration::from_millis(100), |passed| {
                let mut ids = [&passed.to_listener, &passed.to_dialler].into_iter();
                ids.all(|ids| !ids.is_empty() && ids.iter().all(|id| wanted(id.kind, id.epoch)))
            });
            if held {
                return;
            }
            assert!(std::time::Instant::now() < until, "the IDs did not come");
        }
    }

    fn ask(&self, len: usize, class: Class) {
        let request = request(ECHO, class, self.dialler.body(len));
        let answer = self.dialler.transport.request(self.listener.id(), request);
        assert_eq!(bytes_of(&answer.wait(PATIENCE).unwrap()).len(), len);
    }

    fn assert_never_down(&self) {
        for node in [&self.dialler, &self.listener] {
            let downs = node.events.try_iter();
            assert_eq!(
                downs
                    .filter(|event| matches!(event, Event::Down(..)))
                    .count(),
                0,
                "the connection lives on"
            );
        }
    }
}

#[test]
fn a_peer_that_changes_its_port_keeps_its_connection_and_its_shard() {
    const REBINDS: u64 = 4;
    const BODY_BYTES: usize = 12 << 20;
    let mut testbed = Testbed::new();
    testbed.wait_for_ids(|kind, _| kind == Kind::Roaming);
    let shard_of = |testbed: &Testbed| {
        let peers = testbed.listener.transport.status().peers();
        (peers[0].shard, peers[0].address)
    };
    let (shard, first) = shard_of(&testbed);
    assert_eq!(first, Some(testbed.relay.address()));
    for n in 1..=REBINDS {
        // A body each way, cut in the middle of the dialler's.
        testbed.relay.forget();
        let body = request(ECHO, Class::Bulk, testbed.dialler.body(BODY_BYTES));
        let answer = testbed
            .dialler
            .transport
            .request(testbed.listener.id(), body);
        let half = BODY_BYTES / 1_452 / 2;
        assert!(
            testbed
                .relay
                .wait(PATIENCE, |passed| passed.datagrams >= half)
        );
        testbed.relay.rebind();
        let bytes = bytes_of(&answer.wait(PATIENCE).unwrap());
        assert_eq!(bytes.len(), BODY_BYTES);
        testbed.listener.wait_for_count(Counter::Migrations, n);
        let address = testbed.relay.address();
        let moved = |peers: &[millrace_transport::PeerStatus]| peers[0].address == Some(address);
        assert!(testbed.listener.transport.status().wait(PATIENCE, moved));
        assert_eq!(shard_of(&testbed), (shard, Some(address)));
    }
    // And while nothing is carried: a sign of life is enough.
    testbed.relay.rebind();
    testbed
        .listener
        .wait_for_count(Counter::Migrations, REBINDS + 1);
    testbed.ask(100, Class::Normal);
    testbed.assert_never_down();
}

// Protects the connection: a host on the path that repeats packets is not the peer.
#[test]
fn a_packet_repeated_from_another_port_moves_nobody() {
    let testbed = Testbed::new();
    testbed.ask(100, Class::Normal);
    let repeater = UdpSocket::bind((testbed.relay.address().ip(), 0)).unwrap();
    for _ in 0..10 {
        let packet = testbed.relay.last_short();
        repeater
            .send_to(&packet, testbed.listener.transport.local_addr())
            .unwrap();
        // Behind it in the listener's queue.
        testbed.ask(100, Class::Normal);
    }
    assert_eq!(testbed.listener.count(Counter::Migrations), 0);
    repeater
        .set_read_timeout(Some(Duration::from_millis(1)))
        .unwrap();
    assert!(
        repeater.recv_from(&mut [0; 2_000]).is_err(),
        "nothing is sent there"
    );
    testbed.assert_never_down();
}

#[test]
fn ids_are_replaced_before_they_end() {
    let testbed = Testbed::new();
    let epoch = |clock: &Clock| (clock.ns(std::time::Instant::now()) >> ROAMING_EPOCH_SHIFT) as u8;
    testbed.wait_for_ids(|kind, _| kind == Kind::Roaming);
    for _ in 0..3 {
        let before = epoch(&testbed.clock);
        // Longer than any ID may go without being replaced, so that they are issued in a later
        // epoch.
        testbed
            .clock
            .skip(Duration::from_nanos(3 << (ROAMING_EPOCH_SHIFT - 1)));
        let now = epoch(&testbed.clock);
        assert_ne!(before, now);
        // The next one may begin while they are waited for.
        let is_later = |id: u8| [now, epoch(&testbed.clock)].iter().any(|e| id == e & 0x1f);
        testbed.wait_for_ids(|kind, id| kind == Kind::Roaming && is_later(id));
    }
    testbed.assert_never_down();
}
