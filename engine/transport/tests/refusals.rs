//! Clients that are refused: a wrong key, a non-member, no key at all, a former member with a
//! ticket, nothing in common; each refused with its counter.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::net::UdpSocket;
use std::time::Duration;

use common::*;
use millrace_edge_policy::cid::initial_dcid;
use millrace_protocol::frame::{Class, Header, Kind, Method};
use millrace_transport::TransportConfig;
use millrace_transport::counters::{Counter, Family};
use raw::{Certificate, Raw, RawOptions, session_of_other_server};

const LIMIT: Duration = Duration::from_secs(10);

/// A listener whose topology also has the node of key 1, with a lower id, that the tests play.
fn listener_and_dialler() -> (Node, millrace_protocol::identity::SigningKey) {
    let [a, b] = two_keys();
    let addr = free_addr();
    let topology = topology([member(&a, free_addr()), member(&b, addr)], 1);
    (
        Node::start(b, addr, &topology, TransportConfig::default(), 16 << 20),
        a,
    )
}

#[test]
fn a_non_member_is_refused() {
    let (node, _) = listener_and_dialler();
    let mut raw = Raw::dial(
        node.transport.local_addr(),
        &RawOptions {
            key: Some(key(77)),
            ..RawOptions::default()
        },
    );
    assert!(raw.drive(LIMIT, |quic| quic.peer_error().is_some()));
    assert_eq!(
        raw.quic.peer_error().unwrap().error_code,
        302,
        "certificate_unknown"
    );
    node.wait_for_reason(Family::Refused, "not_in_registry", 1);
}

// Protects the owner of a forged address, to whom an answer goes: RFC 9000, 14.1 and 6.1. A
// shorter datagram is counted, and neither begins a handshake nor gets a list of versions.
#[test]
fn a_datagram_that_opens_has_1_200_bytes_at_least() {
    /// A version that no node speaks (RFC 9000, 15).
    const RESERVED: u32 = 0x1a2a_3a4a;
    let (node, dialler) = listener_and_dialler();
    let to = node.transport.local_addr();
    // The first byte says what the packet is in version 1 alone; so do the bytes behind the IDs.
    const INITIAL: u8 = 0xc0;
    let cases = [
        (quiche::PROTOCOL_VERSION, INITIAL, 1_199, false),
        (quiche::PROTOCOL_VERSION, INITIAL, 1_200, true),
        (RESERVED, INITIAL, 1_199, false),
        (RESERVED, INITIAL, 1_200, true),
        (RESERVED, 0xff, 1_200, true),
        (RESERVED, 0x80, 1_200, true),
    ];
    let mut unroutable = 0;
    for (n, (version, first, len, is_answered)) in (1..).zip(cases) {
        let id = initial_dcid(0, [n; 15]);
        let mut raw = Raw::dial_from("127.0.0.1:0", to, &RawOptions::of(&dialler), &id);
        let (mut datagram, _) = raw.outgoing().swap_remove(0);
        assert_eq!(datagram.len(), 1_200);
        datagram[1..5].copy_from_slice(&version.to_be_bytes());
        if version == RESERVED {
            datagram[0] = first;
            // As the length of a token it would reach behind the end.
            let behind_ids = 6 + id.len() + 1 + usize::from(datagram[6 + id.len()]);
            datagram[behind_ids..].fill(0xff);
        }
        raw.send_datagram(&datagram[..len], to);
        if is_answered {
            assert!(
                raw.receive_one(LIMIT).is_some(),
                "{version:x}, {first:x}, {len} bytes"
            );
        } else {
            unroutable += 1;
            node.wait_for_count(Counter::DatagramsUnroutable, unroutable);
        }
    }
}

#[test]
fn a_dialler_without_a_certificate_is_refused() {
    let (node, _) = listener_and_dialler();
    let mut raw = Raw::dial(
        node.transport.local_addr(),
        &RawOptions {
            key: None,
            ..RawOptions::default()
        },
    );
    assert!(raw.drive(LIMIT, |quic| quic.peer_error().is_some()));
    assert_eq!(
        raw.quic.peer_error().unwrap().error_code,
        372,
        "certificate_required"
    );
    node.wait_for_reason(Family::Refused, "no_certificate", 1);
}

