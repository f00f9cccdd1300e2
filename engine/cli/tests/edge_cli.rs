//! The edge as an operator runs it: the binary, in a namespace of its own, with an interface that
//! packets arrive on.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[path = "common/edge_testbed.rs"]
mod edge_testbed;

use std::path::Path;
use std::process::Command;

use caps::Capability;
use common::namespace::{NON_MEMBER, OPERATOR, Pinned, privileged, tool};
use common::process::{Privileges, assert_harmless, bits, children, threads};
use common::{eventually, millrace, stderr, stdout, text};
use edge_testbed::{ELSEWHERE, PORT, Testbed, allow_all_but_the_non_member, rule};
use libbpf_rs::Link;
use millrace_edge::edge::{AttachOptions, Edge};
use millrace_edge::interface::AttachMode;
use millrace_edge::pins::{Kind, Pins};
use millrace_edge_control::Record;
use millrace_edge_policy::rules::{Bounds, compile};
use millrace_edge_policy::settings::{DefaultAction, Kind as ServiceKind, Mode, Service, Settings};

#[test]
fn an_operator_goes_from_nothing_to_enforcing_and_back() {
    if !privileged("an_operator_goes_from_nothing_to_enforcing_and_back") {
        return;
    }
    let testbed = Testbed::new("cli", "");
    let _servers = [PORT, ELSEWHERE].map(|port| testbed.serve(port));
    testbed.pair.node.nft("add table inet other");
    let version = testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());

    let attached = testbed.json("attach", &[]);
    assert_eq!(attached["mode"], "count", "{attached}");
    assert_eq!(attached["interfaces"][0], "mr0");
    assert_eq!(attached["registry_version"], version);
    testbed.talk(NON_MEMBER, PORT).unwrap();
    let (acted, would) = testbed.packets("firewall_deny");
    assert!(acted == 0 && would > 0, "{acted} refused, {would} counted");
    let traced = testbed.trace(NON_MEMBER, PORT, "tcp-syn");
    assert_eq!(traced["enforced"], false, "{traced}");

    let applied = testbed.json("apply", &["--mode", "enforce"]);
    assert_eq!(applied["mode"], "enforce", "{applied}");
    testbed.assert_denied(NON_MEMBER);
    testbed.talk(NON_MEMBER, ELSEWHERE).unwrap();
    testbed.talk(OPERATOR, PORT).unwrap();
    let traced = testbed.trace(NON_MEMBER, PORT, "tcp-syn");
    assert_eq!(
        (&traced["reason"], &traced["action"], &traced["enforced"]),
        (&"firewall_deny".into(), &"drop".into(), &true.into())
    );
    let place = format!("registry version {version}, rule 1");
    assert!(
        traced["rule"].as_str().unwrap().contains(&place),
        "{traced}"
    );
    let rules = testbed.json("rules", &[]);
    let denying = rules.as_array().unwrap().iter();
    let denying = denying.filter(|row| row["origin"] == *place);
    assert!(
        denying
            .map(|row| row["hits"].as_u64().unwrap())
            .sum::<u64>()
            > 0
    );

    // Without a node, and without its config.
    let pins = text(&testbed.pinned.0);
    let detach = || millrace(&["xdp", "detach", "--pins", pins]);
    let detached = testbed.pair.node.enter(detach);
    assert_eq!(detached.status.code(), Some(0), "{}", stderr(&detached));
    assert_eq!(
        testbed.pair.node.nft("list tables").trim(),
        "table inet other",
        "its own table is gone, another stays"
    );
    assert!(!testbed.pair.node.ip("-d link show mr0").contains("xdp"));
    assert!(!testbed.pinned.pins().is_present() && !testbed.pinned.pins().journal_path().exists());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(pins));
    assert_eq!(testbed.xdp("status", &[]).status.code(), Some(69));
    testbed.talk(NON_MEMBER, PORT).unwrap();
}

/// Puts a set in force, for a second, that shuts the operator out. No node runs, and no process
/// waits.
fn cut_off(testbed: &Testbed) {
    let before = testbed.status();
    let (denied, _) = testbed.packets("firewall_deny");
    testbed.registry.set_firewall(&rule("deny", "10.77.0.0/24"));
    let mut operator = testbed.talk(OPERATOR, PORT).unwrap();
    operator.types_during(|| {
        let applied = testbed.json("apply", &["--mode", "enforce", "--confirm", "1s"]);
        assert_eq!(applied["confirm_within_seconds"], 1.0, "{applied}");
        eventually("the time to confirm ends", || {
            testbed.status()["confirm_seconds_left"]
                .is_null()
                .then_some(())
        });
    });
    assert!(testbed.packets("firewall_deny").0 > denied, "cut off");
    operator.hears_all();
    let after = testbed.status();
    for key in ["set", "mode", "registry_version"] {
        assert_eq!(before[key], after[key], "{key}");
    }
    let late = testbed.xdp("confirm", &[]);
    assert_eq!(late.status.code(), Some(1));
    assert!(
        stderr(&late).contains("no set awaits confirmation"),
        "{}",
        stderr(&late)
    );
}

