//! Seeds of simulations: how many a test runs, and which one failed.

use std::{env, thread};

/// Environment variable: runs this seed alone.
pub const REPLAY: &str = "SIM_SEED";

/// Environment variable: with the value 1, tests run in full, as `make verify` does.
pub const FULL: &str = "MILLRACE_VERIFY";

/// A test runs one seed of this many unless [`FULL`] is set.
const SHARE: u64 = 20;

/// Seeds that a test runs at least, if it has as many.
const SEEDS_MIN: u64 = 10;

/// Runs `test` with the seeds from 0: `count` of them with [`FULL`], otherwise a twentieth, and at
/// least 10. [`REPLAY`] runs one seed alone. A seed that fails is printed.
///
/// # Panics
/// When `test` does, and when [`REPLAY`] is no number.
pub fn for_seeds(count: u64, test: impl Fn(u64)) {
    let replay = env::var(REPLAY)
        .ok()
        .map(|seed| seed.parse().expect("SIM_SEED is a number"));
    for seed in range(count, is_full(), replay) {
        let _guard = Printed(seed);
        test(seed);
    }
}

/// Whether tests run in full: see [`FULL`].
#[must_use]
pub fn is_full() -> bool {
    env::var_os(FULL).is_some_and(|value| value == "1")
}

fn range(count: u64, full: bool, replay: Option<u64>) -> std::ops::Range<u64> {
    let fewer = (count / SHARE).max(SEEDS_MIN.min(count));
    replay.map_or(0..if full { count } else { fewer }, |seed| seed..seed + 1)
}

/// Prints its seed when the test panics, however it panics.
struct Printed(u64);

impl Drop for Printed {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("replay with {REPLAY}={}", self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_all_or_a_twentieth_or_one() {
        assert_eq!(range(400, true, None), 0..400);
        assert_eq!(range(400, false, None), 0..20);
        assert_eq!(range(50, false, None), 0..10);
        assert_eq!(range(3, false, None), 0..3);
        assert_eq!(range(400, false, Some(77)), 77..78);
    }
}
