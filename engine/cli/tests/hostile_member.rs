//! Members that attack a node as it comes: a process with the default config, which may have the
//! memory that `check` prints and 32 MiB, and half of a core. It lives, an honest peer's work goes
//! on, and each attack is counted by its reason.
//!
//! The members are bare QUIC clients with half of a core. Each kind of flood by itself, with every
//! bound tightened, is `engine/transport/tests/hostile_member.rs`.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    missing_docs,
    reason = "test code"
)]

#[path = "../../transport/tests/common/attacker.rs"]
mod attacker;
#[path = "hostile_member/attacks.rs"]
mod attacks;
mod common;
#[path = "hostile_member/floods.rs"]
mod floods;
#[path = "../../transport/tests/common/packets.rs"]
mod packets;
#[path = "../../transport/tests/common/raw.rs"]
mod raw;
#[path = "hostile_member/testbed.rs"]
mod testbed;

use std::sync::{Mutex, PoisonError};

use attacks::Attack;
use millrace_testkit::{cgroup, has_all};
use testbed::{Testbed, Work};

/// Rounds of the honest peer that must follow an attack.
const ROUNDS_AFTER: u64 = 3;

struct Case {
    name: &'static str,
    members: usize,
    /// Returns when the victim has seen through it.
    attack: fn(&Attack<'_>),
}

/// One at a time: each has half of a core for the victim and half for the members.
static ALONE: Mutex<()> = Mutex::new(());

fn run(case: &Case) {
    if !has_all(case.name, &cgroup::missing()) {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let testbed = Testbed::start(case.members);
    let work = Work::start(&testbed.honest);
    work.go_on_for(1);
    let before = testbed.honest.reasons();
    testbed.victim.memory.forget_peak();
    let at_start = testbed.victim.memory.peak_bytes();
    let rounds_before = work.rounds();
    std::thread::scope(|scope| {
        let attack = Attack {
            victim: &testbed.victim,
            members: &testbed.hostile,
        };
        let cpu = &testbed.hostile_cpu;
        let attack = scope.spawn(move || {
            cpu.enter();
            (case.attack)(&attack);
        });
        if let Err(panic) = attack.join() {
            std::panic::resume_unwind(panic);
        }
    });
    let rounds_meanwhile = work.rounds() - rounds_before;
    work.go_on_for(ROUNDS_AFTER);
    testbed.victim.assert_lives();
    let slowest_ms = work.slowest_ms();
    let (worked, asked) = work.end();
    let seen = testbed.victim.reasons();
    assert!(worked.is_ok(), "{worked:?}; the victim:\n{seen}");
    assert!(asked.failures.is_empty(), "{:?}", asked.failures);
    let after = testbed.honest.reasons();
    assert_eq!(after, before, "the honest peer counts; the victim:\n{seen}");
    let mib = |bytes: u64| bytes >> 20;
    // For who sizes the bounds: it is printed with `--nocapture`.
    eprintln!(
        "{}: {} MiB at most, {} before, of {}; in {:.1?}, {rounds_meanwhile} puts during the attack, \
         {slowest_ms} ms the slowest with its gets, {} answers",
        case.name,
        mib(testbed.victim.memory.peak_bytes()),
        mib(at_start),
        mib(testbed.victim.memory_max_bytes),
        asked.time,
        asked.answered,
    );
}

// Protects the node's memory, and its time, from single bytes that cannot be read yet.
#[test]
fn single_bytes_in_full_packets() {
    run(&Case {
        name: "single_bytes_in_full_packets",
        members: 1,
        attack: attacks::single_bytes,
    });
}

#[test]
fn single_bytes_in_packets_of_their_own() {
    run(&Case {
        name: "single_bytes_in_packets_of_their_own",
        members: 1,
        attack: attacks::single_bytes_alone,
    });
}

// Protects its memory from members of which none is over its own bound.
#[test]
fn pieces_of_many_members() {
    run(&Case {
        name: "pieces_of_many_members",
        members: 36,
        attack: attacks::pieces,
    });
}

// Protects the artifacts of others.
#[test]
fn puts_without_end() {
    run(&Case {
        name: "puts_without_end",
        members: 1,
        attack: attacks::puts,
    });
}

// Protects the memory for bodies.
#[test]
fn small_bodies_that_do_not_end() {
    run(&Case {
        name: "small_bodies_that_do_not_end",
        members: 20,
        attack: attacks::unfinished_bodies,
    });
}

// Protects it from answers that are asked for and not read.
#[test]
fn answers_that_are_not_read() {
    run(&Case {
        name: "answers_that_are_not_read",
        members: 4,
        attack: attacks::unread_answers,
    });
}

// Protects the time of the shards.
#[test]
fn floods() {
    run(&Case {
        name: "floods",
        members: floods::FLOODS.len(),
        attack: floods::all,
    });
}
