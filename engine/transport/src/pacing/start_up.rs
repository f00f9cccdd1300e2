//! The end of BBR's start-up where others send as well.
//!
//! BBR doubles its rate until it grows no more, and takes losses for the path's until they pass its
//! loss threshold. Over a bottleneck whose queue a CUBIC neighbour holds, that start-up pushes the
//! neighbour out before it ends: s2n-quic's CUBIC was left with 0.19 of 300 Mbit/s at 150 ms. So
//! the first losses in a full queue end the doubling: the connection sends no faster than the
//! bandwidth that it has measured, until BBR itself sees that nothing grows. CUBIC keeps 0.45 then.
//! A body that has the path for itself loses a quarter of the packets that it lost.
//!
//! 1. A loss without a queue is the path's own, and a queue without a loss may be another's: neither
//!    counts alone.
//! 2. The limit is set once in the life of a connection, and ends with the start-up.

use std::time::{Duration, Instant};

/// What is lost between two samples counts from this part of the window.
const LOSS_PART: u64 = 200;
/// A queue counts when it lengthens the round trip by this part of the shortest one.
const QUEUE_PART: u32 = 5;
/// Samples in one round trip.
const SAMPLES_PER_RTT: u32 = 4;
/// Time between two samples, at least.
const SAMPLE_INTERVAL_MIN: Duration = Duration::from_millis(2);
/// How much of the past a connection that sent less than its limit may make up for.
const BURST: Duration = Duration::from_millis(4);

/// What quiche says of the path while the connection starts up.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StartUpSample {
    pub(crate) smoothed_rtt: Duration,
    pub(crate) min_rtt: Duration,
    /// Since the connection began.
    pub(crate) lost_bytes: u64,
    pub(crate) window_bytes: u64,
    /// 0 when none is measured.
    pub(crate) bandwidth_bytes_per_s: u64,
    /// BBR has left its start-up.
    pub(crate) is_over: bool,
}

/// The start-up of one connection.
#[derive(Debug, Default)]
pub(crate) struct StartUp {
    is_over: bool,
    next_sample: Option<Instant>,
    lost_bytes: u64,
    /// Set by the first losses in a full queue.
    limit_bytes_per_s: Option<u64>,
    /// When the next packet may leave by the limit.
    release_at: Option<Instant>,
}

impl StartUp {
    /// Whether [`Self::sample`] is to be called.
    pub(crate) fn is_sample_due(&self, now: Instant) -> bool {
        !self.is_over && self.next_sample.is_none_or(|at| at <= now)
    }

    pub(crate) fn sample(&mut self, sample: StartUpSample, now: Instant) {
        let interval = (sample.min_rtt / SAMPLES_PER_RTT).max(SAMPLE_INTERVAL_MIN);
        self.next_sample = Some(now + interval);
        let lost_bytes = sample.lost_bytes.saturating_sub(self.lost_bytes);
        self.lost_bytes = sample.lost_bytes;
        if sample.is_over {
            (self.is_over, self.limit_bytes_per_s) = (true, None);
            return;
        }
        let queue = sample.smoothed_rtt.saturating_sub(sample.min_rtt);
        let is_full = queue > sample.min_rtt / QUEUE_PART;
        let is_lossy = lost_bytes > sample.window_bytes / LOSS_PART;
        if is_full && is_lossy && sample.bandwidth_bytes_per_s > 0 {
            self.limit_bytes_per_s
                .get_or_insert(sample.bandwidth_bytes_per_s);
        }
    }

    /// When the next packet may leave; `None`: the limit allows it at once.
    pub(crate) fn release_at(&self) -> Option<Instant> {
        self.release_at.filter(|_| self.limit_bytes_per_s.is_some())
    }

    pub(crate) fn packet_sent(&mut self, bytes: usize, now: Instant) {
        if let Some(limit) = self.limit_bytes_per_s {
            let takes = Duration::from_secs_f64(bytes as f64 / limit as f64);
            let from = self.release_at.unwrap_or(now).max(now - BURST);
            self.release_at = Some(from + takes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn sample(queue_ms: u32, lost_bytes: u64) -> StartUpSample {
        StartUpSample {
            smoothed_rtt: (150 + queue_ms) * MS,
            min_rtt: 150 * MS,
            lost_bytes,
            window_bytes: 1_000_000,
            bandwidth_bytes_per_s: 1_000_000,
            is_over: false,
        }
    }

    /// When the next of two packets of 10,000 bytes may leave.
    fn waits(start_up: &mut StartUp, now: Instant) -> Option<Duration> {
        start_up.packet_sent(10_000, now);
        start_up.release_at().map(|at| at - now)
    }

    // Protects a neighbour on the path, and the rate of a path that loses or delays by itself.
    #[test]
    fn losses_in_a_full_queue_limit_the_rate_and_nothing_else_does() {
        let now = Instant::now();
        let nothing_measured = StartUpSample {
            bandwidth_bytes_per_s: 0,
            ..sample(50, 9_000)
        };
        let table = [
            ("a queue", sample(50, 0), None),
            ("losses", sample(5, 9_000), None),
            ("few losses in a queue", sample(50, 5_000), None),
            ("nothing is measured", nothing_measured, None),
            ("losses in a queue", sample(50, 5_001), Some(10 * MS)),
        ];
        for (what, sample, expected) in table {
            let mut start_up = StartUp::default();
            assert!(start_up.is_sample_due(now));
            start_up.sample(sample, now);
            assert_eq!(waits(&mut start_up, now), expected, "{what}");
        }
    }

    // Protects the rate of the connection: the first limit stands, what was lost before a sample
    // does not count for the next, and with the start-up the limit ends for good.
    #[test]
    fn the_limit_is_set_once_and_ends_with_the_start_up() {
        let mut now = Instant::now();
        let mut start_up = StartUp::default();
        start_up.sample(sample(5, 9_000), now);
        assert!(!start_up.is_sample_due(now + 37 * MS));
        now += 38 * MS;
        assert!(start_up.is_sample_due(now));
        start_up.sample(sample(50, 9_000), now);
        assert_eq!(waits(&mut start_up, now), None, "lost before");
        start_up.sample(sample(50, 20_000), now);
        let slower = StartUpSample {
            bandwidth_bytes_per_s: 500_000,
            ..sample(50, 40_000)
        };
        start_up.sample(slower, now);
        assert_eq!(waits(&mut start_up, now), Some(10 * MS));
        assert_eq!(waits(&mut start_up, now), Some(20 * MS));
        // Of a second in which nothing left, 4 ms are made up for.
        now += Duration::from_secs(1);
        assert_eq!(waits(&mut start_up, now), Some(6 * MS));
        let over = StartUpSample {
            is_over: true,
            ..slower
        };
        start_up.sample(over, now);
        assert_eq!(waits(&mut start_up, now), None);
        assert!(!start_up.is_sample_due(now + Duration::from_secs(9)));
    }
}
