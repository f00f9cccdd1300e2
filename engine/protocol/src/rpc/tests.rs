use super::*;
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

const LIMITS: RpcLimits = RpcLimits {
    in_flight_max: [8, 4, 1],
};

#[test]
fn classes_are_bounded_apart() {
    let now = Instant::now();
    let mut table = RpcTable::new(LIMITS, now);
    for class in Class::ALL {
        let max = LIMITS.in_flight_max[class.index()];
        let ids: Vec<_> = (0..max)
            .map(|i| table.insert(class, now, i).unwrap())
            .collect();
        assert_eq!(
            table.insert(class, now, 99),
            Err(RpcError::LocalBusy(class))
        );
        assert_eq!(
            table.insert_with(class, now, 99),
            Err((RpcError::LocalBusy(class), 99))
        );
        assert_eq!(table.in_flight(class), max);
        table.cancel(ids[0]).unwrap();
        table.insert(class, now, 7).unwrap();
    }
    let mut lost = 0;
    table.take_all(&mut |_, _| lost += 1);
    assert_eq!((lost, table.len(), table.poll_timeout()), (13, 0, None));
    let none = RpcLimits {
        in_flight_max: [0, 0, 0],
    };
    assert!(
        RpcTable::new(none, now)
            .insert(Class::Bulk, now, ())
            .is_err()
    );
    let huge = RpcLimits {
        in_flight_max: [u32::MAX; 3],
    };
    let mut table = RpcTable::new(huge, now);
    let all = (0..)
        .take_while(|_| table.insert(Class::Bulk, now, ()).is_ok())
        .count();
    assert_eq!(all, 1 << 16);
}

// Protects a shard's thread: an asker that was refused waits, and does not ask again at once.
#[test]
fn a_class_that_refused_is_writable_again_under_half() {
    let now = Instant::now();
    let mut table = RpcTable::new(LIMITS, now);
    for class in Class::ALL {
        let max = LIMITS.in_flight_max[class.index()];
        let insert = |_| table.insert(class, now, ()).unwrap();
        let ids: Vec<_> = (0..max).map(insert).collect();
        assert!(table.is_writable(class), "full, and none was refused");
        assert!(table.insert(class, now, ()).is_err());
        for id in ids {
            let is_low = 2 * table.in_flight(class) < max;
            assert_eq!(table.is_writable(class), is_low, "{class:?}");
            table.complete(id).unwrap();
        }
        assert!(table.is_writable(class), "{class:?}");
    }
    let of_positions = RpcLimits {
        in_flight_max: [RpcLimits::SLOTS_MAX, RpcLimits::SLOTS_MAX, 0],
    };
    let mut table = RpcTable::new(of_positions, now);
    let insert = |_| table.insert(Class::Latency, now, ()).unwrap();
    let ids: Vec<_> = (0..RpcLimits::SLOTS_MAX).map(insert).collect();
    assert!(table.insert(Class::Normal, now, ()).is_err());
    assert!(!table.is_writable(Class::Normal), "no position is free");
    table.complete(ids[0]).unwrap();
    assert!(table.is_writable(Class::Normal));
    assert!(table.insert(Class::Bulk, now, ()).is_err());
    assert!(!table.is_writable(Class::Bulk), "it never takes one");
}

// Protects an asker from the response to another's request.
#[test]
fn ids_come_back_late_and_with_another_generation() {
    let now = Instant::now();
    let mut table = RpcTable::new(RpcLimits::default(), now);
    let mut seen = BTreeSet::new();
    for _ in 0..100_000 {
        let id = table.insert(Class::Latency, now, ()).unwrap();
        assert!(seen.insert(id), "{id} used twice");
        assert!(table.get_mut(id).is_some());
        assert_eq!(table.complete(id), Some(()));
        assert_eq!((table.complete(id), table.get_mut(id)), (None, None));
    }
    assert_eq!(table.late(), 100_000);
    let positions: BTreeSet<_> = seen.iter().map(|id| id & 0xffff).collect();
    assert_eq!(positions.len(), REUSE_AFTER);
}

