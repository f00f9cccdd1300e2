//! A million packets of all shapes: the program in the kernel and its model decide alike, and each
//! packet is counted once.
#![allow(clippy::unwrap_used, reason = "test code")]

#[path = "common/frames.rs"]
mod frames;
#[path = "model/generator.rs"]
mod generator;
#[path = "common/lockstep.rs"]
mod lockstep;
#[path = "model/testbed.rs"]
mod testbed;

use frames::{Body, Frame, Long, client};
use generator::Generator;
use lockstep::Lockstep;
use millrace_edge_policy::model::{Cookie, Environment};
use millrace_edge_policy::reason::Reason;
use millrace_edge_policy::settings::{DefaultAction, Mode};
use millrace_edge_policy::verdict::Action;
use std::env;

const PACKETS: u64 = 1_000_000;
/// Packets under one set of rules.
const PACKETS_OF_A_SET: u64 = 4_096;
/// Packets between two looks at the counters.
const PACKETS_OF_AN_AUDIT: u64 = 512;
/// Changes of the state come once in so many packets.
const PACKETS_OF_A_CHANGE: u64 = 48;
/// One packet of so many comes in several buffers.
const PACKETS_OF_A_SPLIT: u64 = 8;
/// Far from zero, in the middle of an epoch of each kind.
const START_NS: u64 = (69 << 42) + (7 << 34) + (1 << 33);

/// Reasons that cannot occur here: a Retry always fits into the packet that it answers, and nothing
/// else makes it fail.
const IMPOSSIBLE: [Reason; 1] = [Reason::QuicRetryFailed];

fn number(variable: &str, otherwise: u64) -> u64 {
    env::var(variable).map_or(otherwise, |text| text.parse().unwrap())
}

// Protects everything: kernel and model agree, packet by packet, count by count.
#[test]
fn kernel_and_model_agree_on_a_million_packets() {
    let Some(mut both) = Lockstep::load("kernel_and_model_agree_on_a_million_packets") else {
        return;
    };
    let seed = number("MILLRACE_SEED", 0x6d69_6c6c_7261_6365);
    let packets = number("MILLRACE_PACKETS", PACKETS);
    let mut generator = Generator::new(seed);
    let mut now_ns = START_NS;
    for packet in 0..packets {
        if packet % PACKETS_OF_A_SET == 0 {
            both.publish(testbed::set(&mut generator));
        }
        if generator.once_in(PACKETS_OF_A_CHANGE) {
            testbed::change(&mut generator, &mut both, &mut now_ns);
        }
        let environment = Environment {
            now_ns,
            cookie: generator.cookie(),
            meets_listener: generator.once_in(2),
            read_only: generator.once_in(32),
        };
        let frame = generator.frame(&both.model, now_ns);
        // First buffers end within the headers, or behind all that is read.
        let linear = generator
            .once_in(PACKETS_OF_A_SPLIT)
            .then(|| 14 + generator.below(200) as usize);
        let decided = match linear {
            Some(linear) => both.decide_split(&frame, linear, environment),
            None => both.decide(&frame, environment),
        };
        let decision = decided.unwrap_or_else(|difference| {
            panic!("MILLRACE_SEED={seed}, packet {packet}, linear {linear:?}: {difference}")
        });
        let passes = decision.service.is_some() && decision.reason.action() != Action::Drop;
        // What the default denies may be an answer later, with scope `host`.
        let may_answer = decision.reason == Reason::FirewallDefault && generator.once_in(16);
        if passes || may_answer {
            generator.remember(frame);
        }
        if packet % PACKETS_OF_AN_AUDIT == 0 {
            both.audit_counters();
        }
    }
    both.audit();
    assert_eq!(both.packets, packets);
    report(&both, packets);
}

/// Every reason there is was met.
fn report(both: &Lockstep, packets: u64) {
    let seen = |reason: &Reason| {
        let [acted, counted] = both.model.counters[reason.index() as usize];
        acted + counted
    };
    for reason in Reason::ALL {
        eprintln!("{:>9} {}", seen(reason), reason.label());
    }
    let missing: Vec<_> = Reason::ALL
        .iter()
        .filter(|reason| seen(reason) == 0 && !IMPOSSIBLE.contains(reason))
        .collect();
    assert!(
        packets < PACKETS || missing.is_empty(),
        "never seen: {missing:?}"
    );
}

/// Clocks that no machine has: sums wrap alike.
#[test]
fn kernel_and_model_agree_at_the_ends_of_time() {
    let Some(mut both) = Lockstep::load("kernel_and_model_agree_at_the_ends_of_time") else {
        return;
    };
    let mut generator = Generator::new(1);
    for round in 0..24 {
        both.publish(testbed::set(&mut generator));
        both.change(|model| {
            model.lease_until_ns = u64::MAX;
            model.stress = round % 3;
        });
        for packet in 0..1_000 {
            // 0 is what a clock that was not read yet holds.
            let now_ns =
                generator.one_of(&[0, 1, 1 << 46, 1 << 47, (1 << 48) - 1, 1 << 63, u64::MAX]);
            let environment = Environment {
                now_ns,
                ..Environment::default()
            };
            let frame = generator.frame(&both.model, now_ns);
            let decided = both.decide(&frame, environment);
            decided.unwrap_or_else(|difference| panic!("{round}, {packet}: {difference}"));
        }
    }
    both.audit();
}

