//! The edge's life on real interfaces: attached, killed, adopted, replaced under load, detached.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::io;
use std::io::{BufRead as _, BufReader};
use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{NODE, Namespace, PATIENCE, Pair, WORLD, privileged, until};
use millrace_edge::edge::{AttachOptions, Edge, EdgeError};
use millrace_edge::load::LoadOptions;
use millrace_edge::metrics::Counters;
use millrace_edge::nft::{Nft, Table};
use millrace_edge::pins::{Kind, Pins};
use millrace_edge::publish::{PublishError, Publisher, Standing};
use millrace_edge::state::AttachMode;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::{Bounds, Compiled, Rule, RuleAction, Temporary, compile};
use millrace_edge_policy::settings::{
    DefaultAction, Kind as ServiceKind, Mode, Service, Settings,
};

const PORT: u16 = 4200;

fn sizes() -> LoadOptions {
    LoadOptions {
        trie_nodes4: 256,
        trie_nodes6: 256,
        limiter_lines: 256,
        rules_max: 64,
        peers_max: 16,
        sources_max: 64,
        replies_max: 64,
        ..LoadOptions::default()
    }
}

fn options(mode: AttachMode) -> AttachOptions {
    AttachOptions { interfaces: vec!["mr0".into()], mode, sizes: sizes() }
}

/// UDP to [`PORT`] is allowed or denied from everywhere in the world, by a rule.
fn set(mode: Mode, action: RuleAction) -> Compiled {
    set_of(mode, &["10.77.0.0/24"], action)
}

fn set_of(mode: Mode, prefixes: &[&str], action: RuleAction) -> Compiled {
    let default_action = DefaultAction::Deny;
    let settings = Settings {
        mode,
        services: vec![Service { port: PORT, kind: ServiceKind::Udp, default_action }],
        ..Settings::default()
    };
    let rule = |prefix: &&str| {
        let prefix = prefix.parse().unwrap();
        Rule::temporary(&Temporary { prefix, action, until_unix_seconds: u64::MAX })
    };
    let rules: Vec<Rule> = prefixes.iter().map(rule).collect();
    let bounds = Bounds { rules_max: 1_000, nodes4_max: 10_000, nodes6_max: 10_000 };
    compile(&settings, &rules, bounds).unwrap()
}

/// A folder for pins; everything pinned there is detached when it is dropped.
struct Home {
    pins: Pins,
    _folder: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { pins: Pins::at(folder.path().join("edge")), _folder: folder }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = Edge::detach(&self.pins);
    }
}

/// A socket of the node on [`PORT`], and one of the world that sends there.
struct Ends {
    server: UdpSocket,
    client: UdpSocket,
}

impl Ends {
    fn new(pair: &Pair) -> Self {
        let server = pair.node.enter(|| UdpSocket::bind((NODE, PORT)).unwrap());
        let client = pair.world.enter(|| UdpSocket::bind((WORLD, 0)).unwrap());
        client.connect((NODE, PORT)).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let ends = Self { server, client };
        // Neighbours are resolved before anything is counted.
        assert!(ends.arrives());
        ends
    }

    fn send(&self) {
        self.client.send(b"hello").unwrap();
    }

    fn arrives(&self) -> bool {
        self.send();
        self.server.recv(&mut [0; 64]).is_ok()
    }

    /// Datagrams that are in the socket, which is empty afterwards.
    fn arrived(&self) -> usize {
        self.server.set_nonblocking(true).unwrap();
        let received = std::iter::repeat_with(|| self.server.recv(&mut [0; 64]));
        let count = received.take_while(Result::is_ok).count();
        self.server.set_nonblocking(false).unwrap();
        count
    }
}

fn counters(edge: &Edge) -> Counters {
    Counters::read(edge.maps().counters()).unwrap()
}

fn denied(edge: &Edge) -> u64 {
    counters(edge).acted_on(Reason::FirewallDeny)
}

