//! Scope `host` in real namespaces: answers to this host get in, for a while and unless a rule
//! denies them; packets that follow this host's own answers do not.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddrV4, TcpListener, TcpStream, UdpSocket};

use common::edge::{Home, TCP_PORT, attached, counters, denied, set_of};
use common::{NODE, PATIENCE, Pair, REMOTE, privileged, until};
use libbpf_rs::{MapCore as _, MapFlags};
use millrace_edge::edge::Edge;
use millrace_edge::interface::AttachMode;
use millrace_edge::nft::{Nft, Table};
use millrace_edge_policy::model::REPLY_UDP_NS;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::RuleAction;
use millrace_edge_policy::settings::{Mode, Scope};
use millrace_testkit::sockets::connect_from;

/// Not declared.
const HOST_PORT: u16 = 9_000;
/// Source port of a sender that tries again.
const SOURCE_PORT: u16 = 40_000;

/// Puts a set with scope `host` in force, in kernel and table. Its rules match the remote host.
fn enforce(pair: &Pair, edge: &Edge, action: RuleAction, number: u32) {
    enforce_for(pair, edge, &["10.77.0.0/24", "fd77::/64"], action, number);
}

/// A set with rules for these prefixes; the default denies all others.
fn enforce_for(pair: &Pair, edge: &Edge, prefixes: &[&str], action: RuleAction, number: u32) {
    let mut set = set_of(Mode::Enforce, prefixes, action);
    set.settings.scope = Scope::Host;
    edge.publish(&set, number, None).unwrap();
    pair.node
        .enter(|| Nft::default().apply(&Table::of(&set)).unwrap());
}

fn address(host: &str, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(host.parse().unwrap(), port)
}

fn dial_from(port: u16, to: SocketAddrV4) -> io::Result<TcpStream> {
    connect_from(address(REMOTE, port).into(), to.into(), PATIENCE)
}

/// Local ports of the flows that the kernel remembers.
fn remembered(edge: &Edge) -> Vec<u16> {
    let keys = edge.maps().handle("replies").keys();
    keys.map(|key| u16::from_le_bytes([key[18], key[19]]))
        .collect()
}

// Protects rule `reject` with scope `host`: the reset that refuses a sender must not open the way
// for its next packet.
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
            .remote
            .enter(|| dial_from(SOURCE_PORT, address(NODE, HOST_PORT)).unwrap_err());
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
    assert_eq!(counters(&edge).acted_on(Reason::PassReject), 3);
    assert_eq!(counters(&edge).acted_on(Reason::PassReply), 0);
    assert!(remembered(&edge).is_empty());
}

/// A prefix without a host in these tests, so that the default decides on all packets.
const NOBODY: &[&str] = &["203.0.113.0/24"];

/// A socket of the node on a port of its own, and one of the remote host that it talks to.
struct Talk {
    node: UdpSocket,
    remote: UdpSocket,
}

