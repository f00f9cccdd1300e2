//! QUIC through the edge: transports in two namespaces, the listener's behind the program in the
//! kernel.
//!
//! Native XDP is on both ends of the cable, because a veth delivers what a program transmits only
//! to an end that has one.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[path = "common/quic_testbed.rs"]
mod quic_testbed;
#[path = "../../transport/tests/common/relay.rs"]
mod relay;
#[path = "../../transport/tests/common/mod.rs"]
mod transport;

use std::net::UdpSocket;
use std::time::Duration;

use common::namespace::{NON_MEMBER, OPERATOR};
use millrace_edge_policy::cid::{Kind, LocalCid, dcid_of};
use millrace_edge_policy::proof;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::stress::Level;
use millrace_protocol::frame::Class;
use millrace_testkit::until;
use millrace_transport::counters::{Counter, Family};
use quic_testbed::{BETWEEN, BODY_BYTES, ConnectedTestbed, LISTENER, PROOF, Testbed};
use relay::Relay;
use transport::{ECHO, Event, Node, PATIENCE, bytes_of, request};

fn ask(asker: &Node, answerer: &Node, len: usize) {
    let class = if len > 1_000 {
        Class::Bulk
    } else {
        Class::Normal
    };
    let body = request(ECHO, class, asker.body(len));
    let answer = asker.transport.request(answerer.id(), body);
    assert_eq!(bytes_of(&answer.wait(PATIENCE).unwrap()).len(), len);
}

/// The packets of a dialler that gets in: at first by this reason, and then by its connection ID.
fn assert_gets_in(connected: &ConnectedTestbed<'_>, by: Reason) {
    let testbed = connected.testbed;
    let before = testbed.counters();
    let dialler = connected.dial(LISTENER);
    connected.wait_until_up(&dialler);
    let seen = testbed.since(&before);
    let firsts = [
        Reason::PassQuicPeer,
        Reason::PassQuicToken,
        Reason::PassQuicInitial,
    ];
    for reason in firsts {
        let came = seen.contains_key(reason.label());
        assert_eq!(came, reason == by, "{}: {seen:?}", reason.label());
    }
    let retried = seen.contains_key(Reason::TxRetry.label());
    assert_eq!(retried, by == Reason::PassQuicToken, "{seen:?}");
    until("the kernel counts it", || {
        testbed.connections(OPERATOR) == 1
    });

    let before = testbed.counters();
    for len in [100, BODY_BYTES] {
        ask(&dialler, &connected.listener, len);
        ask(&connected.listener, &dialler, len);
    }
    let mut seen = testbed.since(&before);
    // Neighbour discovery is none of the edge's business.
    seen.remove(Reason::PassOther.label());
    let reasons: Vec<_> = seen.keys().copied().collect();
    assert_eq!(reasons, [Reason::PassQuic.label()], "{seen:?}");
    connected.hang_up(dialler);
    until("the kernel forgets it", || {
        testbed.connections(OPERATOR) == 0
    });
}

#[test]
fn who_is_entitled_gets_in_at_every_level_of_stress() {
    let Some(testbed) = Testbed::new("who_is_entitled_gets_in_at_every_level_of_stress") else {
        return;
    };
    let mut connected = ConnectedTestbed::new(&testbed);
    assert_gets_in(&connected, Reason::PassQuicPeer);
    connected.press(Level::Retry);
    assert_gets_in(&connected, Reason::PassQuicPeer);
    connected.press(Level::Peers);
    assert_gets_in(&connected, Reason::PassQuicPeer);

    connected.know_peers(false);
    connected.press(Level::Normal);
    assert_gets_in(&connected, Reason::PassQuicInitial);
    connected.press(Level::Retry);
    assert_gets_in(&connected, Reason::PassQuicToken);
    assert_eq!(
        connected.listener.count(Counter::Retries),
        0,
        "all of them were made in the kernel"
    );
}

