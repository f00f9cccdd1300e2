//! A share of a core for a thread of a test that works without pause: it rests as often as it must.
//!
//! By the kernel's own count of the thread's time. A control group for single threads is not to be
//! had where the test's process is not in the kernel's root group.

use std::cell::Cell;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

/// How far a thread may be ahead of its share, and behind it to catch up: as with a quota of a
/// control group.
const PERIOD: Duration = Duration::from_millis(100);

#[derive(Clone, Copy)]
struct Share {
    percent: u32,
    /// When the thread would have begun to use what it used, if it never were behind.
    began: Instant,
    used_before: Duration,
}

thread_local! {
    static SHARE: Cell<Option<Share>> = const { Cell::new(None) };
}

/// Time that the calling thread has run, by scheduler statistics (proc_pid_schedstat).
fn used() -> Duration {
    let statistics = fs::read_to_string("/proc/thread-self/schedstat");
    let ns = statistics
        .ok()
        .and_then(|all| all.split(' ').next()?.parse().ok());
    Duration::from_nanos(ns.expect("a kernel with scheduler statistics"))
}

/// From now on the calling thread has so many hundredths of a core: it is to call [`pace`] all the
/// while.
///
/// # Panics
/// Here and below: when the kernel has no scheduler statistics.
pub fn enter(percent: u32) {
    SHARE.set(Some(Share {
        percent,
        began: Instant::now(),
        used_before: used(),
    }));
}

/// Rests until the thread has not used more than its share. Without one it goes on.
pub fn pace() {
    let Some(mut share) = SHARE.get() else {
        return;
    };
    let due = (used() - share.used_before) * 100 / share.percent;
    let now = Instant::now();
    // What it did not use is not there later.
    share.began = share
        .began
        .max(now.checked_sub(due + PERIOD).unwrap_or(now));
    SHARE.set(Some(share));
    let ahead = due.saturating_sub(now - share.began);
    if ahead > PERIOD / 10 {
        thread::sleep(ahead);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Protects what tests say of attackers: that they have half of a core.
    #[test]
    fn a_busy_thread_has_its_share_and_no_more() {
        enter(20);
        let (began, before) = (Instant::now(), used());
        while used() - before < PERIOD / 2 {
            pace();
        }
        pace();
        assert!(began.elapsed() >= 4 * PERIOD / 2);
    }
}
