//! What is in force is what somebody asked for: through lapses, edited configs, lost files and nodes that run beside commands.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[allow(dead_code, reason = "shared by test crates")]
#[path = "common/site.rs"]
mod site;

use std::net::UdpSocket;
use std::path::PathBuf;

use common::namespace::{NODE, OPERATOR, STRANGER, privileged};
use common::{eventually, stderr, text};
use millrace_edge::edge::Edge;
use millrace_edge::frame::{Description, Shape};
use millrace_edge::publish::Publisher;
use millrace_edge_control::Record;
use serde_json::Value;
use site::{PORT, Site, allow_all_but_the_stranger, rule};

/// Another line in `[edge]`, the section that the config ends with.
fn edit(site: &Site, from: &str, to: &str) {
    let config = std::fs::read_to_string(&site.node.config).unwrap();
    assert!(config.contains(from), "{config}");
    std::fs::write(&site.node.config, config.replace(from, to)).unwrap();
}

fn follows(site: &Site, version: u64) {
    eventually("the node follows the registry", || {
        (site.node.status()["edge"]["registry_version"] == version).then_some(())
    });
}

/// The node has looked at what is in force, and leaves it: it looks at rules before it puts the table back, in the same turn.
fn stays(site: &Site, set: &Value) {
    let restored = || {
        let metrics = site.node.get("/metrics").1;
        let mut lines = metrics.lines();
        let value = |line: &str| {
            let value = line.strip_prefix("millrace_edge_tables_restored_total ")?;
            value.parse::<f64>().ok()
        };
        lines.find_map(value).unwrap()
    };
    let before = restored();
    site.pair
        .node
        .nft(&format!("add rule {} input accept", site.table()));
    eventually("the node has had its turn", || {
        (restored() > before).then_some(())
    });
    assert_eq!(&site.status()["set"], set);
}

/// A folder with what a node knows of its registry, while commands have the registry's own.
struct Known {
    registry: PathBuf,
    folder: PathBuf,
}