#[test]
fn at_the_highest_stress_a_member_needs_its_proof() {
    let Some(testbed) = Testbed::new("at_the_highest_stress_a_member_needs_its_proof") else {
        return;
    };
    let mut connected = ConnectedTestbed::new(&testbed);
    connected.know_peers(false);
    connected.press(Level::Peers);
    let before = testbed.counters();
    let dialler = connected.dial(LISTENER);
    connected.wait_for(Reason::QuicPeersOnly, 2, &before);
    assert_eq!(connected.listener.count(Counter::DatagramsReceived), 0);
    let refused = testbed.since(&before);
    assert!(
        !refused.contains_key(Reason::TxRetry.label()),
        "{refused:?}"
    );
    // Its next packets are the same, and another host knows its key now.
    connected.know_peers(true);
    connected.wait_until_up(&dialler);
    assert!(
        testbed
            .since(&before)
            .contains_key(Reason::PassQuicPeer.label())
    );
}

/// The first packet of the dialler, taken on its way.
fn captured(connected: &ConnectedTestbed<'_>) -> Vec<u8> {
    let sink = connected
        .testbed
        .pair
        .remote
        .enter(|| UdpSocket::bind(BETWEEN));
    let sink = sink.unwrap();
    sink.set_read_timeout(Some(PATIENCE)).unwrap();
    let dialler = connected.dial(BETWEEN);
    let mut packet = vec![0; 2_000];
    let len = sink.recv(&mut packet).unwrap();
    packet.truncate(len);
    dialler.transport.shutdown();
    let (dcid, _) = dcid_of(&packet).unwrap();
    assert_eq!(dcid.len(), proof::BYTES);
    packet
}

#[test]
fn a_proof_is_worth_nothing_elsewhere_forged_or_too_often() {
    const TAG_AT: usize = 6 + proof::BYTES - 1;
    let Some(testbed) = Testbed::new("a_proof_is_worth_nothing_elsewhere_forged_or_too_often")
    else {
        return;
    };
    let connected = ConnectedTestbed::new(&testbed);
    connected.press(Level::Peers);
    let packet = captured(&connected);
    let before = testbed.counters();
    let decided = |reason| testbed.count(reason) - before.acted_on(reason);

    let thief = testbed.socket(NON_MEMBER);
    thief.send(&packet).unwrap();
    connected.wait_for(Reason::QuicPeersOnly, 1, &before);
    let owner = testbed.socket(OPERATOR);
    let mut forged = packet.clone();
    forged[TAG_AT] ^= 1;
    owner.send(&forged).unwrap();
    connected.wait_for(Reason::QuicPeersOnly, 2, &before);
    assert_eq!(connected.listener.count(Counter::DatagramsReceived), 0);

    // It passes from the address that it was made for, as often as a handshake may need; then none
    // does.
    for _ in 0..PROOF + 3 {
        owner.send(&packet).unwrap();
    }
    connected.wait_for(Reason::QuicProofReplayed, 3, &before);
    assert_eq!(decided(Reason::PassQuicPeer), PROOF);
    testbed.socket(OPERATOR).send(&packet).unwrap();
    connected.wait_for(Reason::QuicProofReplayed, 4, &before);

    // Under less stress the thief is a client that must show its address.
    connected.press(Level::Retry);
    thief.set_read_timeout(Some(PATIENCE)).unwrap();
    thief.send(&packet).unwrap();
    let mut answer = [0; 200];
    thief.recv(&mut answer).unwrap();
    assert_eq!(answer[0] & 0xf0, 0xf0, "a Retry");
    assert_eq!(decided(Reason::TxRetry), 1);
    assert_eq!(decided(Reason::PassQuicPeer), PROOF);
    assert_eq!(connected.listener.count(Counter::ConnectionsIn), 0);
}

/// A first packet, with a token or without.
fn initial(dcid: &[u8], token: &[u8]) -> Vec<u8> {
    let mut packet = vec![0xc0, 0, 0, 0, 1, dcid.len() as u8];
    packet.extend(dcid);
    packet.extend([8; 9]);
    packet.push(token.len() as u8);
    packet.extend(token);
    packet.resize(1_200, 0);
    packet
}

