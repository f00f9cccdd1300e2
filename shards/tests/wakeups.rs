//! No wake-up is lost: see `stress`. Its control, which hangs, is the example `wakeups_control`.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod stress;

use std::time::Duration;

/// Under load, with every way of waking and both ways of parking, the program never stands still.
///
/// `MILLRACE_STRESS_SECONDS` sets the time for all profiles together, in seconds: 10 by default,
/// 60 in continuous integration.
#[test]
fn no_wakeup_is_lost() {
    let seconds = std::env::var("MILLRACE_STRESS_SECONDS");
    let seconds = seconds
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(10.0);
    for spin_us in [0, 20, 40] {
        let outcome = stress::run(stress::Options {
            time: Duration::from_secs_f64(seconds / 3.0),
            spin: Duration::from_micros(spin_us),
            preempt_timer: Duration::from_secs(1),
            watchdog: Duration::ZERO,
        });
        println!("spin {spin_us} us: {outcome:?}");
        assert!(!outcome.hung, "a wake-up was lost: {outcome:?}");
        assert!(outcome.cycles > 0);
        let parked = outcome.woken.direct_parks > 0 && outcome.woken.eventfd_parks > 0;
        assert!(
            parked,
            "both ways of parking must have been used: {outcome:?}"
        );
    }
}
