//! How far a relay is from the times of its model: a histogram of bounded size.

use std::time::Duration;

/// Width of a bucket.
const STEP: Duration = Duration::from_micros(10);
/// Buckets; the last one holds all that is later.
const BUCKETS: usize = 500;

/// How late packets left a relay. Those that left early count as on time.
#[derive(Clone, Debug)]
pub struct Lateness {
    buckets: [u64; BUCKETS],
    count: u64,
    max: Duration,
}

impl Default for Lateness {
    fn default() -> Self {
        Self {
            buckets: [0; BUCKETS],
            count: 0,
            max: Duration::ZERO,
        }
    }
}

impl Lateness {
    /// Counts `packets` that left so late.
    pub fn record(&mut self, late: Duration, packets: u64) {
        let bucket = (late.as_nanos() / STEP.as_nanos()).min(BUCKETS as u128 - 1);
        self.buckets[bucket as usize] += packets;
        self.count += packets;
        self.max = self.max.max(late);
    }

    /// The lateness that this share of the packets did not exceed, to 10 us; up to 5 ms, and beyond
    /// that the greatest there was.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Duration {
        let rank = (self.count as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (bucket, packets) in self.buckets.iter().enumerate().take(BUCKETS - 1) {
            seen += packets;
            if seen >= rank {
                return (STEP * (bucket as u32 + 1)).min(self.max);
            }
        }
        self.max
    }

    /// The greatest there was.
    #[must_use]
    pub fn max(&self) -> Duration {
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_upper_bounds_and_the_last_bucket_tells_the_greatest() {
        let mut lateness = Lateness::default();
        assert_eq!(lateness.quantile(0.99), Duration::ZERO);
        lateness.record(Duration::from_micros(15), 90);
        lateness.record(Duration::from_micros(995), 9);
        lateness.record(Duration::from_millis(70), 1);
        assert_eq!(lateness.quantile(0.5), Duration::from_micros(20));
        assert_eq!(lateness.quantile(0.99), Duration::from_micros(1_000));
        assert_eq!(lateness.quantile(1.0), Duration::from_millis(70));
        assert_eq!(lateness.max(), Duration::from_millis(70));
    }
}
