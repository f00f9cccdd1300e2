//! The edge as an operator runs it: the binary, in a namespace of its own, with an interface that
//! packets arrive on.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[allow(dead_code, reason = "shared by test crates")]
#[path = "common/edge_testbed.rs"]
mod edge_testbed;

use common::namespace::{NON_MEMBER, OPERATOR, privileged};
use common::{eventually, millrace, stderr, text};
use edge_testbed::{ELSEWHERE, PORT, Testbed, allow_all_but_the_non_member, rule};
use millrace_edge::edge::Edge;
use millrace_edge::pins::Pins;

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
    testbed.knows(version);
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
    testbed.follows(good);
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
            (testbed.refusals("rules") == refused).then_some(())
        });
        assert_eq!(testbed.node.status()["registry"]["newest_version"], version);
    }
    assert_eq!(testbed.status()["set"], set);
    testbed.follows(good);
    testbed.assert_denied(NON_MEMBER);
    let mended = testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    testbed.follows(mended);
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
    testbed.follows(mended);
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
