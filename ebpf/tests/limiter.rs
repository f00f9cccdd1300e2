//! The kernel's limiter by a clock that the test sets: exact on one CPU, never exceeded on two, and
//! fair to innocent sources.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use common::mocked::{self, Mocked, START_NS};
use common::{cpu, until};
use libbpf_rs::{MapCore as _, MapFlags, Object, ObjectBuilder, ProgramInput};
use millrace_edge::abi::{EdgeConfig, EdgeKey, EdgeLimit};
use millrace_edge::lease::sketch;
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::settings::{Budget, levels};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3_600);

/// From one an hour to a million a second.
fn limits() -> [Limit; 5] {
    [
        Limit::per(1, HOUR, 1),
        Limit::per(6, HOUR, 5),
        Limit::per(1_000, Duration::from_secs(60), 500),
        Limit::per(10_000, SECOND, 20),
        Limit::per(1_000_000, SECOND, 1_000),
    ]
}

/// The number of packets that a limit admits in this time if they come without pause.
fn allowance(limit: Limit, elapsed_ns: u64) -> u64 {
    limit.burst() + elapsed_ns / limit.interval_ns
}

/// A limit of the edge, and packets that are charged to it.
struct Probe {
    name: &'static str,
    place: fn(&mut EdgeConfig) -> &mut EdgeLimit,
    /// The packet of this number, made at this time.
    frame: fn(u64, u64) -> Vec<u8>,
    admitted: Reason,
    refused: Reason,
    stress: u32,
    /// Whether each packet is made anew. Otherwise all are the first one, and its ID or token must
    /// stay valid.
    fresh: bool,
    /// How long the first packet is valid.
    valid_ns: u64,
}

const PROBE: Probe = Probe {
    name: "",
    place: |config| &mut config.peer,
    frame: |_, _| Vec::new(),
    admitted: Reason::PassQuicToken,
    refused: Reason::QuicSourceRate,
    stress: 0,
    fresh: true,
    valid_ns: u64::MAX,
};

fn v4(number: u64) -> IpAddr {
    Ipv4Addr::new(198, 51, 100, number as u8).into()
}

/// A host of `2001:db8:1:2::/64`, with the last bits of its network changed by `network`.
fn v6(network: u16, number: u64) -> IpAddr {
    let host = number as u16;
    Ipv6Addr::new(0x2001, 0xdb8, 1, 0x200 ^ network, 0, 0, 9, host).into()
}

