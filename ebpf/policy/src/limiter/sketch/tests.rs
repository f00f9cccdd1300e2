//! Words and slots, bit by bit as `docs/reference/edge.md` has them.

use std::cell::Cell;

use super::*;
use crate::limiter::{CLOCK_SLACK_NS, charge_word};

const SEED: [Key; 2] = [Key { k0: 1, k1: 2 }, Key { k0: 3, k1: 4 }];
const KEY: [u64; 2] = [0x1111, 0x2222];
const LIMIT: Limit = Limit {
    interval_ns: 10,
    tolerance_ns: 20,
};
const NOW: u64 = 1_000_000;

fn sketch(buckets: &OwnedBuckets) -> Sketch<'_, OwnedBuckets> {
    Sketch {
        buckets,
        seed: SEED,
        active: 0,
        old_until_ns: 0,
    }
}

fn hash(generation: usize, key: [u64; 2], purpose: Purpose, level: u64) -> u64 {
    let kind = (purpose as u64) << 8 | level;
    mix(SEED[generation], key[0], key[1], kind)
}

fn busy_word(tag: u64, until_ns: u64) -> u64 {
    tag << 48 | until_ns & TIME_MASK
}

/// Fills every slot of a bucket with busy words of other keys.
fn fill(bucket: &[AtomicU64; SLOTS], but: u64) {
    for (slot, word) in bucket.iter().enumerate() {
        let tag = (but + 1 + slot as u64) % 0xffff + 1;
        word.store(busy_word(tag, NOW + 100), Ordering::Relaxed);
    }
}

fn words(bucket: &[AtomicU64; SLOTS]) -> [u64; SLOTS] {
    std::array::from_fn(|slot| bucket[slot].load(Ordering::Relaxed))
}

#[test]
fn a_charge_writes_the_specified_word() {
    let buckets = OwnedBuckets::new(1 << 6);
    assert_eq!(buckets.count(), 1 << 7);
    let sketch = sketch(&buckets);
    for (purpose, level) in [
        (Purpose::Quic, 0),
        (Purpose::Tcp, 2),
        (Purpose::ConnectionId, 0),
    ] {
        let hash = hash(0, KEY, purpose, level as u64);
        let word = &buckets.bucket(hash as usize % 64)[(hash >> 40) as usize & 7];
        assert!(sketch.charge(KEY, purpose, level, LIMIT, NOW));
        assert_eq!(
            word.load(Ordering::Relaxed),
            busy_word((hash >> 48).max(1), NOW + 10)
        );
        assert!(sketch.charge(KEY, purpose, level, LIMIT, NOW + 1));
        assert_eq!(
            word.load(Ordering::Relaxed),
            busy_word((hash >> 48).max(1), NOW + 20)
        );
    }
}

#[test]
fn a_look_writes_nothing() {
    let buckets = OwnedBuckets::new(1);
    let sketch = sketch(&buckets);
    assert!(sketch.look(KEY, Purpose::Quic, 0, LIMIT, NOW));
    assert_eq!(words(buckets.bucket(0)), [0; SLOTS]);
}

#[test]
fn no_limit_touches_nothing() {
    let buckets = OwnedBuckets::new(1);
    let sketch = sketch(&buckets);
    fill(buckets.bucket(0), 0);
    let before = words(buckets.bucket(0));
    assert!(sketch.look(KEY, Purpose::Quic, 0, Limit::NONE, NOW));
    assert!(sketch.charge(KEY, Purpose::Quic, 0, Limit::NONE, NOW));
    assert_eq!(words(buckets.bucket(0)), before);
}

// Protects against failing open: a full set of the reference lets every source pass.
#[test]
fn a_full_line_refuses_new_keys() {
    let buckets = OwnedBuckets::new(1);
    let sketch = sketch(&buckets);
    fill(buckets.bucket(0), hash(0, KEY, Purpose::Quic, 0) >> 48);
    assert!(!sketch.look(KEY, Purpose::Quic, 0, LIMIT, NOW));
    assert!(!sketch.charge(KEY, Purpose::Quic, 0, LIMIT, NOW));
    // Once its keys are idle, another key may take their slots.
    assert!(sketch.look(KEY, Purpose::Quic, 0, LIMIT, NOW + 100));
    assert!(sketch.charge(KEY, Purpose::Quic, 0, LIMIT, NOW + 100));
}

