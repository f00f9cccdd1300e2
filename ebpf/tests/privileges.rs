//! A node without capabilities: what it can still do with what it holds, and what its helper does for it.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use caps::CapSet;
use common::edge::{Ends, Home, PORT, counters, denied, options, set};
use common::{Pair, ok, privileged, until};
use libbpf_rs::libbpf_sys::bpf_map_create_opts;
use libbpf_rs::{MapHandle, MapType};
use millrace_edge::counts::Counts;
use millrace_edge::edge::Edge;
use millrace_edge::frame::{Description, Shape};
use millrace_edge::helper::{Helper, HelperError, Request, Setup, serve_stdin};
use millrace_edge::load::{LoadError, Loaded};
use millrace_edge::maps::Table;
use millrace_edge::nft::{self, Nft};
use millrace_edge::pins::Pins;
use millrace_edge::privileges::{NEEDED, drop_capabilities, missing};
use millrace_edge::publish::Publisher;
use millrace_edge::state::AttachMode;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::RuleAction;
use millrace_edge_policy::settings::Mode;

const CHILD: &str = "MILLRACE_TEST_NAMESPACE";
const CHILD_PINS: &str = "MILLRACE_TEST_PINS";
const HELPER: &str = "MILLRACE_TEST_HELPER";

/// This test binary once more, to run one of its functions in a process of its own.
fn this_binary(function: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", function, "--nocapture"]);
    command
}

// Protects the node's main promise about privileges: it drops all, and goes on deciding, counting, tracing and publishing.
#[test]
fn without_capabilities_the_node_goes_on() {
    if !privileged("without_capabilities_the_node_goes_on") {
        return;
    }
    let (pair, home) = (Pair::new("caps"), Home::new());
    let ends = Ends::new(&pair);
    let mut child = this_binary("child_node")
        .env(CHILD, &pair.node.name)
        .env(CHILD_PINS, home.pins.root())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    assert!(child.wait().unwrap().success());

    // What the child left: its last set and programs, the helper's table, the interface that the helper attached to.
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

/// No test: the node of [`without_capabilities_the_node_goes_on`].
#[test]
fn child_node() {
    let (Ok(name), Some(root)) = (std::env::var(CHILD), std::env::var_os(CHILD_PINS)) else {
        return;
    };
    common::enter(&name, || node(Pins::at(root)));
}

fn node(pins: Pins) {
    let mut edge = Edge::attach(&pins, &options(AttachMode::Native)).unwrap();
    let loaded = edge.load_beside().unwrap();
    // The helper attaches it again.
    edge.detach_interface("mr0").unwrap();
    let setup = Setup {
        pins: pins.clone(),
        nft: Nft::default(),
    };
    let mut command = this_binary("child_helper");
    command
        .env_remove(CHILD)
        .env(HELPER, "1")
        .stdout(Stdio::null());
    let helper = Helper::start(command, &setup).unwrap();

    drop_capabilities(&[]).unwrap();
    for set in [
        CapSet::Effective,
        CapSet::Permitted,
        CapSet::Inheritable,
        CapSet::Ambient,
    ] {
        assert!(caps::read(None, set).unwrap().is_empty(), "{set:?}");
    }
    assert!(caps::read(None, CapSet::Bounding).unwrap().is_empty());
    assert_eq!(missing(), NEEDED);
    can_use_what_it_holds(edge, &loaded);
    cannot_make_anything_new();
    asks_its_helper(&helper, &pins);
}

fn can_use_what_it_holds(mut edge: Edge, loaded: &Loaded) {
    for probation in [None, Some(Duration::from_secs(600))] {
        edge.publish(&set(Mode::Enforce, RuleAction::Allow), 2, probation)
            .unwrap();
    }
    edge.confirm().unwrap();

    let source: IpAddr = [192, 0, 2, 1].into();
    let map = MapHandle::try_from(edge.maps().quic_sources()).unwrap();
    let counts = Counts::new(map, 9).unwrap();
    counts.opened(source);
    assert_eq!((counts.sources(), counts.missed()), (1, 0));
    assert!(Table::<millrace_edge::abi::EdgeBucket>::map(edge.maps().handle("limiter")).is_ok());

    let from = (source, 1_024).into();
    let packet = Description {
        from,
        to_port: PORT,
        shape: Shape::Udp,
        payload_bytes: None,
    };
    let trace = edge.trace(&packet.frame()).unwrap();
    assert_eq!(
        (trace.reason, trace.connections.quic),
        (Reason::FirewallDefault, 1)
    );

    // Programs that were loaded before take the place of those that run.
    edge.replace(loaded).unwrap();
    assert_eq!(
        edge.trace(&packet.frame()).unwrap().reason,
        Reason::FirewallDefault
    );
}

fn cannot_make_anything_new() {
    let options = bpf_map_create_opts {
        sz: size_of::<bpf_map_create_opts>() as u64,
        ..Default::default()
    };
    let map = MapHandle::create(MapType::Array, Some("mr_test"), 4, 4, 1, &options);
    assert_eq!(
        map.unwrap_err().kind(),
        libbpf_rs::ErrorKind::PermissionDenied
    );
    let error = Loaded::load(&common::edge::sizes()).unwrap_err();
    assert!(
        matches!(error, LoadError::Refused { .. } | LoadError::Open { .. }),
        "{error}"
    );
    assert!(Nft::default().apply(&table()).is_err());
}

fn table() -> nft::Table {
    nft::Table::of(&set(Mode::Enforce, RuleAction::Allow))
}

fn asks_its_helper(helper: &Helper, pins: &Pins) {
    helper.request(&Request::ApplyNft(table())).unwrap();
    assert!(helper.nft_fingerprint().unwrap().is_some());
    let attach = |interface: &str| {
        helper.request(&Request::Attach {
            interface: interface.into(),
            mode: AttachMode::Native,
        })
    };
    let error = attach("nowhere").unwrap_err();
    let HelperError::Refused { message, .. } = &error else {
        panic!("{error}")
    };
    assert!(message.contains("nowhere"), "{message}");
    attach("mr0").unwrap();

    // The pins are for whoever owns the folder.
    let edge = Edge::adopt(pins).unwrap();
    edge.publish(&set(Mode::Enforce, RuleAction::Allow), 3, None)
        .unwrap();
}

/// No test: the helper of [`child_node`].
#[test]
fn child_helper() {
    if std::env::var_os(HELPER).is_some() {
        serve_stdin().unwrap();
    }
}

// Protects the helper's privileges: it ends with the node, and takes nothing from who speaks otherwise.
#[test]
fn the_helper_ends_with_the_conversation() {
    let mut helper = this_binary("child_helper")
        .env(HELPER, "1")
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

/// A helper that has been told nothing yet, and our end of its socket.
fn talked_to() -> (UnixStream, Child) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = this_binary("child_helper");
    command
        .env(HELPER, "1")
        .stdin(Stdio::from(OwnedFd::from(theirs)));
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

// Protects the firewall from a node that somebody else speaks for: the helper takes nothing away, and does not listen to who asks for it.
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
        assert_eq!(heard(&mut ours).unwrap(), r#""done""#);
        // What a node asks for is tried and answered.
        say(&mut ours, r#""look_at_nft""#);
        assert!(heard(&mut ours).unwrap().contains("nft_run"));
        say(&mut ours, request);
        assert_eq!(heard(&mut ours), None, "{request}");
        assert!(!helper.wait().unwrap().success(), "{request}");
    }
}
