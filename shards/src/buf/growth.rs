//! How much of a pool's memory the system has given: pages are asked for when they are needed, a
//! step before.
//!
//! The first touch of a page costs the kernel its zeroing, and 4.4 ms for 2 MiB on a guest whose
//! host reclaims free pages. So a thread of its own makes pages present, and a shard never waits
//! for them when it takes chunks: it gets chunks without pages when no others are left, and the
//! thread runs after it. A body of 128 MiB takes all its chunks at its first byte. While a shard
//! made their pages present it received nothing for 250 ms, and the sender took that for a slow
//! path: 98 instead of 207 Mbit/s over 150 ms with 0.3 % loss.
//!
//! Invariants:
//!
//! 1. A chunk is claimed once, by one thread, which then publishes it as free.
//! 2. At most one thread makes pages present. It goes through the pool in order, and first to the
//!    end of the claimed ones.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::mapping::{HUGE_PAGE_BYTES, Mapping};
use super::units::UnitMap;
use crate::memory::CHUNK_BYTES;
use crate::sys;

/// Chunks that are made present at once: a huge page.
const STEP_CHUNKS: u32 = (HUGE_PAGE_BYTES / CHUNK_BYTES) as u32;

#[derive(Debug)]
pub(super) struct Growth {
    chunks_max: u32,
    /// Chunks from the pool's first on that are free or taken.
    claimed: AtomicU32,
    /// Chunks from the pool's first on that have their pages; the thread writes it.
    present: AtomicU32,
    /// Free chunks that are kept present, while there are more to come.
    ahead_chunks: u32,
    is_ahead_running: AtomicBool,
    /// Where the thread may run: not on the core of a shard alone, whose affinity it inherits.
    cpus: Vec<usize>,
}

impl Growth {
    /// Of `chunks_max` chunks, `ahead_chunks` are to be free and present.
    pub(super) fn new(chunks_max: u32, ahead_chunks: u32) -> Self {
        Self {
            chunks_max,
            claimed: AtomicU32::new(0),
            present: AtomicU32::new(0),
            ahead_chunks: ahead_chunks.min(chunks_max),
            is_ahead_running: AtomicBool::new(false),
            cpus: sys::allowed_cpus(),
        }
    }

    /// Chunks that are neither free nor taken.
    #[inline]
    pub(super) fn absent_chunks(&self) -> u32 {
        self.chunks_max - self.claimed.load(Ordering::Relaxed)
    }

    /// Chunks that have pages, or are taken and will have them soon.
    pub(super) fn present_chunks(&self) -> u32 {
        let present = self.present.load(Ordering::Relaxed);
        present.max(self.claimed.load(Ordering::Relaxed))
    }

    /// Makes the next chunks free, with or without pages; whether there were any.
    pub(super) fn step(&self, units: &UnitMap) -> bool {
        let claimed = self.claimed.load(Ordering::Relaxed);
        claimed < self.chunks_max && {
            self.claim(claimed, units);
            true
        }
    }

    /// Whether a thread should make pages present now; the caller starts one that calls
    /// [`Self::fill`] and ends with [`Self::end_ahead`].
    #[inline]
    pub(super) fn begin_ahead(&self, units: &UnitMap) -> bool {
        let present = self.present.load(Ordering::Relaxed);
        if present == self.chunks_max {
            return false;
        }
        let is_behind = present < self.claimed.load(Ordering::SeqCst);
        let is_due = is_behind || units.whole_chunks() < (self.ahead_chunks / 2) as usize;
        is_due && !self.is_ahead_running.swap(true, Ordering::SeqCst)
    }

    /// Makes pages present until all claimed chunks have theirs and enough chunks are free. One
    /// thread at a time.
    pub(super) fn fill(&self, mapping: &Mapping, units: &UnitMap) {
        loop {
            let present = self.present.load(Ordering::Relaxed);
            let claimed = self.claimed.load(Ordering::Relaxed);
            let is_behind = present < claimed;
            let is_low = units.whole_chunks() < self.ahead_chunks as usize;
            if present == self.chunks_max || !(is_behind || is_low) {
                break;
            }
            let end = self.chunks_max.min(present + STEP_CHUNKS);
            let bytes = |chunks: u32| chunks as usize * CHUNK_BYTES;
            mapping.populate(bytes(present), bytes(end - present));
            self.present.store(end, Ordering::Relaxed);
            if !is_behind {
                self.claim(claimed, units);
            }
        }
    }

    /// Lets the calling thread run on every core that the pool's maker might use.
    pub(super) fn leave_core(&self) {
        // Where the kernel refuses, the thread shares the shard's core.
        sys::allow_cpus(&self.cpus);
    }

    /// No thread runs ahead any more. The caller looks once more whether one should: a shard that
    /// claimed chunks a moment before has seen this one run. (One order for flag and count: either
    /// the shard sees the flag gone, or the caller sees the claim.)
    pub(super) fn end_ahead(&self) {
        self.is_ahead_running.store(false, Ordering::SeqCst);
    }

    /// Claims the chunks after `claimed`, unless another thread did.
    fn claim(&self, claimed: u32, units: &UnitMap) {
        let end = self.chunks_max.min(claimed + STEP_CHUNKS);
        let ordering = Ordering::SeqCst;
        let claim = self
            .claimed
            .compare_exchange(claimed, end, ordering, ordering);
        if claim.is_ok() {
            (claimed..end).for_each(|chunk| units.add(chunk));
        }
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::buf::units::UNITS_PER_CHUNK;
    use crate::memory::HugePages;

    // Protects a shard from waiting for the system: it takes a body's chunks without their pages,
    // and the thread makes those present before it goes ahead.
    #[test]
    fn chunks_are_taken_without_pages_and_get_them_later() {
        const CHUNKS: u32 = 40;
        let mapping = Mapping::for_chunks(CHUNKS as usize * CHUNK_BYTES, HugePages::Never).unwrap();
        let (growth, units) = (Growth::new(CHUNKS, 4), UnitMap::new(CHUNKS));
        let resident = || mapping.resident_bytes() / CHUNK_BYTES;
        growth.fill(&mapping, &units);
        assert_eq!((resident(), units.whole_chunks()), (4, 4));
        assert!(!growth.begin_ahead(&units), "nothing was taken");

        // A body takes ten.
        while units.whole_chunks() < 10 {
            assert!(growth.step(&units));
        }
        (0..10).for_each(|_| assert!(units.take(UNITS_PER_CHUNK).is_some()));
        assert_eq!((resident(), growth.absent_chunks()), (4, CHUNKS - 10));
        assert!(growth.begin_ahead(&units));
        assert!(!growth.begin_ahead(&units), "one thread at a time");
        growth.fill(&mapping, &units);
        growth.end_ahead();
        assert_eq!((resident(), units.whole_chunks()), (14, 4));

        // Up to the last.
        while growth.step(&units) {}
        assert_eq!(resident(), 14);
        assert!(growth.begin_ahead(&units));
        growth.fill(&mapping, &units);
        growth.end_ahead();
        assert_eq!((resident(), growth.absent_chunks()), (CHUNKS as usize, 0));
        assert!(!growth.begin_ahead(&units), "all have pages");
    }
}
