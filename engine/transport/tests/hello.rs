//! What two nodes say first: neighbouring releases talk, others are refused with a reason, and the
//! newer registry version is known on both sides.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::time::Duration;

use common::*;
use millrace_protocol::frame::{Class, Header, Hello, Kind, VersionRange};
use millrace_protocol::identity::SigningKey;
use millrace_transport::counters::Family;
use millrace_transport::{CloseCode, TransportConfig};
use raw::{Raw, RawOptions, hello_lane};

const LIMIT: Duration = Duration::from_secs(10);

/// A listener, and a member that may dial it.
fn listener_and_dialler() -> (Node, SigningKey) {
    let (mut a, mut b) = (key(1), key(2));
    if b.node_id() < a.node_id() {
        std::mem::swap(&mut a, &mut b);
    }
    let addr = free_addr();
    let topology = topology([member(&a, free_addr()), member(&b, addr)], 1);
    let node = Node::start(b, addr, &topology, TransportConfig::default(), 16 << 20);
    (node, a)
}

fn connect(node: &Node, dialler: &SigningKey) -> Raw {
    let mut raw = Raw::dial(node.transport.local_addr(), &RawOptions::of(dialler));
    raw.establish();
    raw
}

fn hello(min: u16, max: u16) -> Hello {
    Hello {
        versions: VersionRange { min, max },
        features: u32::MAX,
        registry_version: 42,
        shards: 3,
    }
}

#[test]
fn both_sides_learn_which_registry_version_the_other_holds() {
    let (mut a, mut b) = (key(1), key(2));
    if b.node_id() < a.node_id() {
        std::mem::swap(&mut a, &mut b);
    }
    let (at, bt) = (free_addr(), free_addr());
    let members = || [member(&a, at), member(&b, bt)];
    let (older, newer) = (topology(members(), 3), topology(members(), 7));
    let start = |key: &SigningKey, addr, topology| {
        Node::start(
            key.clone(),
            addr,
            topology,
            TransportConfig::default(),
            16 << 20,
        )
    };
    let b = start(&b, bt, &newer);
    // Said before anybody dials; a lower one changes nothing.
    b.transport.set_registry_version(9);
    b.transport.set_registry_version(8);
    let a = start(&a, at, &older);
    for (node, peer, version) in [(&a, &b, 9), (&b, &a, 3)] {
        node.wait_for(|event| matches!(event, Event::Up(id, _) if *id == peer.id()));
        let hello = node.hellos.lock().unwrap()[&peer.id()];
        assert_eq!(hello.registry_version, version);
        assert_eq!((hello.version, hello.shards), (Hello::VERSIONS.max, 1));
    }
}

#[test]
fn a_newer_release_that_still_speaks_our_version_is_up() {
    let (node, dialler) = listener_and_dialler();
    let mut raw = connect(&node, &dialler);
    let later = [&hello(1, 9).encode()[..], b"fields of a later version"].concat();
    let lane = hello_lane(&later);
    // A request that overtakes the hello waits for it; so does what follows the hello on its lane.
    let (first, rest) = lane.split_at(9);
    let request = Header {
        kind: Kind::Send,
        class: Class::Normal,
        method: LENGTH,
        id: 0,
        body_bytes: 0,
        arg: 0,
    };
    let overtaking = [&[2], &request.encode()[..]].concat();
    assert!(raw.send(Raw::stream(0), &overtaking, true));
    assert!(raw.send(Raw::LANE, first, false));
    // quiche forgets a stream that was acknowledged to its end. The node looks at its streams
    // before it acknowledges them.
    let is_acknowledged =
        |quic: &mut quiche::Connection| quic.stream_capacity(Raw::stream(0)).is_err();
    assert!(raw.drive(LIMIT, is_acknowledged));
    assert!(node.events.try_recv().is_err(), "nothing before the hello");
    assert!(raw.send(Raw::LANE, &[rest, &request.encode()[..]].concat(), false));
    raw.drive(LIMIT, |_| !node.hellos.lock().unwrap().is_empty());
    let heard = node.hellos.lock().unwrap()[&dialler.node_id()];
    assert_eq!((heard.version, heard.features), (Hello::VERSIONS.max, 0));
    let mut events = Vec::new();
    raw.drive(LIMIT, |_| {
        events.extend(node.events.try_iter());
        events.len() == 3
    });
    assert!(matches!(
        events[..],
        [Event::Up(..), Event::Message(..), Event::Message(..)]
    ));
}

#[test]
fn a_peer_that_does_not_say_hello_as_it_must_is_refused_and_counted() {
    let cases = [
        (
            hello_lane(&hello(2, 9).encode()),
            CloseCode::Incompatible,
            "incompatible_version",
        ),
        (
            hello_lane(&hello(9, 2).encode()),
            CloseCode::Violation,
            "peer_hello_no_versions",
        ),
        (
            hello_lane(&hello(1, 1).encode()[..16]),
            CloseCode::Violation,
            "peer_hello_too_short",
        ),
        (
            hello_lane(&[0; 257]),
            CloseCode::Violation,
            "peer_hello_missing",
        ),
        (vec![2; 40], CloseCode::Violation, "peer_hello_missing"),
        (vec![1; 40], CloseCode::Violation, "peer_hello_missing"),
        (
            [&[1], &[5; 16][..]].concat(),
            CloseCode::Violation,
            "peer_hello_missing",
        ),
    ];
    let (node, dialler) = listener_and_dialler();
    for (lane, code, reason) in cases {
        let before = node.reason(Family::Refused, reason);
        let mut raw = connect(&node, &dialler);
        raw.send(Raw::LANE, &lane, false);
        assert!(
            raw.drive(LIMIT, |quic| quic.peer_error().is_some()),
            "{reason}"
        );
        let error = raw.quic.peer_error().unwrap();
        assert_eq!(
            (error.is_app, error.error_code),
            (true, code as u64),
            "{reason}"
        );
        node.wait_for_reason(Family::Refused, reason, before + 1);
    }
    assert!(
        node.hellos.lock().unwrap().is_empty(),
        "none of them was up"
    );
}
