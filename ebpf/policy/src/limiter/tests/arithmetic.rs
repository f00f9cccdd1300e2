//! Limits and global budgets, by table.

use super::*;

#[test]
fn limits_are_intervals_and_tolerances() {
    let second = SECOND.as_nanos() as u64;
    let cases = [
        // count, window, burst: interval, tolerance
        ((1, HOUR, 1), (3_600 * second, 0)),
        ((1_000, MINUTE, 500), (60_000_000, 499 * 60_000_000)),
        ((1_000_000, SECOND, 3), (1_000, 2_000)),
        ((3, SECOND, 2), (333_333_334, 333_333_334)),
        ((2_000_000_000, SECOND, 4), (1, 3)),
        ((0, SECOND, 0), (second, 0)),
        ((1, Duration::MAX, 2), (u64::MAX, u64::MAX)),
    ];
    for ((count, window, burst), (interval_ns, tolerance_ns)) in cases {
        let limit = Limit::per(count, window, burst);
        assert_eq!(
            limit,
            Limit {
                interval_ns,
                tolerance_ns
            },
            "{count} in {window:?}, {burst}"
        );
    }
}

#[test]
fn scales_rate_and_burst() {
    let limit = Limit::per(1_000, MINUTE, 500);
    assert_eq!(limit.scaled(1), limit);
    assert_eq!(limit.scaled(4), Limit::per(4_000, MINUTE, 2_000));
    assert_eq!(limit.scaled(16), Limit::per(16_000, MINUTE, 8_000));
    assert_eq!(limit.scaled(0), limit);
    assert_eq!(Limit::NONE.scaled(4), Limit::NONE);
    // Rounded up: seven times a rate of 10 is not exceeded.
    let uneven = Limit {
        interval_ns: 10,
        tolerance_ns: 10,
    }
    .scaled(7);
    assert_eq!(
        uneven,
        Limit {
            interval_ns: 2,
            tolerance_ns: 26
        }
    );
    assert_eq!(uneven.burst(), 14);
}

#[test]
fn knows_how_far_it_reaches() {
    assert_eq!(Limit::NONE.burst(), 0);
    assert_eq!(Limit::NONE.reach_ns(), 0);
    let limit = Limit {
        interval_ns: 10,
        tolerance_ns: 40,
    };
    assert_eq!((limit.burst(), limit.reach_ns()), (5, 50));
    let widest = Limit {
        interval_ns: TOLERANCE_MAX_NS,
        tolerance_ns: TOLERANCE_MAX_NS,
    };
    assert!(widest.fits_sketch());
    assert_eq!(widest.reach_ns(), REACH_MAX_NS);
    assert!(
        !Limit {
            tolerance_ns: TOLERANCE_MAX_NS + 1,
            ..widest
        }
        .fits_sketch()
    );
    assert!(
        !Limit {
            interval_ns: TOLERANCE_MAX_NS + 1,
            ..widest
        }
        .fits_sketch()
    );
}

#[test]
fn a_budget_is_a_word() {
    let limit = Limit {
        interval_ns: 10,
        tolerance_ns: 20,
    };
    let word = AtomicU64::new(0);
    // time, admitted, word afterwards
    let steps = [
        (100, true, 110),
        (100, true, 120),
        (100, true, 130),
        (100, false, 130),
        (109, false, 130),
        (110, true, 140),
        (90, false, 140),
        (500, true, 510),
    ];
    for (now_ns, admitted, after) in steps {
        assert_eq!(charge_word(&word, limit, now_ns), admitted, "at {now_ns}");
        assert_eq!(word.load(Ordering::Relaxed), after, "at {now_ns}");
    }
    assert!(charge_word(&word, Limit::NONE, 0));
    assert_eq!(word.load(Ordering::Relaxed), 510);
}
