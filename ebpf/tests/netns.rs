//! The place and the owner of an edge: other layouts, other namespaces, attempts that were cut
//! short.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use common::edge::{Ends, Home, attached, options, set};
use common::{Namespace, Pair, ok, privileged, process, until};
use millrace_edge::edge::{Edge, EdgeError};
use millrace_edge::interface::AttachMode;
use millrace_edge::load::Program;
use millrace_edge::offload::takes_vlan_tags;
use millrace_edge::pins::{Kind, Pins};
use millrace_edge_policy::rules::RuleAction;
use millrace_edge_policy::settings::Mode;

/// The folder of this binary's layout.
fn layout(pins: &Pins) -> PathBuf {
    let maps = pins.path(Kind::Map, "x").parent().unwrap().to_owned();
    maps.parent().unwrap().to_owned()
}

// Protects an edge of another version: an attempt to attach beside it is refused before it touches
// anything.
#[test]
fn an_edge_of_another_layout_outlives_an_attempt_to_attach() {
    if !privileged("an_edge_of_another_layout_outlives_an_attempt_to_attach") {
        return;
    }
    let (pair, home) = (Pair::new("place"), Home::new());
    let ends = Ends::new(&pair);
    let edge = attached(&pair, &home, AttachMode::Auto);
    edge.publish(&set(Mode::Enforce, RuleAction::Deny), 1, None)
        .unwrap();
    let own = layout(&home.pins);
    let other = own.with_file_name("layout-999");
    fs::rename(&own, &other).unwrap();
    let before = fs::read(home.pins.journal_path()).unwrap();
    let attach = || Edge::attach(&home.pins, &options(AttachMode::Auto));
    let error = pair.node.enter(attach).unwrap_err();
    assert!(
        matches!(&error, EdgeError::Layout { found, .. } if found == "layout-999"),
        "{error}"
    );
    assert_eq!(fs::read(home.pins.journal_path()).unwrap(), before);
    assert!(pair.node.ip("link show mr0").contains(" xdp"));
    ends.send();
    assert_eq!(ends.arrived(), 0, "it still enforces");
    fs::rename(&other, &own).unwrap();
    Edge::adopt(&home.pins).unwrap();
}

// Protects the process after a killed attempt: it removes what is on no interface, and nothing
// else.
#[test]
fn what_a_killed_attempt_left_is_cleared_by_the_next() {
    if !privileged("what_a_killed_attempt_left_is_cleared_by_the_next") {
        return;
    }
    let (pair, home) = (Pair::new("place"), Home::new());
    let attach = || {
        pair.node
            .enter(|| Edge::attach(&home.pins, &options(AttachMode::Auto)))
    };
    // Folders alone; some maps; all maps and some programs; all but the link that counts TCP.
    let cuts = [
        (Kind::Map, "control"),
        (Kind::Map, "budgets"),
        (Kind::Program, Program::Stamp.name()),
        (Kind::Link, Program::ConnState.name()),
    ];
    for (kind, missing) in cuts {
        attach().unwrap();
        let interfaces = ["edge", "stamp", "learn"];
        for name in home.pins.names(Kind::Link).unwrap() {
            if interfaces
                .iter()
                .any(|of| name.starts_with(&format!("{of}-")))
            {
                fs::remove_file(home.pins.path(Kind::Link, &name)).unwrap();
            }
        }
        // The kernel removes a link some time after its last name is gone.
        until("nothing is attached", || {
            !pair.node.ip("link show mr0").contains(" xdp")
        });
        fs::remove_file(home.pins.path(kind, missing)).unwrap();
        fs::remove_file(home.pins.journal_path()).unwrap();
        assert!(matches!(
            Edge::adopt(&home.pins),
            Err(EdgeError::Incomplete { .. } | EdgeError::Maps(_))
        ));
        let edge = attach().unwrap();
        assert_eq!(edge.interfaces().unwrap().len(), 1, "without {missing}");
        Edge::detach(&home.pins).unwrap();
    }
    // It is on an interface, so it may be in force, and is not removed.
    attach().unwrap();
    fs::remove_file(home.pins.path(Kind::Map, "budgets")).unwrap();
    let error = attach().unwrap_err();
    assert!(matches!(error, EdgeError::Incomplete { .. }), "{error}");
    assert!(pair.node.ip("link show mr0").contains(" xdp"));
}

