//! Sets on their way into force: confirmation, interruption, sets that do not fit; and the values
//! that operators read afterwards.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::mem::offset_of;
use std::net::IpAddr;
use std::time::Duration;

use common::edge::{Ends, Home, PORT, attached, counters, denied, set, set_of};
use common::{Pair, privileged, until};
use libbpf_rs::{MapCore as _, MapHandle};
use millrace_edge::abi::EdgeControl;
use millrace_edge::clock::now_ns;
use millrace_edge::counts::Counts;
use millrace_edge::edge::EdgeError;
use millrace_edge::frame::{Description, Shape};
use millrace_edge::interface::AttachMode;
use millrace_edge::metrics;
use millrace_edge::publish::{CommitState, PublishError, Publisher};
use millrace_edge::trace::Decider;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::rules::RuleAction;
use millrace_edge_policy::settings::Mode;
use millrace_edge_policy::verdict::Action;
use millrace_testkit::PATIENCE;

/// Time to confirm; longer than any test.
const PERIOD: Duration = Duration::from_secs(600);

// Protects an operator whose rules cut off the operator: the program goes back by its own clock.
#[test]
fn a_set_is_rolled_back_unless_it_is_confirmed() {
    if !privileged("a_set_is_rolled_back_unless_it_is_confirmed") {
        return;
    }
    let (pair, home) = (Pair::new("publish"), Home::new());
    let ends = Ends::new(&pair);
    let edge = attached(&pair, &home, AttachMode::Native);
    let publisher = Publisher::new(edge.maps());
    let allow = set(Mode::Enforce, RuleAction::Allow);
    let deny = set(Mode::Enforce, RuleAction::Deny);
    let to_confirm = || edge.publish(&deny, 2, Some(PERIOD));
    let revert_at = offset_of!(EdgeControl, revert_at_ns);
    edge.publish(&allow, 1, None).unwrap();
    assert!(ends.arrives());

    // Twice: first after a set that was committed, then after one that was rolled back.
    for _ in 0..2 {
        let seen = denied(&edge);
        let before_ns = now_ns();
        to_confirm().unwrap();
        assert!(matches!(
            publisher.commit_state(),
            CommitState::AwaitingConfirm { .. }
        ));
        let ends_ns: u64 = edge.maps().control.load_part(0, revert_at);
        let period_ns = PERIOD.as_nanos() as u64;
        assert!((before_ns + period_ns..=now_ns() + period_ns).contains(&ends_ns));
        ends.send();
        until("it is in force", || denied(&edge) > seen);
        let refused = edge.publish(&allow, 3, None).unwrap_err();
        let EdgeError::Publish(PublishError::AwaitingConfirm { set: 2, .. }) = refused else {
            panic!("{refused}")
        };
        // The end of the time to confirm, moved so that the test need not wait for it.
        let soon_ns = now_ns() + 1_000_000;
        edge.maps().control.store_part(0, revert_at, &soon_ns);
        until("it is rolled back", || {
            publisher.commit_state() == CommitState::RolledBack
        });
        assert_eq!(publisher.config().set, 1);
        // The program's clock is a tick behind.
        until("packets pass again", || {
            ends.send();
            ends.arrived() > 0
        });
        assert!(edge.confirm().is_err() && edge.revert().is_err());
        assert!(ends.arrives());
    }

    // Confirmed, it stays; reverted, it goes at once.
    to_confirm().unwrap();
    edge.confirm().unwrap();
    assert_eq!(
        (publisher.commit_state(), publisher.config().set),
        (CommitState::Committed, 2)
    );
    edge.publish(&allow, 3, Some(PERIOD)).unwrap();
    assert!(ends.arrives());
    edge.revert().unwrap();
    assert_eq!(
        (publisher.commit_state(), publisher.config().set),
        (CommitState::RolledBack, 2)
    );
    let seen = denied(&edge);
    ends.send();
    until("the old set is in force", || denied(&edge) > seen);
    edge.publish(&allow, 4, None).unwrap();
    assert_eq!(
        (publisher.commit_state(), publisher.config().set),
        (CommitState::Committed, 4)
    );
    assert!(ends.arrives());
}

