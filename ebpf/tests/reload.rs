//! The edge's life on real interfaces: attached, killed, adopted, replaced under load, detached.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::edge::{Ends, Home, TCP_PORT, attached, counters, denied, options, set};
use common::node::{BURST, QUIC_PORT, limited};
use common::{NODE, PATIENCE, Pair, REMOTE, mocked, node, ok, privileged, process, until};
use libbpf_rs::Link;
use millrace_edge::clock::now_ns;
use millrace_edge::edge::{AttachOptions, Edge, EdgeError};
use millrace_edge::frame::{Description, Shape};
use millrace_edge::interface::AttachMode;
use millrace_edge::lease::{NodeLease, sketch};
use millrace_edge::nft::{Nft, Table};
use millrace_edge::pins::Kind;
use millrace_edge::publish::Publisher;
use millrace_edge_policy::cid::Keys;
use millrace_edge_policy::limiter::Purpose;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::RuleAction;
use millrace_edge_policy::settings::{Mode, levels};
use millrace_edge_policy::siphash::Key;
use millrace_edge_policy::source::Source;

// Protects the first use: native and generic, nothing refused before a set is published, nothing
// left afterwards.
#[test]
fn attaches_natively_and_generically() {
    if !privileged("attaches_natively_and_generically") {
        return;
    }
    for (mode, shown) in [
        (AttachMode::Native, " xdp "),
        (AttachMode::Generic, " xdpgeneric "),
    ] {
        let (pair, home) = (Pair::new("reload"), Home::new());
        let ends = Ends::new(&pair);
        let edge = attached(&pair, &home, mode);
        assert!(pair.node.ip("link show mr0").contains(shown), "{mode:?}");
        assert_eq!(edge.interfaces().unwrap()[0].mode, mode);
        // No other user gets at the pins.
        let root = std::fs::metadata(home.pins.root()).unwrap();
        assert_eq!(root.permissions().mode() & 0o777, 0o700);
        assert!(ends.arrives());

        edge.publish(&set(Mode::Count, RuleAction::Deny), 1, None)
            .unwrap();
        assert!(ends.arrives());
        assert_eq!(counters(&edge).counted_as(Reason::FirewallDeny), 1);

        edge.publish(&set(Mode::Enforce, RuleAction::Deny), 2, None)
            .unwrap();
        ends.send();
        until("the packet is dropped", || denied(&edge) == 1);
        assert_eq!(ends.arrived(), 0);

        edge.publish(&set(Mode::Enforce, RuleAction::Allow), 3, None)
            .unwrap();
        assert!(ends.arrives());
        assert_eq!(counters(&edge).acted_on(Reason::PassUdp), 1);
        assert_eq!(counters(&edge).acted_on(Reason::Internal), 0);

        Edge::detach(&home.pins).unwrap();
        assert!(!pair.node.ip("link show mr0").contains(" xdp"));
        assert!(ends.arrives());
        assert!(!home.pins.is_present() && !home.pins.journal_path().exists());
        assert_eq!(std::fs::read_dir(home.pins.root()).unwrap().count(), 0);
    }
}

// Protects a node whose process dies: its set stays in force, and the next process adopts it.
#[test]
fn killed_it_stays_in_force_and_is_adopted() {
    if !privileged("killed_it_stays_in_force_and_is_adopted") {
        return;
    }
    let (pair, home) = (Pair::new("reload"), Home::new());
    let ends = Ends::new(&pair);
    let mut child = process::attached(&pair.node, &home.pins, "attach-and-wait");
    child.kill().unwrap();
    child.wait().unwrap();
    for _ in 0..10 {
        ends.send();
    }
    let edge = Edge::adopt(&home.pins).unwrap();
    until("packets are dropped without a process", || {
        denied(&edge) == 10
    });
    assert_eq!(ends.arrived(), 0);
    assert_eq!(edge.interfaces().unwrap()[0].name, "mr0");
    assert_eq!(Publisher::new(edge.maps()).config().set, 7);

    edge.publish(&set(Mode::Enforce, RuleAction::Allow), 8, None)
        .unwrap();
    assert!(ends.arrives());
    drop(edge);
    assert!(ends.arrives());
    Edge::detach(&home.pins).unwrap();
    assert!(ends.arrives());
    assert!(matches!(
        Edge::adopt(&home.pins),
        Err(EdgeError::Absent { .. })
    ));
}

