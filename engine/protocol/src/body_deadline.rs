//! The deadline of a request whose body, or whose answer's body, may be long.
//!
//! A time for all of it says little: 128 MiB take 0.1 s on a LAN and 18 minutes at 1 Mbit/s, and a
//! peer that is silent must not hold a request for 18 minutes. So what comes forward decides. The
//! caller looks once in an interval, and says how far the bytes have come that the request waits
//! for.
//!
//! 1. A body that comes forward is not given up, however long it takes: while it is sent, by
//!    `progress_bytes` in each interval; once the answer's first byte is there, the
//!    receiver's judge of arrivals decides alone.
//! 2. What waits behind other bodies of its connection is not given up while those come forward, by
//!    as much. An answer that is small waits behind none.
//! 3. Where nothing comes forward: a body that is being sent is given up after an interval;
//!    otherwise a request is after `patience`, which is what a peer has to store a body before it
//!    answers. An asker that has others to ask says how long it waits instead.

use std::time::{Duration, Instant};

/// Times and rates of [`BodyDeadline`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyDeadlineConfig {
    /// How long nothing may come forward while the request waits for its turn or its answer; also
    /// the part of a body's time that does not grow with it.
    pub patience: Duration,
    /// The least rate that is expected of a body, bytes in a second; at least 1.
    pub bytes_per_second_min: u64,
    /// What must move in an interval to count as progress, bytes.
    pub progress_bytes: u64,
}

impl BodyDeadlineConfig {
    /// The time for `bytes`: `patience`, and as long as they take at the least rate. The peer is
    /// told it; what comes forward may take longer.
    pub fn time_for(&self, bytes: u64) -> Duration {
        let rate = u128::from(self.bytes_per_second_min.max(1));
        let ms = u64::try_from(u128::from(bytes) * 1_000 / rate).unwrap_or(u64::MAX);
        self.patience.saturating_add(Duration::from_millis(ms))
    }
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It waits in this node's queue. It waits for all bytes that the path takes.
    Queued,
    /// It has a stream. It waits for its own bytes, and for those that go before it.
    Sending,
    /// The path has taken all of it, and nothing of the answer is there. It waits for the bodies
    /// that arrive.
    Sent,
    /// The answer's first byte is there, and not its last.
    Answering,
}

/// What the caller sees when it looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// Where the request is.
    pub stage: Stage,
    /// Bytes that the stage waits for, so far; never falls within a stage.
    pub moved_bytes: u64,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Look again at this time.
    Wait(Instant),
    /// The request is given up.
    GiveUp,
}

/// The judge of one request.
#[derive(Debug)]
pub struct BodyDeadline {
    config: BodyDeadlineConfig,
    has_long_answer: bool,
    /// What the asker said in place of `patience`.
    asker_patience: Option<Duration>,
    /// When the stage began, or what it waits for came forward last, and how far that was.
    moved_at: Instant,
    seen: Sighting,
}

impl BodyDeadline {
    /// The judge of a request that has just been queued. `has_long_answer`: its answer may wait
    /// behind other bodies of the peer. Ask it first an interval from now.
    pub fn new(
        config: BodyDeadlineConfig,
        has_long_answer: bool,
        seen: Sighting,
        now: Instant,
    ) -> Self {
        Self {
            config,
            has_long_answer,
            asker_patience: None,
            moved_at: now,
            seen,
        }
    }

    /// Waits for `patience` in place of the configured one, however short that is. Ask it first no
    /// later than that from now.
    pub fn with_patience(mut self, patience: Option<Duration>) -> Self {
        self.asker_patience = patience;
        self
    }

