//! How many connections each source has, exactly.
//!
//! 1. A source without connections is not in the map.
//! 2. No count passes the cap, and no more than `sources_max` sources are counted.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::source::Source;

#[derive(Debug)]
pub(super) struct Counts {
    /// 0: no cap.
    connections_max: AtomicU32,
    sources_max: usize,
    by_source: Mutex<BTreeMap<Source, u32>>,
}

impl Counts {
    /// With `connections_max` 0 there is no cap.
    pub(super) fn new(connections_max: u32, sources_max: usize) -> Self {
        Self {
            connections_max: AtomicU32::new(connections_max),
            sources_max,
            by_source: Mutex::default(),
        }
    }

    /// Sets the cap. A source that has more connections keeps them.
    pub(super) fn set_cap(&self, connections_max: u32) {
        self.connections_max
            .store(connections_max, Ordering::Relaxed);
    }

    /// Counts a connection. False: refused, and nothing is counted.
    pub(super) fn open(&self, source: Source) -> bool {
        let mut counts = self.lock();
        let sources = counts.len();
        match counts.entry(source.cap_key()) {
            Entry::Vacant(entry) if sources < self.sources_max => {
                entry.insert(1);
                true
            }
            Entry::Occupied(mut entry) if !self.reaches_cap(*entry.get()) => {
                *entry.get_mut() += 1;
                true
            }
            _ => false,
        }
    }

    pub(super) fn close(&self, source: Source) {
        let mut counts = self.lock();
        let Entry::Occupied(mut entry) = counts.entry(source.cap_key()) else {
            debug_assert!(false, "{source} closed a connection that it had not opened");
            return;
        };
        *entry.get_mut() -= 1;
        if *entry.get() == 0 {
            entry.remove();
        }
    }

    pub(super) fn of(&self, source: Source) -> u32 {
        self.lock().get(&source.cap_key()).copied().unwrap_or(0)
    }

    pub(super) fn is_full(&self, source: Source) -> bool {
        self.reaches_cap(self.of(source))
    }

    fn reaches_cap(&self, connections: u32) -> bool {
        let cap = self.connections_max.load(Ordering::Relaxed);
        cap != 0 && connections >= cap
    }

    // Nothing in between can panic, so a poisoned lock holds true counts.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Source, u32>> {
        self.by_source
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
