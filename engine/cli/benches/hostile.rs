//! How long an honest peer's work takes while members attack, and while they do not: puts, gets and
//! RPCs of one node, by the 99th percentile. `make bench-hostile` runs it.
//!
//! The attacks are those of `tests/hostile_member.rs`. Half of a core goes to the attackers, and as
//! much to a thread that is busy for nothing while there is no attack: attackers share the host
//! with their victim, and what they take from it is no fault of the victim's. Both are measured in
//! turn, for as long; the time of an attack begins with it, goes on when its members are refused,
//! and ends with it at the earliest.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    dead_code,
    missing_docs,
    reason = "a bench, of parts of tests"
)]

#[path = "../../transport/tests/common/attacker.rs"]
mod attacker;
#[path = "../tests/hostile_member/attacks.rs"]
mod attacks;
#[path = "../tests/hostile_member/cases.rs"]
mod cases;
#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/hostile_member/floods.rs"]
mod floods;
#[path = "../../transport/tests/common/packets.rs"]
mod packets;
#[path = "../../transport/tests/common/raw.rs"]
mod raw;
#[path = "../tests/hostile_member/testbed.rs"]
mod testbed;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use attacks::Attack;
use cases::Case;
use clap::Parser;
use millrace_testkit::{cgroup, cpu_share};
use serde::Serialize;
use testbed::{CPU_PERCENT, Honest, Testbed, artifact};

/// Parts of a member's attack may take no more than this much longer for the honest peer.
const RATIO_MAX: f64 = 1.5;
/// From an RPC to the next, and from a round of a put and two gets to the next.
const RPC_PAUSE: Duration = Duration::from_millis(1);
const ROUND_PAUSE: Duration = Duration::from_millis(20);

const CASES: [Case; 7] = [
    cases::SINGLE_BYTES,
    cases::SINGLE_BYTES_ALONE,
    cases::PIECES,
    cases::PUTS,
    cases::UNFINISHED_BODIES,
    cases::UNREAD_ANSWERS,
    cases::FLOODS,
];

#[derive(Parser)]
struct Arguments {
    /// Nodes that are attacked one after the other, for each attack.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds without an attack, and with one at least.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Only attacks with this in their name.
    #[arg(long)]
    only: Option<String>,
    /// Hundredths of a core that the victim may use.
    #[arg(long, default_value_t = 200)]
    victim_cpu_percent: u32,
    /// Writes the figures there, as JSON.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Cargo's.
    #[arg(long, hide = true)]
    bench: bool,
}

/// How long each piece of work took.
#[derive(Default)]
struct Times {
    put: Vec<Duration>,
    get: Vec<Duration>,
    rpc: Vec<Duration>,
}

impl Times {
    fn add(&mut self, other: Self) {
        self.put.extend(other.put);
        self.get.extend(other.get);
        self.rpc.extend(other.rpc);
    }
}

/// The 99th percentile of some work, and of how many pieces.
#[derive(Clone, Copy, Serialize)]
struct P99 {
    ms: f64,
    count: usize,
}

fn p99(times: &mut [Duration]) -> P99 {
    times.sort_unstable();
    let rank = (times.len() * 99).div_ceil(100);
    let time = times.get(rank.saturating_sub(1)).copied();
    P99 {
        ms: time.unwrap_or_default().as_secs_f64() * 1_000.0,
        count: times.len(),
    }
}

