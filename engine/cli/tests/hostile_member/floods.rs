//! What members make a victim do: each flood by a member of its own, all at the same time.

use std::time::{Duration, Instant};

use millrace_node::Method;
use millrace_protocol::flood::Flood;
use millrace_protocol::frame::{Kind, StreamKind};
use millrace_testkit::cpu_share;
use millrace_transport::CloseCode;
use millrace_transport::counters::Family;

use crate::attacker::{Lane, header, open_and_reset, retire_one};
use crate::attacks::{ATTACK_TIME_MAX, Attack};
use crate::raw::Raw;
use crate::testbed::CPU_PERCENT;

/// Packets that are sent before the client looks what came.
const PACKETS_IN_A_ROUND: usize = 200;
/// One round of a flood.
type Send = Box<dyn FnMut(&mut Raw)>;

/// A kind of flood.
pub struct FloodCase {
    name: &'static str,
    begin: fn() -> Send,
    end: End,
}

/// How the victim ends a connection.
#[derive(Clone, Copy)]
enum End {
    /// As a flood: the member's next connections are refused for a while.
    Flood(Flood),
    /// By a message's fault, with this reason.
    Fault(&'static str),
}

impl End {
    /// What is counted.
    fn reason(self) -> (Family, &'static str) {
        match self {
            Self::Flood(flood) => (Family::Closed, flood.reason()),
            Self::Fault(reason) => (Family::Rejected, reason),
        }
    }

    /// What the member hears.
    fn code(self) -> CloseCode {
        match self {
            Self::Flood(_) => CloseCode::Flood,
            Self::Fault(_) => CloseCode::Violation,
        }
    }

    fn is_flood(self) -> bool {
        matches!(self, Self::Flood(_))
    }
}

impl FloodCase {
    const fn of(name: &'static str, flood: Flood, begin: fn() -> Send) -> Self {
        let end = End::Flood(flood);
        Self { name, begin, end }
    }
}

pub const FLOODS: [FloodCase; 8] = [
    FloodCase {
        name: "streams that stop in their header, and drips",
        begin: standing,
        end: End::Fault("peer_abandoned_streams"),
    },
    FloodCase::of("opens and resets", Flood::Unfinished, opens_and_resets),
    FloodCase::of("PING", Flood::Packets, || {
        packets(|raw| raw.quic.send_ack_eliciting().unwrap())
    }),
    FloodCase::of("PATH_CHALLENGE", Flood::PathChallenges, || {
        packets(challenge)
    }),
    FloodCase::of("RETIRE_CONNECTION_ID", Flood::RetiredIds, || {
        let mut oldest = 0;
        Box::new(move |raw| retire_one(raw, &mut oldest))
    }),
    FloodCase::of("answers nobody asked for", Flood::Answers, || {
        frames(Kind::Response)
    }),
    FloodCase::of("cancellations", Flood::Cancellations, || {
        frames(Kind::Cancel)
    }),
    FloodCase::of("probes", Flood::Probes, || frames(Kind::Probe)),
];

/// Each flood by a member of its own.
pub fn all(attack: &Attack<'_>) {
    std::thread::scope(|scope| {
        for (member, case) in FLOODS.iter().enumerate() {
            scope.spawn(move || {
                cpu_share::enter((CPU_PERCENT / FLOODS.len() as u32).max(1));
                case.run(attack, member);
            });
        }
    });
    for case in &FLOODS {
        let (family, reason) = case.end.reason();
        let counted = attack.victim.reason(family, reason);
        assert!(counted > 0, "{reason} is counted");
    }
    let wanted = FLOODS.iter().filter(|case| case.end.is_flood()).count() as u64;
    let refused = attack.victim.reason(Family::Refused, "flooded_before");
    assert!(refused >= wanted, "{refused} were refused");
}

impl FloodCase {
    /// Floods until the connection is cut, and, if the member is to be refused, until it is.
    fn run(&self, attack: &Attack<'_>, member: usize) {
        if self.end.is_flood() {
            attack.until_refused(member, || self.flood(attack, member));
        } else {
            self.flood(attack, member);
        }
    }

    fn flood(&self, attack: &Attack<'_>, member: usize) {
        let mut raw = attack.connect(member, 100_000);
        let mut send = (self.begin)();
        let until = Instant::now() + ATTACK_TIME_MAX;
        while raw.quic.peer_error().is_none() {
            assert!(Instant::now() < until, "{} is borne", self.name);
            assert!(!raw.quic.is_closed(), "{} ended otherwise", self.name);
            cpu_share::pace();
            send(&mut raw);
            raw.turn();
        }
        let error = raw.quic.peer_error().unwrap();
        assert_eq!(error.error_code, self.end.code() as u64, "{}", self.name);
    }
}

/// How often a byte of each body comes that drips: its packets are no flood.
const DRIP_INTERVAL: Duration = Duration::from_millis(500);

/// All streams that the victim allows: half of them stop within their header, and the bodies of the
/// others drip. When they are cut, none is ended.
fn standing() -> Send {
    let mut dripping = Vec::new();
    let mut next = 0;
    let mut dripped = Instant::now();
    Box::new(move |raw| {
        while raw.quic.peer_streams_left_uni() > 0 {
            let stream = Raw::stream(next);
            let header = header(Kind::Request, Method(2), next as u32, 20_000);
            let mut head = [&[StreamKind::Message.encode()][..], &header.encode()].concat();
            if next % 2 == 0 {
                head.truncate(1 + next as usize % (head.len() - 1));
            } else {
                dripping.push(stream);
            }
            raw.quic.stream_send(stream, &head, false).ok();
            next += 1;
        }
        if dripped.elapsed() >= DRIP_INTERVAL {
            dripped = Instant::now();
            for stream in &dripping {
                raw.quic.stream_send(*stream, &[7], false).ok();
            }
        }
    })
}

fn opens_and_resets() -> Send {
    let mut next = 0;
    Box::new(move |raw| open_and_reset(raw, Method(2), &mut next))
}

/// Packets with what `add` adds to each.
fn packets(add: fn(&mut Raw)) -> Send {
    Box::new(move |raw| {
        for _ in 0..PACKETS_IN_A_ROUND {
            add(raw);
            for (packet, to) in raw.outgoing() {
                raw.send_datagram(&packet, to);
            }
        }
    })
}

fn challenge(raw: &mut Raw) {
    let path = raw.quic.path_stats().next().unwrap();
    raw.quic.probe_path(path.local_addr, path.peer_addr).ok();
}

fn frames(kind: Kind) -> Send {
    let mut lane = Lane::of(header(kind, Method(0), 77, 0));
    Box::new(move |raw| lane.send(raw))
}
