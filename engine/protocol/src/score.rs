//! Scores of peers: from which peer to fetch, and which peers to ask last, or not at all, for a
//! while.
//!
//! 1. All points halve every `half_life`, so what a peer did an hour ago does not count.
//! 2. A ban is for invalid bytes, never for slowness. A peer that stalls, or is slow or fails again
//!    and again, is asked last.
//! 3. Each further penalty of a kind lasts twice as long, until its `memory` has passed without
//!    one.
//! 4. The peers kept are bounded: a new one takes the place of the peer that was reported longest
//!    ago; before one that is asked last, and that before a banned one.

use crate::{id::NodeId, rng::Rng};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Weights and bounds of [`Scores`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreConfig {
    /// Largest number of peers kept.
    pub peers_max: usize,
    /// Time in which points halve.
    pub half_life: Duration,
    /// Number of invalid answers, within about a half-life, that ban a peer.
    pub invalid_max: u32,
    /// Number of slow and failed answers, within about a half-life and beyond those that it served,
    /// after which a peer is asked last.
    pub failures_max: u32,
    /// A ban.
    pub ban: Penalty,
    /// That a peer is asked last.
    pub last: Penalty,
}

/// How long a penalty lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Penalty {
    /// Length of the first one; each further one is twice as long.
    pub first: Duration,
    /// Length of the longest one.
    pub max: Duration,
    /// Time without one after which the next one is as short as the first.
    pub memory: Duration,
}

impl Default for ScoreConfig {
    fn default() -> Self {
        Self {
            peers_max: 1024,
            half_life: Duration::from_secs(60),
            invalid_max: 3,
            failures_max: 3,
            ban: Penalty {
                first: Duration::from_secs(60),
                max: Duration::from_secs(3600),
                memory: Duration::from_secs(86_400),
            },
            // A stall can cost a node that waits the patience with bodies, 30 s by default: a peer
            // that stalls whenever it can costs that once in 10 minutes.
            last: Penalty {
                first: Duration::from_secs(30),
                max: Duration::from_secs(600),
                memory: Duration::from_secs(3600),
            },
        }
    }
}

/// How an exchange with a peer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The peer served what was asked for, and it was valid.
    Served,
    /// Nothing came within the time after which another peer is asked.
    Slow,
    /// The peer failed.
    Failed,
    /// Nothing came before the deadline.
    Stalled,
    /// The answer was invalid: the peer is broken or lies.
    Invalid,
}

impl Outcome {
    /// All outcomes.
    pub const ALL: [Self; 5] = [
        Self::Served,
        Self::Slow,
        Self::Failed,
        Self::Stalled,
        Self::Invalid,
    ];

    /// The outcome as a label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Slow => "slow",
            Self::Failed => "failed",
            Self::Stalled => "stalled",
            Self::Invalid => "invalid",
        }
    }

    fn points(self) -> i64 {
        match self {
            Self::Served => 1,
            Self::Slow | Self::Failed => -1,
            Self::Stalled => -2,
            Self::Invalid => -20,
        }
    }
}

/// In which order a peer is asked; the first goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AskOrder {
    /// By its points, and by chance.
    Usual,
    /// After all others.
    Last,
    /// Not at all, for a while.
    Banned,
}

/// Points are kept in 2^-20, so that they can halve many times.
const POINT: i64 = 1 << 20;
/// Most points that a peer can gain, so that a long good time does not pay for a bad one.
const CREDIT_MAX: i64 = 10 * POINT;
/// Most points that a peer can lose.
const DEBT_MAX: i64 = 100 * POINT;

/// The record of all peers.
#[derive(Debug)]
pub struct Scores {
    config: ScoreConfig,
    peers: BTreeMap<NodeId, Score>,
}

#[derive(Debug)]
struct Score {
    points: i64,
    invalid: i64,
    updated: Instant,
    ban: Spells,
    last: Spells,
}

/// The penalties of one kind that a peer got.
#[derive(Debug, Default)]
struct Spells {
    /// The end of the last one.
    until: Option<Instant>,
    count: u32,
}

impl Scores {
    /// An empty record.
    pub fn new(config: ScoreConfig) -> Self {
        Self {
            config,
            peers: BTreeMap::new(),
        }
    }

    /// Notes how an exchange ended; returns the penalty that begins with it, if one does.
    pub fn note(&mut self, peer: NodeId, outcome: Outcome, now: Instant) -> Option<AskOrder> {
        let config = self.config;
        if !self.peers.contains_key(&peer) {
            self.make_room(now);
        }
        let fresh = || Score {
            points: 0,
            invalid: 0,
            updated: now,
            ban: Spells::default(),
            last: Spells::default(),
        };
        let score = self.peers.entry(peer).or_insert_with(fresh);
        score.decay(&config, now);
        let begun = score.note(outcome, &config, now);
        self.invariants();
        begun
    }

    /// In which order the peer is to be asked now.
    pub fn ask_order(&self, peer: &NodeId, now: Instant) -> AskOrder {
        let score = self.peers.get(peer);
        score.map_or(AskOrder::Usual, |score| score.ask_order(now))
    }