/// What the program answers to a client whose address it does not know: another ID for the
/// listener, and a token.
fn retried(client: &UdpSocket) -> (Vec<u8>, Vec<u8>) {
    const IDS: usize = 1 + 4;
    const TAG: usize = 16;
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.send(&initial(&[7; 8], &[])).unwrap();
    let mut answer = [0; 200];
    let len = client.recv(&mut answer).unwrap();
    let behind_ours = &answer[IDS + 1 + 8..len - TAG];
    let (id, token) = behind_ours[1..].split_at(usize::from(behind_ours[0]));
    (id.to_vec(), token.to_vec())
}

#[test]
fn a_token_is_worth_nothing_elsewhere_or_forged() {
    let Some(testbed) = Testbed::new("a_token_is_worth_nothing_elsewhere_or_forged") else {
        return;
    };
    let connected = ConnectedTestbed::new(&testbed);
    connected.press(Level::Retry);
    let client = testbed.socket(OPERATOR);
    let (id, token) = retried(&client);
    assert_eq!((id.len(), token.len()), (16, 32));
    let before = testbed.counters();
    // From another address, from another port.
    for from in [NON_MEMBER, OPERATOR] {
        testbed.socket(from).send(&initial(&id, &token)).unwrap();
    }
    connected.wait_for(Reason::QuicBadToken, 2, &before);
    // Any byte of it, and the ID that goes with it.
    for at in 0..token.len() {
        let mut forged = token.clone();
        forged[at] ^= 1;
        client.send(&initial(&id, &forged)).unwrap();
    }
    let mut other = id.clone();
    other[3] ^= 1;
    client.send(&initial(&other, &token)).unwrap();
    // Its first byte and the 13 that are zero behind an ID of 8 bytes are a token's form: without
    // it, a token is another server's, and so none.
    let unknown = 1 + 13;
    let bad = 3 + token.len() as u64 - unknown;
    let sum = |labels: &[&str]| {
        let seen = testbed.since(&before);
        let counts = labels.iter().filter_map(|label| seen.get(*label).copied());
        counts.sum::<u64>()
    };
    until("all are refused, or asked for a token", || {
        sum(&["quic_bad_token", "quic_expired_token"]) == bad && sum(&["tx_retry"]) == unknown
    });
    assert_eq!(connected.listener.count(Counter::DatagramsReceived), 0);
    // Where it belongs, it opens the door.
    client.send(&initial(&id, &token)).unwrap();
    connected.wait_for(Reason::PassQuicToken, 1, &before);
    connected
        .listener
        .wait_for_count(Counter::DatagramsReceived, 1);
}

/// Packets that claim to belong to a connection.
fn forgeries() -> [Vec<u8>; 3] {
    let id = [0x5a; LocalCid::BYTES];
    let mut short = vec![0x40];
    short.extend(id);
    short.resize(64, 0);
    let long = |first: u8| {
        let mut packet = vec![first, 0, 0, 0, 1, id.len() as u8];
        packet.extend(id);
        packet.push(0);
        packet.resize(1_200, 0);
        packet
    };
    [short, long(0xe0), long(0xf0)]
}

#[test]
fn a_forged_id_dies_in_the_kernel() {
    const EACH: u64 = 100;
    let Some(testbed) = Testbed::new("a_forged_id_dies_in_the_kernel") else {
        return;
    };
    let connected = ConnectedTestbed::new(&testbed);
    let before = testbed.counters();
    let socket = testbed.socket(NON_MEMBER);
    let mut sent = 0;
    for level in [Level::Normal, Level::Peers] {
        connected.press(level);
        for packet in forgeries() {
            for _ in 0..EACH {
                socket.send(&packet).unwrap();
            }
            // No more at a time than the ring of a veth holds: what it has no room for is lost on
            // the way.
            sent += EACH;
            connected.wait_for(Reason::QuicUnknownId, sent, &before);
        }
    }
    assert_eq!(sent, 2 * 3 * EACH);
    assert_eq!(testbed.since(&before)["quic_unknown_id"], sent);
    assert_eq!(connected.listener.count(Counter::DatagramsReceived), 0);
}

