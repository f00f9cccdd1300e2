//! Where an edge is: its network namespace, its pins, its interfaces, and the build of its
//! programs, as an operator meets them.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[path = "common/edge_testbed.rs"]
#[allow(dead_code, reason = "takes what it needs")]
mod edge_testbed;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::namespace::{NON_MEMBER, OPERATOR, privileged, tool};
use common::{eventually, millrace, stderr, text};
use edge_testbed::{PORT, Testbed, allow_all_but_the_non_member};
use libbpf_rs::Link;
use libbpf_rs::query::LinkTypeInfo;
use millrace_edge::edge::{AttachOptions, Edge};
use millrace_edge::interface::AttachMode;
use millrace_edge::pins::Kind;

/// The folder of this binary's layout.
fn layout(testbed: &Testbed) -> PathBuf {
    let maps = testbed.pinned.pins().path(Kind::Map, "x");
    maps.parent().unwrap().parent().unwrap().to_owned()
}

/// Makes the programs that run those of another build.
fn age(testbed: &Testbed) {
    let labels = layout(testbed).join("labels");
    let build = testbed.pinned.pins().build().unwrap();
    fs::rename(
        labels.join(format!("build-{build}")),
        labels.join("build-0"),
    )
    .unwrap();
}

/// The XDP program on an interface of the node.
fn program(testbed: &Testbed, interface: &str) -> u64 {
    let shown = testbed
        .pair
        .node
        .ip(&format!("-j -d link show {interface}"));
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    shown[0]["xdp"]["prog"]["id"].as_u64().unwrap()
}

fn assert_refused(output: &Output, words: &[&str]) {
    let error = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    for word in words {
        assert!(error.contains(word), "{word} is not in: {error}");
    }
}

// Protects a node that enforces from commands in the wrong namespace: the program would go, and the
// table would stay and close it.
#[test]
fn commands_in_another_network_namespace_are_refused() {
    if !privileged("commands_in_another_network_namespace_are_refused") {
        return;
    }
    let mut testbed = Testbed::new("else", "mode = \"enforce\"");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    testbed.json("attach", &[]);
    testbed.json("apply", &[]);
    let config = text(&testbed.node.config).to_owned();
    let enter = format!("nsenter --net=/run/netns/{}", testbed.pair.node.name);
    for command in ["attach", "apply", "detach"] {
        let output = millrace(&["xdp", command, "--config", &config]);
        assert_refused(&output, &["another network namespace", &enter]);
    }
    let deny = [
        "xdp",
        "deny",
        "10.77.0.0/24",
        "--for",
        "1h",
        "--config",
        &config,
    ];
    assert_refused(&millrace(&deny), &["another network namespace"]);
    assert_eq!(testbed.status()["temporary_rules"], 0);
    // Nor does a node take it over from there.
    let Testbed { node, pair, .. } = &mut testbed;
    pair.remote.ip("addr add 10.77.0.1/32 dev lo");
    pair.remote.enter(|| node.start());
    let said = node.said.join("\n");
    assert!(said.contains("another network namespace"), "{said}");
    assert_eq!(node.status()["edge"]["place"], "user_space");
    assert_eq!(node.stop(), Some(0));
    pair.remote.ip("addr del 10.77.0.1/32 dev lo");
    testbed.talk(OPERATOR, PORT).unwrap();
    testbed.assert_denied(NON_MEMBER);

    // Its interface is gone: then it may go as well, and what may be left is named.
    testbed.pair.unplug();
    let output = millrace(&["xdp", "detach", "--config", &config]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let left = format!("nft delete table {}", testbed.table());
    assert!(stderr(&output).contains(&left), "{}", stderr(&output));
    assert!(
        testbed
            .pair
            .node
            .nft("list tables")
            .contains(&testbed.table())
    );
}

/// A bpffs that the host has set up; taken down when dropped.
struct Mounted<'p>(&'p Path);

impl<'p> Mounted<'p> {
    fn new(path: &'p Path) -> Self {
        fs::create_dir_all(path).unwrap();
        tool(
            "mount",
            &["-t", "bpf", "-o", "mode=0700", "bpf", text(path)],
        );
        Self(path)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).output();
    }
}

// Protects an edge from ending with the shell that attached it: pins in a bpffs of a mount
// namespace of its own are refused.
#[test]
fn pins_that_would_not_last_are_refused() {
    if !privileged("pins_that_would_not_last_are_refused") {
        return;
    }
    let testbed = Testbed::new("mount", "");
    let attach = || {
        // Makes `/sys` anew, in a mount namespace of its own.
        Command::new("ip")
            .args(["netns", "exec", &testbed.pair.node.name])
            .arg(env!("CARGO_BIN_EXE_millrace"))
            .args(["xdp", "attach", "--config", text(&testbed.node.config)])
            .output()
            .unwrap()
    };
    assert_refused(&attach(), &["mount namespace", "mount -t bpf", "nsenter"]);
    assert!(!testbed.pair.node.ip("-d link show mr0").contains("xdp"));
    assert_eq!(testbed.pair.node.nft("list tables"), "");

    let mounted = Mounted::new(&testbed.pinned.0);
    let output = attach();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(testbed.status()["set"], 1, "it outlived the command");
    testbed.json("detach", &[]);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(mounts.contains(text(&testbed.pinned.0)), "the host's stays");
    drop(mounted);
}

