//! The set in force is the one that an operator asked for: through lapses, edited configs, lost
//! files and nodes that run beside commands.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[allow(dead_code, reason = "shared by test crates")]
#[path = "common/edge_testbed.rs"]
mod edge_testbed;

use std::net::UdpSocket;
use std::path::PathBuf;

use common::namespace::{NODE, NON_MEMBER, OPERATOR, privileged};
use common::{eventually, stderr, text};
use edge_testbed::{PORT, Testbed, allow_all_but_the_non_member, rule};
use millrace_edge::edge::Edge;
use millrace_edge::frame::{Description, Shape};
use millrace_edge::publish::Publisher;
use millrace_edge_control::Record;
use serde_json::Value;

/// The node has looked at what is in force, and leaves it: it looks at rules before it puts the
/// table back, in the same turn.
fn stays(testbed: &Testbed, set: &Value) {
    let restored = || testbed.counter("millrace_edge_tables_restored_total");
    let before = restored();
    testbed
        .pair
        .node
        .nft(&format!("add rule {} input accept", testbed.table()));
    eventually("the node has had its turn", || {
        (restored() > before).then_some(())
    });
    assert_eq!(&testbed.status()["set"], set);
}

/// A folder with what a node knows of its registry, while commands have the registry's own.
struct Known {
    registry: PathBuf,
    folder: PathBuf,
}

impl Known {
    fn new(testbed: &Testbed, folder: PathBuf) -> Self {
        std::fs::create_dir(&folder).unwrap();
        let known = Self {
            registry: testbed.registry.dir.clone(),
            folder,
        };
        known.learn();
        known
    }

    /// The node has all that there is.
    fn learn(&self) {
        for entry in std::fs::read_dir(&self.registry).unwrap() {
            let entry = entry.unwrap();
            let new = self.folder.join(".new");
            std::fs::copy(entry.path(), &new).unwrap();
            std::fs::rename(new, self.folder.join(entry.file_name())).unwrap();
        }
    }
}

// Protects the operator who was cut off: a node that runs does not bring back a set that
// was rolled back, by the clock or by its operator.
#[test]
fn what_was_rolled_back_stays_out_while_a_node_runs() {
    if !privileged("what_was_rolled_back_stays_out_while_a_node_runs") {
        return;
    }
    let mut testbed = Testbed::new("rolled", "mode = \"enforce\"");
    let _server = testbed.serve(PORT);
    let good = testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    let known = testbed.folder.path().join("known");
    let own = text(&testbed.registry.dir).to_owned();
    let known = Known::new(&testbed, known);
    let start = |testbed: &mut Testbed| {
        testbed.node.edit(&own, text(&known.folder));
        testbed.start_node();
        testbed.node.edit(text(&known.folder), &own);
    };
    start(&mut testbed);
    testbed.follows(good);
    let before = testbed.status()["set"].clone();
    for (period, reverts) in [("2s", false), ("60s", true)] {
        let version = testbed.registry.set_firewall(&rule("deny", "10.77.0.0/24"));
        testbed.json("apply", &["--confirm", period]);
        if reverts {
            testbed.json("revert", &[]);
        }
        known.learn();
        testbed.knows(version);
        eventually("it is written down", || {
            (testbed.status()["rolled_back"]["registry_version"] == version).then_some(())
        });
        stays(&testbed, &before);
        testbed.talk(OPERATOR, PORT).unwrap();
        assert_eq!(testbed.status()["registry_version"], good);
    }

    // Nor does a temporary rule bring it, nor a restart of the node.
    let denied = testbed.json("deny", &[&format!("{NON_MEMBER}/32"), "--for", "1h"]);
    assert_eq!(denied["registry_version"], good, "{denied}");
    testbed.assert_denied(NON_MEMBER);
    testbed.talk(OPERATOR, PORT).unwrap();
    testbed.node.stop();
    start(&mut testbed);
    testbed.follows(good);
    testbed.talk(OPERATOR, PORT).unwrap();

    // An operator asks for it anew, and confirms.
    let newest = testbed.node.status()["registry"]["newest_version"].clone();
    testbed.json("apply", &["--mode", "count", "--confirm", "60s"]);
    testbed.json("confirm", &[]);
    let status = testbed.status();
    assert_eq!(status["registry_version"], newest);
    assert!(status["rolled_back"].is_null(), "{status}");
    // A newer version comes by itself.
    let newer = testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    known.learn();
    testbed.follows(newer);
}

