//! The control of the test `wakeups`: the same program with a preempt timer of 20 us.
//!
//! glommio 0.9.0 then falls asleep with runnable tasks, and the program hangs within seconds. That
//! it does shows that the test can fail; that the test does not shows that the long timer helps.
//!
//! `cargo run --release -p millrace-shards --example wakeups_control [seconds] [preempt_us]
//! [watchdog_ms]` exits with 0 when it hung, 1 when it did not. With a watchdog it goes on, and the
//! count of its wakes says how often; only a shard that hangs in its very start, before the
//! watchdog knows it, still does.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "../tests/stress/mod.rs"]
mod stress;

use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    let argument = |at| {
        std::env::args()
            .nth(at)
            .and_then(|text| text.parse::<u64>().ok())
    };
    let outcome = stress::run(stress::Options {
        time: Duration::from_secs(argument(1).unwrap_or(60)),
        spin: Duration::from_micros(40),
        preempt_timer: Duration::from_micros(argument(2).unwrap_or(20)),
        watchdog: Duration::from_millis(argument(3).unwrap_or(0)),
    });
    println!(
        "{} cycles, hung: {}, {:?}",
        outcome.cycles, outcome.hung, outcome.woken
    );
    if outcome.hung {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
