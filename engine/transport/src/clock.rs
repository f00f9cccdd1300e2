//! The clock of connection IDs, tokens and limits: the kernel's, so that the edge's programs and
//! this crate agree.
//!
//! 1. A clock never goes back.
//! 2. Clones are one clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

const NANOSECONDS: u64 = 1_000_000_000;

/// CLOCK_MONOTONIC for code that holds an [`Instant`].
#[derive(Clone, Debug)]
pub struct Clock {
    anchor: Instant,
    anchor_ns: u64,
    skipped_ns: Arc<AtomicU64>,
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock {
    /// The system's clock.
    pub fn new() -> Self {
        let anchor = Instant::now();
        let time = clock_gettime(ClockId::Monotonic);
        Self {
            anchor,
            anchor_ns: time.tv_sec as u64 * NANOSECONDS + time.tv_nsec as u64,
            skipped_ns: Arc::default(),
        }
    }

    /// Nanoseconds of CLOCK_MONOTONIC at `at`.
    pub fn ns(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.anchor).as_nanos() as u64;
        self.anchor_ns + since + self.skipped_ns.load(Ordering::Relaxed)
    }

    /// Moves the clock forward by `by`, so that a test sees IDs and tokens age. Timers do not
    /// notice.
    pub fn skip(&self, by: Duration) {
        self.skipped_ns
            .fetch_add(by.as_nanos() as u64, Ordering::Relaxed);
    }
}

/// Nanoseconds since 1970, which two nodes agree about within a minute.
pub(crate) fn wall_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    // A clock before 1970 makes proofs that no peer accepts; peers then treat this node as any
    // client.
    since.map_or(0, |since| since.as_nanos() as u64)
}

/// Milliseconds since 1970, as dial requests carry them.
pub(crate) fn wall_ms() -> u64 {
    wall_ns() / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    // Protects the agreement with the kernel, which reads the same clock: a reading lies between
    // two of its own.
    #[test]
    fn is_the_kernels_clock() {
        let read = || {
            let time = clock_gettime(ClockId::Monotonic);
            time.tv_sec as u64 * NANOSECONDS + time.tv_nsec as u64
        };
        let before = read();
        let clock = Clock::new();
        let between = clock.ns(Instant::now());
        // The anchor takes its two readings one after the other: it may be ahead by the time
        // between.
        let slack = read() - before;
        assert!(before <= between && between <= read() + slack);
        let other = clock.clone();
        other.skip(Duration::from_secs(7));
        assert!(clock.ns(Instant::now()) >= between + 7 * NANOSECONDS);
    }
}