// Protects an operator who looks for what is wrong: a client of another protocol, or of a TLS
// library without our parameters, is counted apart from one without a key of a member.
#[test]
fn each_kind_of_mismatch_has_a_reason_of_its_own() {
    const NO_APPLICATION_PROTOCOL: u64 = 0x100 + 120;
    const HANDSHAKE_FAILURE: u64 = 0x100 + 40;
    let (node, dialler) = listener_and_dialler();
    let cases = [
        (
            RawOptions {
                protocol: b"h3",
                ..RawOptions::of(&dialler)
            },
            NO_APPLICATION_PROTOCOL,
            "no_common_protocol",
        ),
        (
            RawOptions {
                groups: "P-256:P-384",
                ..RawOptions::of(&dialler)
            },
            HANDSHAKE_FAILURE,
            "no_common_group",
        ),
    ];
    for (options, code, reason) in cases {
        let mut raw = Raw::dial(node.transport.local_addr(), &options);
        assert!(raw.drive(LIMIT, |quic| quic.peer_error().is_some()));
        let error = raw.quic.peer_error().unwrap();
        assert!(!error.is_app, "{reason}");
        assert_eq!(error.error_code, code, "{reason}");
        node.wait_for_reason(Family::Refused, reason, 1);
    }
    // A client whose key is of another type finds that out by itself, and says so.
    let options = RawOptions {
        certificate: Certificate::P256,
        ..RawOptions::of(&dialler)
    };
    let mut raw = Raw::dial(node.transport.local_addr(), &options);
    assert!(raw.drive(LIMIT, |quic| quic.local_error().is_some()));
    raw.turn();
    node.wait_for_reason(Family::Refused, "refused_by_peer", 1);
    // Each was counted once, and by no other reason.
    let refused = node.transport.counters()[0].reasons();
    let refused = refused
        .iter()
        .filter(|(family, ..)| *family == Family::Refused);
    assert_eq!(refused.map(|(.., count)| count).sum::<u64>(), 3);
    assert_eq!(node.count(Counter::ConnectionsIn), 0);
}

// Protects a member whose clock is wrong, or whose certificate is old: the key is all that counts
// of a certificate, and the registry says for how long.
#[test]
fn neither_dates_nor_the_signature_of_a_certificate_count() {
    for certificate in [Certificate::Expired, Certificate::BadlySigned] {
        let (node, dialler) = listener_and_dialler();
        let options = RawOptions {
            certificate,
            ..RawOptions::of(&dialler)
        };
        let mut raw = Raw::dial(node.transport.local_addr(), &options);
        raw.introduce();
        let peers = || node.transport.status().peers();
        assert!(
            raw.drive(LIMIT, |_| !peers().is_empty()),
            "{certificate:?}: the peer is not up"
        );
        assert_eq!(node.count(Counter::ConnectionsIn), 1);
    }
}

// Protects a dialler from a peer that it cannot talk to yet: an answer that speaks another version
// ends the dial at once, with a reason, and the node dials again.
#[test]
fn a_dial_that_is_answered_by_another_version_is_made_again() {
    const RESERVED: u32 = 0x1a2a_3a4a;
    let [dialler, listener] = two_keys();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let own = free_addr();
    let to = socket.local_addr().unwrap();
    let members = [member(&dialler, own), member(&listener, to)];
    let config = TransportConfig {
        // No dial ends by its deadline.
        connect_timeout: 10 * PATIENCE,
        ..TransportConfig::default()
    };
    let node = Node::start(dialler, own, &topology(members, 1), config, 16 << 20);
    // The IDs of the next first packet: the node's, and the one that it gave us.
    let next_ids = || {
        let mut bytes = [0; 2_000];
        let (len, _) = socket.recv_from(&mut bytes).expect("a dial");
        let header = quiche::Header::from_slice(&mut bytes[..len], 16).unwrap();
        [header.scid.to_vec(), header.dcid.to_vec()]
    };
    let [first, given] = next_ids();
    let mut answer = vec![0x80, 0, 0, 0, 0];
    for id in [&first, &given] {
        answer.push(id.len() as u8);
        answer.extend(id);
    }
    answer.extend(RESERVED.to_be_bytes());
    socket.send_to(&answer, own).unwrap();
    node.wait_for_reason(Family::Refused, "quic_failed", 1);
    while next_ids()[0] == first {}
    assert_eq!(node.count(Counter::Dials), 2);
}

#[test]
fn a_node_with_another_key_at_a_members_address_is_refused_by_the_dialler() {
    let [a, b] = two_keys();
    let impostor = key(50);
    let (at, bt) = (free_addr(), free_addr());
    // The impostor listens where b should, and would accept a.
    let liar = topology([member(&a, at), member(&impostor, bt)], 1);
    let truth = topology([member(&a, at), member(&b, bt)], 1);
    let _impostor = Node::start(impostor, bt, &liar, TransportConfig::default(), 16 << 20);
    let a = Node::start(a, at, &truth, TransportConfig::default(), 16 << 20);
    a.wait_for_reason(Family::Refused, "wrong_key", 1);
    a.wait_for_peers(&[]);
}

#[test]
fn a_dial_in_the_wrong_direction_is_refused() {
    let [low, high] = two_keys();
    let addr = free_addr();
    let topology = topology([member(&low, addr), member(&high, free_addr())], 1);
    let node = Node::start(low, addr, &topology, TransportConfig::default(), 16 << 20);
    let mut raw = Raw::dial(
        addr,
        &RawOptions {
            key: Some(high),
            ..RawOptions::default()
        },
    );
    assert!(raw.drive(LIMIT, |quic| quic.peer_error().is_some()));
    assert!(raw.quic.peer_error().unwrap().is_app);
    node.wait_for_reason(Family::Refused, "wrong_direction", 1);
}

