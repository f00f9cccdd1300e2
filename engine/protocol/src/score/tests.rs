//! Penalties and their lengths, points, and the choice by them.

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
    let penalty = ScoreConfig::default().ban;
    let (mut scores, mut now) = (Scores::new(ScoreConfig::default()), Instant::now());
    let banned = Some(AskOrder::Banned);
    for n in [1, 2, 4, 8, 16, 32, 60, 60] {
        assert_eq!(scores.note(peer(1), Outcome::Invalid, now), None);
        assert_eq!(scores.note(peer(1), Outcome::Invalid, now + SECOND), None);
        now += 2 * SECOND;
        assert_eq!(scores.note(peer(1), Outcome::Invalid, now), banned);
        let again = scores.note(peer(1), Outcome::Invalid, now);
        assert_eq!(again, None, "banned already");
        let until = scores.until(&peer(1), now).unwrap();
        assert_eq!(until - now, n * penalty.first);
        let ask_order = |at| scores.ask_order(&peer(1), at);
        assert_eq!(ask_order(until - SECOND), AskOrder::Banned);
        assert_eq!(ask_order(until), AskOrder::Usual);
        now = until;
    }
    now += penalty.memory + SECOND;
    let noted = [0; 3].map(|_| scores.note(peer(1), Outcome::Invalid, now));
    assert_eq!(noted, [None, None, banned]);
    assert_eq!(scores.until(&peer(1), now), Some(now + penalty.first));
    // Once an hour is an accident, however often.
    for n in 0..50 {
        let at = now + n * 3600 * SECOND;
        assert_eq!(scores.note(peer(2), Outcome::Invalid, at), None);
    }
}

// Protects those who wait for a peer that stalls whenever it is its turn, however well it
// served in between; and a peer from one stall long ago.
#[test]
fn a_peer_that_stalls_is_asked_last_and_longer_each_time() {
    let penalty = ScoreConfig::default().last;
    let (mut scores, mut now) = (Scores::new(ScoreConfig::default()), Instant::now());
    let last = Some(AskOrder::Last);
    for n in [1, 2, 4, 8, 16, 20, 20] {
        for _ in 0..100 {
            assert_eq!(scores.note(peer(1), Outcome::Served, now), None);
        }
        assert_eq!(scores.note(peer(1), Outcome::Stalled, now), last);
        assert_eq!(scores.note(peer(1), Outcome::Stalled, now), None, "already");
        let until = scores.until(&peer(1), now).unwrap();
        assert_eq!(until - now, n * penalty.first);
        let ask_order = |at| scores.ask_order(&peer(1), at);
        assert_eq!(ask_order(until - SECOND), AskOrder::Last);
        assert_eq!(ask_order(until), AskOrder::Usual);
        now = until;
    }
    now += penalty.memory + SECOND;
    scores.note(peer(1), Outcome::Stalled, now);
    assert_eq!(scores.until(&peer(1), now), Some(now + penalty.first));
}

// Protects askers from a peer that is late each time; and one that is late now and then, or
// serves more than it fails, from being asked last.
#[test]
fn a_peer_that_is_slow_or_fails_again_and_again_is_asked_last() {
    let (mut scores, now) = (Scores::new(ScoreConfig::default()), Instant::now());
    for outcome in [Outcome::Slow, Outcome::Served, Outcome::Failed].repeat(500) {
        assert_ne!(scores.note(peer(1), outcome, now), Some(AskOrder::Banned));
    }
    assert_eq!(scores.ask_order(&peer(1), now), AskOrder::Last);
    for outcome in [Outcome::Slow, Outcome::Served].repeat(500) {
        assert_eq!(scores.note(peer(2), outcome, now), None);
    }
    let outcomes = [Outcome::Slow, Outcome::Failed, Outcome::Slow];
    let noted = outcomes.map(|outcome| scores.note(peer(3), outcome, now));
    assert_eq!(noted, [None, None, Some(AskOrder::Last)]);
    for n in 0..50 {
        let at = now + n * 60 * SECOND;
        assert_eq!(scores.note(peer(4), Outcome::Slow, at), None);
    }
    // A good time pays for no more than its credit.
    for _ in 0..1_000 {
        scores.note(peer(5), Outcome::Served, now);
    }
    let failed = (1..).find(|_| scores.note(peer(5), Outcome::Slow, now).is_some());
    assert_eq!(failed, Some(10 + 3));
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
            let outcomes = [Outcome::Served, Outcome::Slow, Outcome::Stalled, Outcome::Served];
            scores.note(peer(n), outcomes[usize::from(outcome)], now);
            prop_assert!(scores.len() <= 8);
            let is_banned = scores.ask_order(&peer(0), now) == AskOrder::Banned;
            prop_assert_eq!(is_banned, now < start + config.ban.first);
        }
    }
}
