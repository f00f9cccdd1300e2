//! Waits for a condition that another thread or process makes true.
//!
//! Polling is for conditions that cannot be waited for: a file, a counter of the kernel, the
//! status of a process. Where a channel or a condition variable exists, wait for that instead.

use std::{
    thread,
    time::{Duration, Instant},
};

/// How long a test waits for what should happen at once: a bound, not a measure.
///
/// Two cores that build beside the tests stretch milliseconds into seconds.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(5);

/// Polls until the condition holds.
///
/// # Panics
/// With `what` when the condition does not hold within [`PATIENCE`].
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    eventually(what, || condition().then_some(()));
}

/// Polls until `find` returns a value, and returns that value.
///
/// # Panics
/// With `what` when `find` returns none within [`PATIENCE`].
#[track_caller]
pub fn eventually<T>(what: &str, find: impl FnMut() -> Option<T>) -> T {
    within(PATIENCE, find).unwrap_or_else(|| panic!("not within {PATIENCE:?}: {what}"))
}

/// Polls until `find` returns a value; none when it does not within `bound`.
pub fn within<T>(bound: Duration, mut find: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        // The last look comes after the bound: a thread that was not scheduled still gets one.
        let last = start.elapsed() >= bound;
        let found = find();
        if found.is_some() || last {
            return found;
        }
        thread::sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returns_what_is_found() {
        let mut looks = 0;
        let found = eventually("the third look", || {
            looks += 1;
            (looks == 3).then_some("found")
        });
        assert_eq!((found, looks), ("found", 3));
    }

    // Protects against a wait that ends without its condition.
    #[test]
    fn ends_without_a_value_at_the_bound() {
        let mut looks = 0;
        let found: Option<()> = within(Duration::ZERO, || {
            looks += 1;
            None
        });
        assert_eq!((found, looks), (None, 1));
    }
}
