//! Which arriving messages stand still, which answers are not read, and how long either has to come
//! forward.
//!
//! Invariants
//! 1. A peer that keeps messages open sends `progress_bytes` for each of them in each interval.
//! 2. An arriving message that waits behind others of its connection is not taken for one that
//!    stands still, as long as those bring bytes beyond what they need themselves.
//! 3. An answer that is sent behind others is not taken for one that is not read, as long as those
//!    come forward.

use std::time::Duration;

use millrace_protocol::frame::Class;

use crate::config::TransportConfig;

/// The time for progress in round trips, because repeated losses take several: 12.4 s on a path of
/// 619 ms.
const PROGRESS_ROUND_TRIPS: u32 = 20;

/// A peer that acknowledges late lengthens the round trip, and so the time for progress; not over
/// this, unless the config grants more.
const PROGRESS_INTERVAL_MAX: Duration = Duration::from_secs(60);

/// How long a message may take for `stream_progress_bytes` on a path of this round trip.
pub(crate) fn progress_interval(config: &TransportConfig, rtt: Option<Duration>) -> Duration {
    let round_trips = PROGRESS_ROUND_TRIPS * rtt.unwrap_or(Duration::ZERO);
    config
        .stream_progress_interval
        .max(round_trips.min(PROGRESS_INTERVAL_MAX))
}

/// A stream's place among those that its sender feeds, and what it brought in an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Lanes are fed first, then messages by class and, in a class, by age: their streams' ids.
    pub(crate) place: (usize, u64),
    pub(crate) bytes: u64,
    /// Not a lane, and not in its first interval.
    pub(crate) is_judged: bool,
}

/// The streams that stand still, of all that brought something or might have. In the order of
/// places each byte that a message brought beyond `progress_bytes` makes up for one that a later
/// one lacks.
pub(crate) fn standing_still(mut turns: Vec<Turn>, progress_bytes: u64) -> Vec<u64> {
    turns.sort_unstable_by_key(|turn| turn.place);
    let mut spare_bytes = 0_u64;
    turns.retain(|turn| {
        let needed = if turn.is_judged { progress_bytes } else { 0 };
        let left = (spare_bytes + turn.bytes).checked_sub(needed);
        // One that is cut takes nothing from those behind it.
        spare_bytes = left.unwrap_or(spare_bytes);
        left.is_none()
    });
    turns.iter().map(|turn| turn.place.1).collect()
}

/// The streams of the answers that a peer does not read. One waits for its own bytes and for those
/// of all that go before it, in the order of places; as long as they bring `progress_bytes`
/// together, it is not given up, as no request is (`millrace_protocol::body_deadline`).
pub(crate) fn unread(mut turns: Vec<Turn>, progress_bytes: u64) -> Vec<u64> {
    turns.sort_unstable_by_key(|turn| turn.place);
    let mut moved_bytes = 0_u64;
    turns.retain(|turn| {
        moved_bytes += turn.bytes;
        turn.is_judged && moved_bytes < progress_bytes
    });
    turns.iter().map(|turn| turn.place.1).collect()
}

/// Messages that became whole in an interval: of each class the oldest one's stream, and the bytes
/// of all.
#[derive(Debug, Default)]
pub(crate) struct Finished([Option<(u64, u64)>; 3]);

impl Finished {
    pub(crate) fn add(&mut self, class: Class, stream: u64, bytes: u64) {
        let of_class = &mut self.0[class.index()];
        let (first, sum) = of_class.unwrap_or((stream, 0));
        *of_class = Some((first.min(stream), sum + bytes));
    }

    /// As turns of their oldest streams: what is older than all of them did not wait for them.
    pub(crate) fn take_turns(&mut self) -> impl Iterator<Item = Turn> + use<> {
        let classes = std::mem::take(&mut self.0).into_iter().enumerate();
        classes.filter_map(|(class, finished)| {
            let (stream, bytes) = finished?;
            Some(Turn {
                place: (class, stream),
                bytes,
                is_judged: false,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDED: u64 = 64 << 10;
    const SECOND: Duration = Duration::from_secs(1);

    // Protects a body whose connection feeds others first, and the node from one that never comes.
    #[test]
    fn a_message_stands_still_unless_those_before_it_came_forward() {
        let turn = |class: Class, stream, bytes, is_judged| Turn {
            place: (class.index(), stream),
            bytes,
            is_judged,
        };
        let judged = |class, stream, bytes| turn(class, stream, bytes, true);
        let (bulk, normal) = (Class::Bulk, Class::Normal);
        let lane = turn(Class::Latency, 2, 10 * NEEDED, false);
        let cases: [(&str, Vec<Turn>, &[u64]); 9] = [
            (
                "enough each",
                vec![judged(bulk, 22, NEEDED), judged(bulk, 26, NEEDED)],
                &[],
            ),
            (
                "alone, and too little",
                vec![judged(bulk, 22, NEEDED - 1)],
                &[22],
            ),
            (
                "the oldest takes all",
                vec![judged(bulk, 26, 0), judged(bulk, 22, 2 * NEEDED)],
                &[],
            ),
            (
                "it pays for one only",
                {
                    let others = [judged(bulk, 26, 0), judged(bulk, 30, 0)];
                    vec![judged(bulk, 22, 2 * NEEDED), others[0], others[1]]
                },
                &[30],
            ),
            (
                "a younger one takes all",
                vec![judged(bulk, 22, 0), judged(bulk, 26, 9 * NEEDED)],
                &[22],
            ),
            (
                "a higher class takes all",
                vec![judged(bulk, 22, 0), judged(normal, 26, 2 * NEEDED)],
                &[],
            ),
            (
                "a lower class takes all",
                vec![judged(normal, 26, 0), judged(bulk, 22, 9 * NEEDED)],
                &[26],
            ),
            ("lanes take all", vec![lane, judged(bulk, 22, 0)], &[]),
            (
                "one in its first interval",
                vec![turn(bulk, 22, 0, false)],
                &[],
            ),
        ];
        for (what, turns, still) in cases {
            assert_eq!(standing_still(turns, NEEDED), still, "{what}");
        }
    }

    #[test]
    fn what_became_whole_counts_for_those_that_waited_for_it() {
        for (oldest, still) in [(22, &[][..]), (30, &[26])] {
            let mut finished = Finished::default();
            finished.add(Class::Bulk, 38, NEEDED);
            finished.add(Class::Bulk, oldest, NEEDED);
            let mut turns: Vec<_> = finished.take_turns().collect();
            turns.push(Turn {
                place: (Class::Bulk.index(), 26),
                bytes: 0,
                is_judged: true,
            });
            assert_eq!(standing_still(turns, NEEDED), still, "{oldest}");
            assert_eq!(finished.take_turns().count(), 0, "taken once");
        }
    }

    #[test]
    fn the_time_for_progress_follows_the_round_trip_within_bounds() {
        let mut config = TransportConfig::default();
        for (granted, rtt_ms, interval_ms) in [
            (5, None, 5_000),
            (5, Some(1), 5_000),
            (5, Some(619), 12_380),
            (5, Some(10_000), 60_000),
            (90, Some(10_000), 90_000),
        ] {
            config.stream_progress_interval = granted * SECOND;
            let interval = progress_interval(&config, rtt_ms.map(Duration::from_millis));
            assert_eq!(interval.as_millis(), interval_ms, "{granted} {rtt_ms:?}");
        }
    }
}