// Protects the limits through a turn: a key that only the other generation knows has no word that
// it could be charged to.
#[test]
fn a_full_line_charges_no_key_of_the_generation_that_is_left() {
    // Whether the other generation counts; whether a look, which takes nothing, finds a budget.
    for (old_until_ns, looks) in [(NOW + 30, true), (NOW, false)] {
        let buckets = OwnedBuckets::new(1);
        let mut sketch = sketch(&buckets);
        assert!(sketch.charge(KEY, Purpose::Quic, 0, LIMIT, NOW));
        (sketch.active, sketch.old_until_ns) = (1, old_until_ns);
        fill(buckets.bucket(1), hash(1, KEY, Purpose::Quic, 0) >> 48);
        let before = words(buckets.bucket(1));
        assert_eq!(sketch.look(KEY, Purpose::Quic, 0, LIMIT, NOW), looks);
        assert!(!sketch.charge(KEY, Purpose::Quic, 0, LIMIT, NOW));
        assert_eq!(words(buckets.bucket(1)), before);
    }
}

#[test]
fn slots_are_visited_from_the_hash_on() {
    let buckets = OwnedBuckets::new(1);
    let sketch = sketch(&buckets);
    let hash = hash(0, KEY, Purpose::Quic, 0);
    let (tag, first) = (hash >> 48, (hash >> 40) as usize & 7);
    fill(buckets.bucket(0), tag);
    let last = &buckets.bucket(0)[(first + 7) % 8];
    last.store(0, Ordering::Relaxed);
    assert!(sketch.charge(KEY, Purpose::Quic, 0, LIMIT, NOW));
    assert_eq!(last.load(Ordering::Relaxed), busy_word(tag, NOW + 10));
    // A key keeps its word although an idle slot comes before it.
    buckets.bucket(0)[first].store(0, Ordering::Relaxed);
    assert!(sketch.charge(KEY, Purpose::Quic, 0, LIMIT, NOW));
    assert_eq!(last.load(Ordering::Relaxed), busy_word(tag, NOW + 20));
}

#[test]
fn time_wraps_at_48_bits() {
    for now_ns in [(1 << 48) - 5, (1 << 48) - 1, 3 << 48, (9 << 48) - 10] {
        let buckets = OwnedBuckets::new(1);
        let sketch = sketch(&buckets);
        for expected in [true, true, true, false] {
            assert_eq!(
                sketch.charge(KEY, Purpose::Quic, 0, LIMIT, now_ns),
                expected,
                "{now_ns}"
            );
        }
        assert!(sketch.charge(KEY, Purpose::Quic, 0, LIMIT, now_ns + 10));
        assert!(!sketch.charge(KEY, Purpose::Quic, 0, LIMIT, now_ns + 10));
    }
}

// Protects sources after wrong rates were taken back, and long after the node died: no word refuses
// for longer than its limit.
#[test]
fn a_word_that_its_limit_cannot_have_written_counts_as_a_spent_burst() {
    const FOREVER: Limit = Limit {
        interval_ns: 1 << 40,
        tolerance_ns: 1 << 45,
    };
    let now_ns = 1 << 50;
    let reach_ns = LIMIT.reach_ns() + CLOCK_SLACK_NS;
    for (ahead_ns, admits) in [(reach_ns, false), (reach_ns + 1, true), (1 << 46, true)] {
        let buckets = OwnedBuckets::new(1);
        let sketch = sketch(&buckets);
        assert!(sketch.charge(KEY, Purpose::Quic, 0, FOREVER, now_ns));
        let word = buckets
            .bucket(0)
            .iter()
            .find(|word| word.load(Ordering::Relaxed) != 0);
        let tag = word.unwrap().load(Ordering::Relaxed) >> TAG_SHIFT;
        word.unwrap()
            .store(busy_word(tag, now_ns + ahead_ns), Ordering::Relaxed);
        assert_eq!(
            sketch.look(KEY, Purpose::Quic, 0, LIMIT, now_ns),
            admits,
            "{ahead_ns}"
        );
        assert_eq!(
            sketch.charge(KEY, Purpose::Quic, 0, LIMIT, now_ns),
            admits,
            "{ahead_ns}"
        );
        // One, and not a burst.
        assert!(
            !sketch.charge(KEY, Purpose::Quic, 0, LIMIT, now_ns),
            "{ahead_ns}"
        );
    }
}