#[test]
fn what_cuts_the_operator_off_reverts_by_itself() {
    if !privileged("what_cuts_the_operator_off_reverts_by_itself") {
        return;
    }
    let testbed = Testbed::new("try", "");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.json("attach", &[]);
    cut_off(&testbed);

    let version = testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    let enforce = ["--mode", "enforce", "--confirm", "60s"];
    let applied = testbed.json("apply", &enforce);
    let second = testbed.xdp("apply", &enforce);
    assert_eq!(second.status.code(), Some(1));
    assert!(
        stderr(&second).contains("awaits confirmation"),
        "{}",
        stderr(&second)
    );
    let third = testbed.xdp("deny", &["10.77.0.0/24"]);
    assert_eq!(third.status.code(), Some(1));
    assert_eq!(testbed.status()["temporary_rules"], 0, "refused for good");
    testbed.assert_denied(NON_MEMBER);
    // A command confirms, and dies before table and state have followed: the next one finishes it.
    let edge = Edge::adopt(&Pins::at(&testbed.pinned.0)).unwrap();
    edge.confirm().unwrap();
    assert_eq!(testbed.json("confirm", &[])["set"], applied["set"]);
    let again = testbed.xdp("confirm", &[]);
    assert_eq!(again.status.code(), Some(1), "nothing is left to confirm");
    let status = testbed.status();
    assert!(status["confirm_seconds_left"].is_null(), "{status}");
    assert_eq!(
        (&status["mode"], &status["set"], &status["registry_version"]),
        (&"enforce".into(), &applied["set"], &version.into())
    );
    testbed.assert_denied(NON_MEMBER);

    cut_off(&testbed);
    // What is taken back by hand is back at once.
    testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.json("apply", &enforce);
    testbed.talk(NON_MEMBER, PORT).unwrap();
    testbed.json("revert", &[]);
    testbed.assert_denied(NON_MEMBER);
}

#[test]
fn a_running_node_waits_for_a_confirmation_and_keeps_what_was_confirmed() {
    if !privileged("a_running_node_waits_for_a_confirmation_and_keeps_what_was_confirmed") {
        return;
    }
    let mut testbed = Testbed::new("both", "");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.start_node();
    let applied = testbed.json("apply", &["--mode", "enforce", "--confirm", "60s"]);
    // Meanwhile the registry moves on.
    let version = testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    eventually("the node has the version", || {
        (testbed.node.status()["registry"]["newest_version"] == version).then_some(())
    });
    assert_eq!(testbed.status()["set"], applied["set"]);
    testbed.talk(NON_MEMBER, PORT).unwrap();
    testbed.json("confirm", &[]);
    eventually("the node puts the version in force", || {
        (testbed.status()["registry_version"] == version).then_some(())
    });
    assert_eq!(testbed.status()["mode"], "enforce");
    testbed.assert_denied(NON_MEMBER);
    testbed.talk(OPERATOR, PORT).unwrap();
}

// Protects the set in force from a process that dies in between: a node that runs finishes it, or
// puts its own in its place.
#[test]
fn a_running_node_mends_what_was_left_half_done() {
    if !privileged("a_running_node_mends_what_was_left_half_done") {
        return;
    }
    let mut testbed = Testbed::new("halves", "");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    testbed.start_node();
    let settled = |enforce: bool, above: u32| {
        eventually("the journal has followed", || {
            let record = Record::read(&testbed.pinned.pins()).unwrap();
            let status = testbed.status();
            let follows = status["set"] == record.set && record.set > above;
            let enforces = status["mode"] == "enforce";
            (follows && enforces == enforce).then_some(record.set)
        })
    };
    let set = settled(false, 0);
    testbed.json("apply", &["--mode", "enforce", "--confirm", "60s"]);
    let edge = Edge::adopt(&testbed.pinned.pins()).unwrap();
    // The command that confirms dies before table and state have followed.
    edge.confirm().unwrap();
    let set = settled(true, set);
    let table = testbed
        .pair
        .node
        .nft(&format!("-s list table {}", testbed.table()));
    let mut unstamped = table.lines().filter(|line| line.contains("unstamped"));
    assert!(unstamped.all(|line| line.contains("drop")), "{table}");
    testbed.assert_denied(NON_MEMBER);

    // The process that publishes dies before anything has followed, and no record says its intent.
    let settings = Settings {
        mode: Mode::Enforce,
        services: vec![Service {
            port: PORT,
            kind: ServiceKind::Tcp,
            default_action: DefaultAction::Deny,
        }],
        ..Settings::default()
    };
    let bounds = Bounds {
        rules_max: 1,
        nodes4_max: 16,
        nodes6_max: 16,
    };
    let nobody = compile(&settings, &[], bounds).unwrap();
    edge.publish(&nobody, set + 5, None).unwrap();
    settled(true, set + 5);
    testbed.talk(OPERATOR, PORT).unwrap();
}

