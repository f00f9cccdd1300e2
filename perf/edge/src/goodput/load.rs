//! The load of the clients, and the service that they got.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Callers of each protocol.
pub(super) const CALLERS: usize = 16;
/// Between an answer and the next request.
pub(super) const THINK: Duration = Duration::from_millis(2);
/// A request without an answer by then has failed.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// Length of requests and of answers.
pub(super) const BYTES: usize = 1024;

/// The outcome of one protocol's requests.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) completed_per_second: f64,
    pub(crate) failed: u64,
    pub(crate) p50_us: f64,
    /// Latency of requests that completed; a failed one counts as the patience of a caller.
    pub(crate) p99_us: f64,
}

/// The time in which requests count.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) from: Instant,
    pub(super) until: Instant,
}

/// Latencies of one caller.
#[derive(Clone, Debug, Default)]
pub(super) struct Latencies {
    completed: Vec<Duration>,
    failed: u64,
}

impl Latencies {
    pub(super) fn complete(&mut self, latency: Duration) {
        self.completed.push(latency);
    }

    pub(super) fn fail(&mut self) {
        self.failed += 1;
    }

    pub(super) fn merge(&mut self, other: &Self) {
        self.completed.extend(&other.completed);
        self.failed += other.failed;
    }

    pub(super) fn summarise(mut self, lasts: Duration) -> Load {
        let completed = self.completed.len();
        self.completed
            .resize(completed + self.failed as usize, PATIENCE);
        self.completed.sort_unstable();
        let quantile = |share: f64| {
            let last = self.completed.len().saturating_sub(1);
            let latency = self.completed.get((last as f64 * share).round() as usize);
            latency.map_or(0.0, |latency| latency.as_secs_f64() * 1e6)
        };
        Load {
            completed_per_second: completed as f64 / lasts.as_secs_f64(),
            failed: self.failed,
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_counts_as_late() {
        let mut latencies = Latencies::default();
        for microseconds in 1..=98 {
            latencies.complete(Duration::from_micros(microseconds));
        }
        latencies.fail();
        latencies.fail();
        let load = latencies.summarise(Duration::from_secs(2));
        assert_eq!(load.completed_per_second, 49.0);
        assert_eq!(load.failed, 2);
        assert_eq!(load.p50_us, 51.0);
        assert_eq!(load.p99_us, PATIENCE.as_secs_f64() * 1e6);
    }
}
