//! A search for the largest packets that a path carries, in rounds of probes.
//!
//! Four sizes at a time narrow a range to a quarter in one round trip, where a search by halves
//! takes two, and the losses of a round are one event for congestion control.
//!
//! Invariants
//! 1. A size is excluded by the second of two rounds in which no probe was answered although other
//!    packets were acknowledged. One is not enough: its probes may have left at the end of an
//!    outage. A device that refuses a size excludes it at once.
//! 2. A size is suspect after a round in which it was lost and a smaller one was answered: it and
//!    the larger ones are left out of the next rounds. Congestion may have lost it. So the search
//!    does not end before it was probed again, alone. It is excluded when that probe is lost too;
//!    when the probe is answered, the larger ones are tried again.
//! 3. A first round with one size excludes nothing: a packet may be lost by chance.
//! 4. A search for more than a path is known to carry ends with the first round of several sizes
//!    that is not answered: losses cost the connection more than a few bytes in each packet.

/// Probes of a round. Four, of evenly spaced sizes, find 1,352 between 1,200 and 1,452 in three
/// rounds, and fit in a congestion window that losses have cut.
pub(super) const ROUND_PROBES: usize = 4;

/// The search ends when what is left to find is less: a hundredth of a packet.
pub(super) const PRECISION_BYTES: usize = 16;

/// Rounds in a row without an answer that exclude their sizes.
const UNANSWERED_MAX: u32 = 2;

/// A search.
#[derive(Debug)]
pub(super) struct Search {
    /// The largest size that is not excluded.
    high_bytes: usize,
    /// The smallest suspect size; at most `high_bytes`.
    suspect_bytes: Option<usize>,
    /// The smallest size of this round that was lost.
    lost_bytes: Option<usize>,
    round: Round,
    /// Whether it ends with a round that is not answered.
    is_raise: bool,
    /// Whether a probe of this round was answered.
    is_answered: bool,
    /// What QUIC had counted as acknowledged when the round began.
    acked_bytes: u64,
    /// Rounds in a row in which nothing at all was acknowledged.
    silent_rounds: u32,
    /// Rounds in a row in which no probe was answered, and other packets were.
    unanswered_rounds: u32,
}

/// What the probes of a round are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    /// One size, the largest, as the first of a search.
    Guess,
    /// Several sizes, to narrow the range.
    Burst,
    /// The smallest suspect size, alone.
    Confirm,
}

impl Search {
    /// A search that begins with `high_bytes` alone, and the sizes of its first round.
    pub(super) fn up_to(high_bytes: usize, acked_bytes: u64) -> (Self, Vec<usize>) {
        (
            Self::new(high_bytes, Round::Guess, acked_bytes),
            vec![high_bytes],
        )
    }

    /// The same, for more than the path is known to carry.
    pub(super) fn raise(high_bytes: usize, acked_bytes: u64) -> (Self, Vec<usize>) {
        let (search, due) = Self::up_to(high_bytes, acked_bytes);
        let is_raise = true;
        (Self { is_raise, ..search }, due)
    }

    /// A search that begins with several sizes above `low_bytes`, and these.
    pub(super) fn among(
        low_bytes: usize,
        high_bytes: usize,
        acked_bytes: u64,
    ) -> (Self, Vec<usize>) {
        let search = Self::new(high_bytes, Round::Burst, acked_bytes);
        (search, sizes(low_bytes, high_bytes))
    }

    fn new(high_bytes: usize, round: Round, acked_bytes: u64) -> Self {
        Self {
            high_bytes,
            suspect_bytes: None,
            lost_bytes: None,
            round,
            is_raise: false,
            is_answered: false,
            acked_bytes,
            silent_rounds: 0,
            unanswered_rounds: 0,
        }
    }

    /// Rounds in a row, up to now, in which nothing at all was acknowledged.
    pub(super) fn silent_rounds(&self) -> u32 {
        self.silent_rounds
    }

    /// A probe of this round was answered.
    pub(super) fn on_answer(&mut self) {
        self.is_answered = true;
    }

    /// A probe of this round was lost.
    pub(super) fn on_loss(&mut self, bytes: usize) {
        let least = self.lost_bytes.unwrap_or(bytes);
        self.lost_bytes = Some(least.min(bytes));
    }

    /// The device does not carry packets of `bytes`.
    pub(super) fn exclude(&mut self, bytes: usize) {
        self.high_bytes = self.high_bytes.min(bytes.saturating_sub(1));
        self.suspect_bytes = self.suspect_bytes.filter(|suspect| *suspect < bytes);
    }

    /// All probes of the round are answered or lost. The path carries `low_bytes`, and QUIC has
    /// counted `acked_bytes`. The sizes of the next round, the largest last; `None` when little is
    /// left to find.
    pub(super) fn next_round(&mut self, low_bytes: usize, acked_bytes: u64) -> Option<Vec<usize>> {
        let is_heard = self.is_answered || acked_bytes > self.acked_bytes;
        let lost_bytes = self.lost_bytes.take();
        if self.is_raise && self.round == Round::Burst && !self.is_answered && lost_bytes.is_some()
        {
            return None;
        }
        if let Some(lost_bytes) = lost_bytes {
            self.learn(lost_bytes, is_heard);
        }
        // The suspect size was answered: the larger ones may pass too.
        self.suspect_bytes = self.suspect_bytes.filter(|bytes| *bytes > low_bytes);
        self.is_answered = false;
        self.acked_bytes = acked_bytes;
        let narrowed = self
            .suspect_bytes
            .map_or(self.high_bytes, |bytes| bytes - 1);
        if narrowed >= low_bytes + PRECISION_BYTES {
            self.round = Round::Burst;
            return Some(sizes(low_bytes, narrowed));
        }
        if self.high_bytes < low_bytes + PRECISION_BYTES {
            return None;
        }
        self.round = Round::Confirm;
        self.suspect_bytes.map(|bytes| vec![bytes])
    }

    /// The smallest probe that the round lost had `lost_bytes`. `is_heard`: something was
    /// acknowledged since the round began.
    fn learn(&mut self, lost_bytes: usize, is_heard: bool) {
        self.silent_rounds = if is_heard { 0 } else { self.silent_rounds + 1 };
        if self.is_answered || !is_heard {
            self.unanswered_rounds = 0;
        } else {
            self.unanswered_rounds += u32::from(self.round == Round::Burst);
        }
        match self.round {
            Round::Burst if self.is_answered => self.suspect_bytes = Some(lost_bytes),
            Round::Burst if self.unanswered_rounds >= UNANSWERED_MAX => {
                self.unanswered_rounds = 0;
                self.exclude(lost_bytes);
            }
            Round::Confirm if is_heard => self.exclude(lost_bytes),
            Round::Guess | Round::Burst | Round::Confirm => {}
        }
    }
}

/// The sizes of a round above `low_bytes`, up to `high_bytes`: the largest last, which is sent
/// first.
fn sizes(low_bytes: usize, high_bytes: usize) -> Vec<usize> {
    let span = high_bytes.saturating_sub(low_bytes);
    let mut sizes: Vec<_> = (1..=ROUND_PROBES)
        .map(|step| low_bytes + span * step / ROUND_PROBES)
        .filter(|bytes| *bytes > low_bytes)
        .collect();
    sizes.dedup();
    sizes
}
