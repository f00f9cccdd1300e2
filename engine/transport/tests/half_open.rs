//! Handshakes that are begun and not finished: how many a source may hold, who else gets in, and
//! that all of them are given back.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[path = "common/raw.rs"]
mod raw;
#[path = "common/testbed.rs"]
mod testbed;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use common::*;
use millrace_edge_policy::admission::AdmissionConfig;
use millrace_edge_policy::cid::initial_dcid;
use millrace_edge_policy::proof::node_tag_of;
use millrace_edge_policy::source::Source;
use millrace_edge_policy::stress::{Level, LoadSample, Stress, StressConfig};
use millrace_testkit::until;
use millrace_transport::counters::{Counter, Family};
use millrace_transport::{PeerStatus, TransportConfig};
use raw::{Raw, RawOptions};
use testbed::{LIMIT, Testbed, assert_serves, here};

/// Handshakes of one source.
const BOUND: u32 = 8;
/// Of each shard.
const HANDSHAKES_MAX: usize = 32;
const SHARDS: usize = 2;
const FULL: &str = "source_handshakes_full";

fn admission() -> AdmissionConfig {
    AdmissionConfig {
        half_open_source_max: BOUND,
        half_open_peer_max: BOUND,
        ..AdmissionConfig::default()
    }
    .with_handshakes(HANDSHAKES_MAX)
}

/// What is begun lasts as long as the test.
fn patient() -> TransportConfig {
    TransportConfig {
        connect_timeout: 2 * PATIENCE,
        idle_timeout: 2 * PATIENCE,
        handshakes_max: HANDSHAKES_MAX,
        ..TransportConfig::default()
    }
}

fn non_member() -> RawOptions {
    RawOptions {
        key: None,
        ..RawOptions::default()
    }
}

/// A client at a port of its own, with an ID of its own; neighbours in `n` are on different shards.
fn client(from: &str, to: SocketAddr, options: &RawOptions, n: u8) -> Raw {
    Raw::dial_from(from, to, options, &initial_dcid(n, [n; 15]))
}

fn send_all(raw: &mut Raw) {
    for (packet, to) in raw.outgoing() {
        raw.send_datagram(&packet, to);
    }
}

/// Sends a first packet, and never another one but that with the token, if it is asked for one;
/// whether it was.
fn begin(raw: &mut Raw) -> bool {
    send_all(raw);
    let first = raw.receive_one(LIMIT).expect("an answer");
    let is_retry = first & 0xf0 == 0xf0;
    if is_retry {
        send_all(raw);
    }
    is_retry
}

/// Handshakes of all shards, as the keeper of an edge sees them.
fn handshakes(testbed: &Testbed) -> usize {
    let shards = testbed.listener.transport.status().shards();
    shards.iter().map(|shard| shard.handshakes).sum()
}

#[test]
fn one_address_holds_its_bound_and_shuts_nobody_else_out() {
    const CLIENTS: u8 = 100;
    let testbed = Testbed::on_shards(SHARDS, admission(), patient());
    let to = testbed.listener.transport.local_addr();
    let mut held = Vec::new();
    let mut with_token = 0;
    for n in 0..CLIENTS {
        let mut raw = client("127.0.0.1:0", to, &non_member(), n);
        with_token += u64::from(begin(&mut raw));
        assert!(testbed.admission.half_open(here()) <= BOUND);
        held.push(raw);
    }
    // Half of the bound came in without a token, the other half with one.
    assert_eq!(with_token, u64::from(CLIENTS) - u64::from(BOUND) / 2);
    let refused = with_token - u64::from(BOUND) / 2;
    testbed.refused(FULL, refused);
    assert_eq!(testbed.listener.reason(Family::Refused, FULL), refused);
    assert_eq!(testbed.admission.half_open(here()), BOUND);
    until("the shards say the same", || {
        handshakes(&testbed) == BOUND as usize
    });
    let mut stress = Stress::new(StressConfig::default(), 0);
    let sample = LoadSample {
        half_open: handshakes(&testbed),
        half_open_max: SHARDS * HANDSHAKES_MAX,
        ..LoadSample::default()
    };
    assert_eq!(stress.tick(sample, 1_000_000_000), Level::Normal);

    // Another address, without a round trip more.
    let retries = testbed.listener.count(Counter::Retries);
    let [peer, member] = &testbed.diallers;
    let mut other = client("127.0.0.2:0", to, &RawOptions::of(member), CLIENTS);
    other.establish();
    testbed.listener.wait_for_count(Counter::ConnectionsIn, 1);
    assert_eq!(testbed.listener.count(Counter::Retries), retries);
    let elsewhere = Source::of("127.0.0.2".parse().unwrap());
    assert_eq!(testbed.admission.half_open(elsewhere), 0);
    // A peer behind the same address, by its proof.
    let dialler = testbed.start_dialler();
    dialler.wait_for_peers(&[testbed.listener.id()]);
    assert_serves(&dialler, &testbed.listener);
    let tag = node_tag_of(peer.node_id().as_bytes());
    assert_eq!(testbed.admission.half_open_of_peer(tag), 0);
    assert_eq!(
        testbed.listener.reason(Family::Refused, "handshakes_full"),
        0
    );

    assert_eq!(testbed.admission.half_open(here()), BOUND);
    testbed.listener.transport.shutdown();
    assert_eq!(
        testbed.admission.half_open(here()),
        0,
        "a stop gives everything back"
    );
}