// Protects against sources that have spent their rate: neither a node's death nor its successor
// gives it back early.
#[test]
fn killed_it_leaves_rates_in_force() {
    if !privileged("killed_it_leaves_rates_in_force") {
        return;
    }
    let (pair, home) = (Pair::new("reload"), Home::new());
    let listener = pair
        .node
        .enter(|| TcpListener::bind((NODE, TCP_PORT)).unwrap());
    let mut child = process::attached(&pair.node, &home.pins, "limit-and-wait");
    let to = (node::NODE4, TCP_PORT).into();
    let open: Vec<TcpStream> = (0..BURST)
        .map(|_| pair.remote.enter(|| node::connect(to).unwrap()))
        .collect();
    let refuses = |edge: &Edge| {
        let reasons = [Reason::TcpSourceRate, Reason::QuicSourceRate];
        let acted_on = || reasons.map(|reason| counters(edge).acted_on(reason));
        let before = acted_on();
        let dial = || TcpStream::connect_timeout(&to, node::REFUSED);
        assert!(pair.remote.enter(dial).is_err());
        let client = pair.remote.enter(|| UdpSocket::bind((REMOTE, 0)).unwrap());
        let initial = mocked::long_header(1, &[7; 8], &[]);
        client.send_to(&initial, (NODE, QUIC_PORT)).unwrap();
        until("both are refused by their rates", || {
            let now = acted_on();
            now[0] > before[0] && now[1] == before[1] + 1
        });
    };
    refuses(&Edge::adopt(&home.pins).unwrap());
    child.kill().unwrap();
    child.wait().unwrap();

    let mut edge = Edge::adopt(&home.pins).unwrap();
    refuses(&edge);
    // The next node: another run, other keys, its own programs, its own set.
    edge.reload().unwrap();
    let set = limited();
    edge.publish(&set, 9, None).unwrap();
    let keys = Keys {
        keys: [Key::from_bytes([9; 16]); 4],
        active: 1,
    };
    let limits = &set.settings.limits;
    let mut lease = NodeLease::begin(edge.maps(), 2, PATIENCE, limits, &keys);
    lease.tick(|| [5; 16]);
    refuses(&edge);
    drop((listener, open));
    refuses(&edge);

    // Until the time has come, and not longer.
    let (sketch, source) = (sketch(edge.maps()), Source::of(node::REMOTE4));
    for (purpose, limit) in [
        (Purpose::Quic, limits.source_quic),
        (Purpose::Tcp, limits.source_tcp),
    ] {
        let has_some_in = |ns| sketch.look_source(source, purpose, &levels(limit), now_ns() + ns);
        assert!(!has_some_in(0), "{purpose:?}");
        assert!(has_some_in(limit.interval_ns), "{purpose:?}");
    }
}

/// Packets between two looks at the counters: fewer than the ring of a veth holds, so that none is
/// lost on the way.
const ON_THE_WAY_MAX: u64 = 128;

