//! What stands before a handshake: Retry, tokens, proofs, caps; and connection IDs from the first
//! to the last.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[path = "common/raw.rs"]
mod raw;
#[path = "common/testbed.rs"]
mod testbed;

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use common::*;
use millrace_edge_policy::admission::AdmissionConfig;
use millrace_edge_policy::cid::initial_dcid;
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::proof;
use millrace_edge_policy::settings::{Caps, Limits};
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::stress::Level;
use millrace_protocol::identity::SigningKey;
use millrace_protocol::pair::PairKey;
use millrace_transport::TransportConfig;
use millrace_transport::counters::{Counter, Family};
use raw::{Raw, RawOptions};
use testbed::{LIMIT, POOL_BYTES, Testbed, assert_serves, here};

#[test]
fn a_retry_comes_first_under_stress_and_everything_still_arrives() {
    let testbed = Testbed::new(AdmissionConfig::default(), TransportConfig::default());
    testbed.admission.set_stress(Level::Retry);
    // Without its key the dialler is a client like any other.
    testbed.admission.set_peers(BTreeMap::new());
    let dialler = testbed.start_dialler();
    dialler.wait_for_peers(&[testbed.listener.id()]);
    testbed.listener.wait_for_peers(&[dialler.id()]);
    assert_serves(&dialler, &testbed.listener);
    assert_serves(&testbed.listener, &dialler);
    assert!(testbed.listener.count(Counter::Retries) >= 1);
    assert_eq!(
        testbed.heard.validated_so_far(),
        0,
        "a token is charged when it comes, not again"
    );
}

// Protects identity: the state that a Retry resets must not be the pinned key.
#[test]
fn a_retry_does_not_unpin_the_key_of_the_listener() {
    let testbed = Testbed::new(AdmissionConfig::default(), TransportConfig::default());
    testbed.admission.set_stress(Level::Retry);
    testbed.admission.set_peers(BTreeMap::new());
    let (own, expected) = (free_addr(), key(99));
    let mut keys = [testbed.diallers[0].clone(), expected];
    keys.sort_by_key(SigningKey::node_id);
    let [dialler, expected] = keys;
    let to = testbed.listener.transport.local_addr();
    let lie = topology([member(&dialler, own), member(&expected, to)], 1);
    let dialler = Node::start(dialler, own, &lie, TransportConfig::default(), POOL_BYTES);
    dialler.wait_for_reason(Family::Refused, "wrong_key", 1);
    assert!(testbed.listener.count(Counter::Retries) >= 1);
    dialler.wait_for_peers(&[]);
}

#[test]
fn a_token_is_worth_nothing_elsewhere_changed_or_late() {
    let testbed = Testbed::new(AdmissionConfig::default(), TransportConfig::default());
    testbed.admission.set_stress(Level::Retry);
    let to = testbed.listener.transport.local_addr();
    let mut raw = testbed.dial(&RawOptions::of(&testbed.diallers[0]));
    let packet = testbed.packet_with_token(&mut raw);
    // From another port, from another address.
    for bind in ["127.0.0.1:0", "127.0.0.2:0"] {
        let thief = UdpSocket::bind(bind).unwrap();
        thief.send_to(&packet, to).unwrap();
    }
    testbed.refused("quic_bad_token", 2);
    // Any bit of it: the token lies behind two connection IDs of 16 bytes.
    let token_at = 1 + 4 + 1 + 16 + 1 + 16 + 1;
    for at in [1, 2, 9, 30] {
        let mut forged = packet.clone();
        forged[token_at + at] ^= 1;
        raw.send_datagram(&forged, to);
    }
    testbed.refused("quic_bad_token", 6);
    // Another destination ID than the one that the Retry gave.
    let mut forged = packet.clone();
    forged[12] ^= 1;
    raw.send_datagram(&forged, to);
    testbed.refused("quic_bad_token", 7);
    assert_eq!(testbed.listener.count(Counter::ConnectionsIn), 0);
    raw.send_datagram(&packet, to);
    raw.establish();
    testbed.listener.wait_for_count(Counter::ConnectionsIn, 1);

    let mut late = testbed.dial(&RawOptions::of(&testbed.diallers[1]));
    let packet = testbed.packet_with_token(&mut late);
    testbed.clock.skip(Duration::from_secs(36));
    late.send_datagram(&packet, to);
    testbed.refused("quic_expired_token", 1);
}

