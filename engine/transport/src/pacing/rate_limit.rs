//! What a paced connection yields to others on its path.
//!
//! BBR takes losses for the path's until they pass its loss threshold. Over a bottleneck whose
//! queue a CUBIC neighbour holds, it pushes the neighbour out: s2n-quic's CUBIC was left with 0.19
//! of 300 Mbit/s at 150 ms. Losses in a full queue say that others send too, so they limit the
//! rate:
//!
//! 1. In the start-up they end the doubling. The connection sends no faster than the bandwidth that
//!    it has measured, until BBR itself sees that nothing grows.
//! 2. Later they lower the rate, if the queue is not this connection's own: its window has been
//!    little larger than what the path holds. The limit grows again as a CUBIC window would, and
//!    never falls below a part of the best bandwidth that there was.
//!
//! A loss without a queue is the path's own, and a queue without a loss may be jitter: neither
//! counts alone. What the path loses by itself is measured while there is no queue; losses in a
//! full queue are those that come on top.

use std::time::{Duration, Instant};

/// Samples in one round trip.
const SAMPLES_PER_RTT: u32 = 8;
/// Time between two samples, at least.
const SAMPLE_INTERVAL_MIN: Duration = Duration::from_millis(2);
/// Round trips whose samples count: what is lost left in the first, and is missed in the second.
const RECENT_RTTS: u32 = 2;
const RECENT: usize = (RECENT_RTTS * SAMPLES_PER_RTT) as usize;

/// In the start-up: what is lost between two samples counts from this part of the window.
const START_UP_LOSS_PART: u64 = 1_000;
/// A queue counts when it lengthens the round trip by this part of the shortest one: in the
/// start-up, and later.
const START_UP_QUEUE_PART: u32 = 5;
const QUEUE_PART: u32 = 8;
/// And by this at least: a busy host delays acknowledgements by some milliseconds.
const QUEUE_MIN: Duration = Duration::from_millis(5);

/// The queue is not this connection's while its window is at most this, in bandwidth-delay
/// products.
const OWN_WINDOW_MAX: f64 = 1.3;
/// Losses count from this part of the bytes that left in the recent round trips, on top of this
/// many times the path's own losses.
const LOSS_PART: f64 = 0.001;
const PATH_LOSSES: f64 = 2.0;
/// Weight of one sample in the measure of the path's own losses: eight round trips.
const PATH_LOSS_WEIGHT: f64 = 1.0 / (8 * SAMPLES_PER_RTT) as f64;
/// What is left of the rate after losses: as much as CUBIC keeps (RFC 9438, section 4.6).
const KEPT: f64 = 0.7;
/// How much of the best bandwidth is always kept.
const KEPT_MIN: f64 = 0.45;
/// Growth of a CUBIC window in packets per second cubed (RFC 9438, section 5.1): the limit grows
/// back in the time in which a CUBIC of the same window would.
const CUBIC_C: f64 = 0.4;
const PACKET_BYTES: f64 = 1_350.0;
/// The limit ends at this part of the best bandwidth: BBR's probes are above it.
const END: f64 = 1.3;

/// How much of the past a connection that sent less than its limit may make up for.
const BURST: Duration = Duration::from_millis(4);

/// What quiche says of the path.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RateSample {
    pub(crate) smoothed_rtt: Duration,
    pub(crate) min_rtt: Duration,
    /// Since the connection began.
    pub(crate) lost_bytes: u64,
    pub(crate) window_bytes: u64,
    /// 0 when none is measured.
    pub(crate) bandwidth_bytes_per_s: u64,
    pub(crate) is_starting_up: bool,
}

/// What is kept of a sample for two round trips.
#[derive(Clone, Copy, Debug, Default)]
struct Recent {
    window_bytes: u64,
    /// Since the sample before.
    lost_bytes: u64,
}

/// The limit of one connection.
#[derive(Debug, Default)]
pub(crate) struct RateLimit {
    next_sample: Option<Instant>,
    last_sample: Option<Instant>,
    lost_bytes: u64,
    has_started_up: bool,
    /// The last samples, each in its turn.
    recent: [Recent; RECENT],
    samples: usize,
    /// The part that the path loses by itself.
    path_loss: f64,
    /// The best since the start-up.
    best_bytes_per_s: f64,
    limit_bytes_per_s: Option<f64>,
    lowered: Option<Instant>,
    /// When the next packet may leave by the limit.
    release_at: Option<Instant>,
}

