//! What is held, what makes room for it, and whose is dropped.

use millrace_protocol::budget::{BudgetConfig, ReceiveBudget};
use millrace_shards::chunk::{Account, BodyMut, ChunkPool, UNIT_BYTES};
use millrace_shards::config::HugePages;
use proptest::prelude::*;

use super::*;

fn peer(n: u8) -> NodeId {
    NodeId::from_bytes([n; 29])
}

fn id(n: u8) -> ArtifactId {
    ArtifactId::from_bytes([n; 32])
}

/// The oldest goes first, what it took returns to the pool, and the bound counts units.
#[test]
fn the_oldest_bodies_make_room_and_give_their_chunks_back() {
    let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
    let store = Store::new(2 * UNIT_BYTES as u64);
    for n in 1..=3 {
        store
            .insert(None, id(n), Body::copy_from_slice(&pool, &[n; 10]).unwrap())
            .unwrap();
    }
    assert!(!store.contains(&id(1)) && store.contains(&id(2)) && store.contains(&id(3)));
    assert_eq!(store.get(&id(3)).unwrap().chunks()[0][..], [3; 10]);
    assert_eq!(
        pool.total_bytes() - pool.free_bytes(),
        2 * UNIT_BYTES as u64
    );
    let usage = Usage {
        artifacts: 2,
        bytes: 2 * UNIT_BYTES as u64,
        bytes_max: 2 * UNIT_BYTES as u64,
        dropped: 1,
        dropped_of: [(None, 1)].into(),
    };
    assert_eq!(store.usage(), usage);
}

/// Room is made when a body is announced, and what is expected is not given to another body.
#[test]
fn an_expected_body_makes_room_before_it_comes() {
    const UNIT: u64 = UNIT_BYTES as u64;
    let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
    let store = Arc::new(Store::new(3 * UNIT));
    let insert = |n| {
        let body = Body::copy_from_slice(&pool, &[n; 10]).unwrap();
        store.insert(Some(peer(1)), id(n), body).unwrap();
    };
    (1..=3).for_each(insert);
    let expected = Store::expect(&store, peer(1), UNIT + 1).unwrap();
    assert_eq!(pool.total_bytes() - pool.free_bytes(), UNIT);
    assert!(store.contains(&id(3)) && !store.contains(&id(2)));
    insert(4);
    assert_eq!(store.usage().artifacts, 1, "two are kept free");
    drop(expected);
    (5..=6).for_each(insert);
    assert_eq!(store.usage().artifacts, 3);
    assert!(Store::expect(&store, peer(1), 3 * UNIT + 1).is_none());
    assert_eq!(store.usage().artifacts, 3, "what never fits drops nothing");
}

/// A peer whose bodies never come drops none of another; one that comes whole drops the oldest
/// of the publisher that holds most.
#[test]
fn what_never_comes_drops_nothing_of_other_peers() {
    const UNIT: u64 = UNIT_BYTES as u64;
    let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
    let store = Arc::new(Store::new(6 * UNIT));
    let insert = |from: Option<NodeId>, n: u8| {
        let body = Body::copy_from_slice(&pool, &[n; 10]).unwrap();
        store.insert(from, id(n), body).unwrap();
    };
    insert(None, 1);
    (2..=4).for_each(|n| insert(Some(peer(1)), n));
    (5..=6).for_each(|n| insert(Some(peer(2)), n));
    let holds = |ids: &[u8]| {
        assert!(ids.iter().all(|n| store.contains(&id(*n))), "{ids:?}");
        assert_eq!(store.usage().artifacts, ids.len() as u64);
    };
    holds(&[1, 2, 3, 4, 5, 6]);
    // Two of its own, two to come and half of three are not more than six.
    let begun = Store::expect(&store, peer(2), 2 * UNIT);
    holds(&[1, 2, 3, 4, 5, 6]);
    let stalled: Vec<_> = (0..100)
        .map(|_| Store::expect(&store, peer(2), 6 * UNIT).unwrap())
        .collect();
    holds(&[1, 2, 3, 4]);
    // Another peer has its room all the same.
    insert(Some(peer(1)), 7);
    insert(Some(peer(3)), 8);
    holds(&[1, 2, 3, 4, 7, 8]);
    drop((stalled, begun));
    insert(Some(peer(2)), 9);
    holds(&[1, 3, 4, 7, 8, 9]);
    assert_eq!(store.lock().publishers[&Some(peer(1))].held, 3 * UNIT);
}

// Protects all publishers from one that sends without end: it drops its own, and what is lost
// is counted as its.
#[test]
fn a_publisher_without_end_drops_its_own() {
    const UNIT: u64 = UNIT_BYTES as u64;
    let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
    let store = Arc::new(Store::new(9 * UNIT));
    let insert = |from: Option<NodeId>, n: u8| {
        let body = Body::copy_from_slice(&pool, &[n; 10]).unwrap();
        store.insert(from, id(n), body).unwrap();
    };
    let honest = [(None, 1), (Some(peer(1)), 2), (None, 3), (Some(peer(1)), 4)];
    for (of, n) in honest {
        insert(of, n);
    }
    (100..200).for_each(|n| insert(Some(peer(2)), n));
    for (_, n) in honest {
        assert!(store.contains(&id(n)), "{n}");
    }
    let usage = store.usage();
    assert_eq!(usage.dropped, 95, "five of its hundred are left");
    assert_eq!(usage.dropped_of, [(Some(peer(2)), 95)].into());
    // Its share shrinks when others want as much: equal ones drop their own.
    (10..20).for_each(|n| insert(Some(peer(3)), n));
    (20..30).for_each(|n| insert(Some(peer(1)), n));
    let held = |of: u8| store.lock().publishers[&Some(peer(of))].held / UNIT;
    let none = store.lock().publishers[&None].held / UNIT;
    assert_eq!((none, held(1), held(2), held(3)), (2, 2, 3, 2));
}

