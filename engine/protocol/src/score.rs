//! Scores of peers: from which peer to fetch, and which peers not to ask for a while.
//!
//! 1. All points halve every `half_life`, so what a peer did an hour ago does not count.
//! 2. A ban is for invalid bytes, never for slowness; each further one lasts twice as long, until
//!    `ban_memory` has passed without any.
//! 3. The peers kept are bounded: a new one takes the place of the peer that was reported longest
//!    ago, banned ones last.

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
    /// Length of the first ban.
    pub ban: Duration,
    /// Length of the longest ban.
    pub ban_max: Duration,
    /// Time without a ban after which the next ban is as short as the first.
    pub ban_memory: Duration,
}

impl Default for ScoreConfig {
    fn default() -> Self {
        Self {
            peers_max: 1024,
            half_life: Duration::from_secs(60),
            invalid_max: 3,
            ban: Duration::from_secs(60),
            ban_max: Duration::from_secs(3600),
            ban_memory: Duration::from_secs(86_400),
        }
    }
}

/// How an exchange with a peer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The peer served what was asked for, and it was valid.
    Served,
    /// The answer came late, or not before its deadline.
    Slow,
    /// The peer did not have it, or failed.
    Failed,
    /// The answer was invalid: the peer is broken or lies.
    Invalid,
}

impl Outcome {
    fn points(self) -> i64 {
        match self {
            Self::Served => 1,
            Self::Slow => -2,
            Self::Failed => -1,
            Self::Invalid => -20,
        }
    }
}

/// Points are kept in 2^-20, so that they can halve many times.
const POINT: i64 = 1 << 20;
/// Most points that a peer can gain, so that a long good time does not pay for a bad one.
const POINTS_MAX: i64 = 100 * POINT;

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
    banned_until: Option<Instant>,
    bans: u32,
}

impl Scores {
    /// An empty record.
    pub fn new(config: ScoreConfig) -> Self {
        Self {
            config,
            peers: BTreeMap::new(),
        }
    }

    /// Notes how an exchange ended; returns whether the peer is banned from now on.
    pub fn note(&mut self, peer: NodeId, outcome: Outcome, now: Instant) -> bool {
        let config = self.config;
        if !self.peers.contains_key(&peer) {
            self.make_room(now);
        }
        let fresh = || Score {
            points: 0,
            invalid: 0,
            updated: now,
            banned_until: None,
            bans: 0,
        };
        let score = self.peers.entry(peer).or_insert_with(fresh);
        score.decay(&config, now);
        score.points = (score.points + outcome.points() * POINT).clamp(-POINTS_MAX, POINTS_MAX);
        if outcome != Outcome::Invalid || score.is_banned(now) {
            return false;
        }
        score.invalid += POINT;
        // Half a point below: those before it have decayed a little.
        let banned = score.invalid + POINT / 2 >= i64::from(config.invalid_max) * POINT;
        if banned {
            score.ban(&config, now);
        }
        self.invariants();
        banned
    }

    /// The peer is not to be asked now.
    pub fn is_banned(&self, peer: &NodeId, now: Instant) -> bool {
        self.peers
            .get(peer)
            .is_some_and(|score| score.is_banned(now))
    }

    /// When the peer may be asked again, if it is banned.
    pub fn banned_until(&self, peer: &NodeId, now: Instant) -> Option<Instant> {
        self.peers
            .get(peer)?
            .banned_until
            .filter(|until| now < *until)
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
            .filter(|peer| !self.is_banned(peer, now))
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
                .min_by_key(|(_, score)| (score.is_banned(now), score.updated));
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
                .all(|score| score.points.abs() <= POINTS_MAX)
        );
    }
}

impl Score {
    fn is_banned(&self, now: Instant) -> bool {
        self.banned_until.is_some_and(|until| now < until)
    }

    fn decay(&mut self, config: &ScoreConfig, now: Instant) {
        let age = now.saturating_duration_since(self.updated);
        self.points = decayed(self.points, age, config);
        self.invalid = decayed(self.invalid, age, config);
        self.updated = self.updated.max(now);
    }