impl RateLimit {
    /// Whether [`Self::sample`] is to be called.
    pub(crate) fn is_sample_due(&self, now: Instant) -> bool {
        self.next_sample.is_none_or(|at| at <= now)
    }

    pub(crate) fn sample(&mut self, sample: RateSample, now: Instant) {
        let interval = (sample.min_rtt / SAMPLES_PER_RTT).max(SAMPLE_INTERVAL_MIN);
        self.next_sample = Some(now + interval);
        let since = self
            .last_sample
            .replace(now)
            .map_or(interval, |at| now - at);
        let lost_bytes = sample.lost_bytes.saturating_sub(self.lost_bytes);
        self.lost_bytes = sample.lost_bytes;
        self.recent[self.samples % RECENT] = Recent {
            window_bytes: sample.window_bytes,
            lost_bytes,
        };
        self.samples += 1;
        if sample.is_starting_up && !self.has_started_up {
            self.start_up(&sample, lost_bytes);
            return;
        }
        if !self.has_started_up {
            (self.has_started_up, self.limit_bytes_per_s) = (true, None);
        }
        let bandwidth = sample.bandwidth_bytes_per_s as f64;
        self.best_bytes_per_s = self.best_bytes_per_s.max(bandwidth);
        if !has_queue(&sample, QUEUE_PART) {
            self.measure_path_loss(lost_bytes, bandwidth * since.as_secs_f64());
        }
        if lost_bytes > 0 && self.is_loss_of_queue(&sample) && self.is_queue_of_others(&sample) {
            self.lower(bandwidth, sample.smoothed_rtt, now);
        } else {
            self.grow(sample.min_rtt, since);
        }
    }

    fn start_up(&mut self, sample: &RateSample, lost_bytes: u64) {
        let is_full = has_queue(sample, START_UP_QUEUE_PART);
        let is_lossy = lost_bytes > sample.window_bytes / START_UP_LOSS_PART;
        if is_full && is_lossy && sample.bandwidth_bytes_per_s > 0 {
            self.limit_bytes_per_s
                .get_or_insert(sample.bandwidth_bytes_per_s as f64);
        }
    }

    fn measure_path_loss(&mut self, lost_bytes: u64, sent_bytes: f64) {
        if sent_bytes > 0.0 {
            let loss = (lost_bytes as f64 / sent_bytes).min(1.0);
            self.path_loss += (loss - self.path_loss) * PATH_LOSS_WEIGHT;
        }
    }

    fn is_loss_of_queue(&self, sample: &RateSample) -> bool {
        let lost: u64 = self.recent.iter().map(|recent| recent.lost_bytes).sum();
        let sent = held_bytes(sample) * f64::from(RECENT_RTTS);
        has_queue(sample, QUEUE_PART)
            && lost as f64 > sent * (LOSS_PART + PATH_LOSSES * self.path_loss)
    }

    fn is_queue_of_others(&self, sample: &RateSample) -> bool {
        let window = self.recent.iter().map(|recent| recent.window_bytes).max();
        window.unwrap_or_default() as f64 <= OWN_WINDOW_MAX * held_bytes(sample)
    }

    /// Once for what is lost in two round trips.
    fn lower(&mut self, bandwidth: f64, smoothed_rtt: Duration, now: Instant) {
        let is_new = |at| now.duration_since(at) > RECENT_RTTS * smoothed_rtt;
        if self.lowered.is_none_or(is_new) {
            self.lowered = Some(now);
            let rate = self.limit_bytes_per_s.unwrap_or(f64::MAX).min(bandwidth);
            self.limit_bytes_per_s = Some((rate * KEPT).max(self.best_bytes_per_s * KEPT_MIN));
        }
    }

