//! Hierarchical timer wheel: QUIC timeouts, RPC deadlines, probes, redials.
//!
//! A shard re-arms one timer per connection and batch of packets, so insert, cancel, re-arm and
//! expiry are O(1), with no search and no allocation once the slab has grown. Eight levels of 64
//! slots; an entry moves down a level when its slot's time comes, at most seven times in its life.
//!
//! 1. A timer never fires before its time, and fires at the first poll at or after it, rounded up
//!    to the resolution.
//! 2. Timers fire in the order of their ticks; within a tick the order is unspecified but a
//!    function of the calls made.
//! 3. `elapsed` never goes back, and every entry is at the level of the highest group of 6 bits in
//!    which its tick differs from `elapsed`: so a level holds only slots after the current one,
//!    and the lowest occupied slot of the lowest occupied level is the earliest.
//! 4. `next` is never later than the earliest timer; it may be earlier, when a slot of a higher
//!    level must be spread first.
//!
//! Their owner bounds the number of timers: one per connection, request, peer.

use std::{
    fmt,
    time::{Duration, Instant},
};

const LEVELS: usize = 8;
const SLOT_BITS: u32 = 6;
const SLOTS: usize = 1 << SLOT_BITS;
/// At 100 µs a tick this is 890 years: later times are clamped.
const TICK_MAX: u64 = (1 << (SLOT_BITS * LEVELS as u32)) - 1;
const NIL: u32 = u32::MAX;

/// Names a timer until it fires or is cancelled. Afterwards it names none, also not a later timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TimerId {
    index: u32,
    generation: u32,
}

/// A set of timers, each with a key that is handed back when it fires.
pub struct Wheel<K> {
    origin: Instant,
    resolution_ns: u64,
    elapsed: u64,
    occupied: [u64; LEVELS],
    heads: [[u32; SLOTS]; LEVELS],
    entries: Vec<Entry<K>>,
    free: u32,
    len: usize,
}

struct Entry<K> {
    /// None while on the free list.
    key: Option<K>,
    tick: u64,
    prev: u32,
    next: u32,
    generation: u32,
    level: u8,
    slot: u8,
}

impl<K> Wheel<K> {
    /// 100 µs: well below a LAN's probe timeout, well above a poll's cost.
    pub const RESOLUTION: Duration = Duration::from_micros(100);

    /// An empty wheel that starts at `now`, with [`Self::RESOLUTION`].
    pub fn new(now: Instant) -> Self {
        Self::with_resolution(now, Self::RESOLUTION)
    }

    /// An empty wheel that starts at `now`. A resolution of zero counts as a nanosecond.
    pub fn with_resolution(now: Instant, resolution: Duration) -> Self {
        Self {
            origin: now,
            resolution_ns: u64::try_from(resolution.as_nanos())
                .unwrap_or(u64::MAX)
                .max(1),
            elapsed: 0,
            occupied: [0; LEVELS],
            heads: [[NIL; SLOTS]; LEVELS],
            entries: Vec::new(),
            free: NIL,
            len: 0,
        }
    }

    /// Number of timers that wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no timer waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the timer has neither fired nor been cancelled.
    pub fn waits(&self, id: TimerId) -> bool {
        self.entries
            .get(id.index as usize)
            .is_some_and(|entry| entry.generation == id.generation && entry.key.is_some())
    }

    /// Starts a timer. One in the past fires at the next poll.
    pub fn schedule(&mut self, key: K, at: Instant) -> TimerId {
        let tick = self.tick_at_or_after(at);
        let index = self.allocate(key, tick);
        self.link(index);
        TimerId {
            index,
            generation: self.entries[index as usize].generation,
        }
    }

    /// Moves a timer that still waits; false if it fired or was cancelled.
    pub fn reschedule(&mut self, id: TimerId, at: Instant) -> bool {
        if !self.waits(id) {
            return false;
        }
        let tick = self.tick_at_or_after(at);
        // The usual re-arm of an idle timeout lands in the same tick: nothing to move.
        if self.entries[id.index as usize].tick != tick {
            self.unlink(id.index);
            self.entries[id.index as usize].tick = tick;
            self.link(id.index);
        }
        true
    }

    /// Moves the timer that `id` names, or starts one in its place.
    pub fn replace(&mut self, id: Option<TimerId>, key: K, at: Instant) -> TimerId {
        match id {
            Some(id) if self.reschedule(id, at) => {
                self.entries[id.index as usize].key = Some(key);
                id
            }
            _ => self.schedule(key, at),
        }
    }

    /// Stops a timer and gives its key back; none if it fired or was cancelled.
    pub fn cancel(&mut self, id: TimerId) -> Option<K> {
        if !self.waits(id) {
            return None;
        }
        self.unlink(id.index);
        Some(self.release(id.index))
    }

