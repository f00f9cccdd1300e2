//! When the packets of a paced connection leave, and what tells its BBR that it was idle.
//!
//! quiche's BBR says of each packet when it should leave (its release time), and it measures the
//! path's bandwidth by the bytes that are acknowledged. Both need the sender's help:
//!
//! 1. A packet is built when its release time is less than [`LEAD`] away. Waiting for each packet's
//!    own time is worse than not pacing: a wake that comes late is lost for good (63 Mbit/s instead
//!    of 182 at 300 Mbit/s and 150 ms).
//! 2. A bandwidth that was measured while there was little to send says nothing of the path. quiche
//!    learns that there was little only from a packet without data; data that leaves an idle
//!    connection at once counts in full, and three rounds of health probes end BBR's start-up at
//!    82 kbit/s. So a PING in a packet of its own goes before the first data after idleness, and
//!    again as long as little is sent: BBR takes what leaves until its acknowledgement for limited
//!    by the application.

mod rate_limit;

use std::time::{Duration, Instant};

use rate_limit::RateLimit;
pub(crate) use rate_limit::RateSample;

/// How much earlier than its release time a packet may leave. 1, 2 and 5 ms gave the same rate.
const LEAD: Duration = Duration::from_millis(2);

/// How long a mark counts before the RTT is known. A mark lasts an RTT; the next one comes after
/// half of it, so that there is no gap between two.
const MARK_INTERVAL: Duration = Duration::from_millis(5);

/// The pacing of one connection.
#[derive(Debug)]
pub(crate) struct Pacing {
    /// When the next packet may be built; `None`: at once, or there is none.
    release_at: Option<Instant>,
    /// Whether all that there was to send had left when the last turn ended.
    is_idle: bool,
    marked_at: Option<Instant>,
    mark_interval: Duration,
    rate_limit: RateLimit,
}

impl Default for Pacing {
    fn default() -> Self {
        Self {
            release_at: None,
            is_idle: true,
            marked_at: None,
            mark_interval: MARK_INTERVAL,
            rate_limit: RateLimit::default(),
        }
    }
}

impl Pacing {
    /// A turn to send begins: what the last one waited for is over, whether or not this one asks.
    pub(crate) fn begin_turn(&mut self) {
        self.release_at = None;
    }

    /// Data is to be sent: whether a mark of idleness goes before it.
    pub(crate) fn marks_idleness(&mut self, now: Instant) -> bool {
        let is_due = self
            .marked_at
            .is_none_or(|at| at + self.mark_interval <= now);
        let marks = self.is_idle && is_due;
        if marks {
            self.marked_at = Some(now);
        }
        marks
    }

    /// Whether [`Self::sample`] is to be called.
    pub(crate) fn is_sample_due(&self, now: Instant) -> bool {
        self.rate_limit.is_sample_due(now)
    }

    /// Takes what quiche says of the path.
    pub(crate) fn sample(&mut self, sample: RateSample, now: Instant) {
        self.rate_limit.sample(sample, now);
    }

    /// Whether the next packet may be built now, by its release time; none: at once. If not,
    /// [`Self::next_timeout`] says when.
    pub(crate) fn may_send(&mut self, release_at: Option<Instant>, now: Instant) -> bool {
        // Woken in the middle of the lead, the connection sends half of it at a time.
        self.release_at = release_at
            .max(self.rate_limit.release_at())
            .filter(|at| *at > now + LEAD)
            .map(|at| at - LEAD / 2);
        self.release_at.is_none()
    }

    /// The least RTT of the path.
    pub(crate) fn set_rtt(&mut self, rtt: Duration) {
        self.mark_interval = (rtt / 2).max(MARK_INTERVAL);
    }

    /// A packet has been built.
    pub(crate) fn packet_sent(&mut self, bytes: usize, now: Instant) {
        self.rate_limit.packet_sent(bytes, now);
    }

    /// The turn is over: whether the connection has sent all that there was.
    pub(crate) fn sent(&mut self, is_idle: bool) {
        self.is_idle = is_idle;
    }

    /// When the next packet may be built.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.release_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    // Protects the rate of a paced connection: it sends up to two milliseconds ahead, then waits
    // until a millisecond before the next packet's time, and no longer than that.
    #[test]
    fn packets_leave_up_to_the_lead_before_their_time() {
        let now = Instant::now();
        let cases = [
            (None, None),
            (Some(now + MS), None),
            (Some(now + 2 * MS), None),
            (Some(now + 3 * MS), Some(now + 2 * MS)),
            (Some(now + 50 * MS), Some(now + 49 * MS)),
        ];
        let mut pacing = Pacing::default();
        for (release_at, wakes_at) in cases {
            let may_send = pacing.may_send(release_at, now);
            assert_eq!(may_send, wakes_at.is_none(), "{release_at:?}");
            assert_eq!(pacing.next_timeout(), wakes_at, "{release_at:?}");
        }
        assert!(pacing.may_send(None, now) && pacing.next_timeout().is_none());
        // Protects the shard from a timer that is due again at once: a connection that closes asks
        // for no release time.
        assert!(!pacing.may_send(Some(now + 50 * MS), now));
        pacing.begin_turn();
        assert_eq!(pacing.next_timeout(), None);
    }

    // Protects BBR's start-up from health probes and small messages: the first data after idleness
    // is marked, then once in half of an RTT, and a body in full flow never.
    #[test]
    fn data_after_idleness_is_marked_once_in_half_of_an_rtt() {
        let start = Instant::now();
        let mut pacing = Pacing::default();
        pacing.set_rtt(150 * MS);
        // At this time there is data; whether it is marked; whether all of it left.
        let turns = [
            (0, true, true),
            (1, false, true),
            (74, false, true),
            (75, true, false),
            (200, false, false),
            (300, false, true),
            (301, true, true),
        ];
        for (ms, marks, leaves_idle) in turns {
            assert_eq!(pacing.marks_idleness(start + ms * MS), marks, "{ms} ms");
            pacing.sent(leaves_idle);
        }
    }
}
