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
#[path = "hostile_member/cases.rs"]
mod cases;
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
use cases::Case;
use millrace_testkit::{cgroup, cpu_share, has_all};
use testbed::{CPU_PERCENT, Testbed, Work};

/// Rounds of the honest peer that must follow an attack.
const ROUNDS_AFTER: u64 = 3;

/// One at a time: each has half of a core for the victim and half for the members.
static ALONE: Mutex<()> = Mutex::new(());

fn run(case: &Case) {
    if !has_all(case.name, &cgroup::missing()) {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let testbed = Testbed::start(case.members, CPU_PERCENT);
    let work = Work::start(&testbed.honest);
    work.go_on_for(1);
    let before = testbed.honest.reasons();
    let at_start = testbed.victim.group.peak_bytes();
    let rounds_before = work.rounds();
    std::thread::scope(|scope| {
        let attack = Attack {
            victim: &testbed.victim,
            members: &testbed.hostile,
        };
        let attack = scope.spawn(move || {
            cpu_share::enter(CPU_PERCENT);
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
        mib(testbed.victim.group.peak_bytes()),
        mib(at_start),
        mib(testbed.victim.memory_max_bytes),
        asked.time,
        asked.answered,
    );
}

// Protects the node's memory, and its time, from single bytes that cannot be read yet.
#[test]
fn single_bytes_in_full_packets() {
    run(&cases::SINGLE_BYTES);
}

#[test]
fn single_bytes_in_packets_of_their_own() {
    run(&cases::SINGLE_BYTES_ALONE);
}

// Protects its memory from members of which none is over its own bound.
#[test]
fn pieces_of_many_members() {
    run(&cases::PIECES);
}

// Protects the artifacts of others.
#[test]
fn puts_without_end() {
    run(&cases::PUTS);
}

// Protects the memory for bodies.
#[test]
fn small_bodies_that_do_not_end() {
    run(&cases::UNFINISHED_BODIES);
}

// Protects it from answers that are asked for and not read.
#[test]
fn answers_that_are_not_read() {
    run(&cases::UNREAD_ANSWERS);
}

// Protects the time of the shards.
#[test]
fn floods() {
    run(&cases::FLOODS);
}