/// Every limit of the edge except those of TCP sources, which only real sockets charge.
fn probes() -> Vec<Probe> {
    let budget = |budget: Budget| Probe {
        name: match budget {
            Budget::Unvalidated => "budget unvalidated",
            Budget::Syn => "budget syn",
            Budget::Version => "budget version",
            Budget::DialRequest => "budget dial request",
            Budget::Reject => "budget reject",
        },
        place: match budget {
            Budget::Unvalidated => |config| &mut config.budget[Budget::Unvalidated as usize],
            Budget::Syn => |config| &mut config.budget[Budget::Syn as usize],
            Budget::Version => |config| &mut config.budget[Budget::Version as usize],
            Budget::DialRequest => |config| &mut config.budget[Budget::DialRequest as usize],
            Budget::Reject => |config| &mut config.budget[Budget::Reject as usize],
        },
        ..PROBE
    };
    vec![
        Probe {
            name: "IPv4 /32",
            place: |config| &mut config.source_quic[0],
            frame: |_, now_ns| mocked::initial_with_token(v4(7), now_ns),
            ..PROBE
        },
        Probe {
            name: "IPv4 /24",
            place: |config| &mut config.source_quic[1],
            frame: |number, now_ns| mocked::initial_with_token(v4(number), now_ns),
            ..PROBE
        },
        Probe {
            name: "IPv6 /64",
            place: |config| &mut config.source_quic[0],
            frame: |number, now_ns| mocked::initial_with_token(v6(0, number), now_ns),
            ..PROBE
        },
        Probe {
            name: "IPv6 /56",
            place: |config| &mut config.source_quic[1],
            frame: |number, now_ns| {
                mocked::initial_with_token(v6(number as u16 & 0xff, number), now_ns)
            },
            ..PROBE
        },
        Probe {
            name: "IPv6 /48",
            place: |config| &mut config.source_quic[2],
            frame: |number, now_ns| mocked::initial_with_token(v6(number as u16, number), now_ns),
            ..PROBE
        },
        Probe {
            name: "peer",
            place: |config| &mut config.peer,
            frame: |number, now_ns| mocked::initial_of_peer(v4(number), number, now_ns),
            admitted: Reason::PassQuicPeer,
            refused: Reason::QuicPeerBudget,
            ..PROBE
        },
        Probe {
            name: "proof",
            place: |config| &mut config.proof,
            frame: |_, now_ns| mocked::initial_of_peer(v4(7), 1, now_ns),
            admitted: Reason::PassQuicPeer,
            refused: Reason::QuicProofReplayed,
            fresh: false,
            valid_ns: 1 << 36,
            ..PROBE
        },
        Probe {
            name: "connection ID",
            place: |config| &mut config.id,
            frame: |_, now_ns| mocked::short_header(v4(7), now_ns),
            admitted: Reason::PassQuic,
            refused: Reason::QuicIdBudget,
            stress: 1,
            fresh: false,
            valid_ns: 1 << 42,
        },
        Probe {
            frame: |number, _| mocked::initial(v4(number)),
            admitted: Reason::PassQuicInitial,
            refused: Reason::TxRetry,
            ..budget(Budget::Unvalidated)
        },
        Probe {
            frame: |number, _| mocked::syn(v4(number)),
            admitted: Reason::PassTcpSyn,
            refused: Reason::TxSynCookie,
            ..budget(Budget::Syn)
        },
        Probe {
            frame: |number, _| mocked::initial_of_another_version(v4(number)),
            admitted: Reason::PassQuicVersion,
            refused: Reason::QuicVersionBudget,
            ..budget(Budget::Version)
        },
        Probe {
            frame: |number, _| mocked::dial_request(v6(number as u16, number)),
            admitted: Reason::PassDialRequest,
            refused: Reason::QuicDialRequestBudget,
            ..budget(Budget::DialRequest)
        },
        Probe {
            frame: |number, _| {
                mocked::dial_request(Ipv4Addr::new(203, 0, 113, number as u8).into())
            },
            admitted: Reason::PassReject,
            refused: Reason::FirewallRejectBudget,
            ..budget(Budget::Reject)
        },
    ]
}

/// Offers packets at every quarter of an interval, more than the limit admits; returns how many it
/// admitted.
fn admitted(mocked: &Mocked, probe: &Probe, limit: Limit, elapsed_ns: u64) -> u64 {
    let step_ns = limit.interval_ns / 4;
    let mut number = 0;
    let mut admitted = 0;
    let mut frame = (probe.frame)(number, START_NS);
    for step in 0..=elapsed_ns / step_ns {
        let now_ns = START_NS + step * step_ns;
        mocked.set_clock(now_ns);
        loop {
            if probe.fresh {
                frame = (probe.frame)(number, now_ns);
            }
            number += 1;
            let reason = mocked.reason(&frame);
            if reason != probe.admitted {
                assert_eq!(reason, probe.refused, "{} {limit:?}", probe.name);
                break;
            }
            admitted += 1;
        }
    }
    admitted
}

// Protects the promise that every source gets all that its limit allows, and nothing beyond.
#[test]
fn admits_burst_and_rate() {
    const INTERVALS: u64 = 60;
    let Some(mocked) = Mocked::load("admits_burst_and_rate") else {
        return;
    };
    let mut cases = 0;
    for probe in probes() {
        for limit in limits() {
            let elapsed_ns = INTERVALS * limit.interval_ns + limit.interval_ns * 3 / 4;
            if elapsed_ns > probe.valid_ns {
                continue;
            }
            mocked.forget();
            mocked.configure(|config| *(probe.place)(config) = limit.into());
            mocked.control(|control| control.stress = probe.stress);
            let before = mocked.counters();
            let admitted = admitted(&mocked, &probe, limit, elapsed_ns);
            let case = (probe.name, limit);
            assert_eq!(admitted, allowance(limit, elapsed_ns), "{case:?}");
            let after = mocked.counters();
            let counted = |reason| after.acted_on(reason) - before.acted_on(reason);
            assert_eq!(counted(probe.admitted), admitted, "{case:?}");
            let all = after.packets() - before.packets();
            assert_eq!(all, admitted + counted(probe.refused), "{case:?}");
            cases += 1;
        }
        mocked.configure(|config| *(probe.place)(config) = EdgeLimit::default());
    }
    eprintln!("{cases} limits admitted burst + rate * time, to the packet");
}