// Whether or not the listener may still tell them so: two seconds are more than it may repeat its
// first answer to who shows no address.
#[test]
fn silent_handshakes_end_with_their_time() {
    let config = TransportConfig {
        connect_timeout: Duration::from_secs(2),
        // So that it is not this that ends them.
        idle_timeout: 10 * PATIENCE,
        ..patient()
    };
    let testbed = Testbed::on_shards(SHARDS, admission(), config);
    let to = testbed.listener.transport.local_addr();
    // All of them come in, since no more than their share do.
    let clients = (0..BOUND as u8).map(|n| {
        let mut raw = client("127.0.0.1:0", to, &non_member(), n);
        begin(&mut raw);
        raw
    });
    let clients: Vec<_> = clients.collect();
    testbed.refused("connect_timeout", clients.len() as u64);
    until("the source holds nothing", || {
        testbed.admission.half_open(here()) == 0
    });
    until("no shard holds anything", || {
        let shards = testbed.listener.transport.status().shards();
        shards.iter().all(|shard| shard.connections == 0)
    });
    assert_eq!(testbed.listener.reason(Family::Refused, FULL), 0);
}

// Protects the owner of an address that others forge.
#[test]
fn who_forges_an_address_does_not_shut_its_owner_out() {
    let testbed = Testbed::on_shards(SHARDS, admission(), patient());
    testbed.admission.set_peers(BTreeMap::new());
    let to = testbed.listener.transport.local_addr();
    // The answers go to the owner, so the forger never has a token.
    let mut forged = Vec::new();
    for n in 0..50 {
        let mut raw = client("127.0.0.1:0", to, &non_member(), n);
        send_all(&mut raw);
        forged.push(raw);
        let came = u64::from(n) + 1;
        testbed
            .listener
            .wait_for_count(Counter::DatagramsReceived, came);
    }
    until("half of the bound is held", || {
        testbed.admission.half_open(here()) == BOUND / 2
    });
    for (n, member) in (100..).zip(&testbed.diallers) {
        client("127.0.0.1:0", to, &RawOptions::of(member), n).establish();
    }
    testbed.listener.wait_for_count(Counter::ConnectionsIn, 2);
    assert_eq!(testbed.listener.reason(Family::Refused, FULL), 0);
    assert_eq!(testbed.admission.half_open(here()), BOUND / 2);
}

/// Places of a shard's table for clients without a proof.
const OTHERS: u8 = 20;

/// A shard whose table has these, and what its two peers need: for each a connection, its
/// replacement, and one that drains. No other bound is reached before.
fn small_table() -> Testbed {
    let config = TransportConfig {
        connections_max: 2 * 3 + usize::from(OTHERS),
        handshakes_max: 4 * usize::from(OTHERS),
        ..patient()
    };
    let admission = AdmissionConfig {
        half_open_source_max: 0,
        ..admission()
    };
    Testbed::new(admission.with_handshakes(config.handshakes_max), config)
}

/// Clients that prove nothing and begin a handshake; how many were asked for a token.
fn begin_others(testbed: &Testbed, count: u8) -> (Vec<Raw>, u8) {
    let to = testbed.listener.transport.local_addr();
    let mut asked = 0;
    let clients = (0..count).map(|n| {
        let mut raw = client("127.0.0.1:0", to, &non_member(), n);
        asked += u8::from(begin(&mut raw));
        raw
    });
    (clients.collect(), asked)
}