// Protects a client that another server at this address once gave a token to (RFC 9000, 8.1.3): it
// is asked for one of ours where a client without any would be, and let in where that would be.
#[test]
fn a_token_of_another_server_is_no_token() {
    const OF_OTHERS: [&[u8]; 3] = [&[1], &[0x4d; 32], &[9; 500]];
    let testbed = Testbed::new(AdmissionConfig::default(), TransportConfig::default());
    let to = testbed.listener.transport.local_addr();
    for (level, is_retried) in [(Level::Normal, false), (Level::Retry, true)] {
        testbed.admission.set_stress(level);
        for token in OF_OTHERS {
            let mut raw = testbed.dial(&RawOptions::of(&testbed.diallers[0]));
            raw.be_retried(token);
            let (packet, _) = raw.outgoing().swap_remove(0);
            let mut bytes = packet.clone();
            let header = quiche::Header::from_slice(&mut bytes, 16).unwrap();
            assert_eq!(header.token.as_deref(), Some(token));
            raw.send_datagram(&packet, to);
            let first = raw.receive_one(LIMIT).expect("an answer");
            assert_eq!(first & 0xf0 == 0xf0, is_retried, "{level:?}: {first:x}");
        }
    }
    assert_eq!(testbed.listener.count(Counter::Retries), 3);
    assert_eq!(
        testbed.listener.reason(Family::Refused, "quic_bad_token"),
        0
    );
}

#[test]
fn a_peer_that_proves_itself_passes_when_only_peers_may() {
    let testbed = Testbed::new(AdmissionConfig::default(), TransportConfig::default());
    testbed.admission.set_stress(Level::Peers);
    let mut raw = testbed.dial(&RawOptions::of(&testbed.diallers[1]));
    assert!(!raw.drive(Duration::from_millis(300), |quic| quic.is_established()));
    testbed.refused("quic_peers_only", 1);
    let dialler = testbed.start_dialler();
    dialler.wait_for_peers(&[testbed.listener.id()]);
    assert_serves(&dialler, &testbed.listener);
    assert_eq!(testbed.listener.count(Counter::Retries), 0);
    assert_eq!(
        testbed.heard.validated_so_far(),
        0,
        "a peer has a budget of its own"
    );
}

#[test]
fn a_proof_is_good_from_its_address_and_a_few_times() {
    let limits = AdmissionConfig {
        limits: Limits {
            proof: Limit::per(1, Duration::from_secs(3_600), 1),
            ..Default::default()
        },
        ..Default::default()
    };
    let testbed = Testbed::new(limits, TransportConfig::default());
    testbed.admission.set_stress(Level::Peers);
    let to = testbed.listener.transport.local_addr();
    let dialler = &testbed.diallers[0];
    let id = dialler.node_id();
    let key = PairKey::agree(dialler, &testbed.listener.key.public_key()).unwrap();
    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let proof = proof::make(
        id.spread(),
        proof::node_tag_of(id.as_bytes()),
        [5; 6],
        "127.0.0.1".parse().unwrap(),
        wall.unwrap().as_nanos() as u64,
        Key::from_bytes(*key.as_bytes()),
    );
    let options = RawOptions::of(dialler);
    let mut thief = Raw::dial_from("127.0.0.2:0", to, &options, &proof);
    thief.turn();
    testbed.refused("quic_peers_only", 1);
    let mut forged = proof;
    forged[7] ^= 1;
    Raw::dial_from("127.0.0.1:0", to, &options, &forged).turn();
    testbed.refused("quic_peers_only", 2);
    // The owner, then a host that saw it.
    let mut raw = Raw::dial_from("127.0.0.1:0", to, &options, &proof);
    raw.establish();
    testbed.listener.wait_for_count(Counter::ConnectionsIn, 1);
    let non_member = RawOptions::of(&common::key(77));
    Raw::dial_from("127.0.0.1:0", to, &non_member, &proof).turn();
    testbed.refused("quic_proof_replayed", 1);
    assert_eq!(testbed.listener.count(Counter::ConnectionsIn), 1);
}