/// What two CPUs race for.
trait Contest: Sync {
    fn set_clock(&self, now_ns: u64);
    /// Offers a packet, on the calling thread's CPU.
    fn offer(&self);
    /// Packets admitted so far.
    fn admitted(&self) -> u64;
}

/// Packets that each of the two CPUs offers in a round: a multiple of the packets that a round
/// admits.
const OFFERED: u32 = 150;

/// One round: both CPUs, from the same moment on.
fn race(contest: &impl Contest, now_ns: u64) {
    contest.set_clock(now_ns);
    let ready = AtomicU32::new(0);
    let offer = |number| {
        cpu::pin(number);
        ready.fetch_add(1, Ordering::SeqCst);
        while ready.load(Ordering::SeqCst) < 2 {
            thread::yield_now();
        }
        for _ in 0..OFFERED {
            contest.offer();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| offer(0));
        scope.spawn(|| offer(1));
    });
}

/// The edge, asked with one packet that is always the same.
struct OnePacket<'m> {
    mocked: &'m Mocked,
    frame: Vec<u8>,
    reason: Reason,
    /// Packets with this reason before the race.
    before: u64,
}

impl<'m> OnePacket<'m> {
    fn new(mocked: &'m Mocked, frame: Vec<u8>, reason: Reason) -> Self {
        let before = mocked.counters().acted_on(reason);
        Self {
            mocked,
            frame,
            reason,
            before,
        }
    }
}

impl Contest for OnePacket<'_> {
    fn set_clock(&self, now_ns: u64) {
        self.mocked.set_clock(now_ns);
    }

    fn offer(&self) {
        self.mocked.run(&self.frame);
    }

    fn admitted(&self) -> u64 {
        self.mocked.counters().acted_on(self.reason) - self.before
    }
}

/// The limit of a race: so many at once, and as many more in each round, which is so long.
fn contested(rate: Limit, each_round: u64) -> (Limit, u64) {
    let limit = Limit {
        tolerance_ns: (each_round - 1) * rate.interval_ns,
        ..rate
    };
    (limit, each_round * rate.interval_ns)
}

// Protects the promise against the attacker with many CPUs' worth of packets.
#[test]
fn two_cpus_get_no_more_than_one() {
    const ROUNDS: u64 = 200;
    let test = "two_cpus_get_no_more_than_one";
    let Some(mocked) = Mocked::load(test) else {
        return;
    };
    if !cpu::are_two(test) {
        return;
    }
    // Packets, what becomes of them, and how long what they carry is valid.
    let packets = || {
        let token = mocked::initial_with_token(v4(7), START_NS);
        let proof = mocked::initial_of_peer(v4(7), 1, START_NS);
        [
            (token, Reason::PassQuicToken, 1 << 34),
            (proof, Reason::PassQuicPeer, 1 << 36),
            (
                mocked::dial_request(v4(7)),
                Reason::PassDialRequest,
                u64::MAX,
            ),
        ]
    };
    let second = |count| Limit::per(count, SECOND, 1);
    let rates = [
        (Limit::per(1, HOUR, 1), 5),
        (second(1), 50),
        (second(1_000), 50),
        (second(1_000_000), 50),
    ];
    for (rate, each_round) in rates {
        let (limit, round_ns) = contested(rate, each_round);
        mocked.configure(|config| {
            config.source_quic[0] = limit.into();
            config.peer = limit.into();
            config.budget[Budget::DialRequest as usize] = limit.into();
        });
        for (frame, reason, valid_ns) in packets() {
            mocked.forget();
            let contest = OnePacket::new(&mocked, frame, reason);
            for round in 0..ROUNDS.min(valid_ns / round_ns + 1) {
                let elapsed_ns = round * round_ns;
                race(&contest, START_NS + elapsed_ns);
                // A packet that loses four races is refused, but later packets get what is left.
                let (admitted, allowed) = (contest.admitted(), allowance(limit, elapsed_ns));
                assert_eq!(admitted, allowed, "{reason:?} {limit:?} in round {round}");
            }
        }
    }
}