// Protects the reload: every packet meets one program, the old or the new, and is counted once.
#[test]
fn two_hundred_swaps_under_load_lose_and_bypass_nothing() {
    if !privileged("two_hundred_swaps_under_load_lose_and_bypass_nothing") {
        return;
    }
    let (pair, home) = (Pair::new("reload"), Home::new());
    let ends = Ends::new(&pair);
    let mut edge = attached(&pair, &home, AttachMode::Native);
    edge.publish(&set(Mode::Enforce, RuleAction::Deny), 1, None)
        .unwrap();
    let loaded = [edge.load_beside().unwrap(), edge.load_beside().unwrap()];
    let watched = Edge::adopt(&home.pins).unwrap();

    let sent = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                ends.send();
                let sent = sent.fetch_add(1, Ordering::Relaxed) + 1;
                if sent.is_multiple_of(ON_THE_WAY_MAX) {
                    until("the program counts what was sent", || {
                        denied(&watched) == sent
                    });
                }
            }
        });
        for swap in 0..200 {
            // Each program meets packets before the next one comes.
            let before = sent.load(Ordering::Relaxed);
            edge.replace(&loaded[swap % 2]).unwrap();
            until("packets are sent", || sent.load(Ordering::Relaxed) > before);
        }
        stop.store(true, Ordering::Relaxed);
    });

    let sent = sent.into_inner();
    until("every packet is counted", || denied(&edge) >= sent);
    assert_eq!(denied(&edge), sent);
    assert_eq!(ends.arrived(), 0);
    assert_eq!(counters(&edge).acted_on(Reason::Internal), 0);
}

/// Ends what waits for it, also when its thread panics.
struct Stop<'s>(&'s AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

// Protects traffic that is allowed: the table would drop a packet that loses its stamp in a swap.
#[test]
fn two_hundred_swaps_under_load_lose_nothing_that_passes() {
    if !privileged("two_hundred_swaps_under_load_lose_nothing_that_passes") {
        return;
    }
    for mode in [AttachMode::Native, AttachMode::Generic] {
        let (pair, home) = (Pair::new("reload"), Home::new());
        let ends = Ends::new(&pair);
        let mut edge = attached(&pair, &home, mode);
        let allow = set(Mode::Enforce, RuleAction::Allow);
        edge.publish(&allow, 1, None).unwrap();
        pair.node
            .enter(|| Nft::default().apply(&Table::of(&allow)).unwrap());
        let loaded = [edge.load_beside().unwrap(), edge.load_beside().unwrap()];

        let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
        let stop = AtomicBool::new(false);
        let on_the_way = || sent.load(Ordering::SeqCst) - received.load(Ordering::SeqCst);
        thread::scope(|scope| {
            let _stop = Stop(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    if on_the_way() < ON_THE_WAY_MAX {
                        // Before it is sent: it may be received at once.
                        sent.fetch_add(1, Ordering::SeqCst);
                        ends.send();
                    } else {
                        thread::yield_now();
                    }
                }
            });
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) || on_the_way() > 0 {
                    // In vain, after a long time: packets are lost.
                    if ends.server.recv(&mut [0; 64]).is_err() {
                        break;
                    }
                    received.fetch_add(1, Ordering::SeqCst);
                }
            });
            for swap in 0..200 {
                let before = received.load(Ordering::SeqCst);
                edge.replace(&loaded[swap % 2]).unwrap();
                until("packets arrive behind the new program", || {
                    received.load(Ordering::SeqCst) > before + ON_THE_WAY_MAX
                });
            }
        });
        let sent = sent.into_inner();
        assert_eq!(received.into_inner(), sent, "{mode:?}");
        assert_eq!(counters(&edge).acted_on(Reason::PassUdp), sent, "{mode:?}");
        assert_eq!(counters(&edge).acted_on(Reason::Internal), 0);
    }
}

