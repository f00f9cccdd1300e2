//! Scope `host` in real namespaces: what this host asked for gets in, and what it only answered does not.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::io;
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use common::edge::{Home, TCP_PORT, attached, counters, set};
use common::{NODE, Pair, WORLD, privileged};
use libbpf_rs::MapCore as _;
use millrace_edge::edge::Edge;
use millrace_edge::nft::{Nft, Table};
use millrace_edge::state::AttachMode;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::RuleAction;
use millrace_edge_policy::settings::{Mode, Scope};
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};

/// Not declared.
const HOST_PORT: u16 = 9_000;
/// Of a sender who tries again.
const SOURCE_PORT: u16 = 40_000;

/// Puts a set with scope `host` in force, in kernel and table.
fn enforce(pair: &Pair, edge: &Edge, action: RuleAction, number: u32) {
    let mut set = set(Mode::Enforce, action);
    set.settings.scope = Scope::Host;
    edge.publish(&set, number, None).unwrap();
    pair.node
        .enter(|| Nft::default().apply(&Table::of(&set)).unwrap());
}

fn address(host: &str, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(host.parse().unwrap(), port)
}

fn connect_from(port: u16, to: SocketAddrV4) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    bind(&socket, &address(WORLD, port))?;
    connect(&socket, &to)?;
    Ok(socket)
}

/// Local ports of the flows that the kernel remembers.
fn remembered(edge: &Edge) -> Vec<u16> {
    let keys = edge.maps().handle("replies").keys();
    keys.map(|key| u16::from_le_bytes([key[18], key[19]]))
        .collect()
}

// Protects rule `reject` with scope `host`: the reset that refuses a sender must not open the way for its next packet.
#[test]
fn who_was_refused_is_refused_again() {
    if !privileged("who_was_refused_is_refused_again") {
        return;
    }
    let (pair, home) = (Pair::new("replies"), Home::new());
    let edge = attached(&pair, &home, AttachMode::Native);
    enforce(&pair, &edge, RuleAction::Reject, 1);
    let _listener = pair
        .node
        .enter(|| TcpListener::bind((NODE, HOST_PORT)).unwrap());
    for _ in 0..3 {
        let refused = pair
            .world
            .enter(|| connect_from(SOURCE_PORT, address(NODE, HOST_PORT)).unwrap_err());
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
    assert_eq!(counters(&edge).acted_on(Reason::PassReject), 3);
    assert_eq!(counters(&edge).acted_on(Reason::PassReply), 0);
    assert!(remembered(&edge).is_empty());
}

// Protects what the host itself opens, and the room for it: clients of a declared port, however many, push nothing out.
#[test]
fn only_what_the_host_opens_is_remembered() {
    if !privileged("only_what_the_host_opens_is_remembered") {
        return;
    }
    let (pair, home) = (Pair::new("replies"), Home::new());
    let edge = attached(&pair, &home, AttachMode::Native);
    enforce(&pair, &edge, RuleAction::Allow, 1);
    let listener = pair
        .node
        .enter(|| TcpListener::bind((NODE, TCP_PORT)).unwrap());
    let _client = pair
        .world
        .enter(|| connect_from(SOURCE_PORT, address(NODE, TCP_PORT)).unwrap());
    listener.accept().unwrap();
    assert!(remembered(&edge).is_empty());

    enforce(&pair, &edge, RuleAction::Deny, 2);
    let _listener = pair
        .world
        .enter(|| TcpListener::bind((WORLD, HOST_PORT)).unwrap());
    let opened = pair
        .node
        .enter(|| TcpStream::connect((WORLD, HOST_PORT)).unwrap());
    assert_eq!(remembered(&edge), [opened.local_addr().unwrap().port()]);
    assert!(counters(&edge).acted_on(Reason::PassReply) > 0);
}
