//! Which units of a pool are free: whole chunks, and runs of units in chunks that are split.
//!
//! A chunk is 16 units. A caller takes a whole chunk, or a run of 1 to 15 units that lies in one
//! chunk. A run comes from the fullest split chunk that has room for it, so that the emptier ones
//! become whole again; a whole chunk is split only when no split one has room.
//!
//! Cost: a whole chunk is one push or pop of a lock-free queue. A run looks at each split chunk
//! once (one load) and takes its units by one compare-and-swap. No lock, no allocation.
//!
//! Invariants:
//!
//! 1. A unit is taken by at most one caller.
//! 2. A chunk is in `whole` exactly when all its units are free, but for the moment in which the
//!    thread that frees the last one moves it there. So n runs keep at most n chunks from being
//!    whole: never more than if each had taken a chunk.
//! 3. `used` of a chunk that is not split is all ones; `whole` has room for every chunk.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use crossbeam::queue::ArrayQueue;

use crate::memory::{CHUNK_BYTES, UNIT_BYTES};

/// Units of a chunk.
pub(super) const UNITS_PER_CHUNK: u32 = (CHUNK_BYTES / UNIT_BYTES) as u32;

const _: () = assert!(UNITS_PER_CHUNK == u16::BITS && CHUNK_BYTES.is_multiple_of(UNIT_BYTES));

/// The `used` units of a chunk that is whole, or split and full.
const ALL: u16 = u16::MAX;

/// Units that lie side by side in one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Index in the pool of the first unit.
    pub(super) first: u32,
    /// 1 to 16.
    pub(super) units: u32,
}

impl Run {
    fn chunk(self) -> usize {
        (self.first / UNITS_PER_CHUNK) as usize
    }

    /// The run as bits of its chunk.
    fn mask(self) -> u16 {
        mask_of(self.first % UNITS_PER_CHUNK, self.units)
    }
}

fn mask_of(at: u32, units: u32) -> u16 {
    (ALL >> (UNITS_PER_CHUNK - units)) << at
}

/// Where the lowest run of `units` free units starts, if there is one.
fn place(used: u16, units: u32) -> Option<u32> {
    let free = !used;
    // Bit p stays when the units from p to p + units - 1 are free.
    let starts = (1..units).fold(free, |starts, ahead| starts & (free >> ahead));
    (starts != 0).then(|| starts.trailing_zeros())
}

/// The free units of a pool.
#[derive(Debug)]
pub(super) struct UnitMap {
    whole: ArrayQueue<u32>,
    /// Units in use of each split chunk, a bit for each.
    used: Box<[AtomicU16]>,
    /// A bit for each chunk that is split.
    split: Box<[AtomicU64]>,
}