// Protects a version that was never tried: a process that is killed before the kernel has the
// set leaves nothing to roll back.
#[test]
fn what_never_was_in_force_is_not_rolled_back() {
    if !privileged("what_never_was_in_force_is_not_rolled_back") {
        return;
    }
    let mut testbed = Testbed::new("never", "mode = \"enforce\"");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.json("attach", &[]);
    testbed.json("apply", &["--mode", "enforce"]);
    testbed.json("apply", &["--mode", "enforce", "--confirm", "60s"]);
    let pins = testbed.pinned.pins();
    let mut pending = Record::read(&pins).unwrap().pending.unwrap();
    testbed.json("confirm", &[]);

    // As a command leaves it that is killed while it waits to publish.
    let version = testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    pending.set += 1;
    let lock = pins.lock_waiting().unwrap();
    Record::update(&pins, &lock, |record| record.pending = Some(pending)).unwrap();
    drop(lock);
    testbed.start_node();
    testbed.follows(version);
    testbed.assert_denied(NON_MEMBER);
    let status = testbed.status();
    assert!(status["rolled_back"].is_null(), "{status}");
}

// Protects what an operator applied: the node goes on from it, with the next version and at its own
// socket.
#[test]
fn a_running_node_goes_on_from_what_was_applied() {
    if !privileged("a_running_node_goes_on_from_what_was_applied") {
        return;
    }
    let mut testbed = Testbed::new("kept", "mode = \"enforce\"\ntcp_connections_max = 100\n");
    let _server = testbed.serve(PORT);
    let first = testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.start_node();
    testbed.follows(first);
    testbed.node.edit(
        "tcp_connections_max = 100",
        "tcp_connections_max = 7\nquic_per_minute = 60",
    );
    testbed.node.edit(
        &format!("tcp_ports = [{PORT}]"),
        &format!("tcp_ports = [{PORT}, 8443]"),
    );
    testbed
        .node
        .edit("limiter_buckets = 1024", "limiter_buckets = 2048");
    testbed.node.edit("lease = \"500ms\"", "lease = \"600ms\"");
    let applied = testbed.json("apply", &["--mode", "enforce"]);
    assert_eq!(
        applied["unapplied_keys"],
        serde_json::json!(["limiter_buckets", "lease"])
    );
    let in_force = |testbed: &Testbed| {
        let status = testbed.status();
        let ports = status["ports"].as_array().unwrap().iter();
        let ports: Vec<_> = ports.map(|port| port["port"].as_u64().unwrap()).collect();
        let table = testbed
            .pair
            .node
            .nft(&format!("list table {}", testbed.table()));
        assert!(table.contains("8443"), "{table}");
        let cap = testbed.trace(OPERATOR, PORT, "tcp-syn")["tcp_connections_max"].clone();
        (ports, cap.as_u64().unwrap())
    };
    let wanted = (vec![4100, u64::from(PORT), 8443], 7);
    assert_eq!(in_force(&testbed), wanted);
    stays(&testbed, &applied["set"]);
    let version = testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    testbed.follows(version);
    assert_eq!(in_force(&testbed), wanted);
    let denied = testbed.json("deny", &[&format!("{OPERATOR}/32"), "--for", "1h"]);
    assert_eq!(in_force(&testbed), wanted);
    stays(&testbed, &denied["set"]);

    // What its config says is its own again when it starts.
    testbed.node.edit(", 8443]", ", 8443, 8444]");
    testbed.node.stop();
    testbed.start_node();
    eventually("the node has put its config in force", || {
        let ports = testbed.status()["ports"].to_string();
        ports.contains("8444").then_some(())
    });
    assert_eq!(testbed.status()["mode"], "enforce");
}

