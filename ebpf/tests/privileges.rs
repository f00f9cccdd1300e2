//! A node without capabilities: what it can still do with the descriptors that it holds, and what
//! its helper does for it.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use common::edge::{Ends, Home, counters, denied, set};
use common::{Pair, ok, privileged, process, until};
use millrace_edge::edge::Edge;
use millrace_edge::helper::Setup;
use millrace_edge::nft::Nft;
use millrace_edge::pins::Pins;
use millrace_edge::publish::Publisher;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::RuleAction;
use millrace_edge_policy::settings::Mode;

// Protects the node's main promise about privileges: it drops all capabilities, and goes on
// deciding, counting, tracing and publishing.
#[test]
fn without_capabilities_the_node_goes_on() {
    if !privileged("without_capabilities_the_node_goes_on") {
        return;
    }
    let (pair, home) = (Pair::new("caps"), Home::new());
    let ends = Ends::new(&pair);
    let start = || {
        process::command("unprivileged-node")
            .arg(home.pins.root())
            .stdin(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut child = pair.node.enter(start);
    assert!(child.wait().unwrap().success());

    // The process left its last set and programs, the helper's table, and the interface that the
    // helper attached to.
    let edge = Edge::adopt(&home.pins).unwrap();
    assert_eq!(Publisher::new(edge.maps()).config().set, 3);
    assert!(ends.arrives());
    assert_eq!(counters(&edge).acted_on(Reason::PassUdp), 1);
    let list = || ok(Command::new("nft").args(["list", "table", "inet", "millrace"]));
    assert!(pair.node.enter(list).contains("unstamped"));
    edge.publish(&set(Mode::Enforce, RuleAction::Deny), 4, None)
        .unwrap();
    ends.send();
    until("the programs that the child put in refuse", || {
        denied(&edge) == 1
    });
    assert_eq!(ends.arrived(), 0);
}

// Protects the helper's privileges: it ends with the node, and takes nothing from a process that
// speaks otherwise.
#[test]
fn the_helper_ends_with_the_conversation() {
    let mut helper = process::command("helper")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Standard input is no socket: nothing is read.
    let _ = helper.wait().unwrap();

    let (mut ours, mut helper) = talked_to();
    ours.write_all(&u32::MAX.to_le_bytes()).unwrap();
    assert!(!helper.wait().unwrap().success());
    assert_eq!(heard(&mut ours), None);
}

/// A helper without a setup, and this test's end of its socket.
fn talked_to() -> (UnixStream, Child) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = process::command("helper");
    command.stdin(Stdio::from(OwnedFd::from(theirs)));
    let helper = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    (ours, helper)
}

fn say(socket: &mut UnixStream, message: &str) {
    let length = u32::try_from(message.len()).unwrap();
    socket.write_all(&length.to_le_bytes()).unwrap();
    socket.write_all(message.as_bytes()).unwrap();
}

/// None if the other end has closed.
fn heard(socket: &mut UnixStream) -> Option<String> {
    let mut length = [0; 4];
    socket.read_exact(&mut length).ok()?;
    let mut message = vec![0; u32::from_le_bytes(length) as usize];
    socket.read_exact(&mut message).unwrap();
    Some(String::from_utf8(message).unwrap())
}

// Protects the firewall from a node that an attacker controls: the helper removes nothing, and
// hears no more after a request for it.
#[test]
fn who_asks_for_what_the_node_never_asks_is_not_heard_again() {
    let setup = Setup {
        pins: Pins::at("/nonexistent/edge"),
        nft: Nft {
            program: "/nonexistent/nft".into(),
            ..Nft::default()
        },
    };
    let setup = serde_json::to_string(&setup).unwrap();
    for request in [
        r#"{"detach":{"interface":"mr0"}}"#,
        r#""remove_nft""#,
        r#""reload""#,
    ] {
        let (mut ours, mut helper) = talked_to();
        say(&mut ours, &setup);
        assert_eq!(heard(&mut ours).unwrap(), r#"{"done":null}"#);
        // What a node asks for is tried and answered.
        say(&mut ours, r#"{"nft":"look"}"#);
        assert!(heard(&mut ours).unwrap().contains("nft_run"));
        say(&mut ours, request);
        assert_eq!(heard(&mut ours), None, "{request}");
        assert!(!helper.wait().unwrap().success(), "{request}");
    }
}