// Protects caps across a reload: a connection that two programs see open or close is counted once.
#[test]
fn connections_that_open_during_a_swap_are_counted_once() {
    if !privileged("connections_that_open_during_a_swap_are_counted_once") {
        return;
    }
    let (pair, home) = (Pair::new("reload"), Home::new());
    let mut edge = attached(&pair, &home, AttachMode::Native);
    edge.publish(&set(Mode::Enforce, RuleAction::Allow), 1, None)
        .unwrap();
    let listener = pair
        .node
        .enter(|| TcpListener::bind((NODE, TCP_PORT)).unwrap());
    let connect = || {
        let client = pair
            .remote
            .enter(|| TcpStream::connect((NODE, TCP_PORT)).unwrap());
        (client, listener.accept().unwrap().0)
    };

    let before = connect();
    // The old link is held, so that both programs stay attached.
    let old = Link::open(home.pins.path(Kind::Link, "conn_state")).unwrap();
    edge.reload().unwrap();
    let between = [connect(), connect(), connect()];
    assert_eq!(tcp_connections(&edge), 4);
    drop(before);
    until("one is gone", || tcp_connections(&edge) == 3);
    drop(old);
    let after = connect();
    assert_eq!(tcp_connections(&edge), 4);
    drop((between, after));
    until("all are gone", || tcp_connections(&edge) == 0);
}

/// Of the remote host.
fn tcp_connections(edge: &Edge) -> u32 {
    let from = (REMOTE.parse::<IpAddr>().unwrap(), 1_024).into();
    let shape = Shape::TcpAck;
    let packet = Description {
        from,
        to_port: TCP_PORT,
        shape,
        payload_bytes: None,
    };
    edge.trace(&packet.frame()).unwrap().connections.tcp
}