// Protects counts and stress from everything slow: the lease is renewed while `nft` takes its time.
#[test]
fn the_lease_goes_on_while_nft_hangs() {
    if !privileged("the_lease_goes_on_while_nft_hangs") {
        return;
    }
    let mut testbed = Testbed::new("slow", "mode = \"enforce\"");
    let file = |name: &str| testbed.folder.path().join(name);
    let (hold, held) = (file("hold"), file("held"));
    std::fs::create_dir(file("bin")).unwrap();
    // Waits as long as there is a file `hold`.
    let script = format!(
        "#!/bin/sh\nwhile [ -e {0:?} ]; do : > {1:?}; sleep 0.02; done\nPATH=\"$REAL_PATH\" exec nft \"$@\"\n",
        hold, held
    );
    std::fs::write(file("bin/nft"), script).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(file("bin/nft"), mode).unwrap();
    let path = std::env::var("PATH").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_millrace"));
    command
        .env("REAL_PATH", &path)
        .env("PATH", format!("{}:{path}", text(&file("bin"))));
    testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    let Testbed { node, pair, .. } = &mut testbed;
    pair.node.enter(|| node.start_by(command));

    let edge = Edge::adopt(&testbed.pinned.pins()).unwrap();
    let lease = || edge.maps().control.load(0).lease_until_ns;
    std::fs::write(&hold, "").unwrap();
    let version = testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    eventually("nft hangs", || held.exists().then_some(()));
    let before = lease();
    eventually("the lease is renewed for longer than it lasts", || {
        (lease() > before + 2 * 500_000_000).then_some(())
    });
    assert_ne!(testbed.node.status()["edge"]["registry_version"], version);
    std::fs::remove_file(&hold).unwrap();
    eventually("the node follows", || {
        (testbed.node.status()["edge"]["registry_version"] == version).then_some(())
    });
}

// Protects the program from everything around it: without its helper, a node changes its rules all
// the same.
#[test]
fn rules_follow_without_the_helper() {
    if !privileged("rules_follow_without_the_helper") {
        return;
    }
    let mut testbed = Testbed::new("orphan", "mode = \"enforce\"");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.start_node();
    testbed.talk(NON_MEMBER, PORT).unwrap();
    let helper = children(testbed.node.pid());
    assert_eq!(helper.len(), 1);
    tool("kill", &["-9", &helper[0].to_string()]);
    let follows = |rules: &str| {
        let version = testbed.registry.set_firewall(rules);
        eventually("the node follows", || {
            (testbed.node.status()["edge"]["registry_version"] == version).then_some(())
        });
        assert_eq!(testbed.status()["registry_version"], version);
    };
    follows(&allow_all_but_the_non_member());
    testbed.assert_denied(NON_MEMBER);
    follows(&rule("allow", "10.77.0.0/24"));
    testbed.talk(NON_MEMBER, PORT).unwrap();
    let says = || {
        let lines = testbed.node.says.lock().unwrap();
        let lines = lines.iter();
        lines
            .filter(|line| line.contains("the helper is gone"))
            .count()
    };
    eventually("the node says so", || (says() > 0).then_some(()));
    assert_eq!(says(), 1);
    assert_eq!(testbed.node.stop(), Some(0));
}