// Protects the interfaces of one namespace from commands in another, where the same names mean
// other interfaces.
#[test]
fn an_edge_belongs_to_one_network_namespace() {
    if !privileged("an_edge_belongs_to_one_network_namespace") {
        return;
    }
    let (pair, home) = (Pair::new("place"), Home::new());
    let mut edge = attached(&pair, &home, AttachMode::Auto);
    let other = Namespace::new("place");
    other.ip("link add mr0 type veth peer name mr1");
    pair.node.enter(|| edge.check_here().unwrap());
    assert_eq!(
        pair.node.enter(|| Edge::may_detach(&home.pins)).unwrap(),
        None
    );

    let refused = |error: EdgeError| {
        let way_out = format!("nsenter --net=/run/netns/{}", pair.node.name);
        assert!(
            matches!(error, EdgeError::Elsewhere { .. }) && error.to_string().contains(&way_out),
            "{error}"
        );
    };
    refused(other.enter(|| edge.check_here()).unwrap_err());
    refused(other.enter(|| Edge::may_detach(&home.pins)).unwrap_err());
    let attach = || edge.attach_interface("mr0", AttachMode::Auto);
    refused(other.enter(attach).unwrap_err());
    assert!(!other.ip("link show mr0").contains(" xdp"));

    // Also of a layout that this binary does not know.
    let own = layout(&home.pins);
    fs::rename(&own, own.with_file_name("layout-999")).unwrap();
    refused(other.enter(|| Edge::may_detach(&home.pins)).unwrap_err());
    // Once it is on no interface, it can be detached from anywhere: its namespace may be gone.
    pair.node.ip("link del mr0");
    let elsewhere = other.enter(|| Edge::may_detach(&home.pins)).unwrap();
    let there = pair
        .node
        .enter(|| millrace_edge::netns::NetworkNamespace::current().unwrap());
    assert_eq!(elsewhere, Some(there));
}

/// The XDP program on the node's interface.
fn program_id(pair: &Pair) -> u64 {
    let shown: serde_json::Value =
        serde_json::from_str(&pair.node.ip("-j -d link show mr0")).unwrap();
    shown[0]["xdp"]["prog"]["id"].as_u64().unwrap()
}

// Protects upgrades: a process knows whether the running programs are its binary's, and a link that
// refuses leaves all with their old ones.
#[test]
fn programs_of_another_build_are_told_and_replaced_all_or_none() {
    if !privileged("programs_of_another_build_are_told_and_replaced_all_or_none") {
        return;
    }
    let (pair, home) = (Pair::new("place"), Home::new());
    let ends = Ends::new(&pair);
    let mut edge = attached(&pair, &home, AttachMode::Auto);
    edge.publish(&set(Mode::Enforce, RuleAction::Deny), 1, None)
        .unwrap();
    assert!(edge.is_current());
    let label = |build: &str| {
        layout(&home.pins)
            .join("labels")
            .join(format!("build-{build}"))
    };
    let this = home.pins.build().unwrap();
    fs::rename(label(&this), label("0")).unwrap();
    assert!(!Edge::adopt(&home.pins).unwrap().is_current());

    // A link of a kind that takes no other program, and comes last: the links before it go back.
    let before = program_id(&pair);
    let refusing = home.pins.path(Kind::Link, "stamp-999999");
    let mut link = libbpf_rs::Link::open(home.pins.path(Kind::Link, "conn_state")).unwrap();
    link.unpin().unwrap();
    link.pin(&refusing).unwrap();
    let error = edge.reload().unwrap_err();
    assert!(
        matches!(&error, EdgeError::Update { path, .. } if *path == refusing),
        "{error}"
    );
    assert_eq!(program_id(&pair), before);
    assert!(!edge.is_current());
    ends.send();
    assert_eq!(ends.arrived(), 0, "it still enforces");

    link.unpin().unwrap();
    link.pin(home.pins.path(Kind::Link, "conn_state")).unwrap();
    edge.reload().unwrap();
    assert_ne!(program_id(&pair), before);
    assert!(edge.is_current());
    ends.send();
    assert_eq!(ends.arrived(), 0, "what was in force is");
}

// Protects answers on VLANs: the card says whether it hides tags from the program.
#[test]
fn an_offload_that_hides_tags_is_seen() {
    if !privileged("an_offload_that_hides_tags_is_seen") {
        return;
    }
    let pair = Pair::new("place");
    let ethtool = |arguments: &[&str]| {
        pair.node
            .enter(|| ok(Command::new("ethtool").args(arguments)))
    };
    if Command::new("ethtool").arg("--version").output().is_err() {
        return common::skip::skip("an_offload_that_hides_tags_is_seen", "ethtool");
    }
    for (word, expected) in [("off", false), ("on", true), ("off", false)] {
        ethtool(&["-K", "mr0", "rxvlan", word]);
        let found = pair.node.enter(|| takes_vlan_tags("mr0").unwrap());
        assert_eq!(found, expected, "{word}");
    }
    assert!(pair.node.enter(|| takes_vlan_tags("mr9")).is_err());
    assert!(takes_vlan_tags("a-name-that-is-too-long").is_err());
}

// Protects a running edge from commands where its pins are not visible, as in a mount namespace
// that was made before: they refuse, and remove nothing of it.
#[test]
fn an_edge_out_of_sight_loses_nothing() {
    if !privileged("an_edge_out_of_sight_loses_nothing") {
        return;
    }
    let (pair, home) = (Pair::new("place"), Home::new());
    let mut child = pair.node.enter(|| {
        Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .arg(process::path())
            .arg("out-of-sight")
            .arg(home.pins.root())
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    });
    until("the child has mounts of its own", || {
        home.pins.root().with_file_name("ready").exists()
    });
    let edge = attached(&pair, &home, AttachMode::Auto);
    let state = fs::read(home.pins.journal_path()).unwrap();
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert_eq!(fs::read(home.pins.journal_path()).unwrap(), state);
    let interface = edge.interfaces().unwrap().remove(0);
    assert!(edge.is_live(&interface));
}