    fn grow(&mut self, min_rtt: Duration, since: Duration) {
        let window_packets = self.best_bytes_per_s * min_rtt.as_secs_f64() / PACKET_BYTES;
        let grows_back_s = (window_packets * (1.0 - KEPT) / CUBIC_C).cbrt().max(1.0);
        let part = (1.0 - KEPT) * since.as_secs_f64() / grows_back_s;
        let growth = self.best_bytes_per_s * part;
        let end = self.best_bytes_per_s * END;
        self.limit_bytes_per_s = self
            .limit_bytes_per_s
            .map(|limit| limit + growth)
            .filter(|limit| *limit < end);
    }

    /// When the next packet may leave; `None`: the limit allows it at once.
    pub(crate) fn release_at(&self) -> Option<Instant> {
        self.release_at.filter(|_| self.limit_bytes_per_s.is_some())
    }

    pub(crate) fn packet_sent(&mut self, bytes: usize, now: Instant) {
        if let Some(limit) = self.limit_bytes_per_s.filter(|limit| *limit > 0.0) {
            let takes = Duration::from_secs_f64(bytes as f64 / limit);
            let from = self.release_at.unwrap_or(now).max(now - BURST);
            self.release_at = Some(from + takes);
        }
    }
}

/// The bandwidth-delay product.
fn held_bytes(sample: &RateSample) -> f64 {
    sample.bandwidth_bytes_per_s as f64 * sample.min_rtt.as_secs_f64()
}