// Protects the mode: it is the kernel's, whatever becomes of the files beside it.
#[test]
fn enforcing_goes_on_without_the_journal() {
    if !privileged("enforcing_goes_on_without_the_journal") {
        return;
    }
    let mut testbed = Testbed::new("lost", "");
    let _server = testbed.serve(PORT);
    let first = testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    testbed.start_node();
    testbed.follows(first);
    testbed.json("apply", &["--mode", "enforce"]);
    let applied = testbed.json("deny", &["198.51.100.0/24", "--for", "1h"]);
    // What the node has seen, it knows.
    stays(&testbed, &applied["set"]);
    let path = testbed.pinned.pins().journal_path();
    std::fs::remove_file(&path).unwrap();
    eventually("the node writes it again", || {
        let record = Record::read(&testbed.pinned.pins()).unwrap();
        (Some(u64::from(record.set)) == applied["set"].as_u64()).then_some(())
    });
    let status = testbed.status();
    assert_eq!(
        (&status["mode"], &status["temporary_rules"]),
        (&"enforce".into(), &1.into())
    );
    assert_eq!(status["interfaces"][0]["name"], "mr0");
    testbed.assert_denied(NON_MEMBER);

    // What cannot be read is said once, and left alone; the node goes on, also through a restart.
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let unreadable = |testbed: &Testbed| {
        eventually("the node counts it", || {
            (testbed.refusals("journal") == 1).then_some(())
        });
        assert_eq!(testbed.node.status()["edge"]["place"], "kernel");
    };
    unreadable(&testbed);
    testbed.node.stop();
    testbed.start_node();
    unreadable(&testbed);
    assert!(
        testbed
            .node
            .said
            .iter()
            .any(|line| line.contains("is no journal of the edge")),
        "{:?}",
        testbed.node.said
    );
    let edge = Edge::adopt(&testbed.pinned.pins()).unwrap();
    assert_eq!(
        Publisher::new(edge.maps()).mode(),
        millrace_edge_policy::settings::Mode::Enforce
    );
    assert!(
        testbed
            .pair
            .connect(NON_MEMBER, PORT, edge_testbed::MOMENT)
            .is_err()
    );
    let version = testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    std::fs::write(&path, &whole).unwrap();
    testbed.follows(version);
    testbed.talk(NON_MEMBER, PORT).unwrap();
    assert_eq!(testbed.status()["mode"], "enforce");
}

// Protects the host from endless attempts: a set that the maps do not hold is refused until the
// config or the registry is another, and the last good one stays.
#[test]
fn a_set_that_the_maps_do_not_hold_is_refused_once() {
    if !privileged("a_set_that_the_maps_do_not_hold_is_refused_once") {
        return;
    }
    let mut testbed = Testbed::new("room", "");
    let good = testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.json("attach", &[]);
    // The maps stay as they were made.
    testbed.node.edit("rules_max = 64", "rules_max = 128");
    testbed
        .node
        .edit("trie_nodes_max = 256", "trie_nodes_max = 4096");
    testbed.start_node();
    testbed.follows(good);
    let set = testbed.status()["set"].clone();
    let rules: String = (0..100)
        .map(|net| rule("deny", &format!("10.{net}.0.0/16")))
        .collect();
    testbed.registry.set_firewall(&rules);
    let message = |testbed: &Testbed| testbed.status()["refused"]["message"].clone();
    eventually("it is refused", || {
        message(&testbed).is_string().then_some(())
    });
    let text = message(&testbed);
    assert!(text.as_str().unwrap().contains("raise rules_max"), "{text}");
    let stayed = testbed.status()["set"].clone();
    stays(&testbed, &stayed);
    assert!(testbed.refusals("rules") == 1, "tried once");
    assert_eq!(
        testbed.status()["registry_version"],
        good,
        "since set {set}"
    );
    let output = testbed.xdp("apply", &[]);
    assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
    // What fits is in force again.
    let version = testbed.registry.set_firewall(&rule("allow", "10.0.0.0/8"));
    testbed.follows(version);
}