// Protects the node's memory: members come and go, and their counts stay.
#[test]
fn drops_are_counted_for_a_bounded_number_of_publishers() {
    let mut held = Held::default();
    let publisher = |n: usize| {
        let mut id = [0; 29];
        id[..8].copy_from_slice(&n.to_le_bytes());
        Some(NodeId::from_bytes(id))
    };
    for n in 0..DROPPED_OF_MAX + 10 {
        held.count_dropped(publisher(n));
    }
    held.count_dropped(publisher(0));
    assert_eq!(held.dropped, DROPPED_OF_MAX as u64 + 11);
    assert_eq!(held.dropped_of.len(), DROPPED_OF_MAX);
    assert_eq!(held.dropped_of[&publisher(0)], 2);
}

proptest! {
    /// A receive budget of twice the store's size has space for a body that is expected,
    /// however the peers share the store.
    #[test]
    fn the_receive_budget_has_space_for_what_is_expected(
        steps in proptest::collection::vec((0u8..4, 1u64..=8), 1..60),
    ) {
        const UNIT: u64 = UNIT_BYTES as u64;
        const MAX: u64 = 16 * UNIT;
        let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
        let store = Arc::new(Store::new(MAX));
        for (n, (from, units)) in (0..).zip(steps) {
            let from = (from > 0).then(|| peer(from));
            let expected = from.map(|peer| Store::expect(&store, peer, units * UNIT).unwrap());
            let mut budget = ReceiveBudget::new(BudgetConfig {
                total_bytes: 2 * MAX,
                peer_bytes_max: MAX,
                peer_inline_bytes_max: 0,
                inline_bytes_max: 0,
            });
            for (of, bytes) in &store.lock().publishers {
                // Each at once: no order of theirs is above its share.
                let charged = of.map(|peer| budget.reserve(peer, bytes.held));
                prop_assert_eq!(charged.unwrap_or(Ok(())), Ok(()));
            }
            if let Some(peer) = from {
                prop_assert_eq!(budget.reserve(peer, units * UNIT), Ok(()));
            }
            drop(expected);
            let body = Body::copy_from_slice(&pool, &vec![n; (units * UNIT) as usize]);
            store.insert(from, id(n), body.unwrap()).unwrap();
            let held = store.lock();
            let bytes = held.bodies.values().map(|body| body.len() as u64);
            prop_assert_eq!(bytes.sum::<u64>(), held.bytes);
            prop_assert!(held.bytes <= MAX);
            let listed = held.publishers.values().flat_map(|share| &share.ids);
            let listed: Vec<_> = listed.copied().collect();
            prop_assert_eq!(listed.len(), held.bodies.len());
            prop_assert!(listed.iter().all(|id| held.bodies.contains_key(id)));
            let shares = held.publishers.values().map(|share| share.held);
            prop_assert_eq!(shares.sum::<u64>(), held.bytes);
        }
    }
}

#[test]
fn a_body_is_held_once_and_one_that_never_fits_is_refused() {
    let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
    let store = Store::new(1 << 20);
    let body = Body::copy_from_slice(&pool, &[1; 10]).unwrap();
    store.insert(None, id(1), body.clone()).unwrap();
    store.insert(Some(peer(1)), id(1), body).unwrap();
    assert_eq!(store.usage().artifacts, 1);
    let large = Body::copy_from_slice(&pool, &vec![0; (1 << 20) + 1]).unwrap();
    assert_eq!(
        store
            .insert(Some(peer(1)), id(2), large)
            .unwrap_err()
            .needed_bytes,
        (1 << 20) + UNIT_BYTES as u64
    );
    assert!(store.contains(&id(1)), "what is refused drops nothing");
    assert!(!store.fits((1 << 20) + 1) && store.fits(1 << 20));
}

/// What is charged to a peer goes where that is enough, oldest first; what is not charged, and
/// bodies of others, stay.
#[test]
fn charged_bodies_go_where_they_are_enough() {
    const UNIT: u64 = UNIT_BYTES as u64;
    let pool = ChunkPool::new(4 << 20, HugePages::Never).unwrap();
    let account = Arc::new(Account::default());
    let store = Store::new(16 * UNIT);
    for (n, of, is_charged) in [
        (1, 1, false),
        (2, 1, true),
        (3, 2, true),
        (4, 1, true),
        (5, 1, true),
    ] {
        let mut body = BodyMut::with_len(&pool, 10).unwrap();
        if is_charged {
            body.charge(&account);
        }
        body.spare().copy_from_slice(&[n; 10]);
        body.advance(10);
        store.insert(Some(peer(of)), id(n), body.freeze()).unwrap();
    }
    let held = || {
        (1..=5)
            .filter(|n| store.contains(&id(*n)))
            .collect::<Vec<_>>()
    };
    for (bytes, is_done, left) in [
        (3 * UNIT + 1, false, vec![1, 2, 3, 4, 5]),
        (UNIT + 1, true, vec![1, 3, 5]),
        (2 * UNIT, false, vec![1, 3, 5]),
        (1, true, vec![1, 3]),
    ] {
        assert_eq!(store.drop_charged(peer(1), bytes), is_done, "{bytes}");
        assert_eq!(held(), left, "{bytes}");
    }
    assert!(!store.drop_charged(peer(9), 1));
    assert_eq!(store.usage().dropped_of, [(Some(peer(1)), 3)].into());
}
