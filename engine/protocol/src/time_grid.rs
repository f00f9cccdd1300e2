//! Times at which what repeats is done together: a node that is idle wakes once an interval for all
//! its connections, and not once for each (as the kernel's `round_jiffies` does).
//!
//! 1. Two times of one grid and interval are a whole number of intervals apart.
//! 2. The next time is an interval away, less an eighth or up to seven eighths more.

use std::time::{Duration, Instant};

/// Times that lie a whole number of intervals from an origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeGrid {
    origin: Instant,
}

impl TimeGrid {
    /// The grid through `origin`, which may lie in the past or in the future.
    pub fn through(origin: Instant) -> Self {
        Self { origin }
    }

    /// When what was done at `now`, and is to be done every `interval`, is due again. What was done
    /// up to an eighth of an interval late is due at its next time.
    pub fn next(&self, now: Instant, interval: Duration) -> Instant {
        let least = now + Self::least(interval);
        let interval_ns = interval.as_nanos();
        if interval_ns == 0 {
            return least;
        }
        let behind_ns = match least.checked_duration_since(self.origin) {
            Some(since) => since.as_nanos() % interval_ns,
            None => interval_ns - (self.origin - least).as_nanos() % interval_ns,
        };
        let ahead_ns = (interval_ns - behind_ns) % interval_ns;
        least + Duration::from_nanos(ahead_ns as u64)
    }

    /// The least time between two of its times for something that is done every `interval`.
    pub fn least(interval: Duration) -> Duration {
        interval - interval / 8
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        // Protects the wake-ups of an idle node, and the time in which a silent peer is noticed.
        #[test]
        fn due_times_lie_on_the_grid_and_about_an_interval_away(
            origin_us in 0u64..100_000_000,
            now_us in 0u64..100_000_000,
            interval_us in 0u64..10_000_000,
        ) {
            let start = Instant::now();
            let at = |us| start + Duration::from_micros(us);
            let (origin, now) = (at(origin_us), at(now_us));
            let interval = Duration::from_micros(interval_us);
            let due = TimeGrid::through(origin).next(now, interval);
            prop_assert!(due >= now + interval - interval / 8);
            prop_assert!(due < now + 2 * interval + Duration::from_nanos(1));
            if interval_us > 0 {
                let apart = due.max(origin) - due.min(origin);
                prop_assert_eq!(apart.as_nanos() % interval.as_nanos(), 0);
            }
        }
    }
}