impl Talk {
    fn new(pair: &Pair) -> Self {
        let node = pair
            .node
            .enter(|| UdpSocket::bind((NODE, HOST_PORT)).unwrap());
        let remote = pair
            .remote
            .enter(|| UdpSocket::bind((REMOTE, SOURCE_PORT)).unwrap());
        node.connect((REMOTE, SOURCE_PORT)).unwrap();
        remote.connect((NODE, HOST_PORT)).unwrap();
        for socket in [&node, &remote] {
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        Self { node, remote }
    }

    fn ask(&self) {
        self.node.send(b"asks").unwrap();
        self.remote.recv(&mut [0; 16]).unwrap();
    }

    fn answer(&self) {
        self.remote.send(b"answers").unwrap();
    }

    fn is_answered(&self) -> bool {
        self.answer();
        self.node.recv(&mut [0; 16]).is_ok()
    }
}

// Protects an operator who denies: the rule stops a sender at once, whatever the host asked it
// before.
#[test]
fn a_deny_stops_what_is_under_way() {
    if !privileged("a_deny_stops_what_is_under_way") {
        return;
    }
    let (pair, home) = (Pair::new("replies"), Home::new());
    let edge = attached(&pair, &home, AttachMode::Native);
    enforce_for(&pair, &edge, NOBODY, RuleAction::Deny, 1);
    let talk = Talk::new(&pair);
    talk.ask();
    assert!(talk.is_answered());
    assert_eq!(counters(&edge).acted_on(Reason::PassReply), 1);

    enforce(&pair, &edge, RuleAction::Deny, 2);
    for number in 1..=3 {
        talk.ask();
        talk.answer();
        until("the rule counts", || denied(&edge) == number);
    }
    assert_eq!(counters(&edge).acted_on(Reason::PassReply), 1);

    enforce_for(&pair, &edge, NOBODY, RuleAction::Deny, 3);
    assert!(talk.is_answered());
}

// Protects ports that once sent: a remote host that this host asked long ago is refused again,
// until it is asked anew.
#[test]
fn an_answer_that_is_too_late_is_none() {
    if !privileged("an_answer_that_is_too_late_is_none") {
        return;
    }
    let (pair, home) = (Pair::new("replies"), Home::new());
    let edge = attached(&pair, &home, AttachMode::Native);
    enforce_for(&pair, &edge, NOBODY, RuleAction::Deny, 1);
    let talk = Talk::new(&pair);
    talk.ask();
    assert!(talk.is_answered());

    let replies = edge.maps().handle("replies");
    let flow = replies.keys().next().unwrap();
    let sent_ns = || {
        let value = replies.lookup(&flow, MapFlags::ANY).unwrap().unwrap();
        u64::from_le_bytes(value.try_into().unwrap())
    };
    let asked_ns = sent_ns();
    let long_ago_ns = asked_ns.checked_sub(REPLY_UDP_NS + 1);
    let Some(long_ago_ns) = long_ago_ns else {
        common::skip::skip(
            "an_answer_that_is_too_late_is_none",
            "a host that runs for three minutes",
        );
        return;
    };
    replies
        .update(&flow, &long_ago_ns.to_le_bytes(), MapFlags::EXIST)
        .unwrap();
    talk.answer();
    until("the default counts", || {
        counters(&edge).acted_on(Reason::FirewallDefault) == 1
    });
    assert_eq!(sent_ns(), long_ago_ns, "who answers renews nothing");

    talk.ask();
    assert!(sent_ns() >= asked_ns);
    assert!(talk.is_answered());
}

// Protects the room for flows that the host opens: clients of its listeners on undeclared ports
// take none.
#[test]
fn connections_of_others_are_not_remembered() {
    if !privileged("connections_of_others_are_not_remembered") {
        return;
    }
    let (pair, home) = (Pair::new("replies"), Home::new());
    let edge = attached(&pair, &home, AttachMode::Native);
    enforce(&pair, &edge, RuleAction::Allow, 1);
    for (node, remote) in [(NODE, REMOTE), ("fd77::1", "fd77::2")] {
        let listener = pair
            .node
            .enter(|| TcpListener::bind((node, HOST_PORT)).unwrap());
        let mut client = pair.remote.enter(|| {
            let client = TcpStream::connect((node, HOST_PORT));
            client.unwrap_or_else(|error| panic!("{remote}: {error}"))
        });
        let (mut served, _) = listener.accept().unwrap();
        client.write_all(b"asks").unwrap();
        served.read_exact(&mut [0; 4]).unwrap();
        served.write_all(b"answers").unwrap();
        client.read_exact(&mut [0; 7]).unwrap();
        assert!(remembered(&edge).is_empty());
    }
}

// Protects connections that are open when an operator chooses the scope: the host's own go on, and
// are forgotten once reset.
#[test]
fn connections_of_before_are_learned() {
    if !privileged("connections_of_before_are_learned") {
        return;
    }
    let (pair, home) = (Pair::new("replies"), Home::new());
    let edge = attached(&pair, &home, AttachMode::Native);
    let listener = pair
        .remote
        .enter(|| TcpListener::bind((REMOTE, HOST_PORT)).unwrap());
    let mut opened = pair
        .node
        .enter(|| TcpStream::connect((REMOTE, HOST_PORT)).unwrap());
    let (mut served, _) = listener.accept().unwrap();
    assert!(remembered(&edge).is_empty());
    enforce_for(&pair, &edge, NOBODY, RuleAction::Deny, 1);
    opened.write_all(b"asks").unwrap();
    served.read_exact(&mut [0; 4]).unwrap();
    assert_eq!(remembered(&edge), [opened.local_addr().unwrap().port()]);
    served.write_all(b"answers").unwrap();
    opened.read_exact(&mut [0; 7]).unwrap();

    rustix::net::sockopt::set_socket_linger(&opened, Some(std::time::Duration::ZERO)).unwrap();
    drop(opened);
    until("the reset is seen", || remembered(&edge).is_empty());
}

// Protects flows that the host opens, and the room for them: clients of a declared port, however
// many, push none out.
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
        .remote
        .enter(|| dial_from(SOURCE_PORT, address(NODE, TCP_PORT)).unwrap());
    listener.accept().unwrap();
    assert!(remembered(&edge).is_empty());

    enforce_for(&pair, &edge, NOBODY, RuleAction::Deny, 2);
    let _listener = pair
        .remote
        .enter(|| TcpListener::bind((REMOTE, HOST_PORT)).unwrap());
    let opened = pair
        .node
        .enter(|| TcpStream::connect((REMOTE, HOST_PORT)).unwrap());
    assert_eq!(remembered(&edge), [opened.local_addr().unwrap().port()]);
    assert!(counters(&edge).acted_on(Reason::PassReply) > 0);
}