// Protects the first packets of a source: both CPUs find no word of it, and an idle slot.
#[test]
fn two_cpus_place_a_source_once() {
    const SOURCES: u64 = 200;
    let Some(mocked) = Mocked::load("two_cpus_place_a_source_once") else {
        return;
    };
    if !cpu::are_two("two_cpus_place_a_source_once") {
        return;
    }
    let once = Limit::per(1, HOUR, 1);
    mocked.configure(|config| config.source_quic[0] = once.into());
    for source in 0..SOURCES {
        let frame = mocked::initial_with_token(v4(source), START_NS);
        let contest = OnePacket::new(&mocked, frame, Reason::PassQuicToken);
        race(&contest, START_NS);
        assert_eq!(contest.admitted(), 1, "source {source}");
    }
}

/// A limiter without compare-and-swap.
struct Naive {
    object: Object,
}

impl Naive {
    fn load(limit: Limit) -> Self {
        const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/naive.bpf.o"));
        let mut builder = ObjectBuilder::default();
        let object = builder.open_memory(OBJECT).unwrap().load().unwrap();
        let naive = Self { object };
        naive.store([limit.interval_ns, limit.tolerance_ns, START_NS, 0, 0]);
        naive
    }

    /// Interval, tolerance, now, paid until, admitted.
    fn state(&self) -> [u64; 5] {
        let state = self.map().lookup(&0_u32.to_ne_bytes(), MapFlags::ANY);
        let state = state.unwrap().unwrap();
        let word = |at: usize| u64::from_ne_bytes(state[at * 8..][..8].try_into().unwrap());
        [0, 1, 2, 3, 4].map(word)
    }

    fn store(&self, state: [u64; 5]) {
        let bytes: Vec<u8> = state.into_iter().flat_map(u64::to_ne_bytes).collect();
        self.map()
            .update(&0_u32.to_ne_bytes(), &bytes, MapFlags::ANY)
            .unwrap();
    }

    fn map(&self) -> libbpf_rs::Map<'_> {
        let is_state = |map: &libbpf_rs::Map<'_>| map.name().to_string_lossy().ends_with(".bss");
        self.object.maps().find(is_state).unwrap()
    }
}

impl Contest for Naive {
    fn set_clock(&self, now_ns: u64) {
        let mut state = self.state();
        state[2] = now_ns;
        self.store(state);
    }

    fn offer(&self) {
        let program = self.object.progs_mut().next().unwrap();
        let input = ProgramInput {
            data_in: Some(&[0; 64]),
            repeat: 1,
            ..ProgramInput::default()
        };
        program.test_run(input).unwrap();
    }

    fn admitted(&self) -> u64 {
        self.state()[4]
    }
}

// The race above must be one: a limiter that is not made for it fails it.
#[test]
fn control_without_compare_and_swap_exceeds() {
    let test = "control_without_compare_and_swap_exceeds";
    if !common::privileged(test) || !cpu::are_two(test) {
        return;
    }
    let (limit, round_ns) = contested(Limit::per(1_000, SECOND, 1), 50);
    let naive = Naive::load(limit);
    let mut elapsed_ns = 0;
    until("the naive limiter admits too much", || {
        race(&naive, START_NS + elapsed_ns);
        let exceeds = naive.admitted() > allowance(limit, elapsed_ns);
        elapsed_ns += round_ns;
        exceeds
    });
}

/// A permutation of 32 bits that looks random (MurmurHash3's last step): multiples of one factor
/// would spread over the sketch more evenly than sources do.
fn scattered(number: u32) -> u32 {
    let x = (number ^ number >> 16).wrapping_mul(0x85eb_ca6b);
    let x = (x ^ x >> 13).wrapping_mul(0xc2b2_ae35);
    x ^ x >> 16
}

/// An address for every number.
type AddressOf = fn(u32) -> IpAddr;

/// An IPv4 address; hardly ever two of them are in one /24.
fn random4(number: u32) -> IpAddr {
    let [first, rest @ ..] = scattered(number).to_be_bytes();
    // Neither loopback nor multicast.
    let [b, c, d] = rest;
    Ipv4Addr::new(128 + first % 96, b, c, d).into()
}