// Protects invariant 1 of publishing: a process that died while it published has left the
// old set in force, twice.
#[test]
fn a_publisher_that_died_halfway_has_changed_nothing() {
    if !privileged("a_publisher_that_died_halfway_has_changed_nothing") {
        return;
    }
    let (pair, home) = (Pair::new("publish"), Home::new());
    let ends = Ends::new(&pair);
    let edge = attached(&pair, &home, AttachMode::Native);
    let maps = edge.maps();
    let publisher = Publisher::new(maps);
    let allow = set(Mode::Enforce, RuleAction::Allow);
    edge.publish(&allow, 1, None).unwrap();
    let (original, copy) = (publisher.in_force(), publisher.in_force() ^ 1);
    for port in 0..=u16::MAX {
        maps.set_port(copy, false, port, maps.port(original, false, port));
    }
    maps.store_config(copy, &maps.load_config(original));
    let revert_at = offset_of!(EdgeControl, revert_at_ns);
    maps.control.store_part(0, revert_at, &1_u64);
    assert_eq!(publisher.in_force(), copy);
    assert!(ends.arrives());

    edge.publish(&allow, 2, Some(Duration::from_secs(600)))
        .unwrap();
    assert_eq!(publisher.config().set, 2);
    assert!(ends.arrives());
    edge.revert().unwrap();
    assert_eq!(publisher.config().set, 1);
    assert!(ends.arrives());
    edge.publish(&allow, 3, None).unwrap();
    assert_eq!(
        (publisher.commit_state(), publisher.config().set),
        (CommitState::Committed, 3)
    );
    assert!(ends.arrives());
    assert_eq!(counters(&edge).acted_on(Reason::Internal), 0);
}

// Protects the last good set: a set that does not fit is refused whole, and the error says what to
// raise.
#[test]
fn a_set_that_does_not_fit_changes_nothing() {
    if !privileged("a_set_that_does_not_fit_changes_nothing") {
        return;
    }
    let (pair, home) = (Pair::new("publish"), Home::new());
    let ends = Ends::new(&pair);
    let edge = attached(&pair, &home, AttachMode::Generic);
    edge.publish(&set(Mode::Enforce, RuleAction::Allow), 1, None)
        .unwrap();

    let many = vec!["192.0.2.0/24"; 65];
    let deep: Vec<String> = (0..60)
        .map(|n| format!("2001:db8:{n:x}:{n:x}::1/128"))
        .collect();
    let deep: Vec<&str> = deep.iter().map(String::as_str).collect();
    for (prefixes, raise) in [(many, "rules_max"), (deep, "trie_nodes_max")] {
        let set = set_of(Mode::Enforce, &prefixes, RuleAction::Deny);
        let error = edge.publish(&set, 2, None).unwrap_err();
        let EdgeError::Publish(PublishError::TooLarge { key, .. }) = &error else {
            panic!("{error}")
        };
        assert_eq!(*key, raise, "{error}");
        assert_eq!(Publisher::new(edge.maps()).config().set, 1);
        assert!(ends.arrives());
    }
}