// Protects a confirmation from another one: it is for the set that awaits confirmation, or
// nothing is confirmed.
#[test]
fn a_confirmation_is_for_the_set_that_it_was_written_for() {
    if !privileged("a_confirmation_is_for_the_set_that_it_was_written_for") {
        return;
    }
    let testbed = Testbed::new("whose", "");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.json("attach", &[]);
    let pins = testbed.pinned.pins();
    testbed.json("apply", &["--mode", "count", "--confirm", "60s"]);
    let older = Record::read(&pins).unwrap().pending;
    testbed.json("revert", &[]);
    let applied = testbed.json("apply", &["--mode", "enforce", "--confirm", "60s"]);
    let lock = pins.lock_waiting().unwrap();
    Record::update(&pins, &lock, |record| record.pending = older).unwrap();
    drop(lock);
    let refused = testbed.xdp("confirm", &[]);
    assert_eq!(refused.status.code(), Some(1));
    let said = stderr(&refused);
    assert!(
        said.contains(&format!("set {} awaits a confirmation", applied["set"])),
        "{said}"
    );
    assert!(testbed.status()["confirm_seconds_left"].is_number());
    testbed.json("revert", &[]);
    assert_eq!(testbed.status()["mode"], "count");
}

// Protects operators from words that mean nothing: what would be over at once, or fit no packet.
#[test]
fn what_cannot_have_an_effect_is_refused_or_said() {
    if !privileged("what_cannot_have_an_effect_is_refused_or_said") {
        return;
    }
    let testbed = Testbed::new("words", "");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.json("attach", &[]);
    for period in ["0s", "10ms"] {
        let refused = testbed.xdp("apply", &["--confirm", period]);
        assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
        let refused = testbed.xdp("deny", &["10.77.0.0/24", "--for", period]);
        assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    }
    testbed.json("apply", &["--mode", "enforce"]);
    let said = testbed.xdp(
        "deny",
        &[&format!("::ffff:{NON_MEMBER}/128"), "--for", "1h"],
    );
    assert!(said.status.success(), "{}", stderr(&said));
    assert!(stderr(&said).contains("no node runs"), "{}", stderr(&said));
    testbed.assert_denied(NON_MEMBER);
    testbed.talk(OPERATOR, PORT).unwrap();
}

// Protects the node from a flood, and its clients from what it does against it: Retry for
// everybody, as long as the flood lasts.
#[test]
fn a_flood_beyond_the_budget_asks_for_addresses_until_it_ends() {
    if !privileged("a_flood_beyond_the_budget_asks_for_addresses_until_it_ends") {
        return;
    }
    let budget = "mode = \"enforce\"\nunvalidated_per_second = 10\nquic_per_minute = 100000\nquic_burst = 100000\n";
    let mut testbed = Testbed::new("press", budget);
    let version = testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.start_node();
    testbed.follows(version);
    let stress = |testbed: &Testbed| testbed.node.status()["edge"]["stress"].clone();
    assert_eq!(stress(&testbed), 0);
    let initial = Description {
        from: (NON_MEMBER, 40_000).into(),
        to_port: 4100,
        shape: Shape::QuicInitial,
        payload_bytes: None,
    };
    // What follows the headers of Ethernet, IPv4 and UDP.
    let initial = initial.frame().split_off(14 + 20 + 8);
    let flood = testbed
        .pair
        .remote
        .enter(|| UdpSocket::bind((NON_MEMBER, 0)).unwrap());
    eventually("the node asks for addresses", || {
        for _ in 0..50 {
            // What a full queue does not take is lost, as elsewhere.
            let _ = flood.send_to(&initial, (NODE, 4100));
        }
        (stress(&testbed) == 1).then_some(())
    });
    assert_eq!(
        testbed.trace(OPERATOR, 4100, "quic-initial")["reason"],
        "tx_retry"
    );
    assert_eq!(testbed.status()["stress"], 1);
    eventually("it does not any more", || {
        (stress(&testbed) == 0).then_some(())
    });
    assert_eq!(
        testbed.trace(OPERATOR, 4100, "quic-initial")["reason"],
        "pass_quic_initial"
    );
}
