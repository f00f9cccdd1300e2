//! State that a live node changes under the program: turns of the sketch, generations of sets,
//! secrets.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::{Duration, Instant};

use common::edge::{Home, sizes};
use common::mocked::{self, Mocked};
use common::{privileged, until};
use millrace_edge::abi::EdgeControl;
use millrace_edge::clock::now_ns;
use millrace_edge::edge::{AttachOptions, Edge};
use millrace_edge::lease::NodeLease;
use millrace_edge::publish::{GRACE, Publisher};
use millrace_edge_policy::limiter::{Limit, PERIOD_MIN_NS};
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::settings::Limits;

const BURST: u64 = 4;

fn hourly() -> Limit {
    Limit::per(1, Duration::from_secs(3_600), BURST)
}

/// No limit but that of QUIC sources.
fn limits(source_quic: Limit) -> Limits {
    Limits {
        source_quic,
        ..mocked::settings_in_force().settings.limits
    }
}

fn source(number: u8) -> IpAddr {
    Ipv4Addr::new(198, 51, number, 1).into()
}

/// The program, and the sketch as its owner turns it. The test sets the program's clock; the owner
/// began by the host's.
struct Testbed {
    mocked: Mocked,
}

impl Testbed {
    fn new(test: &str) -> Option<Self> {
        let mocked = Mocked::load(test)?;
        mocked.configure(|config| config.source_quic[0] = hourly().into());
        Some(Self { mocked })
    }

    fn begin(&self, limits: &Limits) -> NodeLease<'_> {
        let (maps, lease) = (self.mocked.loaded.maps(), Duration::from_secs(3_600));
        NodeLease::begin(maps, 1, lease, limits, &mocked::keys())
    }

    /// Number of admitted ones among so many handshakes that a source completes now.
    fn admitted(&self, source: IpAddr, now_ns: u64, offered: u64) -> u64 {
        self.mocked.set_clock(now_ns);
        let frame = mocked::initial_with_token(source, now_ns);
        let reasons = (0..offered).map(|_| self.mocked.reason(&frame));
        reasons
            .filter(|reason| *reason == Reason::PassQuicToken)
            .count() as u64
    }

    fn control(&self) -> EdgeControl {
        self.mocked.loaded.maps().control.load(0)
    }
}

// Protects the limits from their own upkeep: a source that is at its limit when the sketch turns
// stays there, and for no longer than without a turn.
#[test]
fn a_tick_that_turns_the_sketch_forgets_nobody() {
    let Some(testbed) = Testbed::new("a_tick_that_turns_the_sketch_forgets_nobody") else {
        return;
    };
    let mut lease = testbed.begin(&limits(hourly()));
    let mut now_ns = now_ns();
    let mut seeds = BTreeSet::new();
    for turn in 0..3_u8 {
        let before = testbed.control();
        // The limit reaches over hours, far beyond the shortest period: no turn yet.
        lease.tick_at(now_ns + PERIOD_MIN_NS, || [1; 16]);
        assert_eq!(testbed.control().limiter_active, before.limiter_active);

        // The turn comes when it is due; a source that has spent its burst just before it is
        // refused after it.
        now_ns += hourly().reach_ns() + PERIOD_MIN_NS;
        assert_eq!(testbed.admitted(source(turn), now_ns, 9), BURST);
        assert_eq!(testbed.admitted(source(100 + turn), now_ns, 1), 1);
        lease.tick_at(now_ns, || [7 + turn; 16]);
        let after = testbed.control();
        assert_eq!(after.limiter_active, before.limiter_active ^ 1);
        let seed = after.seed[after.limiter_active as usize];
        assert!(seeds.insert((seed.k0, seed.k1)), "turn {turn}: an old seed");
        assert_eq!(testbed.admitted(source(turn), now_ns, 9), 0, "turn {turn}");
        assert_eq!(testbed.admitted(source(100 + turn), now_ns, 9), BURST - 1);
        // At a time, one for each hour; all of it after a while.
        let later_ns = now_ns + hourly().interval_ns;
        assert_eq!(
            testbed.admitted(source(turn), later_ns, 9),
            1,
            "turn {turn}"
        );
        // Until the next turn there is none.
        lease.tick_at(later_ns, || [1; 16]);
        assert_eq!(testbed.control().limiter_active, after.limiter_active);
        now_ns = later_ns;
    }
}

// Protects the limits of a set that was published later: the next turn of the sketch waits for the
// slowest of them.
#[test]
fn slower_limits_put_the_turn_off() {
    let Some(testbed) = Testbed::new("slower_limits_put_the_turn_off") else {
        return;
    };
    let fast = limits(Limit::per(10, Duration::from_secs(1), 10));
    let turns_after_a_minute = |published: Option<&Limits>| {
        let mut lease = testbed.begin(&fast);
        if let Some(limits) = published {
            lease.set_limits(limits);
        }
        let before = testbed.control().limiter_active;
        lease.tick_at(now_ns() + PERIOD_MIN_NS, || [3; 16]);
        testbed.control().limiter_active != before
    };
    assert!(turns_after_a_minute(None));
    let now_ns = now_ns();
    assert_eq!(testbed.admitted(source(1), now_ns, 9), BURST);
    assert!(!turns_after_a_minute(Some(&limits(hourly()))));
    let minute_later_ns = now_ns + PERIOD_MIN_NS + hourly().interval_ns / 2;
    assert_eq!(testbed.admitted(source(1), minute_later_ns, 9), 0);
}

// Protects packets on their way: no publisher writes the generation that they began under while
// they may still read it.
#[test]
fn a_generation_is_left_alone_for_a_while() {
    let Some(mocked) = Mocked::load("a_generation_is_left_alone_for_a_while") else {
        return;
    };
    let maps = mocked.loaded.maps();
    let publisher = Publisher::new(maps);
    let set = mocked::settings_in_force();
    for number in 2..10 {
        let left = publisher.in_force();
        publisher.publish(&set, number, None).unwrap();
        assert_ne!(publisher.in_force(), left);
        // It was in force until now at the latest. A reader sees a write at its time or later,
        // never before.
        let (since, unwritten) = (Instant::now(), maps.load_config(left).set);
        let rested = thread::scope(|scope| {
            let looking = scope.spawn(|| {
                until("it is written", || maps.load_config(left).set != unwritten);
                since.elapsed()
            });
            publisher.publish(&set, number + 100, None).unwrap();
            looking.join().unwrap()
        });
        assert!(rested >= GRACE, "{rested:?}");
    }
}

// Protects a host before its first node starts: tokens and slots of the sketch cannot be predicted.
#[test]
fn every_edge_has_secrets_of_its_own() {
    if !privileged("every_edge_has_secrets_of_its_own") {
        return;
    }
    let options = AttachOptions {
        sizes: sizes(),
        ..AttachOptions::default()
    };
    let mut secrets = BTreeSet::new();
    for _ in 0..2 {
        let home = Home::new();
        let edge = Edge::attach(&home.pins, &options).unwrap();
        let control: EdgeControl = edge.maps().control.load(0);
        for key in control.seed.iter().chain(&control.keys) {
            assert!(key.k0 != 0 && key.k1 != 0);
            assert!(secrets.insert(key.k0) && secrets.insert(key.k1));
        }
    }
    assert_eq!(secrets.len(), 2 * 2 * (2 + 4));
}