#[test]
fn server_bounds_and_finds_requests() {
    let mut served = InFlight::new(LIMITS);
    served.begin(3, Class::Bulk, 'a').unwrap();
    assert_eq!(
        served.begin(4, Class::Bulk, 'b'),
        Err(InFlightError::Busy(Class::Bulk))
    );
    assert_eq!(
        served.begin(3, Class::Normal, 'b'),
        Err(InFlightError::PeerDuplicateId(3))
    );
    // 13 places are rounded up to 16: id 19 meets id 3.
    assert_eq!(
        served.begin(19, Class::Normal, 'b'),
        Err(InFlightError::Busy(Class::Normal))
    );
    served.begin(u32::MAX, Class::Latency, 'c').unwrap();
    assert_eq!(served.get_mut(19), None);
    assert_eq!(served.get_mut(3), Some(&mut 'a'));
    assert_eq!(
        (served.end(19), served.end(3), served.end(3)),
        (None, Some('a'), None)
    );
    served.begin(19, Class::Bulk, 'd').unwrap();
    let mut lost = Vec::new();
    served.take_all(&mut |id, state| lost.push((id, state)));
    assert_eq!(lost, [(19, 'd'), (u32::MAX, 'c')]);
    assert_eq!(Class::ALL.map(|class| served.in_flight(class)), [0; 3]);
}

// Protects a body that comes forward: its request is asked at each deadline, and ends once.
#[test]
fn a_deadline_that_is_extended_passes_later_and_once() {
    let start = Instant::now();
    let mut table = RpcTable::new(LIMITS, start);
    let second = Duration::from_secs(1);
    let extended = table.insert(Class::Bulk, start + second, 3).unwrap();
    let plain = table.insert(Class::Normal, start + second, 0).unwrap();
    let mut ended = Vec::new();
    let mut now = start;
    while let Some(at) = table.poll_timeout() {
        now = now.max(at);
        let mut extend = |_, left: &mut usize| {
            *left = left.checked_sub(1)?;
            Some(now + second)
        };
        table.expire_unless(now, &mut extend, &mut |id, left| ended.push((id, left)));
    }
    assert_eq!(ended, [(plain, 0), (extended, 0)]);
    assert!(now >= start + 4 * second && now < start + 5 * second);
    assert!(table.is_empty() && table.complete(extended).is_none());
}

proptest! {
    // Protects every waiter: against a plain map, each is handed back exactly once.
    #[test]
    fn behaves_like_a_map(
        steps in proptest::collection::vec((0u8..6, 0usize..3, 0usize..40, 0u64..2000), 1..200),
    ) {
        let mut now = Instant::now();
        let mut table = RpcTable::new(LIMITS, now);
        let mut oracle: BTreeMap<u32, (Class, Instant, usize)> = BTreeMap::new();
        let mut ids = vec![0];
        for (n, (kind, class, pick, ms)) in steps.into_iter().enumerate() {
            let class = Class::ALL[class];
            let id = ids[pick % ids.len()];
            match kind {
                0..=2 => {
                    let deadline = now + Duration::from_millis(ms);
                    let busy = oracle.values().filter(|(c, ..)| *c == class).count() as u32
                        >= LIMITS.in_flight_max[class.index()];
                    match table.insert(class, deadline, n) {
                        Ok(id) => {
                            prop_assert!(!busy);
                            prop_assert!(oracle.insert(id, (class, deadline, n)).is_none());
                            ids.push(id);
                        }
                        Err(error) => {
                            prop_assert_eq!(error, RpcError::LocalBusy(class));
                            prop_assert!(busy);
                        }
                    }
                }
                3 => prop_assert_eq!(table.complete(id), oracle.remove(&id).map(|w| w.2)),
                4 => prop_assert_eq!(table.cancel(id), oracle.remove(&id).map(|w| w.2)),
                _ => {
                    now += Duration::from_millis(ms / 4);
                    let mut expired = Vec::new();
                    table.expire(now, &mut |id, waiter| expired.push((id, waiter)));
                    for (id, waiter) in expired {
                        let (_, deadline, n) = oracle.remove(&id).unwrap();
                        prop_assert!(deadline <= now && n == waiter);
                    }
                    let late = now - Duration::from_millis(1);
                    prop_assert!(oracle.values().all(|(_, deadline, _)| *deadline > late));
                }
            }
            prop_assert_eq!(table.len(), oracle.len());
        }
        let mut lost = Vec::new();
        table.take_all(&mut |id, waiter| lost.push((id, waiter)));
        lost.sort_unstable();
        prop_assert_eq!(lost, oracle.into_iter().map(|(id, w)| (id, w.2)).collect::<Vec<_>>());
    }
}