impl Known {
    fn new(site: &Site, folder: PathBuf) -> Self {
        std::fs::create_dir(&folder).unwrap();
        let known = Self {
            registry: site.registry.dir.clone(),
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

// Protects the operator who was cut off: a node that runs does not bring back for good what has lapsed, or was taken back.
#[test]
fn what_has_lapsed_stays_out_while_a_node_runs() {
    if !privileged("what_has_lapsed_stays_out_while_a_node_runs") {
        return;
    }
    let mut site = Site::new("lapse", "mode = \"enforce\"");
    let _server = site.serve(PORT);
    let good = site.registry.set_firewall(&rule("allow", "10.77.0.0/24"));
    let known = site.folder.path().join("known");
    let own = text(&site.registry.dir).to_owned();
    let known = Known::new(&site, known);
    let start = |site: &mut Site| {
        edit(site, &own, text(&known.folder));
        site.start_node();
        edit(site, text(&known.folder), &own);
    };
    start(&mut site);
    follows(&site, good);
    let before = site.status()["set"].clone();
    for (period, reverts) in [("2s", false), ("60s", true)] {
        let version = site.registry.set_firewall(&rule("deny", "10.77.0.0/24"));
        site.json("apply", &["--confirm", period]);
        if reverts {
            site.json("revert", &[]);
        }
        known.learn();
        eventually("the node has the version", || {
            (site.node.status()["registry"]["newest_version"] == version).then_some(())
        });
        eventually("it is written down", || {
            (site.status()["rolled_back"]["registry_version"] == version).then_some(())
        });
        stays(&site, &before);
        site.talk(OPERATOR, PORT).unwrap();
        assert_eq!(site.status()["registry_version"], good);
    }

    // Nor does a temporary rule bring it, nor a restart of the node.
    let denied = site.json("deny", &[&format!("{STRANGER}/32"), "--for", "1h"]);
    assert_eq!(denied["registry_version"], good, "{denied}");
    site.assert_denied(STRANGER);
    site.talk(OPERATOR, PORT).unwrap();
    site.node.stop();
    start(&mut site);
    follows(&site, good);
    site.talk(OPERATOR, PORT).unwrap();

    // Somebody asks for it anew, and confirms.
    let newest = site.node.status()["registry"]["newest_version"].clone();
    site.json("apply", &["--mode", "count", "--confirm", "60s"]);
    site.json("confirm", &[]);
    let status = site.status();
    assert_eq!(status["registry_version"], newest);
    assert!(status["rolled_back"].is_null(), "{status}");
    // A newer version comes by itself.
    let newer = site.registry.set_firewall(&allow_all_but_the_stranger());
    known.learn();
    follows(&site, newer);
}

// Protects a version that nobody tried: whoever is killed before the kernel has a set on probation leaves nothing that lapses.
#[test]
fn what_never_was_in_force_does_not_lapse() {
    if !privileged("what_never_was_in_force_does_not_lapse") {
        return;
    }
    let mut site = Site::new("never", "mode = \"enforce\"");
    let _server = site.serve(PORT);
    site.registry.set_firewall(&rule("allow", "10.77.0.0/24"));
    site.json("attach", &[]);
    site.json("apply", &["--mode", "enforce"]);
    site.json("apply", &["--mode", "enforce", "--confirm", "60s"]);
    let pins = site.pinned.pins();
    let mut pending = Record::read(&pins).unwrap().pending.unwrap();
    site.json("confirm", &[]);

    // As a command leaves it that is killed while it waits to publish.
    let version = site.registry.set_firewall(&allow_all_but_the_stranger());
    pending.set += 1;
    let lock = pins.lock_waiting().unwrap();
    Record::update(&pins, &lock, |record| record.pending = Some(pending)).unwrap();
    drop(lock);
    site.start_node();
    follows(&site, version);
    site.assert_denied(STRANGER);
    let status = site.status();
    assert!(status["rolled_back"].is_null(), "{status}");
}

// Protects what an operator applied: the node goes on from it, with the next version and at its own socket.
#[test]
fn a_running_node_goes_on_from_what_was_applied() {
    if !privileged("a_running_node_goes_on_from_what_was_applied") {
        return;
    }
    let mut site = Site::new("kept", "mode = \"enforce\"\ntcp_connections_max = 100\n");
    let _server = site.serve(PORT);
    let first = site.registry.set_firewall(&rule("allow", "10.77.0.0/24"));
    site.start_node();
    follows(&site, first);
    edit(
        &site,
        "tcp_connections_max = 100",
        "tcp_connections_max = 7\nquic_per_minute = 60",
    );
    edit(
        &site,
        &format!("tcp_ports = [{PORT}]"),
        &format!("tcp_ports = [{PORT}, 8443]"),
    );
    edit(&site, "limiter_buckets = 1024", "limiter_buckets = 2048");
    edit(&site, "lease = \"500ms\"", "lease = \"600ms\"");
    let applied = site.json("apply", &["--mode", "enforce"]);
    assert_eq!(
        applied["unapplied_keys"],
        serde_json::json!(["limiter_buckets", "lease"])
    );
    let in_force = |site: &Site| {
        let status = site.status();
        let ports = status["ports"].as_array().unwrap().iter();
        let ports: Vec<_> = ports.map(|port| port["port"].as_u64().unwrap()).collect();
        let table = site.pair.node.nft(&format!("list table {}", site.table()));
        assert!(table.contains("8443"), "{table}");
        let cap = site.trace(OPERATOR, PORT, "tcp-syn")["tcp_connections_max"].clone();
        (ports, cap.as_u64().unwrap())
    };
    let wanted = (vec![4100, u64::from(PORT), 8443], 7);
    assert_eq!(in_force(&site), wanted);
    stays(&site, &applied["set"]);
    let version = site.registry.set_firewall(&allow_all_but_the_stranger());
    follows(&site, version);
    assert_eq!(in_force(&site), wanted);
    let denied = site.json("deny", &[&format!("{OPERATOR}/32"), "--for", "1h"]);
    assert_eq!(in_force(&site), wanted);
    stays(&site, &denied["set"]);

    // What its config says is its own again when it starts.
    edit(&site, ", 8443]", ", 8443, 8444]");
    site.node.stop();
    site.start_node();
    eventually("the node has put its config in force", || {
        let ports = site.status()["ports"].to_string();
        ports.contains("8444").then_some(())
    });
    assert_eq!(site.status()["mode"], "enforce");
}

// Protects the mode: it is the kernel's, whatever becomes of the files beside it.
#[test]
fn enforcing_goes_on_without_the_journal() {
    if !privileged("enforcing_goes_on_without_the_journal") {
        return;
    }
    let mut site = Site::new("lost", "");
    let _server = site.serve(PORT);
    let first = site.registry.set_firewall(&allow_all_but_the_stranger());
    site.start_node();
    follows(&site, first);
    site.json("apply", &["--mode", "enforce"]);
    let applied = site.json("deny", &["198.51.100.0/24", "--for", "1h"]);
    // What the node has seen, it knows.
    stays(&site, &applied["set"]);
    let path = site.pinned.pins().journal_path();
    std::fs::remove_file(&path).unwrap();
    eventually("the node writes it again", || {
        let record = Record::read(&site.pinned.pins()).unwrap();
        (Some(u64::from(record.set)) == applied["set"].as_u64()).then_some(())
    });
    let status = site.status();
    assert_eq!(
        (&status["mode"], &status["temporary_rules"]),
        (&"enforce".into(), &1.into())
    );
    assert_eq!(status["interfaces"][0]["name"], "mr0");
    site.assert_denied(STRANGER);

    // What cannot be read is said once, and left alone; the node goes on, also through a restart.
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let unreadable = |site: &Site| {
        let metric = "millrace_edge_rules_refused_total{reason=\"journal\"} 1\n";
        eventually("the node counts it", || {
            site.node.get("/metrics").1.contains(metric).then_some(())
        });
        assert_eq!(site.node.status()["edge"]["place"], "kernel");
    };
    unreadable(&site);
    site.node.stop();
    site.start_node();
    unreadable(&site);
    assert!(
        site.node
            .said
            .iter()
            .any(|line| line.contains("is no journal of the edge")),
        "{:?}",
        site.node.said
    );
    let edge = Edge::adopt(&site.pinned.pins()).unwrap();
    assert_eq!(
        Publisher::new(edge.maps()).mode(),
        millrace_edge_policy::settings::Mode::Enforce
    );
    assert!(site.pair.connect(STRANGER, PORT, site::MOMENT).is_err());
    let version = site.registry.set_firewall(&rule("allow", "10.77.0.0/24"));
    std::fs::write(&path, &whole).unwrap();
    follows(&site, version);
    site.talk(STRANGER, PORT).unwrap();
    assert_eq!(site.status()["mode"], "enforce");
}

// Protects a confirmation from somebody else's: what follows belongs to the set that is on probation, or nothing is confirmed.
#[test]
fn a_confirmation_is_for_the_set_that_it_was_written_for() {
    if !privileged("a_confirmation_is_for_the_set_that_it_was_written_for") {
        return;
    }
    let site = Site::new("whose", "");
    let _server = site.serve(PORT);
    site.registry.set_firewall(&rule("allow", "10.77.0.0/24"));
    site.json("attach", &[]);
    let pins = site.pinned.pins();
    site.json("apply", &["--mode", "count", "--confirm", "60s"]);
    let older = Record::read(&pins).unwrap().pending;
    site.json("revert", &[]);
    let applied = site.json("apply", &["--mode", "enforce", "--confirm", "60s"]);
    let lock = pins.lock_waiting().unwrap();
    Record::update(&pins, &lock, |record| record.pending = older).unwrap();
    drop(lock);
    let refused = site.xdp("confirm", &[]);
    assert_eq!(refused.status.code(), Some(1));
    let said = stderr(&refused);
    assert!(
        said.contains(&format!("set {} awaits a confirmation", applied["set"])),
        "{said}"
    );
    assert!(site.status()["confirm_seconds_left"].is_number());
    site.json("revert", &[]);
    assert_eq!(site.status()["mode"], "count");
}

// Protects operators from words that mean nothing: what would be over at once, or fit no packet.
#[test]
fn what_cannot_have_an_effect_is_refused_or_said() {
    if !privileged("what_cannot_have_an_effect_is_refused_or_said") {
        return;
    }
    let site = Site::new("words", "");
    let _server = site.serve(PORT);
    site.registry.set_firewall(&rule("allow", "10.77.0.0/24"));
    site.json("attach", &[]);
    for period in ["0s", "10ms"] {
        let refused = site.xdp("apply", &["--confirm", period]);
        assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
        let refused = site.xdp("deny", &["10.77.0.0/24", "--for", period]);
        assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    }
    site.json("apply", &["--mode", "enforce"]);
    let said = site.xdp("deny", &[&format!("::ffff:{STRANGER}/128"), "--for", "1h"]);
    assert!(said.status.success(), "{}", stderr(&said));
    assert!(stderr(&said).contains("no node runs"), "{}", stderr(&said));
    site.assert_denied(STRANGER);
    site.talk(OPERATOR, PORT).unwrap();
}

// Protects the node from a flood, and its clients from what it does against it: Retry for everybody, as long as the flood lasts.
#[test]
fn a_flood_beyond_the_budget_asks_for_addresses_until_it_ends() {
    if !privileged("a_flood_beyond_the_budget_asks_for_addresses_until_it_ends") {
        return;
    }
    let budget = "mode = \"enforce\"\nunvalidated_per_second = 10\nquic_per_minute = 100000\nquic_burst = 100000\n";
    let mut site = Site::new("press", budget);
    let version = site.registry.set_firewall(&rule("allow", "10.77.0.0/24"));
    site.start_node();
    follows(&site, version);
    let stress = |site: &Site| site.node.status()["edge"]["stress"].clone();
    assert_eq!(stress(&site), 0);
    let initial = Description {
        from: (STRANGER, 40_000).into(),
        to_port: 4100,
        shape: Shape::QuicInitial,
        payload_bytes: None,
    };
    // What follows the headers of Ethernet, IPv4 and UDP.
    let initial = initial.frame().split_off(14 + 20 + 8);
    let flood = site
        .pair
        .world
        .enter(|| UdpSocket::bind((STRANGER, 0)).unwrap());
    eventually("the node asks for addresses", || {
        for _ in 0..50 {
            // What a full queue does not take is lost, as elsewhere.
            let _ = flood.send_to(&initial, (NODE, 4100));
        }
        (stress(&site) == 1).then_some(())
    });
    assert_eq!(
        site.trace(OPERATOR, 4100, "quic-initial")["reason"],
        "tx_retry"
    );
    assert_eq!(site.status()["stress"], 1);
    eventually("it does not any more", || {
        (stress(&site) == 0).then_some(())
    });
    assert_eq!(
        site.trace(OPERATOR, 4100, "quic-initial")["reason"],
        "pass_quic_initial"
    );
}
