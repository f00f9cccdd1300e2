//! Limits, the budgets that they bound, and the sketch that holds a budget for every source.
//!
//! Each limit is a GCRA (generic cell rate algorithm): one word holds the time up to which the
//! admitted packets are paid for. A packet costs one compare-and-swap for a global budget, and one
//! bucket of 64 bytes in the sketch. `docs/reference/edge.md` has the arithmetic, bit by bit.
//!
//! 1. Admissions never exceed burst + rate * time, whatever the number of threads; a lost race
//!    refuses.
//! 2. The memory of a sketch is fixed when it is made: a full sketch refuses sources and forgets
//!    none.
//! 3. A word's time is at most [`REACH_MAX_NS`] ahead, far below half of the 48 bits that the
//!    sketch keeps of it.

mod mix;
mod rotation;
mod sketch;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use rotation::{PERIOD_MIN_NS, Rotation, Switch};
pub use sketch::{Bucket, Buckets, OwnedBuckets, Purpose, SLOTS, Sketch};

/// Longest interval and longest tolerance of a limit that a sketch can keep: 9.8 hours.
pub const TOLERANCE_MAX_NS: u64 = 1 << 45;

/// The most that a word of the sketch is ahead: the longest tolerance and one interval.
pub const REACH_MAX_NS: u64 = 2 * TOLERANCE_MAX_NS;

/// How old a clock value may be when a thread charges with it: the scheduler may stop the thread in
/// between.
const CLOCK_SLACK_NS: u64 = 60_000_000_000;

/// Races that a charge may lose before it is refused.
const TRIES: usize = 4;

/// A rate and a burst. Laid out as `struct edge_limit`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Limit {
    /// Nanoseconds that each admission costs; 0: no limit.
    pub interval_ns: u64,
    /// How many nanoseconds the word may be ahead of now and still admit: `(burst - 1) *
    /// interval_ns`.
    pub tolerance_ns: u64,
}

impl Limit {
    /// No limit.
    pub const NONE: Self = Self {
        interval_ns: 0,
        tolerance_ns: 0,
    };

    /// The limit of `count` in each `window` over time, and of `burst` at once. Zeros count as one.
    ///
    /// An interval that is no whole number of nanoseconds is rounded up, so the rate is never above
    /// the one asked for. An interval beyond 64 bits of nanoseconds becomes the longest that fits.
    pub fn per(count: u64, window: Duration, burst: u64) -> Self {
        let interval = window.as_nanos().div_ceil(u128::from(count.max(1))).max(1);
        Self::of(u64::try_from(interval).unwrap_or(u64::MAX), burst.max(1))
    }

    /// The limit with `times` the rate and `times` the burst; [`Limit::NONE`] stays that.
    ///
    /// Exact where `times` divides the interval, else rounded as in [`Limit::per`].
    pub fn scaled(self, times: u64) -> Self {
        if self.interval_ns == 0 {
            return Self::NONE;
        }
        let times = times.max(1);
        Self::of(
            self.interval_ns.div_ceil(times),
            self.burst().saturating_mul(times),
        )
    }

    /// The number of packets that may come at once; 0 without a limit.
    pub fn burst(self) -> u64 {
        self.tolerance_ns
            .checked_div(self.interval_ns)
            .map_or(0, |more| more.saturating_add(1))
    }

    /// How many nanoseconds a word of this limit gets ahead of now. Once that time has passed, the
    /// word holds nothing.
    pub fn reach_ns(self) -> u64 {
        self.tolerance_ns.saturating_add(self.interval_ns)
    }

    /// Whether a sketch can keep the limit: neither interval nor tolerance beyond
    /// [`TOLERANCE_MAX_NS`].
    pub fn fits_sketch(self) -> bool {
        self.interval_ns <= TOLERANCE_MAX_NS && self.tolerance_ns <= TOLERANCE_MAX_NS
    }

    /// How far a word is ahead, as far as this limit can have put it there.
    ///
    /// A word that is further ahead was written under an earlier limit, or its clock has gone
    /// round: it counts as a spent burst.
    fn ahead_ns(self, ahead_ns: u64) -> u64 {
        let reach_ns = self.reach_ns().saturating_add(CLOCK_SLACK_NS);
        if ahead_ns > reach_ns {
            self.tolerance_ns
        } else {
            ahead_ns
        }
    }

    fn of(interval_ns: u64, burst: u64) -> Self {
        Self {
            interval_ns,
            tolerance_ns: interval_ns.saturating_mul(burst - 1),
        }
    }
}

/// Takes one from a global budget; false: refused.
///
/// `word` is the time up to which the budget is spent, 0 at first. `now_ns` is CLOCK_MONOTONIC. A
/// charge that loses four races is refused as well.
pub fn charge_word(word: &AtomicU64, limit: Limit, now_ns: u64) -> bool {
    if limit.interval_ns == 0 {
        return true;
    }
    let mut spent = word.load(Ordering::Relaxed);
    for _ in 0..TRIES {
        let ahead_ns = limit.ahead_ns(spent.saturating_sub(now_ns));
        if ahead_ns > limit.tolerance_ns {
            return false;
        }
        let next = now_ns
            .wrapping_add(ahead_ns)
            .wrapping_add(limit.interval_ns);
        match word.compare_exchange(spent, next, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return true,
            Err(present) => spent = present,
        }
    }
    false
}

#[cfg(test)]
mod tests;