// Protects upgrades: a node and `attach` replace programs of another build, and what is in force
// stays.
#[test]
fn programs_of_another_build_are_replaced() {
    if !privileged("programs_of_another_build_are_replaced") {
        return;
    }
    let mut testbed = Testbed::new("build", "mode = \"enforce\"");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    testbed.json("attach", &[]);
    let set = testbed.json("apply", &[])["set"].clone();
    let first = program(&testbed, "mr0");
    let again = testbed.json("attach", &[]);
    assert_eq!(again["reloaded"], false, "{again}");
    assert_eq!(program(&testbed, "mr0"), first);

    age(&testbed);
    let again = testbed.json("attach", &[]);
    assert_eq!(
        (&again["reloaded"], &again["set"], &again["mode"]),
        (&true.into(), &set, &"enforce".into()),
        "{again}"
    );
    let second = program(&testbed, "mr0");
    assert_ne!(second, first);
    testbed.assert_denied(NON_MEMBER);

    age(&testbed);
    testbed.start_node();
    assert_ne!(program(&testbed, "mr0"), second);
    assert_eq!(testbed.node.status()["edge"]["place"], "kernel");
    testbed.talk(OPERATOR, PORT).unwrap();
    testbed.assert_denied(NON_MEMBER);
}

// Protects a live edge that gets another interface: it is added, and a node that runs looks after
// it.
#[test]
fn an_interface_is_added_to_a_live_edge() {
    if !privileged("an_interface_is_added_to_a_live_edge") {
        return;
    }
    let mut testbed = Testbed::new("more", "mode = \"enforce\"");
    testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    testbed.start_node();
    let plug = |testbed: &Testbed| {
        testbed.pair.node.ip("link add mr2 type veth peer name mr3");
        testbed.pair.node.ip("link set mr2 up");
    };
    plug(&testbed);
    let both = ["--interface", "mr0", "--interface", "mr2"];
    let added = testbed.json("attach", &both);
    assert_eq!(added["added"], serde_json::json!(["mr2"]), "{added}");
    assert_eq!(added["interfaces"], serde_json::json!(["mr0", "mr2"]));
    assert_eq!(program(&testbed, "mr2"), program(&testbed, "mr0"));
    testbed.pair.node.ip("link del mr2");
    plug(&testbed);
    eventually("the node puts the program on it again", || {
        let shown = testbed.pair.node.ip("link show mr2");
        shown.contains(" xdp").then_some(())
    });
}

// Protects a node whose first attempt was cut short: the next one completes it or begins anew.
#[test]
fn what_a_killed_attempt_left_is_completed_or_cleared() {
    if !privileged("what_a_killed_attempt_left_is_completed_or_cleared") {
        return;
    }
    let mut testbed = Testbed::new("cut", "mode = \"enforce\"");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    // Attached, and no set in force.
    let options = AttachOptions {
        interfaces: vec!["mr0".into()],
        mode: AttachMode::Auto,
        ..AttachOptions::default()
    };
    let attach = || Edge::attach(&testbed.pinned.pins(), &options).unwrap();
    drop(testbed.pair.node.enter(attach));
    let completed = testbed.json("attach", &[]);
    assert_eq!(
        (&completed["set"], &completed["mode"]),
        (&1.into(), &"count".into())
    );

    // Pinned by halves, and on no interface.
    for name in testbed.pinned.pins().names(Kind::Link).unwrap() {
        let pin = testbed.pinned.pins().path(Kind::Link, &name);
        let link = Link::open(&pin).unwrap();
        if matches!(link.info().unwrap().info, LinkTypeInfo::Xdp(_)) {
            link.detach().unwrap();
        }
    }
    fs::remove_file(testbed.pinned.pins().path(Kind::Map, "budgets")).unwrap();
    testbed.start_node();
    assert_eq!(testbed.node.status()["edge"]["place"], "kernel");
    assert_eq!(testbed.status()["mode"], "enforce");
    testbed.assert_denied(NON_MEMBER);
}

#[test]
fn an_interface_that_is_not_there_leaves_nothing_behind() {
    if !privileged("an_interface_that_is_not_there_leaves_nothing_behind") {
        return;
    }
    let testbed = Testbed::new("nic", "");
    // The first of the two is there, and must be left as it was.
    let interfaces = ["--interface", "mr0", "--interface", "nowhere0"];
    let output = testbed.xdp("attach", &interfaces);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("nowhere0"), "{}", stderr(&output));
    assert!(!testbed.pinned.pins().is_present());
    assert!(!testbed.pair.node.ip("-d link show mr0").contains("xdp"));
    assert_eq!(testbed.pair.node.nft("list tables"), "");
    testbed.json("attach", &[]);
}