// Protects members from clients that fill the table of connections and prove nothing: what members
// need of it is kept for them.
#[test]
fn members_have_room_where_others_have_taken_all_the_rest() {
    let testbed = small_table();
    let (_held, asked) = begin_others(&testbed, 2 * OTHERS);
    assert_eq!(asked, OTHERS);
    testbed.refused("handshakes_full", u64::from(asked));
    until("the others have the rest", || {
        handshakes(&testbed) == usize::from(OTHERS)
    });
    let dialler = testbed.start_dialler();
    dialler.wait_for_peers(&[testbed.listener.id()]);
    assert_serves(&dialler, &testbed.listener);
}

// Protects members whose proof does not hold: once the handshake has shown who one is, its place is
// the next client's.
#[test]
fn a_member_without_a_proof_takes_a_place_of_others_for_its_handshake_alone() {
    let testbed = small_table();
    let to = testbed.listener.transport.local_addr();
    let members = testbed.diallers.iter().map(|member| {
        // The first byte says which of the pair's connections it is.
        let n = member.node_id().spread();
        let mut raw = client("127.0.0.1:0", to, &RawOptions::of(member), n);
        raw.introduce();
        // It answers until the listener has taken it for the member.
        let up = || testbed.listener.transport.status().peers();
        let is_up = |peer: &PeerStatus| peer.node_id == member.node_id();
        assert!(raw.drive(LIMIT, |_| up().iter().any(is_up)));
        raw
    });
    let _members: Vec<_> = members.collect();
    let (_held, asked) = begin_others(&testbed, OTHERS + 1);
    assert_eq!(asked, 1);
    testbed.refused("handshakes_full", 1);
}

// Protects clients from noise: bytes behind the header of an Initial that no client sealed open
// nothing, hold nothing, and are answered by nothing.
#[test]
fn garbage_behind_the_header_of_an_initial_is_no_connection() {
    // More than all places that a shard has for clients without a token.
    const GARBAGE: u8 = 2 * HANDSHAKES_MAX as u8;
    let testbed = Testbed::new(admission(), patient());
    let to = testbed.listener.transport.local_addr();
    let sender = client("127.0.0.1:0", to, &non_member(), 0);
    for n in 0..GARBAGE {
        let mut other = client("127.0.0.1:0", to, &non_member(), n);
        let (mut datagram, _) = other.outgoing().swap_remove(0);
        // Two IDs of 16 bytes and no token; then the length, of two bytes, and what it is of.
        let length_at = 1 + 4 + 1 + 16 + 1 + 16 + 1;
        assert_eq!(datagram[length_at] >> 6, 1);
        if n % 2 == 0 {
            datagram[length_at + 30] ^= 1;
        } else {
            datagram[length_at] = 0x7f;
        }
        sender.send_datagram(&datagram, to);
        let came = u64::from(n) + 1;
        testbed
            .listener
            .wait_for_count(Counter::DatagramsInvalid, came);
        assert_eq!(testbed.admission.half_open(here()), 0);
    }
    let answers = testbed.listener.count(Counter::PacketsSent);
    assert_eq!(answers, 0, "nothing is answered");
    let reasons = testbed.listener.transport.counters()[0].reasons();
    assert_eq!(reasons, [], "nothing was refused, closed or lost");
    let retries = testbed.listener.count(Counter::Retries);
    assert_eq!(retries, 0);
    let [_, member] = &testbed.diallers;
    client("127.0.0.1:0", to, &RawOptions::of(member), GARBAGE).establish();
    testbed.listener.wait_for_count(Counter::ConnectionsIn, 1);
}

#[test]
fn a_handshake_that_fails_gives_its_place_back() {
    let testbed = Testbed::on_shards(SHARDS, admission(), patient());
    let to = testbed.listener.transport.local_addr();
    for round in 1..=2 * u64::from(BOUND) {
        for (reason, key) in [("not_in_registry", Some(key(77))), ("no_certificate", None)] {
            let options = RawOptions {
                key,
                ..RawOptions::default()
            };
            let mut raw = client("127.0.0.1:0", to, &options, round as u8);
            assert!(raw.drive(LIMIT, |quic| quic.peer_error().is_some()));
            testbed.refused(reason, round);
        }
        // Hangs up in the middle, after the listener's first answer.
        let mut raw = client("127.0.0.1:0", to, &non_member(), round as u8);
        begin(&mut raw);
        raw.quic.close(false, 0, b"").unwrap();
        send_all(&mut raw);
        until("its place is free", || {
            testbed.admission.half_open(here()) == 0
        });
    }
    assert_eq!(testbed.listener.reason(Family::Refused, FULL), 0);
    assert_eq!(testbed.listener.count(Counter::ConnectionsIn), 0);
}