// Protects the values that operators read: hits belong to the set in force, a trace changes
// nothing.
#[test]
fn hits_and_traces_tell_the_rule() {
    if !privileged("hits_and_traces_tell_the_rule") {
        return;
    }
    let (pair, home) = (Pair::new("publish"), Home::new());
    let ends = Ends::new(&pair);
    let edge = attached(&pair, &home, AttachMode::Native);
    let rules = set_of(
        Mode::Enforce,
        &["192.0.2.0/24", "10.77.0.0/24"],
        RuleAction::Allow,
    );
    edge.publish(&rules, 1, None).unwrap();
    assert!(ends.arrives() && ends.arrives());
    let hits = || {
        let generation = Publisher::new(edge.maps()).in_force();
        metrics::hits(edge.maps().hits(), generation as u32, 2).unwrap()
    };
    assert_eq!(hits(), [0, 2]);

    let trace = |from: &str, to_port| {
        let from = from.parse().unwrap();
        let packet = Description {
            from,
            to_port,
            shape: Shape::Udp,
            payload_bytes: Some(5),
        };
        edge.trace(&packet.frame()).unwrap()
    };
    let first = trace("192.0.2.1:1024", PORT);
    assert_eq!(
        (first.reason, first.rule),
        (Reason::PassUdp, Decider::Rule(0))
    );
    assert!(
        first.rule.text(&rules).unwrap().contains("192.0.2.0/24"),
        "{first:?}"
    );
    assert_eq!((first.set, first.enforced), (1, true));
    assert_eq!(first.service.unwrap().port, PORT);
    let none = trace("[2001:db8::1]:1024", PORT);
    assert_eq!(
        (none.reason, none.rule),
        (Reason::FirewallDefault, Decider::Default)
    );
    assert_eq!((none.action, none.rule.text(&rules)), (Action::Drop, None));
    let other = trace("192.0.2.1:1024", PORT + 1);
    assert_eq!((other.reason, other.service), (Reason::PassOther, None));
    assert!(edge.trace(b"short").is_err());
    // A command that changes the edge is not waited for.
    let lock = edge.pins().lock().unwrap();
    std::thread::scope(|scope| {
        let (traced, heard) = std::sync::mpsc::channel();
        scope.spawn(move || traced.send(trace("192.0.2.1:1024", PORT)));
        let heard = heard.recv_timeout(PATIENCE);
        drop(lock);
        heard.expect("a trace beside a command");
    });
    let after = counters(&edge);
    assert_eq!((hits(), after.acted_on(Reason::PassUdp)), (vec![0, 2], 2));
    assert_eq!(after.acted_on(Reason::FirewallDefault), 0);

    // Two sets on, the generation of the first is in use again.
    for number in 2..=3 {
        edge.publish(&rules, number, None).unwrap();
        assert_eq!(hits(), [0, 0]);
        assert!(ends.arrives());
        assert_eq!(hits(), [0, 1]);
    }
}

// Protects sources from a run that died: its counts are not valid, and a full map costs accuracy,
// never a connection.
#[test]
fn counts_are_those_of_this_run() {
    if !privileged("counts_are_those_of_this_run") {
        return;
    }
    let (pair, home) = (Pair::new("publish"), Home::new());
    let edge = attached(&pair, &home, AttachMode::Generic);
    let sources_max = edge.maps().quic_sources().max_entries();
    let counts = |run| {
        let map = MapHandle::try_from(edge.maps().quic_sources()).unwrap();
        Counts::new(map, run).unwrap()
    };
    let occupancy = || metrics::occupancy(edge.maps().quic_sources()).entries;
    let source = |number: u32| IpAddr::from(number.to_be_bytes());

    let first = counts(1);
    for number in 0..sources_max {
        first.opened(source(number));
        first.opened(source(number));
        first.closed(source(number));
    }
    assert_eq!(occupancy(), u64::from(sources_max));
    assert_eq!((first.missed(), first.connections(source(0))), (0, 1));
    first.opened(source(sources_max));
    assert_eq!(
        (first.missed(), first.connections(source(sources_max))),
        (1, 0)
    );
    first.closed(source(sources_max));
    first.closed(source(0));
    first.opened(source(sources_max));
    assert_eq!(first.connections(source(sources_max)), 1);

    drop(first);
    let second = counts(2);
    assert_eq!(occupancy(), 0);
    second.opened("::ffff:10.0.0.1".parse().unwrap());
    assert_eq!(
        (occupancy(), second.connections([10, 0, 0, 1].into())),
        (1, 1)
    );
    second.closed([10, 0, 0, 1].into());
    assert_eq!((occupancy(), second.sources(), second.missed()), (0, 0, 0));
}