#[test]
fn a_node_whose_edge_was_detached_puts_nothing_back() {
    if !privileged("a_node_whose_edge_was_detached_puts_nothing_back") {
        return;
    }
    let mut testbed = Testbed::new("gone", "mode = \"enforce\"");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    testbed.start_node();
    testbed.assert_denied(NON_MEMBER);
    testbed.json("detach", &[]);
    let place = |testbed: &Testbed| testbed.node.status()["edge"]["place"].clone();
    eventually("the node sees it", || {
        (place(&testbed) == "user_space").then_some(())
    });
    let version = testbed.registry.set_firewall(&rule("deny", "10.77.0.0/24"));
    eventually("the node has the version", || {
        (testbed.node.status()["registry"]["newest_version"] == version).then_some(())
    });
    assert_eq!(testbed.pair.node.nft("list tables"), "");
    assert!(!testbed.pinned.pins().journal_path().exists());
    testbed.talk(NON_MEMBER, PORT).unwrap();

    // Another edge at the same place is not its own before it starts again.
    testbed.json("attach", &[]);
    assert_eq!(place(&testbed), "user_space");
    testbed.node.stop();
    testbed.start_node();
    assert_eq!(place(&testbed), "kernel");
}

/// A rule, the key that is wrong, and what is said of it.
const INVALID: [(&str, &str); 5] = [
    (
        "prefixes = [\"10.0.0.0/33\"]\naction = \"deny\"",
        "10.0.0.0/33",
    ),
    ("ports = [\"9100-9000\"]\naction = \"deny\"", "9100-9000"),
    ("ports = [70000]\naction = \"deny\"", "70000"),
    ("action = \"perhaps\"", "perhaps"),
    ("prefix = [\"10.0.0.0/8\"]\naction = \"deny\"", "prefix"),
];

#[test]
fn an_invalid_set_is_refused_and_the_last_good_one_stays() {
    if !privileged("an_invalid_set_is_refused_and_the_last_good_one_stays") {
        return;
    }
    let mut testbed = Testbed::new("bad", "");
    let _server = testbed.serve(PORT);
    let good = testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    testbed.json("attach", &[]);
    testbed.json("apply", &["--mode", "enforce"]);
    testbed.start_node();
    let follows = |testbed: &Testbed, version: u64| {
        eventually("the node follows", || {
            (testbed.node.status()["edge"]["registry_version"] == version).then_some(())
        });
    };
    follows(&testbed, good);
    let set = testbed.status()["set"].clone();
    for (refused, (keys, said)) in (1..).zip(INVALID) {
        let invalid = format!("[[firewall]]\nscope = \"global\"\n{keys}\n");
        let rules = rule("allow", "10.77.0.0/24") + &invalid;
        let version = testbed.registry.set_firewall(&rules);
        let output = testbed.xdp("apply", &["--mode", "enforce"]);
        assert_eq!(output.status.code(), Some(78));
        let place = format!("registry version {version}, firewall rule 2");
        let error = stderr(&output);
        assert!(error.contains(&place) && error.contains(said), "{error}");
        eventually("the node refuses it too", || {
            let metric =
                format!("millrace_edge_rules_refused_total{{reason=\"rules\"}} {refused}\n");
            testbed
                .node
                .get("/metrics")
                .1
                .contains(&metric)
                .then_some(())
        });
        assert_eq!(testbed.node.status()["registry"]["newest_version"], version);
    }
    assert_eq!(testbed.status()["set"], set);
    follows(&testbed, good);
    testbed.assert_denied(NON_MEMBER);
    let mended = testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    follows(&testbed, mended);
    testbed.talk(NON_MEMBER, PORT).unwrap();
    assert_eq!(testbed.node.get("/healthz").0, 200);
}

/// A rule that no version may have.
const BROKEN: &str = "[[firewall]]\nscope = \"global\"\naction = \"perhaps\"\n";