#[derive(Serialize)]
struct Row {
    attack: &'static str,
    work: &'static str,
    without: P99,
    with: P99,
    ratio: f64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let missing = cgroup::missing();
    if !missing.is_empty() {
        eprintln!("bench-hostile: this host lacks {}", missing.join(", "));
        return ExitCode::FAILURE;
    }
    let only = arguments.only.as_deref().unwrap_or("");
    let mut rows = Vec::new();
    println!(
        "{:36}  {:4}  {:>20}  {:>20}  {:>6}",
        "attack", "work", "p99 without, ms", "p99 with, ms", "ratio"
    );
    for case in CASES.iter().filter(|case| case.name.contains(only)) {
        for row in rows_of(case, &arguments) {
            let figure = |p99: P99| format!("{:.2} (of {})", p99.ms, p99.count);
            println!(
                "{:36}  {:4}  {:>20}  {:>20}  {:>6.2}{}",
                row.attack,
                row.work,
                figure(row.without),
                figure(row.with),
                row.ratio,
                if row.ratio > RATIO_MAX { "  NO" } else { "" }
            );
            rows.push(row);
        }
    }
    if let Some(file) = &arguments.out {
        std::fs::write(file, serde_json::to_vec_pretty(&rows).unwrap()).unwrap();
    }
    if rows.iter().any(|row| row.ratio > RATIO_MAX) {
        println!("NO: work takes more than {RATIO_MAX} times as long");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn rows_of(case: &Case, arguments: &Arguments) -> [Row; 3] {
    let (mut without, mut with) = (Times::default(), Times::default());
    for _ in 0..arguments.rounds {
        let testbed = Testbed::start(case.members, arguments.victim_cpu_percent);
        let time = Duration::from_secs(arguments.seconds);
        without.add(work_during(&testbed.honest, || {
            be_busy(Instant::now() + time);
        }));
        with.add(work_during(&testbed.honest, || {
            let until = Instant::now() + time;
            cpu_share::enter(CPU_PERCENT);
            (case.attack)(&Attack {
                victim: &testbed.victim,
                members: &testbed.hostile,
            });
            be_busy(until);
        }));
        testbed.victim.assert_lives();
    }
    let row = |work, without: &mut [Duration], with: &mut [Duration]| {
        let (without, with) = (p99(without), p99(with));
        Row {
            attack: case.name,
            work,
            without,
            with,
            ratio: with.ms / without.ms,
        }
    };
    [
        row("put", &mut without.put, &mut with.put),
        row("get", &mut without.get, &mut with.get),
        row("rpc", &mut without.rpc, &mut with.rpc),
    ]
}

/// Takes as much time of the host as attackers do.
fn be_busy(until: Instant) {
    cpu_share::enter(CPU_PERCENT);
    while Instant::now() < until {
        cpu_share::pace();
        (0..10_000).for_each(|n| {
            std::hint::black_box(n);
        });
    }
}

/// The honest peer's work until `meanwhile` returns.
fn work_during(honest: &Honest, meanwhile: impl FnOnce() + Send) -> Times {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let rounds = scope.spawn(|| {
            let mut times = Times::default();
            while !is_over.load(Ordering::Relaxed) {
                put_and_get(honest, &mut times);
                std::thread::sleep(ROUND_PAUSE);
            }
            times
        });
        let calls = scope.spawn(|| {
            let mut times = Vec::new();
            while !is_over.load(Ordering::Relaxed) {
                let began = Instant::now();
                common::load::ask(honest.node.transport(), honest.victim).unwrap();
                times.push(began.elapsed());
                std::thread::sleep(RPC_PAUSE);
            }
            times
        });
        let meanwhile = scope.spawn(meanwhile).join();
        is_over.store(true, Ordering::Relaxed);
        let times = Times {
            rpc: calls.join().unwrap(),
            ..rounds.join().unwrap()
        };
        if let Err(panic) = meanwhile {
            std::panic::resume_unwind(panic);
        }
        times
    })
}

fn put_and_get(honest: &Honest, times: &mut Times) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let bytes = artifact(number);
    let began = Instant::now();
    let id = honest.put(&bytes).unwrap();
    times.put.push(began.elapsed());
    for _ in 0..2 {
        let began = Instant::now();
        let got = honest.get(&id).unwrap();
        times.get.push(began.elapsed());
        assert!(got == bytes, "artifact {number}: other bytes");
    }
}
