//! A node beside its edge: what it mends, what it leaves alone, and what outlives it.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
#[allow(dead_code, reason = "shared by test crates")]
#[path = "common/edge_testbed.rs"]
mod edge_testbed;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use caps::Capability;
use common::namespace::{NON_MEMBER, OPERATOR, Pinned, privileged, tool};
use common::process::{Privileges, assert_harmless, bits, children, threads};
use common::{eventually, millrace, stderr, stdout, text};
use edge_testbed::{PORT, Testbed, allow_all_but_the_non_member, rule};
use libbpf_rs::Link;
use millrace_edge::edge::{AttachOptions, Edge};
use millrace_edge::interface::AttachMode;
use millrace_edge::pins::Kind;
use millrace_edge_control::Record;
use millrace_edge_policy::rules::{Bounds, compile};
use millrace_edge_policy::settings::{DefaultAction, Kind as ServiceKind, Mode, Service, Settings};

/// What loading, attaching and nftables take.
const HELPERS: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
];

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
    testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    // Waits as long as there is a file `hold`.
    let waits = format!("while [ -e {hold:?} ]; do : > {held:?}; sleep 0.02; done");
    start_with_nft(&mut testbed, &waits);

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
    testbed.follows(version);
}

// Protects the successor of a node: its end waits for no `nft` that hangs, and leaves none behind
// that could change the table later.
#[test]
fn a_node_ends_while_nft_hangs() {
    if !privileged("a_node_ends_while_nft_hangs") {
        return;
    }
    let mut testbed = Testbed::new("ends", "mode = \"enforce\"");
    let file = |name: &str| testbed.folder.path().join(name);
    let (hold, held) = (file("hold"), file("held"));
    let first = testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    let waits = format!("while [ -e {hold:?} ]; do echo $$ > {held:?}; sleep 0.02; done");
    start_with_nft(&mut testbed, &waits);
    testbed.follows(first);
    std::fs::write(&hold, "").unwrap();
    testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    let nft = eventually("nft hangs", || {
        let pid = std::fs::read_to_string(&held).ok()?;
        pid.trim().parse::<u32>().ok()
    });
    let stopped_at = Instant::now();
    assert_eq!(testbed.node.stop(), Some(0));
    // A second is promised; ten times of it is allowed. `nft` is given more.
    assert!(stopped_at.elapsed() < Duration::from_secs(10));
    eventually("nft is killed", || {
        // A killed process without a parent that waits for it has no command line.
        let command = std::fs::read(format!("/proc/{nft}/cmdline"));
        command.unwrap_or_default().is_empty().then_some(())
    });
}

// Protects outbound rules from an `nft` that fails once: nothing tells the node that the table is
// not that of the set, and it tries again all the same.
#[test]
fn a_table_that_could_not_be_put_in_force_is_tried_again() {
    if !privileged("a_table_that_could_not_be_put_in_force_is_tried_again") {
        return;
    }
    let mut testbed = Testbed::new("again", "mode = \"enforce\"");
    let fail = testbed.folder.path().join("fail");
    let first = testbed
        .registry
        .set_firewall(&rule("allow", "10.77.0.0/24"));
    start_with_nft(&mut testbed, &format!("[ -e {fail:?} ] && exit 1"));
    testbed.follows(first);
    let is_table =
        |testbed: &Testbed, word: &str| (testbed.status()["table"] == word).then_some(());
    eventually("the table is put in force", || {
        is_table(&testbed, "in_force")
    });
    std::fs::write(&fail, "").unwrap();
    let version = testbed
        .registry
        .set_firewall(&allow_all_but_the_non_member());
    testbed.follows(version);
    eventually("the node says so", || {
        testbed.node.status()["edge"]["failures"]["table"]
            .is_string()
            .then_some(())
    });
    is_table(&testbed, "missing").unwrap();
    std::fs::remove_file(&fail).unwrap();
    eventually("the table is put in force", || {
        is_table(&testbed, "in_force")
    });
    eventually("nothing is left to say", || {
        testbed.node.status()["edge"]["failures"]["table"]
            .is_null()
            .then_some(())
    });
}

/// Starts the node with an `nft` that does this first.
fn start_with_nft(testbed: &mut Testbed, first: &str) {
    let folder = testbed.folder.path().join("bin");
    std::fs::create_dir(&folder).unwrap();
    let script = format!("#!/bin/sh\n{first}\nPATH=\"$REAL_PATH\" exec nft \"$@\"\n");
    std::fs::write(folder.join("nft"), script).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.join("nft"), mode).unwrap();
    let path = std::env::var("PATH").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_millrace"));
    command
        .env("REAL_PATH", &path)
        .env("PATH", format!("{}:{path}", text(&folder)));
    let Testbed { node, pair, .. } = testbed;
    pair.node.enter(|| node.start_by(command));
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
        testbed.follows(version);
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
    testbed.knows(version);
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
    testbed.follows(version);
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
            (testbed.counter(RESTORED) == times).then_some(())
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
    assert_eq!(testbed.counter(RESTORED), 3);
    let delete = format!("delete chain {} output", testbed.table());
    testbed.pair.node.nft(&delete);
    eventually("the next change is seen", || {
        (testbed.counter(RESTORED) == 4).then_some(())
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
    assert_eq!(testbed.counter("millrace_edge_interfaces_gone"), 1);
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
            (testbed.counter("millrace_edge_interfaces_reattached_total") == times
                && testbed.counter("millrace_edge_interfaces_gone") == 0)
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
        (testbed.counter("millrace_edge_attach_failures_total") >= 2).then_some(())
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
    testbed.follows(version);
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

// Protects an operator from an edge that silently follows nothing: a lock that cannot be taken is
// told once, stands in the status, and is tried again.
#[test]
fn a_lock_that_cannot_be_taken_is_told() {
    if !privileged("a_lock_that_cannot_be_taken_is_told") {
        return;
    }
    let mut testbed = Testbed::new("lock", "");
    testbed.start_node();
    let why = |testbed: &Testbed| testbed.node.status()["edge"]["failures"]["lock"].clone();
    let lock = testbed.pinned.0.with_extension("lock");
    std::fs::remove_file(&lock).unwrap();
    std::fs::create_dir(&lock).unwrap();
    eventually("the node says so", || {
        why(&testbed).is_string().then_some(())
    });
    let text = why(&testbed);
    assert!(text.as_str().unwrap().contains("cannot lock"), "{text}");
    assert!(testbed.refusals("lock") == 1);
    std::fs::remove_dir(&lock).unwrap();
    eventually("the node goes on", || why(&testbed).is_null().then_some(()));
    assert!(testbed.refusals("lock") == 1, "told once");
}