// The same for a budget of all.
#[test]
fn a_budget_that_its_limit_cannot_have_spent_counts_as_a_spent_burst() {
    let now_ns = 1 << 50;
    let reach_ns = LIMIT.reach_ns() + CLOCK_SLACK_NS;
    for (ahead_ns, admits) in [
        (reach_ns, false),
        (reach_ns + 1, true),
        (u64::MAX - now_ns, true),
    ] {
        let word = AtomicU64::new(now_ns + ahead_ns);
        assert_eq!(charge_word(&word, LIMIT, now_ns), admits, "{ahead_ns}");
        assert!(!charge_word(&word, LIMIT, now_ns), "{ahead_ns}");
    }
}

#[test]
fn words_are_busy_within_their_reach() {
    let cases = [
        (0, 5, 0),
        (0, (1 << 48) - 5, 0),
        (busy_word(1, 100), 100, 0),
        (busy_word(1, 100), 99, 1),
        (busy_word(1, 100), 101, 0),
        (busy_word(1, 2 << 46), 1 << 46, 1 << 46),
        (busy_word(1, 2 << 46), (1 << 46) - 1, 0),
        (busy_word(1, 3), (1 << 48) - 4, 7),
    ];
    for (word, now_ns, expected) in cases {
        assert_eq!(ahead(word, now_ns), expected, "{word:x} at {now_ns}");
    }
}

#[test]
fn the_generation_that_is_left_counts_for_a_while() {
    let buckets = OwnedBuckets::new(1);
    let mut sketch = sketch(&buckets);
    while sketch.charge(KEY, Purpose::Quic, 0, LIMIT, NOW) {}
    sketch.active = 1;
    assert!(
        sketch.look(KEY, Purpose::Quic, 0, LIMIT, NOW),
        "it counts no longer"
    );
    sketch.old_until_ns = NOW + 30;
    assert!(!sketch.look(KEY, Purpose::Quic, 0, LIMIT, NOW));
    assert!(!sketch.charge(KEY, Purpose::Quic, 0, LIMIT, NOW + 9));
    // The first charge carries the key's debt into the active generation.
    assert!(sketch.charge(KEY, Purpose::Quic, 0, LIMIT, NOW + 10));
    let hash = hash(1, KEY, Purpose::Quic, 0);
    let word = buckets.bucket(1)[(hash >> 40) as usize & 7].load(Ordering::Relaxed);
    assert_eq!(word, busy_word(hash >> 48, NOW + 40));
    assert!(!sketch.charge(KEY, Purpose::Quic, 0, LIMIT, NOW + 10));
}

#[test]
fn only_the_idle_generation_is_cleared() {
    let buckets = OwnedBuckets::new(4);
    let mut sketch = sketch(&buckets);
    (0..buckets.count()).for_each(|index| fill(buckets.bucket(index), 0));
    sketch.active = 1;
    sketch.clear_idle();
    for index in 0..4 {
        assert_eq!(words(buckets.bucket(index)), [0; SLOTS]);
        assert!(
            words(buckets.bucket(4 + index))
                .iter()
                .all(|&word| word != 0)
        );
    }
}

