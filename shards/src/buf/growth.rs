//! How much of a pool's memory the system has given: pages are asked for when they are needed, a
//! step before.
//!
//! The first touch of a page costs the kernel its zeroing, and 4.4 ms for 2 MiB on a guest whose
//! host reclaims free pages. So a thread of its own makes the next pages present while enough are
//! left, and ends when enough are. A shard makes them itself only when it outruns that thread.
//!
//! Invariants:
//!
//! 1. A chunk is claimed once, by one thread, which makes its pages present and then publishes it.
//! 2. At most one thread runs ahead.

use std::ops::Range;
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
    /// Chunks from the pool's first on that are present, or that a thread has claimed.
    claimed: AtomicU32,
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
            ahead_chunks: ahead_chunks.min(chunks_max),
            is_ahead_running: AtomicBool::new(false),
            cpus: sys::allowed_cpus(),
        }
    }

    /// Chunks that are not present yet.
    #[inline]
    pub(super) fn absent_chunks(&self) -> u32 {
        self.chunks_max - self.claimed.load(Ordering::Relaxed)
    }

    /// Makes the next chunks present; whether there were any.
    pub(super) fn step(&self, mapping: &Mapping, units: &UnitMap) -> bool {
        let Some(chunks) = self.claim() else {
            return false;
        };
        let bytes = |chunks: u32| chunks as usize * CHUNK_BYTES;
        mapping.populate(bytes(chunks.start), bytes(chunks.end - chunks.start));
        chunks.for_each(|chunk| units.add(chunk));
        true
    }

    /// Makes chunks present until enough are free.
    pub(super) fn fill(&self, mapping: &Mapping, units: &UnitMap) {
        while self.is_low(units) && self.step(mapping, units) {}
    }

    /// Whether a thread should run ahead now; the caller starts one that ends with
    /// [`Self::end_ahead`].
    #[inline]
    pub(super) fn begin_ahead(&self, units: &UnitMap) -> bool {
        self.absent_chunks() > 0
            && units.whole_chunks() < (self.ahead_chunks / 2) as usize
            && !self.is_ahead_running.swap(true, Ordering::Acquire)
    }

    /// Lets the calling thread run on every core that the pool's maker might use.
    pub(super) fn leave_core(&self) {
        // Where the kernel refuses, the thread shares the shard's core.
        sys::allow_cpus(&self.cpus);
    }

    /// No thread runs ahead any more.
    pub(super) fn end_ahead(&self) {
        self.is_ahead_running.store(false, Ordering::Release);
    }

    fn is_low(&self, units: &UnitMap) -> bool {
        units.whole_chunks() < self.ahead_chunks as usize
    }

    fn claim(&self) -> Option<Range<u32>> {
        let end = |claimed: u32| self.chunks_max.min(claimed + STEP_CHUNKS);
        let claimed = self
            .claimed
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |claimed| {
                (claimed < self.chunks_max).then(|| end(claimed))
            });
        claimed.ok().map(|start| start..end(start))
    }
}