/// Whether packets wait for more than this part of the shortest round trip.
fn has_queue(sample: &RateSample, part: u32) -> bool {
    let queue = sample.smoothed_rtt.saturating_sub(sample.min_rtt);
    queue > (sample.min_rtt / part).max(QUEUE_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const SECOND: Duration = Duration::from_secs(1);
    /// Of the path of the tests, in a second and in flight.
    const BANDWIDTH: u64 = 1_000_000;
    const HELD_BYTES: u64 = BANDWIDTH * 150 / 1_000;

    fn starting(queue_ms: u32, lost_bytes: u64) -> RateSample {
        RateSample {
            smoothed_rtt: (150 + queue_ms) * MS,
            min_rtt: 150 * MS,
            lost_bytes,
            window_bytes: 1_000_000,
            bandwidth_bytes_per_s: BANDWIDTH,
            is_starting_up: true,
        }
    }

    fn started(queue_ms: u32, lost_bytes: u64, window_bytes: u64) -> RateSample {
        RateSample {
            window_bytes,
            is_starting_up: false,
            ..starting(queue_ms, lost_bytes)
        }
    }

    /// When the next of two packets of 10,000 bytes may leave.
    fn waits(limit: &mut RateLimit, now: Instant) -> Option<Duration> {
        limit.packet_sent(10_000, now);
        limit.release_at().map(|at| at - now)
    }

    // Protects a neighbour on the path, and the start of a path that loses or delays by itself.
    #[test]
    fn losses_in_a_full_queue_end_the_doubling_and_nothing_else_does() {
        let now = Instant::now();
        let short = RateSample {
            smoothed_rtt: 6 * MS,
            min_rtt: MS,
            ..starting(0, 9_000)
        };
        let nothing_measured = RateSample {
            bandwidth_bytes_per_s: 0,
            ..starting(50, 9_000)
        };
        let table = [
            ("a queue", starting(50, 0), None),
            ("losses", starting(5, 9_000), None),
            ("few losses in a queue", starting(50, 1_000), None),
            ("a busy host on a short path", short, None),
            ("nothing is measured", nothing_measured, None),
            ("losses in a queue", starting(50, 1_001), Some(10 * MS)),
        ];
        for (what, sample, expected) in table {
            let mut limit = RateLimit::default();
            assert!(limit.is_sample_due(now));
            limit.sample(sample, now);
            assert_eq!(waits(&mut limit, now), expected, "{what}");
        }
    }

    // Protects the rate of the connection: the first limit stands, what was lost before a sample
    // does not count for the next, and with the start-up that limit ends.
    #[test]
    fn the_limit_of_the_start_up_is_set_once_and_ends_with_it() {
        let mut now = Instant::now();
        let mut limit = RateLimit::default();
        limit.sample(starting(5, 9_000), now);
        assert!(!limit.is_sample_due(now + 18 * MS));
        now += 19 * MS;
        assert!(limit.is_sample_due(now));
        limit.sample(starting(50, 9_000), now);
        assert_eq!(waits(&mut limit, now), None, "lost before");
        limit.sample(starting(50, 20_000), now);
        let slower = RateSample {
            bandwidth_bytes_per_s: BANDWIDTH / 2,
            ..starting(50, 40_000)
        };
        limit.sample(slower, now);
        assert_eq!(waits(&mut limit, now), Some(10 * MS));
        assert_eq!(waits(&mut limit, now), Some(20 * MS));
        // Of a second in which nothing left, 4 ms are made up for.
        now += SECOND;
        assert_eq!(waits(&mut limit, now), Some(6 * MS));
        limit.sample(started(0, 40_000, HELD_BYTES), now);
        assert_eq!(waits(&mut limit, now), None);
    }

    // Protects a neighbour after the start-up, and a connection that is alone: losses lower the
    // rate where the queue is another's, and not where the window made it.
    #[test]
    fn losses_in_the_queue_of_others_lower_the_rate() {
        let now = Instant::now();
        let wide = HELD_BYTES * 3 / 2;
        let table = [
            ("a queue", started(50, 0, HELD_BYTES), None),
            ("losses", started(10, 9_000, HELD_BYTES), None),
            ("its own queue", started(50, 9_000, wide), None),
            ("few losses", started(50, 300, HELD_BYTES), None),
            ("another's", started(50, 1_500, HELD_BYTES), Some(KEPT)),
        ];
        for (what, sample, expected) in table {
            let mut limit = RateLimit::default();
            limit.sample(sample, now);
            let rate = limit.limit_bytes_per_s.map(|rate| rate / BANDWIDTH as f64);
            assert_eq!(rate, expected, "{what}");
            // The window of two round trips before counts as well.
            let mut limit = RateLimit::default();
            limit.sample(started(0, 0, wide), now);
            limit.sample(sample, now + 19 * MS);
            assert_eq!(limit.limit_bytes_per_s, None, "{what}");
        }
    }

    // Protects the rate on a path that loses by itself: BBR's probes of the path make a queue, and
    // what is lost meanwhile is not the queue's until it is more than the path loses.
    #[test]
    fn losses_of_the_path_itself_do_not_count() {
        let mut now = Instant::now();
        let mut limit = RateLimit::default();
        let mut lost_bytes = 0;
        let mut sample = |queue_ms: u32, loss: f64| {
            now += 150 * MS / SAMPLES_PER_RTT;
            lost_bytes += (BANDWIDTH as f64 * 0.150 / f64::from(SAMPLES_PER_RTT) * loss) as u64;
            limit.sample(started(queue_ms, lost_bytes, HELD_BYTES), now);
            limit.limit_bytes_per_s.is_some()
        };
        for _ in 0..4 * 8 * SAMPLES_PER_RTT {
            assert!(!sample(0, 0.02));
        }
        for _ in 0..4 * SAMPLES_PER_RTT {
            assert!(!sample(50, 0.03));
        }
        assert!((0..RECENT).any(|_| sample(50, 0.06)));
    }

    // Protects the rate of the connection from losses that go on: it keeps a part of the best
    // bandwidth, is lowered once in two round trips, and comes back.
    #[test]
    fn the_limit_has_a_floor_and_grows_until_it_ends() {
        let mut now = Instant::now();
        let mut limit = RateLimit::default();
        let mut lost_bytes = 0;
        let mut rates = Vec::new();
        for _ in 0..60 {
            lost_bytes += 1_500;
            limit.sample(started(50, lost_bytes, HELD_BYTES), now);
            rates.push(limit.limit_bytes_per_s.unwrap() / BANDWIDTH as f64);
            now += 150 * MS;
        }
        assert_eq!(rates[..3], [KEPT; 3]);
        assert!((rates[3] - KEPT * KEPT).abs() < 1e-9, "{rates:?}");
        assert_eq!(*rates.last().unwrap(), KEPT_MIN);
        for second in 0..60 {
            now += SECOND;
            limit.sample(started(0, lost_bytes, HELD_BYTES), now);
            let Some(rate) = limit.limit_bytes_per_s else {
                assert!((10..15).contains(&second), "{second} s");
                return;
            };
            rates.push(rate);
        }
        panic!("the limit does not end: {rates:?}");
    }
}
