//! The promises of the limits: exact on one thread, never exceeded on two, innocent sources
//! admitted in a crowd.

mod arithmetic;
mod crowd;
mod exact;
mod oracle;
mod races;

use std::time::Duration;

use super::*;
use crate::siphash::Key;

const HOUR: Duration = Duration::from_secs(3_600);
const MINUTE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);

/// Rates from 1 an hour to 1,000,000 a second, each with the bursts that fit a sketch.
fn limits() -> impl Iterator<Item = Limit> {
    let rates = [
        (1, HOUR),
        (1, MINUTE),
        (1_000, MINUTE),
        (1, SECOND),
        (1_000, SECOND),
        (1_000_000, SECOND),
    ];
    rates
        .into_iter()
        .flat_map(|(count, window)| [1, 2, 7, 500].map(|burst| Limit::per(count, window, burst)))
        .filter(|limit| limit.fits_sketch())
}

/// The most that a limit may admit in `elapsed_ns` from its first packet on.
fn allowance(limit: Limit, elapsed_ns: u64) -> u64 {
    limit.burst() + elapsed_ns / limit.interval_ns
}

fn sketch(buckets: &OwnedBuckets) -> Sketch<'_, OwnedBuckets> {
    let seed = [Key { k0: 11, k1: 12 }, Key { k0: 13, k1: 14 }];
    Sketch {
        buckets,
        seed,
        active: 0,
        old_until_ns: 0,
    }
}