/// One of each shape, as long as its headers are different.
fn seeds() -> Vec<(&'static str, Frame)> {
    let v4 = client("10.0.0.1:40000");
    let v6 = client("[2001:db8:1::1]:40000");
    let id = [0x77; 16];
    let mut long = Long::initial(&[0xdd; 20]).with(|long| long.source_id = vec![0x55; 20]);
    long.token = vec![0x4d; 32];
    let first = Long::initial(&[0xdd; 8]).bytes();
    let jumbo = long.clone().with(|long| long.datagram_bytes = 2_000);
    let chain = |frame: &mut Frame| {
        frame.extensions = vec![
            (frames::HOP_BY_HOP, frames::padding(1)),
            (frames::ROUTING, frames::routing(2)),
            (frames::FRAGMENT, frames::fragment(0, false)),
            (frames::DESTINATION, frames::padding(3)),
        ];
    };
    let tagged = |frame: &mut Frame| frame.tags = vec![0x88a8, 0x8100];
    let optional = |frame: &mut Frame| frame.options = vec![1; 40];
    let mut generator = Generator::new(2);
    let mut seeds = vec![
        ("first packet", Frame::udp(v4, 4_100, &first)),
        ("first packet, IPv6", Frame::udp(v6, 4_100, &first)),
        ("token", Frame::udp(v4, 4_100, &long.bytes())),
        (
            "two tags",
            Frame::udp(v4, 4_100, &jumbo.bytes()).with(tagged),
        ),
        ("chain", Frame::udp(v6, 4_100, &long.bytes()).with(chain)),
        (
            "chain and tags",
            Frame::tcp(v6, 8_080, frames::SYN).with(chain).with(tagged),
        ),
        ("options", Frame::udp(v4, 4_100, &first).with(optional)),
        ("short header", Frame::udp(v4, 4_100, &frames::short(&id))),
        (
            "dial request",
            Frame::udp(v6, 4_100, &frames::dial_request()),
        ),
        ("SYN", Frame::tcp(v4, 8_080, frames::SYN)),
        ("SYN, IPv6", Frame::tcp(v6, 8_080, frames::SYN)),
        ("UDP", Frame::udp(v4, 9_000, b"plain")),
        ("elsewhere", Frame::udp(v4, 53, &first)),
        ("ICMP", Frame::raw(v4, frames::ICMP, &[8; 64])),
    ];
    if let Body::Tcp {
        options, payload, ..
    } = &mut seeds[9].1.body
    {
        *options = vec![1; 20];
        *payload = generator.bytes(20);
    }
    seeds
}

fn open_testbed(test: &str) -> Option<Lockstep> {
    let mut both = Lockstep::load(test)?;
    let mut generator = Generator::new(3);
    let set = loop {
        let set = testbed::set(&mut generator);
        let settings = &set.settings;
        let open = set.rules.is_empty()
            && settings.services.len() == 6
            && settings.mode == Mode::Enforce
            && settings
                .services
                .iter()
                .all(|service| service.default_action == DefaultAction::Allow);
        if open {
            break set;
        }
    };
    both.publish(set);
    Some(both)
}

// Protects the reader: there is no byte at which a packet may end and surprise it.
#[test]
fn frames_end_at_every_byte() {
    let Some(mut both) = open_testbed("frames_end_at_every_byte") else {
        return;
    };
    let environment = Environment {
        now_ns: START_NS,
        ..Environment::default()
    };
    for (name, seed) in seeds() {
        let whole = seed.bytes();
        for end in 14..=whole.len() {
            let decided = both.decide(&whole[..end], environment);
            decided.unwrap_or_else(|difference| panic!("{name} of {end} bytes: {difference}"));
        }
    }
    both.audit();
}

// The same with right lengths in every header, so that only the innermost header is cut short.
#[test]
fn packets_end_at_every_byte() {
    let Some(mut both) = open_testbed("packets_end_at_every_byte") else {
        return;
    };
    let environment = Environment {
        now_ns: START_NS,
        ..Environment::default()
    };
    for (name, seed) in seeds() {
        let whole = seed.bytes();
        let network = 14 + 4 * seed.tags.len();
        let header = if seed.source.is_ipv4() { 0 } else { 40 };
        for end in network + 40..=whole.len() {
            let mut frame = whole[..end].to_vec();
            let length = (end - network - header) as u16;
            let at = network + if header == 0 { 2 } else { 4 };
            frame[at..at + 2].copy_from_slice(&length.to_be_bytes());
            let decided = both.decide(&frame, environment);
            decided.unwrap_or_else(|difference| panic!("{name} of {end} bytes: {difference}"));
            if let Body::Udp { payload, .. } = &seed.body {
                let transport = whole.len() - payload.len() - 8;
                let Some(datagram) = end.checked_sub(transport).filter(|bytes| *bytes >= 8) else {
                    continue;
                };
                let length = (datagram as u16).to_be_bytes();
                frame[transport + 4..transport + 6].copy_from_slice(&length);
                let decided = both.decide(&frame, environment);
                decided.unwrap_or_else(|difference| {
                    panic!("{name}, datagram of {datagram} bytes: {difference}")
                });
            }
        }
    }
    both.audit();
}

// Protects drivers with small buffers and large frames: where a frame is split changes nothing.
#[test]
fn frames_in_pieces_are_decided_like_whole_ones() {
    let Some(mut both) = open_testbed("frames_in_pieces_are_decided_like_whole_ones") else {
        return;
    };
    let environment = Environment {
        now_ns: START_NS,
        cookie: Cookie::Given(77),
        ..Environment::default()
    };
    for (name, seed) in seeds() {
        let whole = seed.clone().with(|frame| frame.trailer = 6_000).bytes();
        for linear in (14..300).chain([1_500, 3_000]) {
            let decided = both.decide_split(&whole, linear, environment);
            decided.unwrap_or_else(|difference| panic!("{name} split at {linear}: {difference}"));
        }
    }
    both.audit();
}