    /// Calls `fire` with the key of every timer that is due, earliest tick first.
    pub fn poll(&mut self, now: Instant, fire: &mut impl FnMut(K)) {
        let now_tick = self.tick_at_or_before(now);
        while let Some((level, slot, start)) = self.first_slot() {
            if start > now_tick {
                break;
            }
            self.elapsed = self.elapsed.max(start);
            self.occupied[level] &= !(1 << slot);
            let mut index = std::mem::replace(&mut self.heads[level][slot], NIL);
            while index != NIL {
                let next = self.entries[index as usize].next;
                if level == 0 {
                    fire(self.release(index));
                } else {
                    self.link(index);
                }
                index = next;
            }
        }
        self.elapsed = self.elapsed.max(now_tick);
        self.invariants();
    }

    /// When to poll next; none when no timer waits.
    pub fn next(&self) -> Option<Instant> {
        let (_, _, start) = self.first_slot()?;
        Some(self.instant(start))
    }

    /// The earliest occupied slot, by invariant 3: its level, its index, its first tick.
    fn first_slot(&self) -> Option<(usize, usize, u64)> {
        let level = self.occupied.iter().position(|bits| *bits != 0)?;
        let slot = self.occupied[level].trailing_zeros() as usize;
        let shift = SLOT_BITS * level as u32;
        let above = self.elapsed >> (shift + SLOT_BITS) << (shift + SLOT_BITS);
        Some((level, slot, above | (slot as u64) << shift))
    }

    fn link(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        entry.tick = entry.tick.max(self.elapsed);
        let differs = (entry.tick ^ self.elapsed) | (SLOTS as u64 - 1);
        let level = ((63 - differs.leading_zeros()) / SLOT_BITS) as usize;
        let slot = (entry.tick >> (SLOT_BITS * level as u32)) as usize % SLOTS;
        (entry.level, entry.slot) = (level as u8, slot as u8);
        let head = std::mem::replace(&mut self.heads[level][slot], index);
        (entry.prev, entry.next) = (NIL, head);
        if head != NIL {
            self.entries[head as usize].prev = index;
        }
        self.occupied[level] |= 1 << slot;
    }

    fn unlink(&mut self, index: u32) {
        let Entry {
            prev,
            next,
            level,
            slot,
            ..
        } = self.entries[index as usize];
        let (level, slot) = (usize::from(level), usize::from(slot));
        if next != NIL {
            self.entries[next as usize].prev = prev;
        }
        if prev != NIL {
            self.entries[prev as usize].next = next;
        } else {
            self.heads[level][slot] = next;
            if next == NIL {
                self.occupied[level] &= !(1 << slot);
            }
        }
    }

    fn allocate(&mut self, key: K, tick: u64) -> u32 {
        self.len += 1;
        if self.free != NIL {
            let index = self.free;
            let entry = &mut self.entries[index as usize];
            self.free = entry.next;
            entry.key = Some(key);
            entry.tick = tick;
            return index;
        }
        let index = self.entries.len() as u32;
        assert!(index < NIL, "4 billion timers: their owner has no bound");
        let entry = Entry {
            key: Some(key),
            tick,
            prev: NIL,
            next: NIL,
            generation: 0,
            level: 0,
            slot: 0,
        };
        self.entries.push(entry);
        index
    }

    fn release(&mut self, index: u32) -> K {
        let entry = &mut self.entries[index as usize];
        let key = entry.key.take().expect("a linked entry has its key");
        entry.generation = entry.generation.wrapping_add(1);
        entry.next = self.free;
        self.free = index;
        self.len -= 1;
        key
    }

    fn tick_at_or_after(&self, at: Instant) -> u64 {
        let ns = at.saturating_duration_since(self.origin).as_nanos();
        let ticks = ns.div_ceil(u128::from(self.resolution_ns));
        u64::try_from(ticks).unwrap_or(TICK_MAX).min(TICK_MAX)
    }

    fn tick_at_or_before(&self, at: Instant) -> u64 {
        let ns = at.saturating_duration_since(self.origin).as_nanos();
        let ticks = ns / u128::from(self.resolution_ns);
        u64::try_from(ticks).unwrap_or(TICK_MAX).min(TICK_MAX)
    }

    fn instant(&self, tick: u64) -> Instant {
        // Only a clamped tick can overflow; a day is then as good an answer as any.
        tick.checked_mul(self.resolution_ns)
            .and_then(|ns| self.origin.checked_add(Duration::from_nanos(ns)))
            .unwrap_or_else(|| {
                self.origin + Duration::from_nanos(self.elapsed * self.resolution_ns)
            })
    }

    /// Invariant 3, for the slot that decides; the property test checks the rest.
    fn invariants(&self) {
        if let Some((_, _, start)) = self.first_slot() {
            debug_assert!(start >= self.elapsed);
        }
        debug_assert_eq!(self.len == 0, self.occupied == [0; LEVELS]);
    }
}

