//! A budget for every source, in memory of a fixed size.
//!
//! A keyed hash that no sender can predict gives a key one bucket of eight words; a word carries 16
//! bits of the hash beside its time. Buckets come in two generations. A charge goes to the active
//! one; the other one still counts until all its words are past, so that new seeds forget no
//! source.
//!
//! 1. A key has at most one word in a generation: when two CPUs place a key at the same moment, one
//!    of them gives its word back.
//! 2. A bucket with eight busy words refuses new keys.
//! 3. [`Limit::NONE`] reads and writes nothing.
//! 4. A `now_ns` may be a little late, as it is with several threads. After 9 hours a word's time
//!    would seem past.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::mix::mix;
use super::{Limit, REACH_MAX_NS, TRIES};
use crate::siphash::Key;
use crate::source::{LEVELS_MAX, Source};

/// Words of a bucket.
pub const SLOTS: usize = 8;

const TAG_SHIFT: u32 = 48;
const TIME_MASK: u64 = (1 << TAG_SHIFT) - 1;

/// What a key is charged for. One source has a budget for each purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u64)]
pub enum Purpose {
    /// QUIC connections of a source.
    Quic = 1,
    /// TCP connections of a source.
    Tcp = 2,
    /// Connections of a registry peer that proved itself; the key is its node tag and 0.
    Peer = 3,
    /// Uses of one proof; the key is its first 16 bytes.
    Proof = 4,
    /// Packets of one connection ID that this node issued; the key is its 16 bytes.
    ConnectionId = 5,
}

/// The memory of a sketch: in this process, or in a map that the kernel shares.
pub trait Buckets {
    /// Number of buckets of both generations together: twice a power of two.
    fn count(&self) -> usize;
    /// One bucket.
    ///
    /// # Panics
    ///
    /// If `index` is not below [`Buckets::count`].
    fn bucket(&self, index: usize) -> &[AtomicU64; SLOTS];
}

/// One bucket, on a cache line of its own. Laid out as `struct edge_bucket`.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Bucket([AtomicU64; SLOTS]);

/// Buckets in this process's own memory.
pub struct OwnedBuckets(Box<[Bucket]>);

impl OwnedBuckets {
    /// Two generations of empty buckets. `buckets` is the number in each, rounded up to a power of
    /// two; each takes 128 bytes.
    pub fn new(buckets: usize) -> Self {
        let count = buckets.max(1).next_power_of_two() * 2;
        Self((0..count).map(|_| Bucket::default()).collect())
    }
}

impl fmt::Debug for OwnedBuckets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnedBuckets({})", self.0.len())
    }
}

impl Buckets for OwnedBuckets {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn bucket(&self, index: usize) -> &[AtomicU64; SLOTS] {
        &self.0[index].0
    }
}

/// The buckets, and the state by which they are read. Callers make one for every use, which is
/// cheap.
#[derive(Debug)]
pub struct Sketch<'l, L: Buckets + ?Sized> {
    /// Both generations.
    pub buckets: &'l L,
    /// Seed of each generation.
    pub seed: [Key; 2],
    /// Generation that is charged: 0 or 1.
    pub active: usize,
    /// Until when the other generation counts as well, in nanoseconds of CLOCK_MONOTONIC.
    pub old_until_ns: u64,
}

/// Where a key belongs in one generation.
struct Place<'l> {
    bucket: &'l [AtomicU64; SLOTS],
    /// 1 to 65,535.
    tag: u64,
    /// The slot that is visited first.
    first: usize,
}

/// What a bucket holds of a key.
struct Lookup {
    /// The slot and the word with the key's tag.
    own: Option<(usize, u64)>,
    /// The first idle slot and its word.
    idle: Option<(usize, u64)>,
}

/// The result of a lookup that did not refuse: how far ahead the key is, and the slot for its word.
struct Admission {
    ahead_ns: u64,
    /// The slot and its present word; none if the bucket has no room.
    slot: Option<(usize, u64)>,
    /// The slot held another key, or was empty.
    fresh: bool,
}