// Protects an operator under attack while the registry is wrong: temporary rules go on top of the
// last good rules.
#[test]
fn an_operator_can_act_while_the_newest_rules_are_refused() {
    if !privileged("an_operator_can_act_while_the_newest_rules_are_refused") {
        return;
    }
    let mut testbed = Testbed::new("under", "");
    let _server = testbed.serve(PORT);
    let good = testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.json("attach", &[]);
    assert!(testbed.status()["refused"].is_null());
    let broken = testbed.registry.set_firewall(BROKEN);
    let refused = |status: &serde_json::Value| {
        assert_eq!(status["registry_version"], good, "{status}");
        assert_eq!(status["refused"]["registry_version"], broken, "{status}");
        let message = status["refused"]["message"].as_str().unwrap();
        assert!(message.contains("perhaps"), "{message}");
    };
    let prefix = format!("{NON_MEMBER}/32");

    // No node runs.
    assert_eq!(
        testbed.xdp("apply", &["--mode", "enforce"]).status.code(),
        Some(78)
    );
    refused(&testbed.status());
    let applied = testbed.json("apply", &["--mode", "enforce", "--last-good"]);
    assert_eq!(applied["mode"], "enforce");
    refused(&applied);
    testbed.talk(NON_MEMBER, PORT).unwrap();
    refused(&testbed.json("deny", &[&prefix, "--for", "1h"]));
    testbed.assert_denied(NON_MEMBER);
    testbed.talk(OPERATOR, PORT).unwrap();

    // A node that starts now holds to it, and to what comes.
    testbed.start_node();
    eventually("the node says so", || {
        let edge = testbed.node.status()["edge"].clone();
        (edge["registry_version"] != 0).then(|| refused(&edge))
    });
    testbed.assert_denied(NON_MEMBER);
    let said = testbed.xdp("allow", &[&prefix, "--for", "1h"]);
    assert!(said.status.success(), "{}", stderr(&said));
    assert!(
        stderr(&said).contains(&format!("registry version {broken} is refused")),
        "{}",
        stderr(&said)
    );
    testbed.talk(NON_MEMBER, PORT).unwrap();
    refused(&testbed.status());

    // A version that is right again replaces it.
    let mended = testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    eventually("the node follows", || {
        (testbed.node.status()["edge"]["registry_version"] == mended).then_some(())
    });
    let status = testbed.status();
    assert_eq!(status["registry_version"], mended);
    assert!(status["refused"].is_null(), "{status}");
    assert!(testbed.node.status()["edge"]["refused"].is_null());
}

// Protects a node whose registry came from its peers: a command that does not have it puts no older
// one in force.
#[test]
fn a_command_that_knows_an_older_registry_keeps_the_newer_rules() {
    if !privileged("a_command_that_knows_an_older_registry_keeps_the_newer_rules") {
        return;
    }
    let testbed = Testbed::new("older", "mode = \"enforce\"");
    let _server = testbed.serve(PORT);
    testbed.registry.set_firewall(&rule("deny", "10.77.0.0/24"));
    let newest = testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    testbed.json("attach", &[]);
    for suffix in ["toml", "sig"] {
        let file = format!("{newest:012}.{suffix}");
        std::fs::remove_file(testbed.registry.dir.join(file)).unwrap();
    }
    let applied = testbed.json("apply", &[]);
    assert_eq!(applied["registry_version"], newest, "{applied}");
    testbed.talk(OPERATOR, PORT).unwrap();
    testbed.assert_denied(NON_MEMBER);
}

fn counter(testbed: &Testbed, name: &str) -> u64 {
    let metrics = testbed.node.get("/metrics").1;
    let mut lines = metrics.lines();
    let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap().parse::<f64>().unwrap() as u64
}

// Protects ports and outbound rules from a firewall service that starts: the table is back, by the
// helper of a node without capabilities.
#[test]
fn a_table_that_others_remove_comes_back() {
    const RESTORED: &str = "millrace_edge_tables_restored_total";
    if !privileged("a_table_that_others_remove_comes_back") {
        return;
    }
    let mut testbed = Testbed::new("flush", "mode = \"enforce\"");
    let outbound = "[[firewall]]\nscope = \"global\"\ndirection = \"outbound\"\naction = \"deny\"\n\
                    prefixes = [\"198.51.100.0/24\"]\n";
    let rules = rule("allow", "10.77.0.0/24") + outbound;
    let version = testbed.registry.set_firewall(&rules);
    testbed.start_node();
    eventually("the node has put its set in force", || {
        (testbed.node.status()["edge"]["registry_version"] == version).then_some(())
    });
    let set = testbed.status()["set"].clone();
    let table = |testbed: &Testbed| {
        testbed
            .pair
            .node
            .nft(&format!("-s list table {}", testbed.table()))
    };
    let whole = table(&testbed);
    assert!(whole.contains("198.51.100.0/24"), "{whole}");
    for (times, change) in (1..).zip([
        "flush ruleset".to_owned(),
        format!("flush chain {} input", testbed.table()),
        format!("add rule {} input accept", testbed.table()),
    ]) {
        testbed.pair.node.nft(&change);
        eventually("the table is put back", || {
            (counter(&testbed, RESTORED) == times).then_some(())
        });
        assert_eq!(table(&testbed), whole, "after {change}");
    }
    // Other ports do not concern the edge, and commands are no clients.
    testbed.pair.node.nft("add table inet other");
    testbed.json("apply", &[]);
    let prefix = format!("{NON_MEMBER}/32");
    let denied = testbed.json("deny", &[&prefix, "--for", "1s"])["set"].as_u64();
    // The journal is the last that is written.
    eventually("the node takes the rule away", || {
        let record = Record::read(&testbed.pinned.pins()).unwrap();
        (Some(u64::from(record.set)) > denied).then_some(())
    });
    assert_eq!(counter(&testbed, RESTORED), 3);
    let delete = format!("delete chain {} output", testbed.table());
    testbed.pair.node.nft(&delete);
    eventually("the next change is seen", || {
        (counter(&testbed, RESTORED) == 4).then_some(())
    });
    assert_eq!(table(&testbed), whole);
    assert_ne!(testbed.status()["set"], set, "the sets were others");
    assert!(testbed.pair.node.nft("list tables").contains("other"));
}