    /// Until when the peer has the order that it has now; none for the usual one.
    pub fn until(&self, peer: &NodeId, now: Instant) -> Option<Instant> {
        let score = self.peers.get(peer)?;
        match score.ask_order(now) {
            AskOrder::Usual => None,
            AskOrder::Last => score.last.until,
            AskOrder::Banned => score.ban.until,
        }
    }

    /// Points of a peer, in thousandths; 0 for an unknown peer.
    pub fn points_milli(&self, peer: &NodeId, now: Instant) -> i64 {
        let points = |score: &Score| decayed(score.points, now - score.updated, &self.config);
        self.peers.get(peer).map_or(0, points) * 1000 / POINT
    }

    /// The better of two candidates drawn at random, banned ones left out. That is near the best
    /// choice, and does not send the requests of all nodes to the same peer.
    pub fn choose(
        &self,
        candidates: impl IntoIterator<Item = NodeId>,
        rng: &mut Rng,
        now: Instant,
    ) -> Option<NodeId> {
        let usable: Vec<NodeId> = candidates
            .into_iter()
            .filter(|peer| self.ask_order(peer, now) != AskOrder::Banned)
            .collect();
        let count = usable.len() as u64;
        let first = *usable.get(rng.below(count) as usize)?;
        if count == 1 {
            return Some(first);
        }
        let others: Vec<NodeId> = usable.into_iter().filter(|peer| *peer != first).collect();
        let Some(&second) = others.get(rng.below(others.len() as u64) as usize) else {
            return Some(first);
        };
        let better = self.points_milli(&second, now) > self.points_milli(&first, now);
        Some(if better { second } else { first })
    }

    /// Number of known peers.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether no peer is known.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    fn make_room(&mut self, now: Instant) {
        while self.peers.len() >= self.config.peers_max.max(1) {
            let oldest = self
                .peers
                .iter()
                .min_by_key(|(_, score)| (score.ask_order(now), score.updated));
            let Some(oldest) = oldest.map(|(id, _)| *id) else {
                return;
            };
            self.peers.remove(&oldest);
        }
    }

    fn invariants(&self) {
        debug_assert!(self.peers.len() <= self.config.peers_max.max(1));
        debug_assert!(
            self.peers
                .values()
                .all(|score| (-DEBT_MAX..=CREDIT_MAX).contains(&score.points))
        );
    }
}

impl Score {
    fn ask_order(&self, now: Instant) -> AskOrder {
        if self.ban.is_in_force(now) {
            AskOrder::Banned
        } else if self.last.is_in_force(now) {
            AskOrder::Last
        } else {
            AskOrder::Usual
        }
    }

    fn decay(&mut self, config: &ScoreConfig, now: Instant) {
        let age = now.saturating_duration_since(self.updated);
        self.points = decayed(self.points, age, config);
        self.invalid = decayed(self.invalid, age, config);
        self.updated = self.updated.max(now);
    }

    fn note(&mut self, outcome: Outcome, config: &ScoreConfig, now: Instant) -> Option<AskOrder> {
        let points = self.points + outcome.points() * POINT;
        self.points = points.clamp(-DEBT_MAX, CREDIT_MAX);
        // Half a point below: those before it have decayed a little.
        let is_reached = |points: i64, max: u32| points + POINT / 2 >= i64::from(max) * POINT;
        match outcome {
            Outcome::Invalid if !self.ban.is_in_force(now) => {
                self.invalid += POINT;
                if !is_reached(self.invalid, config.invalid_max) {
                    return None;
                }
                self.invalid = 0;
                self.ban.begin(&config.ban, now);
                Some(AskOrder::Banned)
            }
            Outcome::Slow | Outcome::Failed | Outcome::Stalled
                if self.ask_order(now) == AskOrder::Usual =>
            {
                let is_last = outcome == Outcome::Stalled
                    || is_reached(self.points.saturating_neg(), config.failures_max);
                is_last.then(|| {
                    self.last.begin(&config.last, now);
                    AskOrder::Last
                })
            }
            _ => None,
        }
    }
}

impl Spells {
    fn is_in_force(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    fn begin(&mut self, penalty: &Penalty, now: Instant) {
        let is_forgotten = |until: Instant| now > until + penalty.memory;
        if self.until.is_some_and(is_forgotten) {
            self.count = 0;
        }
        let length = penalty.first.saturating_mul(1 << self.count.min(20));
        self.count = self.count.saturating_add(1);
        self.until = Some(now + length.min(penalty.max));
    }
}

/// Halves per half-life, linear between: whole numbers, so that every machine computes the same.
fn decayed(points: i64, age: Duration, config: &ScoreConfig) -> i64 {
    let half_life_ms = config.half_life.as_millis().max(1);
    let (halvings, rest_ms) = (
        age.as_millis() / half_life_ms,
        (age.as_millis() % half_life_ms) as i64,
    );
    let points = points / (1_i64 << halvings.min(62));
    points - points * rest_ms / (2 * half_life_ms as i64)
}

#[cfg(test)]
mod tests;