impl UnitMap {
    /// Room for `chunks_max` chunks, none of which is there yet.
    pub(super) fn new(chunks_max: u32) -> Self {
        let count = chunks_max as usize;
        Self {
            whole: ArrayQueue::new(count.max(1)),
            used: (0..count).map(|_| AtomicU16::new(ALL)).collect(),
            split: (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Chunk number `chunk` is there, and free. Once for each.
    pub(super) fn add(&self, chunk: u32) {
        self.push_whole(chunk);
    }

    /// Takes `units` units, 1 to 16, or `None` when there is no such run. Space that another thread
    /// gives back at the same moment may be missed.
    pub(super) fn take(&self, units: u32) -> Option<Run> {
        debug_assert!((1..=UNITS_PER_CHUNK).contains(&units));
        if units == UNITS_PER_CHUNK {
            let first = self.whole.pop()? * UNITS_PER_CHUNK;
            return Some(Run { first, units });
        }
        self.take_of_split(units).or_else(|| self.split_one(units))
    }

    /// Gives a run back.
    pub(super) fn give_back(&self, run: Run) {
        let chunk = run.chunk();
        if run.units == UNITS_PER_CHUNK {
            return self.push_whole(chunk as u32);
        }
        let (used, mask) = (&self.used[chunk], run.mask());
        // Release: what the caller read or wrote there is before the next owner's writes.
        // `left == 0` is never stored: the chunk turns whole, all ones, in the same step.
        let after = |left: u16| if left == 0 { ALL } else { left };
        let before = used.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |used| {
            debug_assert_eq!(used & mask, mask, "a unit is given back once");
            Some(after(used & !mask))
        });
        if before.is_ok_and(|before| before & !mask == 0) {
            // Only this thread frees the last unit, and no thread takes from a word of all ones:
            // until the push the chunk is this thread's.
            self.split[chunk / 64].fetch_and(!(1 << (chunk % 64)), Ordering::Relaxed);
            self.push_whole(chunk as u32);
        }
    }

    /// Chunks that are whole and free.
    pub(super) fn whole_chunks(&self) -> usize {
        self.whole.len()
    }

    /// Units that are free, in whole and in split chunks.
    pub(super) fn free_units(&self) -> usize {
        let in_split = self.used.iter().map(|used| {
            let used = used.load(Ordering::Relaxed);
            used.count_zeros() as usize
        });
        self.whole.len() * UNITS_PER_CHUNK as usize + in_split.sum::<usize>()
    }

    /// Chunks that there may be.
    pub(super) fn chunks_max(&self) -> usize {
        self.used.len()
    }

    fn take_of_split(&self, units: u32) -> Option<Run> {
        // A failed exchange means that another thread took or gave back units: look again.
        loop {
            let (chunk, used, at) = self.fullest_with(units)?;
            let taken = self.used[chunk].compare_exchange(
                used,
                used | mask_of(at, units),
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            if taken.is_ok() {
                let first = chunk as u32 * UNITS_PER_CHUNK + at;
                return Some(Run { first, units });
            }
        }
    }

    /// The split chunk with the fewest free units that has such a run: its index, its used units
    /// and where the run starts.
    fn fullest_with(&self, units: u32) -> Option<(usize, u16, u32)> {
        let mut best: Option<(usize, u16, u32)> = None;
        for (word, bits) in self.split.iter().enumerate() {
            let mut bits = bits.load(Ordering::Relaxed);
            while bits != 0 {
                let chunk = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                let used = self.used[chunk].load(Ordering::Relaxed);
                let is_fuller =
                    best.is_none_or(|(_, of_best, _)| used.count_ones() > of_best.count_ones());
                if is_fuller && let Some(at) = place(used, units) {
                    best = Some((chunk, used, at));
                }
            }
        }
        best
    }

    fn split_one(&self, units: u32) -> Option<Run> {
        let chunk = self.whole.pop()?;
        // The chunk is this thread's until the store: a word of all ones gives no thread anything.
        self.used[chunk as usize].store(mask_of(0, units), Ordering::Release);
        self.split[chunk as usize / 64].fetch_or(1 << (chunk % 64), Ordering::Relaxed);
        let first = chunk * UNITS_PER_CHUNK;
        Some(Run { first, units })
    }

    fn push_whole(&self, chunk: u32) {
        // Cannot be full: it has room for every chunk, and this one was out, or not there yet.
        let _ = self.whole.push(chunk);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU8;

    use proptest::prelude::*;

    use super::*;

    /// All units of `chunks` chunks are free.
    fn full(chunks: u32) -> UnitMap {
        let map = UnitMap::new(chunks);
        (0..chunks).for_each(|chunk| map.add(chunk));
        map
    }

    /// The lowest free run is found, and a run across the end of a chunk is not one.
    #[test]
    fn runs_are_placed_low_and_inside() {
        let cases = [
            (0, 1, Some(0)),
            (0, 15, Some(0)),
            (0b0000_0000_0000_0101, 1, Some(1)),
            (0b0000_0000_0000_0101, 2, Some(3)),
            (0b1000_0000_0000_0000, 15, Some(0)),
            (0b1000_0000_0000_0001, 15, None),
            (0b0111_1111_1111_1111, 1, Some(15)),
            (0b0111_1111_1111_1111, 2, None),
            (ALL, 1, None),
        ];
        for (used, units, at) in cases {
            assert_eq!(place(used, units), at, "{units} units in {used:016b}");
        }
    }

    /// One small run does not take a chunk each time: 16 units fill one chunk, and a chunk whose
    /// units all came back can be taken whole.
    #[test]
    fn small_runs_share_a_chunk_and_leave_it_whole() {
        let map = full(2);
        let small: Vec<_> = (0..16).map(|_| map.take(1).unwrap()).collect();
        assert_eq!((map.whole_chunks(), map.free_units()), (1, 16));
        let whole = map.take(16).unwrap();
        assert!(map.take(16).is_none() && map.take(1).is_none());
        small.into_iter().for_each(|run| map.give_back(run));
        assert_eq!((map.whole_chunks(), map.free_units()), (1, 16));
        map.give_back(whole);
        assert_eq!((map.whole_chunks(), map.free_units()), (2, 32));
    }

    /// The fullest chunk is used first, so that an emptier one can become whole.
    #[test]
    fn the_fullest_chunk_is_used_first() {
        let map = full(2);
        let (a, b) = (map.take(4).unwrap(), map.take(13).unwrap());
        assert_ne!(a.chunk(), b.chunk());
        assert_eq!(map.take(2).unwrap().chunk(), b.chunk());
        map.give_back(a);
        assert_eq!(map.whole_chunks(), 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take(u32),
        GiveBack(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (1..=UNITS_PER_CHUNK).prop_map(Step::Take),
            2 => any::<usize>().prop_map(Step::GiveBack),
        ];
        proptest::collection::vec(step, 1..200)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 3 } else { 300 }))]

        /// Against a list of booleans: no unit is given twice, a run is refused only when there is
        /// none, and everything comes back.
        #[test]
        fn gives_what_is_free_and_nothing_else(steps in steps()) {
            const CHUNKS: usize = 5;
            let map = full(CHUNKS as u32);
            let mut taken = [[false; UNITS_PER_CHUNK as usize]; CHUNKS];
            let mut held: Vec<Run> = Vec::new();
            for step in steps {
                match step {
                    Step::Take(units) => {
                        let has_run = taken.iter().any(|chunk| {
                            chunk.windows(units as usize).any(|run| !run.contains(&true))
                        });
                        let run = map.take(units);
                        prop_assert_eq!(run.is_some(), has_run, "{} units of {:?}", units, taken);
                        if let Some(run) = run {
                            prop_assert_eq!(run.units, units);
                            let at = (run.first % UNITS_PER_CHUNK) as usize;
                            let place = taken[run.chunk()].get_mut(at..at + units as usize);
                            for unit in place.expect("a run lies in one chunk") {
                                prop_assert!(!std::mem::replace(unit, true), "given twice");
                            }
                            held.push(run);
                        }
                    }
                    Step::GiveBack(_) if held.is_empty() => {}
                    Step::GiveBack(which) => {
                        let run = held.swap_remove(which % held.len());
                        let at = (run.first % UNITS_PER_CHUNK) as usize;
                        taken[run.chunk()][at..at + run.units as usize].fill(false);
                        map.give_back(run);
                    }
                }
                let free = taken.iter().flatten().filter(|unit| !**unit).count();
                let whole = taken.iter().filter(|chunk| !chunk.contains(&true)).count();
                prop_assert_eq!((map.free_units(), map.whole_chunks()), (free, whole));
                prop_assert!(CHUNKS - whole <= held.len(), "n runs keep n chunks at most");
            }
            held.into_iter().for_each(|run| map.give_back(run));
            prop_assert_eq!(map.whole_chunks(), CHUNKS);
        }
    }

    /// Threads that take and give back at random, also each other's runs, never hold a unit at the
    /// same time, and everything comes back.
    #[test]
    fn threads_never_share_a_unit() {
        const CHUNKS: u32 = 3;
        const THREADS: u32 = 4;
        let rounds = if cfg!(miri) { 40 } else { 20_000 };
        let map = full(CHUNKS);
        let owners: Vec<_> = (0..CHUNKS * UNITS_PER_CHUNK)
            .map(|_| AtomicU8::new(0))
            .collect();
        // Runs that one thread hands to the others to give back.
        let handed = ArrayQueue::new(8);
        let units_of = |run: Run| {
            let first = run.first as usize;
            owners[first..first + run.units as usize].iter()
        };
        let give_back = |run: Run| {
            for owner in units_of(run) {
                assert_eq!(owner.fetch_sub(1, Ordering::Relaxed), 1);
            }
            map.give_back(run);
        };
        std::thread::scope(|scope| {
            for thread in 1..=THREADS {
                let (map, handed, units_of, give_back) = (&map, &handed, &units_of, &give_back);
                scope.spawn(move || {
                    let mut random = thread;
                    for _ in 0..rounds {
                        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        let Some(run) = map.take(1 + (random >> 16) % UNITS_PER_CHUNK) else {
                            handed.pop().into_iter().for_each(give_back);
                            continue;
                        };
                        for owner in units_of(run) {
                            assert_eq!(owner.fetch_add(1, Ordering::Relaxed), 0, "held twice");
                        }
                        if let Some(other) = handed.force_push(run) {
                            give_back(other);
                        }
                    }
                });
            }
        });
        std::iter::from_fn(|| handed.pop()).for_each(give_back);
        assert_eq!(map.whole_chunks(), CHUNKS as usize);
    }
}