impl<K> fmt::Debug for Wheel<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wheel")
            .field("len", &self.len)
            .field("elapsed", &self.elapsed)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Clone, Debug)]
    enum Op {
        Schedule(u64),
        Reschedule(usize, u64),
        Cancel(usize),
        Advance(u64),
        Next,
    }

    fn times() -> impl Strategy<Value = u64> {
        // Microseconds, over all the levels that a test can reach, with many in the lowest.
        prop_oneof![
            0u64..500,
            0u64..50_000,
            0u64..10_000_000,
            0u64..4_000_000_000_000
        ]
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let op = prop_oneof![
            4 => times().prop_map(Op::Schedule),
            2 => (any::<usize>(), times()).prop_map(|(i, t)| Op::Reschedule(i, t)),
            1 => any::<usize>().prop_map(Op::Cancel),
            3 => times().prop_map(Op::Advance),
            1 => Just(Op::Next),
        ];
        proptest::collection::vec(op, 1..120)
    }

    proptest! {
        // Protects every timeout in the engine: the wheel against a sorted map.
        #[test]
        fn behaves_like_a_sorted_map(ops in ops()) {
            let origin = Instant::now();
            let mut wheel = Wheel::new(origin);
            let res = Duration::from_micros(100);
            let mut now = origin;
            let mut oracle: BTreeMap<usize, (Instant, TimerId)> = BTreeMap::new();
            let mut known = Vec::new();
            for op in ops {
                match op {
                    Op::Schedule(us) => {
                        let at = now + Duration::from_micros(us);
                        let id = wheel.schedule(known.len(), at);
                        oracle.insert(known.len(), (at, id));
                        known.push(id);
                    }
                    Op::Reschedule(i, us) if !known.is_empty() => {
                        let key = i % known.len();
                        let at = now + Duration::from_micros(us);
                        let moved = wheel.reschedule(known[key], at);
                        prop_assert_eq!(moved, oracle.contains_key(&key));
                        if moved {
                            oracle.insert(key, (at, known[key]));
                        }
                    }
                    Op::Cancel(i) if !known.is_empty() => {
                        let key = i % known.len();
                        let had = oracle.remove(&key).map(|_| key);
                        prop_assert_eq!(wheel.cancel(known[key]), had);
                    }
                    Op::Advance(us) => {
                        now += Duration::from_micros(us);
                        let mut fired = Vec::new();
                        wheel.poll(now, &mut |key| fired.push(key));
                        let mut last = origin;
                        for key in fired {
                            let (at, _) = oracle.remove(&key).unwrap();
                            prop_assert!(at <= now, "fired early");
                            prop_assert!(at + res > last, "fired out of order");
                            last = last.max(at);
                        }
                        // What is left is not due, or became due within the tick that now is in.
                        prop_assert!(oracle.values().all(|(at, _)| *at + res > now));
                    }
                    _ => {}
                }
                prop_assert_eq!(wheel.len(), oracle.len());
                let earliest = oracle.values().map(|(at, _)| *at).min();
                prop_assert_eq!(wheel.next().is_some(), earliest.is_some());
                if let (Some(next), Some(at)) = (wheel.next(), earliest) {
                    prop_assert!(next < at.max(now) + res, "would sleep over a timer");
                }
            }
        }
    }

    // Protects a shard from spinning: following `next` reaches any timer in few polls.
    #[test]
    fn next_leads_to_the_timer() {
        let origin = Instant::now();
        for us in [0, 1, 99, 100, 6_400, 409_600, 30_000_000, 3_600_000_000_u64] {
            let mut wheel = Wheel::new(origin);
            wheel.schedule((), origin + Duration::from_micros(us));
            let mut polls = 0;
            while let Some(at) = wheel.next() {
                wheel.poll(at, &mut |()| ());
                polls += 1;
            }
            assert!(polls <= LEVELS, "{us} us took {polls} polls");
        }
    }

    // Protects against a stale id that stops someone else's timer after its slot was reused.
    #[test]
    fn stale_id_names_nothing() {
        let now = Instant::now();
        let mut wheel = Wheel::new(now);
        let old = wheel.schedule('a', now);
        assert_eq!(wheel.cancel(old), Some('a'));
        let new = wheel.schedule('b', now + Duration::from_secs(1));
        assert_eq!(wheel.cancel(old), None);
        assert!(!wheel.reschedule(old, now));
        let third = wheel.replace(Some(old), 'c', now);
        assert_eq!(wheel.replace(Some(new), 'd', now), new);
        let mut fired = Vec::new();
        wheel.poll(now, &mut |key| fired.push(key));
        fired.sort_unstable();
        assert_eq!(fired, ['c', 'd']);
        assert_eq!(wheel.cancel(third), None);
        assert!(wheel.is_empty());
    }

    #[test]
    fn far_future_is_clamped() {
        let now = Instant::now();
        let mut wheel = Wheel::with_resolution(now, Duration::ZERO);
        wheel.schedule((), now + Duration::from_secs(1 << 40));
        assert!(wheel.next().is_some());
        wheel.poll(now + Duration::from_secs(1), &mut |()| {
            panic!("fired early")
        });
        assert_eq!(wheel.len(), 1);
    }
}