#[test]
fn a_removed_node_cannot_come_back_by_a_session() {
    let (node, dialler) = listener_and_dialler();
    let same = || millrace_protocol::identity::SigningKey::from_seed(*dialler.seed());
    let mut raw = Raw::dial(
        node.transport.local_addr(),
        &RawOptions {
            key: Some(same()),
            ..RawOptions::default()
        },
    );
    raw.establish();
    node.wait_for_peers(&[]);
    // Whatever session the listener is willing to give.
    raw.drive(Duration::from_millis(300), |quic| quic.session().is_some());
    let session = raw.quic.session().map(<[u8]>::to_vec);
    assert!(
        session.is_none(),
        "a listener that gives no tickets cannot be asked to resume one"
    );
    let only_node = topology([member(&node.key, node.transport.local_addr())], 2);
    assert!(node.transport.update_topology(&only_node));
    assert!(
        raw.drive(LIMIT, |quic| quic.peer_error().is_some()),
        "cut at the change of the registry"
    );
    // A session of another listener with the same ticket key would be worth nothing either: the
    // full handshake is asked for.
    let mut again = Raw::dial(
        node.transport.local_addr(),
        &RawOptions {
            key: Some(same()),
            ..RawOptions::default()
        },
    );
    assert!(again.drive(LIMIT, |quic| quic.peer_error().is_some()));
    assert!(!again.quic.is_resumed());
    node.wait_for_reason(Family::Refused, "not_in_registry", 1);
}

// Protects the pinned keys from tickets. A resumed session would skip the callback that looks for
// the key in the registry, so a node gives no tickets and takes none: a client that offers a real
// one goes through the whole handshake, and is judged by its key.
#[test]
fn a_real_ticket_does_not_replace_the_handshake() {
    let (node, dialler) = listener_and_dialler();
    for (key, reason) in [(key(77), Some("not_in_registry")), (dialler, None)] {
        let options = RawOptions::of(&key);
        let session = Some(session_of_other_server(&node.key, &options));
        let options = RawOptions { session, ..options };
        let mut raw = Raw::dial(node.transport.local_addr(), &options);
        if let Some(reason) = reason {
            assert!(raw.drive(LIMIT, |quic| quic.peer_error().is_some()));
            node.wait_for_reason(Family::Refused, reason, 1);
        } else {
            raw.establish();
            node.wait_for_count(Counter::ConnectionsIn, 1);
        }
        assert!(!raw.quic.is_resumed());
    }
}

#[test]
fn a_request_dropped_half_way_is_seen_as_reset() {
    let (node, dialler) = listener_and_dialler();
    let mut raw = Raw::dial(
        node.transport.local_addr(),
        &RawOptions {
            key: Some(dialler),
            ..RawOptions::default()
        },
    );
    raw.introduce();
    let mut opening = vec![2];
    opening.extend(
        Header {
            kind: Kind::Request,
            class: Class::Normal,
            method: ECHO,
            id: 1,
            body_bytes: 10_000,
            arg: 1_000,
        }
        .encode(),
    );
    opening.extend([0; 5_000]);
    assert!(raw.send(Raw::stream(0), &opening, false));
    raw.quic
        .stream_shutdown(Raw::stream(0), quiche::Shutdown::Write, 0x8000_0006)
        .unwrap();
    raw.drive(LIMIT, |_| node.reason(Family::Rejected, "peer_reset") > 0);
    node.wait_for_reason(Family::Rejected, "peer_reset", 1);
}

// A cancellation is a small frame, and passes a request on another stream.
#[test]
fn a_request_that_was_cancelled_before_it_arrived_is_not_served() {
    let (node, dialler) = listener_and_dialler();
    let mut raw = Raw::dial(
        node.transport.local_addr(),
        &RawOptions {
            key: Some(dialler),
            ..RawOptions::default()
        },
    );
    raw.introduce();
    let header = |kind, id| Header {
        kind,
        class: Class::Normal,
        method: HANG,
        id,
        body_bytes: 0,
        arg: 60_000,
    };
    let cancel = Header {
        method: Method(0),
        arg: 0,
        ..header(Kind::Cancel, 5)
    };
    let mut lane = vec![1];
    lane.extend(cancel.encode());
    lane.extend(header(Kind::Request, 5).encode());
    lane.extend(header(Kind::Request, 6).encode());
    assert!(raw.send(Raw::stream(0), &lane, false));
    raw.drive(LIMIT, |_| node.count(Counter::ReceivedNormal) == 2);
    node.wait_for(|event| matches!(event, Event::Hanging));
    assert_eq!(node.count(Counter::RequestsCancelled), 1);
    let hanging = node.events.try_iter();
    let more = hanging.filter(|event| matches!(event, Event::Hanging));
    assert_eq!(more.count(), 0, "only the other request is served");
}