impl<L: Buckets + ?Sized> Sketch<'_, L> {
    /// Whether the key `words` has something left of `limit`. Takes nothing. `now_ns` is
    /// CLOCK_MONOTONIC.
    pub fn look(
        &self,
        words: [u64; 2],
        purpose: Purpose,
        level: usize,
        limit: Limit,
        now_ns: u64,
    ) -> bool {
        if limit.interval_ns == 0 {
            return true;
        }
        let key = key_words(words, purpose, level);
        let place = self.place(self.active, &key);
        self.admission(&place, &key, limit, now_ns).is_some()
    }

    /// Takes one from what the key `words` has left of `limit`. False: refused, and nothing is
    /// taken.
    pub fn charge(
        &self,
        words: [u64; 2],
        purpose: Purpose,
        level: usize,
        limit: Limit,
        now_ns: u64,
    ) -> bool {
        if limit.interval_ns == 0 {
            return true;
        }
        let key = key_words(words, purpose, level);
        let place = self.place(self.active, &key);
        for _ in 0..TRIES {
            let Some(admission) = self.admission(&place, &key, limit, now_ns) else {
                return false;
            };
            let Some((slot, present)) = admission.slot else {
                return false;
            };
            let paid = now_ns
                .wrapping_add(admission.ahead_ns)
                .wrapping_add(limit.interval_ns);
            let next = place.tag << TAG_SHIFT | paid & TIME_MASK;
            if place.replace(slot, present, next)
                && (!admission.fresh || place.keep_only_one(slot, next))
            {
                return true;
            }
        }
        false
    }

    /// [`Sketch::look`] at every level of a source.
    pub fn look_source(
        &self,
        source: Source,
        purpose: Purpose,
        limits: &[Limit; LEVELS_MAX],
        now_ns: u64,
    ) -> bool {
        (0..source.levels()).all(|level| {
            self.look(
                source.at_level(level).words(),
                purpose,
                level,
                limits[level],
                now_ns,
            )
        })
    }

    /// [`Sketch::charge`] at every level of a source, the narrowest first; the first refusal ends
    /// it.
    pub fn charge_source(
        &self,
        source: Source,
        purpose: Purpose,
        limits: &[Limit; LEVELS_MAX],
        now_ns: u64,
    ) -> bool {
        (0..source.levels()).all(|level| {
            self.charge(
                source.at_level(level).words(),
                purpose,
                level,
                limits[level],
                now_ns,
            )
        })
    }

    /// Clears the generation that is not charged. The owner must call it before that generation
    /// becomes active.
    pub fn clear_idle(&self) {
        let half = self.buckets.count() / 2;
        let idle = self.active ^ 1;
        for index in idle * half..(idle + 1) * half {
            for word in self.buckets.bucket(index) {
                word.store(0, Ordering::Relaxed);
            }
        }
    }

    fn place(&self, generation: usize, key: &[u64; 3]) -> Place<'_> {
        let half = self.buckets.count() / 2;
        let [a, b, kind] = *key;
        let hash = mix(self.seed[generation], a, b, kind);
        let index = generation * half + (hash as usize & (half - 1));
        Place {
            bucket: self.buckets.bucket(index),
            tag: (hash >> TAG_SHIFT).max(1),
            first: (hash >> 40) as usize % SLOTS,
        }
    }

    /// None: refused.
    fn admission(
        &self,
        place: &Place<'_>,
        key: &[u64; 3],
        limit: Limit,
        now_ns: u64,
    ) -> Option<Admission> {
        let lookup = place.look_up(now_ns);
        let mut admission = match lookup.own {
            Some((_, word)) => Admission {
                ahead_ns: ahead(word, now_ns),
                slot: lookup.own,
                fresh: false,
            },
            None => {
                let before = self.seen_before(key, now_ns);
                if before.is_none() && lookup.idle.is_none() {
                    return None;
                }
                Admission {
                    ahead_ns: before.unwrap_or(0),
                    slot: lookup.idle,
                    fresh: true,
                }
            }
        };
        admission.ahead_ns = limit.ahead_ns(admission.ahead_ns);
        (admission.ahead_ns <= limit.tolerance_ns).then_some(admission)
    }

    /// How far ahead the other generation has the key. None if it does not have the key, or no
    /// longer counts.
    fn seen_before(&self, key: &[u64; 3], now_ns: u64) -> Option<u64> {
        if now_ns >= self.old_until_ns {
            return None;
        }
        let (_, word) = self.place(self.active ^ 1, key).look_up(now_ns).own?;
        Some(ahead(word, now_ns))
    }
}

impl Place<'_> {
    fn look_up(&self, now_ns: u64) -> Lookup {
        let mut idle = None;
        for slot in self.visit() {
            let word = self.bucket[slot].load(Ordering::SeqCst);
            if word >> TAG_SHIFT == self.tag {
                return Lookup {
                    own: Some((slot, word)),
                    idle,
                };
            }
            if idle.is_none() && ahead(word, now_ns) == 0 {
                idle = Some((slot, word));
            }
        }
        Lookup { own: None, idle }
    }

    fn visit(&self) -> impl Iterator<Item = usize> + use<> {
        let first = self.first;
        (0..SLOTS).map(move |step| (first + step) % SLOTS)
    }

    fn replace(&self, slot: usize, present: u64, next: u64) -> bool {
        // Sequentially consistent, like the kernel's: when two CPUs place the same key in two
        // slots, at least one of them must see the other's word.
        self.bucket[slot]
            .compare_exchange(present, next, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    /// Gives a fresh slot back if another CPU placed the key in a second one at the same time.
    /// True: the key has only this slot.
    fn keep_only_one(&self, slot: usize, word: u64) -> bool {
        let alone = self.visit().all(|other| {
            other == slot || self.bucket[other].load(Ordering::SeqCst) >> TAG_SHIFT != self.tag
        });
        if !alone {
            // Fails if another CPU charged the word meanwhile: then the charge that is not admitted
            // here stays paid.
            self.replace(slot, word, 0);
        }
        alone
    }
}

fn key_words(words: [u64; 2], purpose: Purpose, level: usize) -> [u64; 3] {
    [words[0], words[1], (purpose as u64) << 8 | level as u64]
}

/// How far the word is ahead of now; 0: idle.
fn ahead(word: u64, now_ns: u64) -> u64 {
    // The difference would make an empty word look busy whenever the clock's low bits are high.
    if word == 0 {
        return 0;
    }
    let ahead = word.wrapping_sub(now_ns) & TIME_MASK;
    if ahead <= REACH_MAX_NS { ahead } else { 0 }
}

#[cfg(test)]
mod tests;