// Protects the first use: native and generic, nothing refused before a set is published, nothing left afterwards.
#[test]
fn attaches_natively_and_generically() {
    if !privileged("attaches_natively_and_generically") {
        return;
    }
    for (mode, shown) in [(AttachMode::Native, " xdp "), (AttachMode::Generic, " xdpgeneric ")] {
        let (pair, home) = (Pair::new("reload"), Home::new());
        let ends = Ends::new(&pair);
        let edge = pair.node.enter(|| Edge::attach(&home.pins, &options(mode)).unwrap());
        assert!(pair.node.ip("link show mr0").contains(shown), "{mode:?}");
        assert_eq!(edge.interfaces().unwrap()[0].mode, mode);
        assert!(ends.arrives());

        edge.publish(&set(Mode::Count, RuleAction::Deny), 1, None).unwrap();
        assert!(ends.arrives());
        assert_eq!(counters(&edge).counted_as(Reason::FirewallDeny), 1);

        edge.publish(&set(Mode::Enforce, RuleAction::Deny), 2, None).unwrap();
        ends.send();
        until("the packet is dropped", || denied(&edge) == 1);
        assert_eq!(ends.arrived(), 0);

        edge.publish(&set(Mode::Enforce, RuleAction::Allow), 3, None).unwrap();
        assert!(ends.arrives());
        assert_eq!(counters(&edge).acted_on(Reason::PassUdp), 1);
        assert_eq!(counters(&edge).acted_on(Reason::Internal), 0);

        Edge::detach(&home.pins).unwrap();
        assert!(!pair.node.ip("link show mr0").contains(" xdp"));
        assert!(ends.arrives());
        assert!(!home.pins.is_present() && !home.pins.state_path().exists());
        assert_eq!(std::fs::read_dir(home.pins.root()).unwrap().count(), 0);
    }
}

// Protects a node whose process dies: what it put in force stays, and the next one takes it over.
#[test]
fn killed_it_stays_in_force_and_is_adopted() {
    if !privileged("killed_it_stays_in_force_and_is_adopted") {
        return;
    }
    let (pair, home) = (Pair::new("reload"), Home::new());
    let ends = Ends::new(&pair);
    let mut child = start_child(&pair.node, &home.pins);
    child.kill().unwrap();
    child.wait().unwrap();
    for _ in 0..10 {
        ends.send();
    }
    let edge = Edge::adopt(&home.pins).unwrap();
    until("packets are dropped without a process", || denied(&edge) == 10);
    assert_eq!(ends.arrived(), 0);
    assert_eq!(edge.interfaces().unwrap()[0].name, "mr0");
    assert_eq!(Publisher::new(edge.maps()).config().set, 7);

    edge.publish(&set(Mode::Enforce, RuleAction::Allow), 8, None).unwrap();
    assert!(ends.arrives());
    drop(edge);
    assert!(ends.arrives());
    Edge::detach(&home.pins).unwrap();
    assert!(ends.arrives());
    assert!(matches!(Edge::adopt(&home.pins), Err(EdgeError::Absent { .. })));
}

/// Starts this test binary once more, to attach in a process of its own; it has when this returns.
fn start_child(node: &Namespace, pins: &Pins) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_attaches_and_waits", "--nocapture"])
        .env(CHILD, &node.name)
        .env(CHILD_PINS, pins.root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains(ATTACHED)), "the child ended");
    child
}

const CHILD: &str = "MILLRACE_TEST_NAMESPACE";
const CHILD_PINS: &str = "MILLRACE_TEST_PINS";
const ATTACHED: &str = "attached and published";

/// No test: what [`start_child`] starts.
#[test]
fn child_attaches_and_waits() {
    let (Ok(name), Some(root)) = (std::env::var(CHILD), std::env::var_os(CHILD_PINS)) else {
        return;
    };
    common::enter(&name, || {
        let edge = Edge::attach(&Pins::at(root), &options(AttachMode::Native)).unwrap();
        edge.publish(&set(Mode::Enforce, RuleAction::Deny), 7, None).unwrap();
        println!("{ATTACHED}");
        // Until the parent's end closes.
        let _ = io::stdin().read_line(&mut String::new());
    });
}

// Protects the reload: every packet meets one program, the old or the new.
#[test]
fn reload_times() {
    if !privileged("x") {
        return;
    }
    let (pair, home) = (Pair::new("reload"), Home::new());
    let mut edge = pair.node.enter(|| Edge::attach(&home.pins, &options(AttachMode::Native)).unwrap());
    let t = std::time::Instant::now();
    edge.reload().unwrap();
    eprintln!("reload {:?}", t.elapsed());
}
