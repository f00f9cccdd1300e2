//! A node without capabilities: what it can still do with what it holds, and what its helper does for it.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::io;
use std::net::IpAddr;
use std::process::{Command, Stdio};
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

    // What the child left: its last set, the helper's table, the helper's programs.
    let edge = Edge::adopt(&home.pins).unwrap();
    assert_eq!(Publisher::new(edge.maps()).config().set, 3);
    assert!(ends.arrives());
    assert_eq!(counters(&edge).acted_on(Reason::PassUdp), 1);
    let list = || ok(Command::new("nft").args(["list", "table", "inet", "millrace"]));
    assert!(pair.node.enter(list).contains("unstamped"));
    edge.publish(&set(Mode::Enforce, RuleAction::Deny), 4, None)
        .unwrap();
    ends.send();
    until("the programs that the helper loaded refuse", || {
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
    let edge = Edge::attach(&pins, &options(AttachMode::Native)).unwrap();
    let loaded = edge.load_beside().unwrap();
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
    assert!(Table::<millrace_edge::abi::EdgeLine>::map(edge.maps().handle("limiter")).is_ok());

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
    helper.request(&Request::Reload).unwrap();
    let interface = "mr0".to_owned();
    helper
        .request(&Request::Detach {
            interface: interface.clone(),
        })
        .unwrap();
    let error = helper
        .request(&Request::Detach {
            interface: interface.clone(),
        })
        .unwrap_err();
    let HelperError::Refused { reason, message } = &error else {
        panic!("{error}")
    };
    assert_eq!(reason, "not_attached");
    assert!(message.contains("mr0"), "{message}");
    helper
        .request(&Request::Attach {
            interface,
            mode: AttachMode::Native,
        })
        .unwrap();

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
    use std::io::Write as _;
    let mut helper = this_binary("child_helper")
        .env(HELPER, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Standard input is no socket: nothing is read.
    let _ = helper.wait().unwrap();

    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut command = this_binary("child_helper");
    command
        .env(HELPER, "1")
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)));
    let mut helper = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(command);
    ours.write_all(&u32::MAX.to_le_bytes()).unwrap();
    assert!(!helper.wait().unwrap().success());
    let closed = io::Read::read(&mut ours, &mut [0; 4]);
    assert!(closed.is_ok_and(|bytes| bytes == 0));
}