// Protects a node whose network card was taken out of the system and put back: it is closed for
// that time alone.
#[test]
fn an_interface_that_is_made_anew_has_the_program_again() {
    if !privileged("an_interface_that_is_made_anew_has_the_program_again") {
        return;
    }
    let mut testbed = Testbed::new("anew", "mode = \"enforce\"");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    testbed.start_node();
    testbed.talk(OPERATOR, PORT).unwrap();
    let index = |testbed: &Testbed| {
        testbed
            .pair
            .node
            .ip("-o link show mr0")
            .split(':')
            .next()
            .unwrap()
            .to_owned()
    };
    let before = index(&testbed);

    testbed.pair.unplug();
    eventually("the node says what is gone", || {
        let gone = testbed.node.status()["edge"]["interfaces_gone"].clone();
        (gone == serde_json::json!(["mr0"])).then_some(())
    });
    assert_eq!(counter(&testbed, "millrace_edge_interfaces_gone"), 1);
    assert_eq!(testbed.status()["interfaces"][0]["gone"], true);

    testbed.pair.plug();
    assert_ne!(index(&testbed), before);
    eventually("the program is on it again", || {
        (testbed.status()["interfaces"][0]["gone"] == false).then_some(())
    });
    assert_eq!(testbed.status()["interfaces"].as_array().unwrap().len(), 1);
    testbed.talk(OPERATOR, PORT).unwrap();
    testbed.assert_denied(NON_MEMBER);
    let counted = |times: u64| {
        eventually("the node has counted it", || {
            (counter(&testbed, "millrace_edge_interfaces_reattached_total") == times
                && counter(&testbed, "millrace_edge_interfaces_gone") == 0)
                .then_some(())
        });
    };
    counted(1);

    // Nor does it stay open where an operator takes the program off by other means.
    let pin = format!("edge-{}", index(&testbed));
    let pin = testbed.pinned.pins().path(Kind::Link, &pin);
    Link::open(&pin).unwrap().detach().unwrap();
    counted(2);
    testbed.talk(OPERATOR, PORT).unwrap();
    testbed.assert_denied(NON_MEMBER);
}