    /// Judges the request. `interval`: the time that a path of this round trip has for
    /// `progress_bytes`.
    pub fn judge(&mut self, seen: Sighting, interval: Duration, now: Instant) -> Verdict {
        let moved_bytes = seen.moved_bytes.saturating_sub(self.seen.moved_bytes);
        let waits_for_others = seen.stage != Stage::Sent || self.has_long_answer;
        let has_moved = waits_for_others && moved_bytes >= self.config.progress_bytes;
        if seen.stage != self.seen.stage || seen.stage == Stage::Answering || has_moved {
            (self.moved_at, self.seen) = (now, seen);
        }
        let limit = match seen.stage {
            Stage::Sending => interval,
            _ => self
                .asker_patience
                .unwrap_or_else(|| self.config.patience.max(interval)),
        };
        let silent_at = self.moved_at + limit;
        if silent_at <= now {
            return Verdict::GiveUp;
        }
        Verdict::Wait(silent_at.min(now + interval))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Stage::{Answering, Queued, Sending, Sent};

    const SECOND: Duration = Duration::from_secs(1);
    const INTERVAL: Duration = Duration::from_secs(5);
    const MIB: u64 = 1 << 20;
    const CONFIG: BodyDeadlineConfig = BodyDeadlineConfig {
        patience: Duration::from_secs(30),
        bytes_per_second_min: 125_000,
        progress_bytes: 64 << 10,
    };

    /// The second in which a request is given up that is seen so in each second.
    fn given_up(
        has_long_answer: bool,
        interval: Duration,
        see: impl Fn(u64) -> (Stage, u64),
    ) -> Option<u64> {
        const LONGEST: u64 = 10_000;
        let start = Instant::now();
        let seen = |now: Instant| {
            let (stage, moved_bytes) = see((now - start).as_secs());
            Sighting { stage, moved_bytes }
        };
        let mut deadline = BodyDeadline::new(CONFIG, has_long_answer, seen(start), start);
        let mut now = start + interval;
        loop {
            let at = (now - start).as_secs();
            match deadline.judge(seen(now), interval, now) {
                Verdict::GiveUp => return Some(at),
                Verdict::Wait(_) if at > LONGEST => return None,
                Verdict::Wait(next) => {
                    assert!(next > now && next <= now + interval, "one look an interval");
                    now = next;
                }
            }
        }
    }

    #[test]
    fn the_time_for_a_body_follows_its_length() {
        for (bytes, seconds) in [(0, 30), (125_000, 31), (128 * MIB, 1_103)] {
            assert_eq!(CONFIG.time_for(bytes).as_secs(), seconds, "{bytes}");
        }
        assert!(CONFIG.time_for(u64::MAX) > 1_000_000 * SECOND);
    }

    // Protects a body on a slow path, and a node from a peer that takes or says nothing.
    #[test]
    fn a_request_is_given_up_when_nothing_of_it_comes_forward_and_not_before() {
        type See = fn(u64) -> (Stage, u64);
        let (long, small) = (true, false);
        let cases: [(&str, bool, See, Option<u64>); 11] = [
            (
                "sent at a tenth of the least rate",
                small,
                |at| (Sending, 13_200 * at),
                None,
            ),
            (
                "sent more slowly",
                small,
                |at| (Sending, 13_000 * at),
                Some(5),
            ),
            (
                "it stops",
                small,
                |at| (Sending, MIB * at.min(20)),
                Some(25),
            ),
            (
                "it waits in the queue while others are sent",
                small,
                |at| (Queued, MIB * at),
                None,
            ),
            (
                "it waits in the queue, and nothing is sent",
                small,
                |_| (Queued, 7),
                Some(30),
            ),
            (
                "the peer has it, and says nothing",
                small,
                |at| match at {
                    0..10 => (Sending, MIB * at),
                    _ => (Sent, 0),
                },
                Some(40),
            ),
            (
                "the same, while other bodies arrive",
                small,
                |at| (Sent, MIB * at),
                Some(30),
            ),
            (
                "a long answer that waits behind others",
                long,
                |at| (Sent, MIB * at),
                None,
            ),
            (
                "a long answer of a silent peer",
                long,
                |_| (Sent, 7),
                Some(30),
            ),
            (
                "others stop before a long answer",
                long,
                |at| (Sent, MIB * at.min(100)),
                Some(130),
            ),
            (
                "an answer that arrives has another judge",
                small,
                |_| (Answering, 7),
                None,
            ),
        ];
        for (what, has_long_answer, see, end) in cases {
            assert_eq!(given_up(has_long_answer, INTERVAL, see), end, "{what}");
        }
    }

    // Protects an asker that has others to ask from the time of an interval, and the peer that has
    // begun to answer from being left.
    #[test]
    fn the_patience_of_an_asker_may_be_shorter_than_an_interval() {
        const PATIENCE: Duration = Duration::from_millis(300);
        let start = Instant::now();
        let judge = |stage, after| {
            let see = |stage| Sighting {
                stage,
                moved_bytes: 0,
            };
            let deadline = BodyDeadline::new(CONFIG, true, see(Sent), start);
            let mut deadline = deadline.with_patience(Some(PATIENCE));
            deadline.judge(see(stage), INTERVAL, start + after)
        };
        let early = PATIENCE - Duration::from_millis(1);
        assert_eq!(judge(Sent, early), Verdict::Wait(start + PATIENCE));
        assert_eq!(judge(Sent, PATIENCE), Verdict::GiveUp);
        let answering = start + PATIENCE + PATIENCE;
        assert_eq!(judge(Answering, PATIENCE), Verdict::Wait(answering));
    }

    // Protects the longest paths: 20 round trips may be longer than the patience.
    #[test]
    fn a_long_interval_lengthens_the_patience() {
        assert_eq!(given_up(true, 60 * SECOND, |_| (Sent, 0)), Some(60));
    }
}
