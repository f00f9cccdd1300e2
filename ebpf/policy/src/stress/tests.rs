//! Levels of stress: they rise at once, fall after calm, and never flap.

use proptest::prelude::*;

use super::*;

const SECOND: u64 = 1_000_000_000;

fn config() -> StressConfig {
    StressConfig::default()
}

/// One second with this many percent half open, refused and unvalidated packets, of a budget of
/// 2,000 each second.
fn sample(half_open_percent: usize, refused: u64, unvalidated: u64) -> LoadSample {
    LoadSample {
        half_open: half_open_percent * 2,
        half_open_max: 200,
        quic: BudgetLoad {
            refused,
            unvalidated,
            per_second: 2_000,
        },
        ..LoadSample::default()
    }
}

/// Feeds each sample for a number of seconds; after the last of them the level must be the expected
/// one.
fn run(steps: &[(u64, LoadSample, Level)]) {
    let mut stress = Stress::new(config(), 0);
    let mut now_ns = 0;
    for (index, &(seconds, sample, expected)) in steps.iter().enumerate() {
        for _ in 0..seconds {
            now_ns += SECOND;
            stress.tick(sample, now_ns);
        }
        assert_eq!(stress.level(), expected, "after step {index}");
    }
}

#[test]
fn calm_stays_normal() {
    run(&[
        (100, sample(0, 0, 0), Level::Normal),
        (100, sample(49, 99, 1_000_000), Level::Normal),
    ]);
}

#[test]
fn each_measure_raises() {
    run(&[(1, sample(50, 0, 0), Level::Retry)]);
    run(&[(1, sample(0, 100, 0), Level::Retry)]);
    run(&[(1, sample(90, 0, 0), Level::Peers)]);
    // A flood of packets alone never locks out clients that can show an address.
    run(&[(100, sample(0, u64::MAX, u64::MAX), Level::Retry)]);
}

#[test]
fn falls_one_level_at_a_time_after_its_hold() {
    run(&[
        (1, sample(95, 0, 0), Level::Peers),
        (30, sample(0, 0, 0), Level::Peers),
        (1, sample(0, 0, 0), Level::Retry),
        (10, sample(0, 0, 0), Level::Retry),
        (1, sample(0, 0, 0), Level::Normal),
    ]);
}

#[test]
fn between_the_marks_nothing_changes() {
    run(&[
        (1, sample(60, 0, 0), Level::Retry),
        (100, sample(30, 0, 0), Level::Retry),
        (8, sample(24, 0, 0), Level::Retry),
        (1, sample(30, 0, 0), Level::Retry),
        (8, sample(24, 0, 0), Level::Retry),
        (3, sample(24, 0, 0), Level::Normal),
    ]);
    run(&[
        (1, sample(91, 0, 0), Level::Peers),
        (100, sample(60, 0, 0), Level::Peers),
    ]);
}

// At `Retry` no budget refuses any more: what keeps the level is the flood itself.
#[test]
fn a_flood_that_goes_on_holds_its_level() {
    run(&[
        (1, sample(0, 5_000, 7_000), Level::Retry),
        (1_000, sample(0, 0, 7_000), Level::Retry),
        (10, sample(0, 0, 10), Level::Retry),
        (1, sample(0, 0, 10), Level::Normal),
    ]);
}

// Protects small and large budgets alike: a mark that fits one size would flap, or be held up by
// honest packets, under another.
#[test]
fn marks_are_the_budgets_own() {
    let of = |per_second: u64, refused, unvalidated| BudgetLoad {
        refused,
        unvalidated,
        per_second,
    };
    let levels = |load: BudgetLoad, then: BudgetLoad| {
        let under = |quic, syn| LoadSample {
            half_open_max: 200,
            quic,
            syn,
            ..LoadSample::default()
        };
        for swapped in [false, true] {
            let both = |load: BudgetLoad| match swapped {
                false => under(load, of(1_000_000, 0, 500)),
                true => under(of(1_000_000, 0, 500), load),
            };
            let mut stress = Stress::new(config(), 0);
            assert_eq!(stress.tick(both(load), SECOND), Level::Retry);
            for second in 2..20 {
                stress.tick(both(then), second * SECOND);
            }
            assert_eq!(
                stress.level() == Level::Retry,
                then.unvalidated >= then.per_second / 2,
                "{then:?}"
            );
        }
    };
    // A small budget: a small flood makes it refuse.
    levels(of(20, 1, 21), of(20, 0, 200));
    levels(of(100, 5, 105), of(100, 0, 50));
    levels(of(100, 5, 105), of(100, 0, 49));
    // A large budget: packets far below its rate are no flood.
    levels(of(100_000, 5_000, 105_000), of(100_000, 0, 40_000));
    // Without a budget, nothing presses.
    let mut stress = Stress::new(config(), 0);
    let none = LoadSample {
        half_open_max: 200,
        syn: of(0, 1_000, 1_000),
        ..LoadSample::default()
    };
    assert_eq!(stress.tick(none, SECOND), Level::Normal);
}

#[test]
fn rates_are_for_each_second() {
    for (tick_ns, refused, expected) in [
        (SECOND / 10, 10, Level::Retry),
        (SECOND / 10, 9, Level::Normal),
        (10 * SECOND, 999, Level::Normal),
        (10 * SECOND, 1_000, Level::Retry),
        (0, 1, Level::Retry),
    ] {
        let mut stress = Stress::new(config(), 5 * SECOND);
        let level = stress.tick(sample(0, refused, 0), 5 * SECOND + tick_ns);
        assert_eq!(level, expected, "{refused} in {tick_ns} ns");
    }
}

#[test]
fn a_mark_for_leaving_above_the_one_for_entering_does_no_harm() {
    let mut config = config();
    config.retry.leave = LoadPercent {
        half_open_percent: 100,
        refused_percent: u64::MAX,
        unvalidated_percent: u64::MAX,
    };
    let mut stress = Stress::new(config, 0);
    for second in 1..100 {
        assert_eq!(stress.tick(sample(50, 0, 0), second * SECOND), Level::Retry);
    }
}

#[test]
fn no_bound_is_a_bound_of_one() {
    let mut stress = Stress::new(config(), 0);
    let sample = LoadSample {
        half_open: 1,
        ..LoadSample::default()
    };
    assert_eq!(stress.tick(sample, SECOND), Level::Peers);
}

#[test]
fn levels_are_the_kernels_numbers() {
    for level in [Level::Normal, Level::Retry, Level::Peers] {
        assert_eq!(Level::from_number(level as u32), level);
    }
    assert_eq!(Level::from_number(9), Level::Peers);
}

proptest! {
    // No flapping: after any samples, each step down comes a hold time after the change before it.
    #[test]
    fn steps_down_are_rare(
        ticks in prop::collection::vec((0..3 * SECOND, 0..120usize, 0..300u64, 0..3_000u64), 1..400),
    ) {
        let mut stress = Stress::new(config(), 0);
        let (mut now_ns, mut changed_at_ns) = (0, 0);
        for (elapsed_ns, percent, refused, unvalidated) in ticks {
            now_ns += elapsed_ns;
            let before = stress.level();
            let level = stress.tick(sample(percent, refused, unvalidated), now_ns);
            if level < before {
                let hold_ns = match before {
                    Level::Peers => config().peers.hold_ns,
                    _ => config().retry.hold_ns,
                };
                prop_assert_eq!(before as u32 - level as u32, 1);
                prop_assert!(now_ns - changed_at_ns >= hold_ns);
            }
            if level != before {
                changed_at_ns = now_ns;
            }
        }
    }
}