// The interleaving step by step: two threads see no word of the key, and place it in different
// slots.
#[test]
fn a_key_placed_twice_is_given_back() {
    let buckets = OwnedBuckets::new(1);
    let sketch = sketch(&buckets);
    let place = sketch.place(0, &key_words(KEY, Purpose::Quic, 0));
    let (slot, present) = place.look_up(NOW).idle.unwrap();
    let theirs = busy_word(place.tag, NOW + 10);
    let other = &buckets.bucket(0)[(slot + 3) % SLOTS];
    other.store(theirs, Ordering::Relaxed);

    assert!(place.replace(slot, present, theirs + 1));
    assert!(!place.keep_only_one(slot, theirs + 1));
    assert_eq!(buckets.bucket(0)[slot].load(Ordering::Relaxed), 0);
    assert_eq!(other.load(Ordering::Relaxed), theirs);
}

/// Buckets in which another CPU places a key while this one is between its look at the active
/// generation and its compare-and-swap: when it looks at the other generation.
struct Contested {
    buckets: OwnedBuckets,
    /// The slot of bucket 0 and the word that the other CPU writes there, once.
    theirs: Cell<Option<(usize, u64)>>,
}

impl Buckets for Contested {
    fn count(&self) -> usize {
        self.buckets.count()
    }

    fn bucket(&self, index: usize) -> &[AtomicU64; SLOTS] {
        if index == 1
            && let Some((slot, word)) = self.theirs.take()
        {
            self.buckets.bucket(0)[slot].store(word, Ordering::SeqCst);
        }
        self.buckets.bucket(index)
    }
}

// Protects a limit from CPUs that place a key at the same moment: the charge that finds a second
// placement gives its own back, and pays at the other.
#[test]
fn a_charge_keeps_no_second_placement() {
    let hash = hash(0, KEY, Purpose::Quic, 0);
    let (tag, first) = (hash >> 48, (hash >> 40) as usize & 7);
    // Admissions that are left beside theirs; whether the charge gets one, and the word then.
    for (burst, is_admitted, paid_until_ns) in [(1, false, NOW + 10), (2, true, NOW + 20)] {
        let theirs = ((first + 3) % SLOTS, busy_word(tag, NOW + 10));
        let contested = Contested {
            buckets: OwnedBuckets::new(1),
            theirs: Cell::new(Some(theirs)),
        };
        let sketch = Sketch {
            buckets: &contested,
            seed: SEED,
            active: 0,
            old_until_ns: u64::MAX,
        };
        let limit = Limit {
            interval_ns: 10,
            tolerance_ns: 10 * (burst - 1),
        };
        let admitted = sketch.charge(KEY, Purpose::Quic, 0, limit, NOW);
        assert_eq!(admitted, is_admitted, "burst {burst}");
        let mut expected = [0; SLOTS];
        expected[theirs.0] = busy_word(tag, paid_until_ns);
        assert_eq!(words(contested.bucket(0)), expected, "burst {burst}");
    }
}

#[test]
fn a_source_pays_at_all_its_levels() {
    let buckets = OwnedBuckets::new(1 << 8);
    let sketch = sketch(&buckets);
    let limits = [LIMIT, LIMIT.scaled(2), LIMIT.scaled(4)];
    let source = |last: u16| Source::of(format!("2001:db8:0:{last:x}::1").parse().unwrap());
    let admitted = |source| {
        (0..100)
            .filter(|_| {
                let look = sketch.look_source(source, Purpose::Quic, &limits, NOW);
                let charge = sketch.charge_source(source, Purpose::Quic, &limits, NOW);
                assert_eq!(look, charge);
                charge
            })
            .count()
    };
    // Bursts are 3 for a /64, 6 for a /56, 12 for the /48.
    assert_eq!(admitted(source(0x0001)), 3);
    assert_eq!(admitted(source(0x0002)), 3);
    assert_eq!(admitted(source(0x0003)), 0, "its /56 has nothing left");
    assert_eq!(admitted(source(0x0101)), 3);
    assert_eq!(admitted(source(0x0201)), 3);
    assert_eq!(admitted(source(0x0301)), 0, "its /48 has nothing left");
}