// Protects the log: what cannot be attached is said once, however often it is tried, and attached
// when it can be.
#[test]
fn an_interface_that_refuses_the_program_is_said_once() {
    if !privileged("an_interface_that_refuses_the_program_is_said_once") {
        return;
    }
    let mut testbed = Testbed::new("taken", "xdp = \"native\"\nmode = \"enforce\"");
    testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.start_node();
    testbed.pair.unplug();
    // The next one of this name has another program.
    let node = &testbed.pair.node;
    node.ip("link add mr9 type veth peer name mr8");
    let other = Pinned(testbed.folder.path().join("other"));
    let options = AttachOptions {
        interfaces: vec!["mr9".into()],
        mode: AttachMode::Native,
        ..AttachOptions::default()
    };
    drop(node.enter(|| Edge::attach(&other.pins(), &options).unwrap()));
    node.ip("link set mr9 name mr0");
    eventually("it is tried again and again", || {
        (counter(&testbed, "millrace_edge_attach_failures_total") >= 2).then_some(())
    });
    drop(other);
    eventually("the program is on it again", || {
        (testbed.status()["interfaces"][0]["gone"] == false).then_some(())
    });
    let times = |words: &str| {
        let lines = testbed.node.says.lock().unwrap();
        lines.iter().filter(|line| line.contains(words)).count()
    };
    // The last of all lines about it.
    eventually("it says so", || {
        (times("the edge is on it again") == 1).then_some(())
    });
    assert_eq!(times("the edge cannot be attached to it"), 1);
    assert_eq!(times("another program is attached there"), 1);
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

#[test]
fn a_temporary_rule_holds_at_once_and_the_node_takes_it_away() {
    if !privileged("a_temporary_rule_holds_at_once_and_the_node_takes_it_away") {
        return;
    }
    let mut testbed = Testbed::new("temp", "mode = \"enforce\"");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.start_node();
    let prefix = format!("{NON_MEMBER}/32");
    let temporary = |testbed: &Testbed| {
        let rules = testbed.json("rules", &[]);
        let first = &rules[0];
        (first["origin"] == "temporary").then(|| first.clone())
    };
    let mut non_member = testbed.talk(NON_MEMBER, PORT).unwrap();
    non_member.types_during(|| {
        testbed.json("deny", &[&prefix, "--for", "2s"]);
        eventually("it lapses", || temporary(&testbed).is_none().then_some(()));
    });
    assert!(testbed.packets("firewall_deny").0 > 0);
    non_member.hears_all();
    assert_eq!(testbed.status()["temporary_rules"], 0);

    // The newest decides, and a node that starts later keeps it.
    testbed.json("deny", &[&prefix, "--for", "1h"]);
    testbed.assert_denied(NON_MEMBER);
    testbed.node.stop();
    testbed.start_node();
    let rule = temporary(&testbed).unwrap();
    assert!(rule["rule"].as_str().unwrap().contains(&prefix), "{rule}");
    testbed.assert_denied(NON_MEMBER);
    testbed.json("allow", &[&prefix, "--for", "1h"]);
    testbed.talk(NON_MEMBER, PORT).unwrap();
}

#[test]
fn a_trace_names_the_limit_that_decides() {
    if !privileged("a_trace_names_the_limit_that_decides") {
        return;
    }
    let limits = "tcp_connections_max = 2\ntcp_burst = 3\ntcp_per_minute = 1\n";
    let testbed = Testbed::new("why", limits);
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.json("attach", &[]);
    testbed.json("apply", &["--mode", "enforce"]);
    let reason = |from| {
        let traced = testbed.trace(from, PORT, "tcp-syn");
        traced["reason"].as_str().unwrap().to_owned()
    };
    assert_eq!(reason(OPERATOR), "pass_tcp_syn");
    let sessions = [(); 2].map(|()| testbed.talk(OPERATOR, PORT).unwrap());
    let traced = testbed.trace(OPERATOR, PORT, "tcp-syn");
    assert_eq!(
        (
            &traced["reason"],
            &traced["tcp_connections"],
            &traced["tcp_connections_max"]
        ),
        (&"tcp_source_cap".into(), &2.into(), &2.into()),
        "{traced}"
    );
    assert_eq!(reason(NON_MEMBER), "pass_tcp_syn", "another source");
    drop(sessions);
    eventually("they are closed", || {
        (reason(OPERATOR) == "pass_tcp_syn").then_some(())
    });
    drop(testbed.talk(OPERATOR, PORT).unwrap());
    assert_eq!(reason(OPERATOR), "tcp_source_rate");
    let (before, _) = testbed.packets("pass_tcp_syn");
    for _ in 0..3 {
        assert_eq!(reason(OPERATOR), "tcp_source_rate");
    }
    assert_eq!(
        testbed.packets("pass_tcp_syn").0,
        before,
        "a trace counts nothing"
    );
}

/// What loading, attaching and nftables take.
const HELPERS: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
];

#[test]
fn rules_outlive_a_killed_node_and_the_next_one_adopts_them() {
    if !privileged("rules_outlive_a_killed_node_and_the_next_one_adopts_them") {
        return;
    }
    let mut testbed = Testbed::new("kill", "mode = \"enforce\"");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    let said =
        |testbed: &Testbed, words: &str| testbed.node.said.iter().any(|line| line.contains(words));

    testbed.start_node();
    assert!(
        said(&testbed, "edge attached to mr0, mode enforce"),
        "{:?}",
        testbed.node.said
    );
    let edge = testbed.node.status()["edge"].clone();
    assert_eq!(edge["place"], "kernel", "{edge}");
    assert_harmless(testbed.node.pid());
    let helpers = children(testbed.node.pid());
    assert_eq!(helpers.len(), 1, "{helpers:?}");
    // It keeps what programs and nftables take, and what it executes gets no more.
    for thread in threads(helpers[0]) {
        let held = Privileges::of(&thread);
        assert!(held.no_new_privileges, "{held:?}");
        for set in ["Prm", "Eff", "Bnd"] {
            assert_eq!(held.capabilities[set], bits(&HELPERS), "{set}");
        }
    }
    testbed.assert_denied(NON_MEMBER);

    testbed.node.kill();
    testbed.assert_denied(NON_MEMBER);
    testbed.talk(OPERATOR, PORT).unwrap();
    eventually("its lease and its helper end", || {
        let helper = Path::new("/proc").join(helpers[0].to_string());
        (testbed.status()["lease_seconds_left"].is_null() && !helper.exists()).then_some(())
    });

    testbed.start_node();
    assert!(
        said(&testbed, "edge adopted from"),
        "{:?}",
        testbed.node.said
    );
    assert_harmless(testbed.node.pid());
    eventually("it is alive", || {
        testbed.status()["lease_seconds_left"].as_f64()
    });
    testbed.assert_denied(NON_MEMBER);
    // The helper still can what the node cannot: a version with an outbound rule changes nftables.
    let outbound = "[[firewall]]\nscope = \"global\"\ndirection = \"outbound\"\naction = \"deny\"\n\
                    prefixes = [\"198.51.100.0/24\"]\n";
    testbed
        .registry
        .set_firewall(&(allow_all_but_the_non_member() + outbound));
    eventually("the table follows", || {
        let table = testbed
            .pair
            .node
            .nft(&format!("list table {}", testbed.table()));
        table.contains("198.51.100.0/24").then_some(())
    });
    assert_eq!(testbed.node.stop(), Some(0));
    testbed.assert_denied(NON_MEMBER);
}

