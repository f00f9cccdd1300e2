//! How long a peer is waited for: by the round trip of its path, within bounds.

use std::time::Duration;

/// A peer from which nothing comes in this many round trips is left for another one.
const HEDGE_RTTS: u32 = 2;
/// What the round trip does not show: the queues of both shards, and a thread that is woken late on
/// a busy host.
const HEDGE_MIN: Duration = Duration::from_millis(100);

/// A peer that is asked last has this many round trips, within the same bounds: a lost packet is
/// repeated within them, and they are all that it costs a node that waits for it.
const LAST_RTTS: u32 = 4;

/// A small question is answered within this many round trips. On the longest paths of the reference
/// (619 ms, 13 % loss) each lost packet costs 1 to 2 s.
const ANSWER_RTTS: u32 = 10;
/// A host that is busy with others answers late.
const ANSWER_MIN: Duration = Duration::from_secs(2);
/// As long as a peer may be silent by default.
const ANSWER_MAX: Duration = Duration::from_secs(15);

/// The round trip of a path while it is not measured (RFC 9002, 6.2.2).
const INITIAL_RTT: Duration = Duration::from_millis(333);

/// The time in which a body has to come forward by default.
const HOLDER_MIN: Duration = Duration::from_secs(5);

/// How long a peer may be silent before another one is asked.
pub(super) fn hedge(rtt: Option<Duration>) -> Duration {
    times(HEDGE_RTTS, rtt, HEDGE_MIN)
}

/// How long a peer that is asked last may be silent.
pub(super) fn last(rtt: Option<Duration>) -> Duration {
    times(LAST_RTTS, rtt, HEDGE_MIN)
}

/// How long a peer has for a small question at most.
pub(super) fn answer(rtt: Option<Duration>) -> Duration {
    times(ANSWER_RTTS, rtt, ANSWER_MIN)
}

/// How long a peer that says that it holds an artifact may send nothing of it, if no other one can
/// be asked.
pub(super) fn holder(rtt: Option<Duration>) -> Duration {
    answer(rtt).max(HOLDER_MIN)
}

fn times(count: u32, rtt: Option<Duration>, min: Duration) -> Duration {
    let rtt = rtt.unwrap_or(INITIAL_RTT);
    rtt.saturating_mul(count).clamp(min, ANSWER_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Protects short paths from the scheduling of their hosts, and askers from a round trip that a
    // peer stretched.
    #[test]
    fn waits_follow_the_round_trip_within_bounds() {
        let cases = [
            (Some(0), [100, 100, 2_000, 5_000]),
            (Some(100), [200, 400, 2_000, 5_000]),
            (Some(619), [1_238, 2_476, 6_190, 6_190]),
            (Some(3_600_000), [15_000; 4]),
            (None, [666, 1_332, 3_330, 5_000]),
        ];
        for (rtt, expected_ms) in cases {
            let rtt = rtt.map(Duration::from_millis);
            let waits = [hedge(rtt), last(rtt), answer(rtt), holder(rtt)];
            assert_eq!(waits.map(|wait| wait.as_millis()), expected_ms, "{rtt:?}");
        }
    }
}