/// A different IPv6 /48 for every number: it takes three slots of the sketch, the most that a
/// source takes.
fn random6(number: u32) -> IpAddr {
    let network = u128::from(scattered(number)) << 80;
    Ipv6Addr::from_bits(0x2001 << 112 | network | 1).into()
}

// Protects customers of a node under attack: the sketch must not take them for the attackers.
#[test]
fn busy_sources_hardly_ever_limit_innocent_ones() {
    const BUSY: u32 = 16_000;
    const INNOCENT: u32 = 300_000;
    const OFFERED_EACH: u32 = 18;
    let Some(mocked) = Mocked::load("busy_sources_hardly_ever_limit_innocent_ones") else {
        return;
    };
    let limit = Limit::per(1_000, Duration::from_secs(60), 10);
    mocked.configure(|config| {
        for (place, limit) in config.source_quic.iter_mut().zip(levels(limit)) {
            *place = limit.into();
        }
    });
    for (family, address_of) in [("IPv4", random4 as AddressOf), ("IPv6", random6)] {
        mocked.forget();
        mocked.set_clock(START_NS);
        let refusals = || mocked.counters().acted_on(Reason::QuicSourceRate);
        let before = refusals();
        for number in 0..BUSY {
            let frame = mocked::initial_with_token(address_of(number), START_NS);
            for _ in 0..OFFERED_EACH {
                mocked.run(&frame);
            }
        }
        let refused = refusals() - before;
        let beyond = u64::from(OFFERED_EACH) - limit.burst();
        // All have spent their bursts.
        assert!(refused >= beyond * u64::from(BUSY), "{family}: {refused}");

        mocked.set_environment(START_NS, true);
        let before = refusals();
        let mut frame = mocked::initial(address_of(0));
        for number in BUSY..BUSY + INNOCENT {
            mocked::set_source(&mut frame, address_of(number));
            mocked.run(&frame);
        }
        let limited = refusals() - before;
        eprintln!("{limited} of {INNOCENT} innocent {family} sources limited beside {BUSY} busy");
        assert!(
            limited * 10_000 < u64::from(INNOCENT),
            "{family}: {limited}"
        );
    }
}

// Protects the limits while the sketch changes its seed: a source at its limit stays there, and any
// other keeps what it had left.
#[test]
fn a_turn_of_the_sketch_forgets_nobody() {
    const SOURCES: u64 = 50;
    let Some(mocked) = Mocked::load("a_turn_of_the_sketch_forgets_nobody") else {
        return;
    };
    let limit = Limit::per(10, SECOND, 5);
    mocked.configure(|config| config.source_quic[0] = limit.into());
    let admitted = |source: u64, now_ns: u64, offered: u64| {
        mocked.set_clock(now_ns);
        let frame = mocked::initial_with_token(v4(source), now_ns);
        let asked = (0..offered).map(|_| mocked.reason(&frame));
        asked
            .filter(|reason| *reason == Reason::PassQuicToken)
            .count() as u64
    };
    // Each source uses another part of its burst before the turn.
    let taken = |source: u64| source % (limit.burst() + 1);
    for turn in 0..4 {
        // By then everything is past.
        let now_ns = START_NS + turn * 2 * limit.reach_ns();
        for source in 0..SOURCES {
            assert_eq!(admitted(source, now_ns, taken(source)), taken(source));
        }
        sketch(mocked.loaded.maps()).clear_idle();
        mocked.control(|control| {
            let next = control.limiter_active ^ 1;
            control.seed[next as usize] = EdgeKey { k0: turn, k1: 77 };
            control.limiter_old_until_ns = now_ns + limit.reach_ns();
            control.limiter_active = next;
        });
        for source in 0..SOURCES {
            let left = limit.burst() - taken(source);
            let look = mocked.reason(&mocked::initial(v4(source)));
            assert_eq!(look == Reason::QuicSourceRate, left == 0, "source {source}");
            assert_eq!(admitted(source, now_ns, 10), left, "source {source}");
            let later_ns = now_ns + 2 * limit.interval_ns;
            assert_eq!(admitted(source, later_ns, 10), 2, "source {source}");
            mocked.set_clock(now_ns);
        }
    }
}