#[test]
fn a_source_holds_as_many_connections_as_its_cap() {
    let caps = AdmissionConfig {
        caps: Caps { quic: 1, tcp: 0 },
        ..Default::default()
    };
    let testbed = Testbed::new(caps, TransportConfig::default());
    let [first, second] = &testbed.diallers;
    // Both begin before either is there, so that the cap is hit at the end of the handshake.
    let mut first = testbed.dial(&RawOptions::of(first));
    let mut late = testbed.dial(&RawOptions::of(second));
    first.turn();
    late.turn();
    first.establish();
    testbed.listener.wait_for_count(Counter::ConnectionsIn, 1);
    assert!(late.drive(LIMIT, |quic| quic.peer_error().is_some()));
    let error = late.quic.peer_error().unwrap();
    assert!(error.is_app && error.reason == b"no_room", "{error:?}");
    testbed.refused("quic_source_cap", 1);
    // At its first packet, now that the source is known to be full.
    testbed.dial(&RawOptions::of(second)).turn();
    testbed.refused("quic_source_cap", 2);
    assert_eq!(testbed.admission.connections(here()), 1);
    assert_eq!(testbed.heard.open(here()), 1);

    // The listener has given it other IDs, and with that confirmed the handshake: before, quiche
    // does not say that it closes.
    assert!(first.drive(LIMIT, |quic| quic.available_dcids() > 0));
    first.quic.close(true, 0, b"done").unwrap();
    let status = testbed.listener.transport.status();
    first.turn();
    let is_gone = || testbed.admission.connections(here()) == 0;
    assert!(status.wait(PATIENCE, |_| is_gone()));
    assert_eq!(testbed.heard.open(here()), 0);
    let mut again = testbed.dial(&RawOptions::of(second));
    again.establish();
    testbed.listener.wait_for_count(Counter::ConnectionsIn, 3);
    assert_eq!(testbed.admission.connections(here()), 1);
    testbed.listener.transport.shutdown();
    assert_eq!(
        testbed.admission.connections(here()),
        0,
        "a stop gives everything back"
    );
    assert_eq!(testbed.heard.open(here()), 0);
    assert_eq!(testbed.heard.opened.load(Ordering::Relaxed), 2);
}

#[test]
fn a_source_is_charged_once_it_has_shown_its_address() {
    let testbed = Testbed::new(AdmissionConfig::default(), TransportConfig::default());
    // A first packet alone shows nothing.
    testbed.dial(&RawOptions::of(&testbed.diallers[0])).turn();
    testbed
        .listener
        .wait_for_count(Counter::DatagramsReceived, 1);
    assert_eq!(testbed.heard.validated_so_far(), 0);
    testbed
        .dial(&RawOptions::of(&testbed.diallers[1]))
        .establish();
    testbed.listener.wait_for_count(Counter::ConnectionsIn, 1);
    assert_eq!(testbed.heard.validated_so_far(), 1);
    // Neither does it help to fail behind that point.
    for (key, reason, n) in [
        (Some(key(77)), "not_in_registry", 2),
        (None, "no_certificate", 3),
    ] {
        let mut raw = testbed.dial(&RawOptions {
            key,
            ..RawOptions::default()
        });
        assert!(raw.drive(LIMIT, |quic| quic.peer_error().is_some()));
        testbed.refused(reason, 1);
        let charged = || testbed.heard.validated_so_far() == n;
        assert!(
            testbed
                .listener
                .transport
                .status()
                .wait(PATIENCE, |_| charged())
        );
    }
}

#[test]
fn a_flood_of_first_packets_leaves_room_for_peers() {
    const THRESHOLD: usize = 4;
    const FLOOD: u64 = 200;
    let limits = AdmissionConfig {
        half_open_retry: THRESHOLD,
        ..Default::default()
    };
    let config = TransportConfig {
        handshakes_max: 2 * THRESHOLD,
        ..Default::default()
    };
    let testbed = Testbed::new(limits, config);
    let to = testbed.listener.transport.local_addr();
    // Each from a port of its own, none of which ever answers.
    let non_member = RawOptions {
        key: None,
        ..RawOptions::default()
    };
    for n in 0..FLOOD {
        let mut random = [3; 15];
        random[..8].copy_from_slice(&n.to_le_bytes());
        let dcid = initial_dcid(n as u8, random);
        let mut raw = Raw::dial_from("127.0.0.1:0", to, &non_member, &dcid);
        for (packet, to) in raw.outgoing() {
            raw.send_datagram(&packet, to);
        }
        // One at a time: what the socket's buffer drops would not be judged.
        if n % 16 == 15 {
            testbed
                .listener
                .wait_for_count(Counter::DatagramsReceived, n + 1);
        }
    }
    testbed
        .listener
        .wait_for_count(Counter::DatagramsReceived, FLOOD);
    testbed
        .listener
        .wait_for_count(Counter::Retries, FLOOD - THRESHOLD as u64);
    let live = |testbed: &Testbed| {
        let shards = testbed.listener.transport.status().shards();
        shards.iter().map(|shard| shard.connections).sum::<usize>()
    };
    assert!(live(&testbed) <= THRESHOLD, "{} are held", live(&testbed));
    // A member that shows its address by the Retry, and one that proves itself.
    testbed
        .dial(&RawOptions::of(&testbed.diallers[1]))
        .establish();
    let dialler = testbed.start_dialler();
    dialler.wait_for_peers(&[testbed.listener.id()]);
    assert_serves(&dialler, &testbed.listener);
    assert_eq!(
        testbed.listener.reason(Family::Refused, "handshakes_full"),
        0
    );
}