// Protects a node that lost its program on an interface: the table passes no packet without a
// stamp.
#[test]
fn the_table_closes_what_the_program_left() {
    if !privileged("the_table_closes_what_the_program_left") {
        return;
    }
    for mode in [AttachMode::Native, AttachMode::Generic] {
        let (pair, home) = (Pair::new("reload"), Home::new());
        let ends = Ends::new(&pair);
        let mut edge = attached(&pair, &home, mode);
        let allow = set(Mode::Enforce, RuleAction::Allow);
        edge.publish(&allow, 1, None).unwrap();
        pair.node
            .enter(|| Nft::default().apply(&Table::of(&allow)).unwrap());
        assert!(ends.arrives(), "stamped, {mode:?}");

        edge.detach_interface("mr0").unwrap();
        assert!(edge.interfaces().unwrap().is_empty());
        ends.send();
        let list = || ok(Command::new("nft").args(["list", "table", "inet", "millrace"]));
        let dropped = || pair.node.enter(list).contains("counter packets 1 ");
        until("the table drops it", dropped);
        assert_eq!(ends.arrived(), 0);
        let again = edge.detach_interface("mr0").unwrap_err();
        assert!(matches!(again, EdgeError::NotAttached { .. }), "{again}");

        pair.node
            .enter(|| edge.attach_interface("mr0", mode).unwrap());
        assert!(ends.arrives(), "stamped again, {mode:?}");

        // The table answers a rejected packet.
        edge.publish(&set(Mode::Enforce, RuleAction::Reject), 2, None)
            .unwrap();
        ends.send();
        ends.client.set_read_timeout(Some(PATIENCE)).unwrap();
        let error = ends.client.recv(&mut [0; 64]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        assert_eq!(counters(&edge).acted_on(Reason::PassReject), 1);
    }
}

// Protects a node whose interface was made anew, as when a driver is loaded again: neither its name
// nor its index alone means that it is attached.
#[test]
fn an_interface_that_was_made_anew_is_attached_again() {
    if !privileged("an_interface_that_was_made_anew_is_attached_again") {
        return;
    }
    let (pair, home) = (Pair::new("reload"), Home::new());
    let mut edge = attached(&pair, &home, AttachMode::Auto);
    let first = edge.interfaces().unwrap().remove(0);
    assert!(edge.is_live(&first));
    for index in [first.index, first.index + 1_000] {
        pair.node.ip("link del mr0");
        let gone = edge.interfaces().unwrap().remove(0);
        assert!(!edge.is_live(&gone));
        edge.reload().unwrap();
        pair.node
            .ip(&format!("link add mr0 index {index} type veth"));
        assert!(!edge.is_live(&gone));
        pair.node
            .enter(|| edge.attach_interface("mr0", AttachMode::Auto).unwrap());
        let [interface] = edge.interfaces().unwrap().try_into().unwrap();
        assert_eq!((interface.name.as_str(), interface.index), ("mr0", index));
        assert!(edge.is_live(&interface));
        assert!(pair.node.ip("link show mr0").contains(" xdp "));
    }
    let links = home.pins.names(Kind::Link).unwrap();
    assert_eq!(links.len(), 4, "{links:?}");
}

// Protects a process that attaches while another of its threads starts a process, which has a copy
// of the lock for a moment.
#[test]
fn attaching_waits_for_the_lock() {
    if !privileged("attaching_waits_for_the_lock") {
        return;
    }
    let (pair, home) = (Pair::new("reload"), Home::new());
    let held = home.pins.lock().unwrap();
    let file = std::fs::metadata(home.pins.root().with_extension("lock")).unwrap();
    let waiter = format!(":{} ", file.ino());
    thread::scope(|scope| {
        let attaching = scope.spawn(|| attached(&pair, &home, AttachMode::Native));
        until("the attaching thread waits for it", || {
            let locks = std::fs::read_to_string("/proc/locks").unwrap();
            let mut waiting = locks.lines().filter(|line| line.contains("->"));
            attaching.is_finished() || waiting.any(|line| line.contains(&waiter))
        });
        drop(held);
        let edge = attaching.join().unwrap();
        assert_eq!(edge.interfaces().unwrap()[0].name, "mr0");
    });
}

// Protects an operator from guessing: errors name the fault, and nothing is left behind.
#[test]
fn what_cannot_be_attached_or_adopted_is_named() {
    if !privileged("what_cannot_be_attached_or_adopted_is_named") {
        return;
    }
    let (pair, home) = (Pair::new("reload"), Home::new());
    let attach = |options: &AttachOptions| pair.node.enter(|| Edge::attach(&home.pins, options));
    let error = Edge::adopt(&home.pins).unwrap_err();
    assert!(matches!(error, EdgeError::Absent { .. }), "{error}");

    let interfaces = vec!["mr0".into(), "mr9".into()];
    let error = attach(&AttachOptions {
        interfaces,
        ..options(AttachMode::Auto)
    })
    .unwrap_err();
    assert!(
        matches!(&error, EdgeError::Interface { name, .. } if name == "mr9"),
        "{error}"
    );
    assert!(!home.pins.is_present());
    assert!(!pair.node.ip("link show mr0").contains(" xdp"));

    let edge = attach(&options(AttachMode::Auto)).unwrap();
    assert_eq!(edge.interfaces().unwrap()[0].mode, AttachMode::Native);
    let error = attach(&options(AttachMode::Auto)).unwrap_err();
    assert!(matches!(error, EdgeError::Present { .. }), "{error}");
    let other = Home::new();
    let busy = pair
        .node
        .enter(|| Edge::attach(&other.pins, &options(AttachMode::Native)));
    let busy = busy.unwrap_err();
    assert!(
        busy.to_string().contains("another program is attached"),
        "{busy}"
    );

    std::fs::remove_file(home.pins.path(Kind::Map, "budgets")).unwrap();
    let error = Edge::adopt(&home.pins).unwrap_err();
    assert!(error.to_string().contains("budgets"), "{error}");

    // Another version has other maps: they are not touched, only detached as a whole.
    let maps = home
        .pins
        .path(Kind::Map, "budgets")
        .parent()
        .unwrap()
        .to_owned();
    let layout = maps.parent().unwrap();
    std::fs::rename(layout, layout.with_file_name("layout-999")).unwrap();
    let error = Edge::adopt(&home.pins).unwrap_err();
    assert!(
        matches!(&error, EdgeError::Layout { found, .. } if found == "layout-999"),
        "{error}"
    );
    Edge::detach(&home.pins).unwrap();
    assert!(!pair.node.ip("link show mr0").contains(" xdp"));
}