// Protects an edge from a second node, whose keys and counts would be another's.
#[test]
fn an_edge_has_one_node() {
    if !privileged("an_edge_has_one_node") {
        return;
    }
    let mut testbed = Testbed::new("claim", "mode = \"enforce\"");
    let _server = testbed.serve(PORT);
    testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    testbed.start_node();
    let mut second = testbed.another_node("10.77.0.3");
    // A bound for one that is not refused.
    let mut command = Command::new("timeout");
    command.args([
        "-k",
        "1",
        "60",
        env!("CARGO_BIN_EXE_millrace"),
        "node",
        "--config",
    ]);
    command.arg(&second.config);
    let refused = testbed.pair.node.enter(|| command.output().unwrap());
    assert_eq!(refused.status.code(), Some(1));
    let said = stderr(&refused);
    let place = format!("another node uses the edge at {}", text(&testbed.pinned.0));
    assert!(said.contains(&place), "{said}");
    assert!(!second.socket.exists());

    assert_eq!(testbed.node.status()["edge"]["place"], "kernel");
    let version = testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    eventually("the first goes on", || {
        (testbed.node.status()["edge"]["registry_version"] == version).then_some(())
    });
    testbed.talk(NON_MEMBER, PORT).unwrap();

    testbed.node.kill();
    testbed.pair.node.enter(|| second.start());
    let adopted = second.said.iter().any(|line| line.contains("edge adopted"));
    assert!(adopted, "{:?}", second.said);
    assert_eq!(second.status()["edge"]["place"], "kernel");
    assert_eq!(second.stop(), Some(0));
}

#[test]
fn a_node_without_privileges_runs_and_says_so() {
    const NOBODY: u32 = 65_534;
    let test = "a_node_without_privileges_runs_and_says_so";
    if !privileged(test) {
        return;
    }
    if Command::new("setpriv").arg("--version").output().is_err() {
        common::skip::skip(test, "setpriv (util-linux)");
        return;
    }
    let mut testbed = Testbed::new("none", "mode = \"enforce\"");
    // Folders that no other user may enter lie above the binary and the state, on some machines.
    let binary = testbed.folder.path().join("millrace");
    std::fs::copy(env!("CARGO_BIN_EXE_millrace"), &binary).unwrap();
    give(testbed.folder.path(), NOBODY);
    let mut command = Command::new("setpriv");
    let user = NOBODY.to_string();
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
    command.args(["--bounding-set=-all", "--inh-caps=-all"]);
    command.arg(&binary);
    let Testbed { node, pair, .. } = &mut testbed;
    pair.node.enter(|| node.start_by(command));

    let said = testbed.node.said.join("\n");
    assert!(said.contains("no edge in the kernel"), "{said}");
    assert!(said.to_lowercase().contains("cap_net_admin"), "{said}");
    let edge = testbed.node.status()["edge"].clone();
    assert_eq!(edge["place"], "user_space", "{edge}");
    let metrics = testbed.node.get("/metrics").1;
    assert!(metrics.contains("millrace_edge_in_kernel 0"), "{metrics}");
    let status = millrace(&["status", "--config", text(&testbed.node.config)]);
    assert!(
        stdout(&status).contains("user space only"),
        "{}",
        stdout(&status)
    );
    assert_eq!(testbed.node.stop(), Some(0));
}

/// Makes a user the owner of a folder and what is in it.
fn give(folder: &Path, user: u32) {
    std::os::unix::fs::chown(folder, Some(user), Some(user)).unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            give(&path, user);
        } else {
            std::os::unix::fs::chown(&path, Some(user), Some(user)).unwrap();
        }
    }
}