    fn ban(&mut self, config: &ScoreConfig, now: Instant) {
        if self
            .banned_until
            .is_some_and(|until| now > until + config.ban_memory)
        {
            self.bans = 0;
        }
        let ban = config
            .ban
            .saturating_mul(1 << self.bans.min(20))
            .min(config.ban_max);
        self.bans += 1;
        self.invalid = 0;
        self.banned_until = Some(now + ban);
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
mod tests {
    use super::*;
    use crate::rng::Rng;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn peer(n: u8) -> NodeId {
        NodeId::from_bytes([n; 29])
    }

    #[test]
    fn points_decay() {
        let (mut scores, now) = (Scores::new(ScoreConfig::default()), Instant::now());
        for _ in 0..8 {
            scores.note(peer(1), Outcome::Served, now);
        }
        let points = |seconds| scores.points_milli(&peer(1), now + seconds * SECOND);
        assert_eq!(
            [0, 30, 60, 120, 7200].map(points),
            [8000, 6000, 4000, 2000, 0]
        );
        assert_eq!(scores.points_milli(&peer(2), now), 0);
    }

    // Protects downloads from a liar, and a peer from one broken disk read long ago.
    #[test]
    fn bans_grow_and_are_remembered() {
        let config = ScoreConfig::default();
        let (mut scores, mut now) = (Scores::new(config), Instant::now());
        for n in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert!(!scores.note(peer(1), Outcome::Invalid, now));
            assert!(!scores.note(peer(1), Outcome::Invalid, now + SECOND));
            assert!(scores.note(peer(1), Outcome::Invalid, now + 2 * SECOND));
            now += 2 * SECOND;
            assert!(
                !scores.note(peer(1), Outcome::Invalid, now),
                "banned already"
            );
            let until = scores.banned_until(&peer(1), now).unwrap();
            assert_eq!(until - now, n * config.ban);
            assert!(scores.is_banned(&peer(1), until - SECOND));
            assert!(!scores.is_banned(&peer(1), until));
            now = until;
        }
        now += config.ban_memory + SECOND;
        let banned = [0; 3].map(|_| scores.note(peer(1), Outcome::Invalid, now));
        assert_eq!(banned, [false, false, true]);
        assert_eq!(scores.banned_until(&peer(1), now), Some(now + config.ban));
        // Once an hour is an accident, however often.
        for n in 0..50 {
            assert!(!scores.note(peer(2), Outcome::Invalid, now + n * 3600 * SECOND));
        }
    }

    #[test]
    fn slow_and_failing_peers_are_not_banned() {
        let (mut scores, now) = (Scores::new(ScoreConfig::default()), Instant::now());
        for outcome in [Outcome::Slow, Outcome::Failed, Outcome::Served].repeat(500) {
            assert!(!scores.note(peer(1), outcome, now));
        }
        assert!(!scores.is_banned(&peer(1), now));
    }

    #[test]
    fn chooses_good_peers_and_spreads() {
        let (mut scores, now) = (Scores::new(ScoreConfig::default()), Instant::now());
        let mut rng = Rng::new(1);
        scores.note(peer(1), Outcome::Slow, now);
        for n in [2, 3] {
            scores.note(peer(n), Outcome::Served, now);
        }
        for _ in 0..3 {
            scores.note(peer(4), Outcome::Invalid, now);
        }
        let mut chosen = [0; 5];
        for _ in 0..600 {
            let all = (1..=4).map(peer);
            chosen[scores.choose(all, &mut rng, now).unwrap().as_bytes()[0] as usize] += 1;
        }
        assert_eq!(
            (chosen[1], chosen[4]),
            (0, 0),
            "the worst of three is never the better of two"
        );
        assert!(chosen[2] > 200 && chosen[3] > 200, "{chosen:?}");
        assert_eq!(scores.choose([peer(4)], &mut rng, now), None);
        assert_eq!(scores.choose([peer(1)], &mut rng, now), Some(peer(1)));
        assert_eq!(
            scores.choose([peer(1), peer(1)], &mut rng, now),
            Some(peer(1))
        );
    }

    proptest! {
        #[test]
        fn records_are_bounded_and_bans_outlive_the_rest(
            notes in proptest::collection::vec((5u8..40, 0u8..4, 0u64..9), 1..100),
        ) {
            let config = ScoreConfig { peers_max: 8, ..ScoreConfig::default() };
            let (mut scores, mut now) = (Scores::new(config), Instant::now());
            let start = now;
            for _ in 0..3 {
            scores.note(peer(0), Outcome::Invalid, now);
        }
            for (n, outcome, seconds) in notes {
                now += Duration::from_secs(seconds);
                let outcomes = [Outcome::Served, Outcome::Slow, Outcome::Failed, Outcome::Served];
                scores.note(peer(n), outcomes[usize::from(outcome)], now);
                prop_assert!(scores.len() <= 8);
                prop_assert_eq!(scores.is_banned(&peer(0), now), now < start + config.ban);
            }
        }
    }
}