/// A dialler behind a NAT, and the relay that is the NAT.
fn behind_a_nat(connected: &ConnectedTestbed<'_>) -> (Node, Relay) {
    let relay = connected
        .testbed
        .pair
        .remote
        .enter(|| Relay::start(BETWEEN, LISTENER));
    let dialler = connected.dial(BETWEEN);
    connected.wait_until_up(&dialler);
    until("both use roaming IDs, and no others", || {
        relay.forget();
        ask(&dialler, &connected.listener, 100);
        relay.wait(Duration::from_millis(100), |passed| {
            let mut ids = [&passed.to_listener, &passed.to_dialler].into_iter();
            ids.all(|ids| !ids.is_empty() && ids.iter().all(|id| id.kind == Kind::Roaming))
        })
    });
    (dialler, relay)
}

#[test]
fn a_client_that_changes_its_port_stays_with_its_shard() {
    const REBINDS: u64 = 3;
    let Some(testbed) = Testbed::new("a_client_that_changes_its_port_stays_with_its_shard") else {
        return;
    };
    let connected = ConnectedTestbed::new(&testbed);
    let (dialler, mut relay) = behind_a_nat(&connected);
    assert_eq!(
        testbed.connections(NON_MEMBER),
        1,
        "as the listener sees it"
    );
    let before = testbed.counters();
    let status = connected.listener.transport.status();
    let shard = status.peers()[0].shard;
    for n in 1..=REBINDS {
        relay.forget();
        let body = request(ECHO, Class::Bulk, dialler.body(BODY_BYTES));
        let answer = dialler.transport.request(connected.listener.id(), body);
        let half = BODY_BYTES / 1_452 / 2;
        assert!(relay.wait(PATIENCE, |passed| passed.datagrams >= half));
        testbed.pair.remote.enter(|| relay.rebind());
        let answer = answer.wait(PATIENCE).unwrap();
        assert_eq!(bytes_of(&answer).len(), BODY_BYTES);
        connected.listener.wait_for_count(Counter::Migrations, n);
        let address = relay.address();
        assert!(status.wait(PATIENCE, |peers| peers[0].address == Some(address)));
        assert_eq!(status.peers()[0].shard, shard);
    }
    let mut seen = testbed.since(&before);
    seen.remove(Reason::PassOther.label());
    let reasons: Vec<_> = seen.keys().copied().collect();
    assert_eq!(reasons, [Reason::PassQuic.label()], "{seen:?}");
    for node in [&dialler, &connected.listener] {
        let downs = node.events.try_iter();
        let downs = downs.filter(|event| matches!(event, Event::Down(..)));
        assert_eq!(downs.count(), 0, "the connection lives on");
        assert_eq!(node.reason(Family::Closed, "idle_timeout"), 0);
    }
}

#[test]
fn what_a_repeater_saw_moves_nobody_and_what_it_changes_is_dropped() {
    const TIMES: u64 = 10;
    let Some(testbed) =
        Testbed::new("what_a_repeater_saw_moves_nobody_and_what_it_changes_is_dropped")
    else {
        return;
    };
    let connected = ConnectedTestbed::new(&testbed);
    let (dialler, relay) = behind_a_nat(&connected);
    let before = testbed.counters();
    let repeater = testbed.socket(OPERATOR);
    for byte in 1..=TIMES as usize {
        let packet = relay.last_short();
        repeater.send(&packet).unwrap();
        let mut changed = packet;
        changed[byte] ^= 1;
        repeater.send(&changed).unwrap();
        // Behind both in the listener's queue.
        ask(&dialler, &connected.listener, 100);
    }
    // A roaming ID whose key or epoch is changed belongs to another node, or is too old: it passes
    // in no case.
    until("all are dropped", || {
        let seen = testbed.since(&before);
        let dropped = ["quic_unknown_id", "quic_expired_id"].map(|label| seen.get(label).copied());
        dropped.into_iter().flatten().sum::<u64>() == TIMES
    });
    assert_eq!(connected.listener.count(Counter::Migrations), 0);
    repeater
        .set_read_timeout(Some(Duration::from_millis(1)))
        .unwrap();
    let answer = repeater.recv(&mut [0; 2_000]);
    assert!(answer.is_err(), "nothing is sent there");
}
