//! Which peers are asked for an artifact, and in which order.
//!
//! How a peer served before decides, and chance: the better of two that are drawn, one draw after
//! the other ([`Scores::choose`]). So the requests of all nodes do not go to the nearest, and a
//! peer that does not serve loses its turn to those that do.
//!
//! 1. Each peer is in one wave, but for banned ones, which are in none. All of a wave are asked at
//!    once, and it has at most [`WAVE`] peers.
//! 2. Peers that lately stalled, or were slow or failed again and again, are in the last waves, and
//!    in none with others.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use millrace_protocol::id::NodeId;
use millrace_protocol::rng::Rng;
use millrace_protocol::score::{AskOrder, Outcome, ScoreConfig, Scores};

/// Peers that are asked at once: most subnets have an artifact at one of the first, and a question
/// to each of a few hundred members would cost more than it finds.
pub(crate) const WAVE: usize = 8;

/// Peers that are asked at once.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wave {
    /// The one to ask first for the artifact, if several hold it, is the first.
    pub(crate) peers: Vec<NodeId>,
    /// [`AskOrder::Last`]
    pub(crate) is_last: bool,
}

/// The record of peers, and the order that follows from it.
#[derive(Debug)]
pub(crate) struct Candidates {
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    scores: Scores,
    rng: Rng,
    /// How exchanges with all peers ended, by [`Outcome::label`].
    outcomes: BTreeMap<&'static str, u64>,
}

impl Candidates {
    /// Nothing is known of any peer. `seed`: another one on each node.
    pub(crate) fn new(seed: u64) -> Self {
        let held = Held {
            scores: Scores::new(ScoreConfig::default()),
            rng: Rng::new(seed),
            outcomes: Outcome::ALL.map(|outcome| (outcome.label(), 0)).into(),
        };
        Self {
            held: Mutex::new(held),
        }
    }

    /// Notes how an exchange with a peer ended.
    pub(crate) fn note(&self, peer: NodeId, outcome: Outcome, now: Instant) {
        let mut held = self.lock();
        *held.outcomes.entry(outcome.label()).or_default() += 1;
        let Some(penalty) = held.scores.note(peer, outcome, now) else {
            return;
        };
        let until = held.scores.until(&peer, now);
        drop(held);
        // Each one is longer than the one before, so these are few lines.
        let seconds = until.map_or(0, |until| (until - now).as_secs());
        let outcome = outcome.label();
        match penalty {
            AskOrder::Banned => {
                tracing::warn!(%peer, seconds, "a peer sent other bytes than it was asked for: banned");
            }
            _ => tracing::warn!(%peer, seconds, outcome, "a peer does not serve: asked last"),
        }
    }

    /// The peers to ask, wave by wave.
    pub(crate) fn waves(&self, peers: impl Iterator<Item = NodeId>, now: Instant) -> Vec<Wave> {
        let mut held = self.lock();
        let Held { scores, rng, .. } = &mut *held;
        let is_last = |peer: &NodeId| scores.ask_order(peer, now) == AskOrder::Last;
        let (last, usual): (Vec<_>, Vec<_>) = peers.partition(is_last);
        let mut waves = Vec::new();
        for (mut left, is_last) in [(usual, false), (last, true)] {
            let mut order = Vec::with_capacity(left.len());
            while let Some(chosen) = scores.choose(left.iter().copied(), rng, now) {
                left.retain(|peer| *peer != chosen);
                order.push(chosen);
            }
            waves.extend(order.chunks(WAVE).map(|peers| Wave {
                peers: peers.to_vec(),
                is_last,
            }));
        }
        waves
    }

    /// In which order the peer is asked.
    pub(crate) fn ask_order(&self, peer: &NodeId, now: Instant) -> AskOrder {
        self.lock().scores.ask_order(peer, now)
    }

    /// Points of the peer.
    pub(crate) fn points(&self, peer: &NodeId, now: Instant) -> f64 {
        self.lock().scores.points_milli(peer, now) as f64 / 1_000.0
    }

    /// How exchanges with all peers ended, by label.
    pub(crate) fn outcomes(&self) -> BTreeMap<&'static str, u64> {
        self.lock().outcomes.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::*;

    fn peers(count: u8) -> Vec<NodeId> {
        (0..count).map(|n| NodeId::from_bytes([n; 29])).collect()
    }

    // Protects the peers that serve from being asked in the same order by all: the nearest one, or
    // the first by its id, is one of many.
    #[test]
    fn all_peers_are_asked_once_and_by_chance() {
        let (now, all) = (Instant::now(), peers(20));
        let candidates = Candidates::new(7);
        let mut firsts = BTreeSet::new();
        for _ in 0..100 {
            let waves = candidates.waves(all.iter().copied(), now);
            let sizes: Vec<_> = waves.iter().map(|wave| wave.peers.len()).collect();
            assert_eq!(sizes, [8, 8, 4]);
            firsts.insert(waves[0].peers[0]);
            let asked: BTreeSet<_> = waves.into_iter().flat_map(|wave| wave.peers).collect();
            assert_eq!(asked.len(), all.len());
        }
        assert!(firsts.len() > 10, "{firsts:?}");
        let other = Candidates::new(8).waves(all.iter().copied(), now);
        assert_ne!(other, Candidates::new(7).waves(all.into_iter(), now));
    }

    // Protects askers from peers that do not serve, and who served well from an equal chance of
    // those that did not.
    #[test]
    fn those_that_do_not_serve_come_last_or_not_at_all() {
        let (now, all) = (Instant::now(), peers(6));
        let candidates = Candidates::new(7);
        let [good, slow, silent, lies] = [all[2], all[3], all[4], all[5]];
        candidates.note(good, Outcome::Served, now);
        candidates.note(slow, Outcome::Slow, now);
        candidates.note(silent, Outcome::Stalled, now);
        for _ in 0..3 {
            candidates.note(lies, Outcome::Invalid, now);
        }
        let mut good_first = 0;
        for _ in 0..100 {
            let waves = candidates.waves(all.iter().copied(), now);
            let [usual, last] = &waves[..] else {
                panic!("{waves:?}");
            };
            assert!(!usual.is_last && last.is_last);
            assert_eq!(last.peers, [silent], "and not the banned one");
            // The worst of four is never the better of two that are drawn.
            assert!(usual.peers.len() == 4 && usual.peers[3] == slow);
            good_first += u32::from(usual.peers[0] == good);
        }
        // Of two that are drawn of four it is one in half of the cases, and the better one then.
        assert!((40..60).contains(&good_first), "{good_first}");
        assert_eq!(candidates.ask_order(&lies, now), AskOrder::Banned);
        let later = now + Duration::from_secs(30);
        let waves = candidates.waves(all.iter().copied(), later);
        assert!(waves.len() == 1 && waves[0].peers.contains(&silent));
        let outcomes = [("failed", 0), ("invalid", 3), ("served", 1)];
        let expected = outcomes.into_iter().chain([("slow", 1), ("stalled", 1)]);
        assert_eq!(candidates.outcomes(), expected.collect());
    }
}
