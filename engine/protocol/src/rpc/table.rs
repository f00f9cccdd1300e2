//! The asker's side: the waiter of each response.

use super::{RpcError, RpcLimits};
use crate::{
    frame::Class,
    timer::{TimerId, Wheel},
};
use std::{fmt, time::Instant};

/// Least number of freed positions that wait before one is used again. With 16 bits of generation
/// and a request every 14 µs, an id comes back after a minute; a late response has come by then.
pub const REUSE_AFTER: usize = 64;

const NIL: u32 = u32::MAX;
const POSITION_BITS: u32 = 16;
const POSITION_MASK: u32 = (1 << POSITION_BITS) - 1;

/// Requests that wait for their response, each with its waiter.
pub struct RpcTable<W> {
    limits: RpcLimits,
    slots: Vec<Slot<W>>,
    /// Freed positions, the one that has been free longest first.
    free_head: u32,
    free_tail: u32,
    free: usize,
    in_flight: [u32; 3],
    /// Classes that refused a request, and did not have room again when asked since.
    refused: [bool; 3],
    deadlines: Wheel<u32>,
    late: u64,
}

struct Slot<W> {
    waiting: Option<Waiting<W>>,
    generation: u16,
    next_free: u32,
}

struct Waiting<W> {
    waiter: W,
    class: Class,
    timer: TimerId,
}

impl<W> RpcTable<W> {
    /// An empty table.
    pub fn new(limits: RpcLimits, now: Instant) -> Self {
        Self {
            limits,
            slots: Vec::new(),
            free_head: NIL,
            free_tail: NIL,
            free: 0,
            in_flight: [0; 3],
            refused: [false; 3],
            deadlines: Wheel::new(now),
            late: 0,
        }
    }

    /// Adds a request and returns its id, which goes into the frame.
    ///
    /// # Errors
    /// When the class has as many requests in flight as its limit; the waiter is dropped.
    pub fn insert(&mut self, class: Class, deadline: Instant, waiter: W) -> Result<u32, RpcError> {
        self.insert_with(class, deadline, waiter)
            .map_err(|(error, _)| error)
    }

    /// As [`Self::insert`], for a caller that needs the waiter back.
    ///
    /// # Errors
    /// When the class has as many requests in flight as its limit, with the waiter.
    pub fn insert_with(
        &mut self,
        class: Class,
        deadline: Instant,
        waiter: W,
    ) -> Result<u32, (RpcError, W)> {
        let is_full = self.in_flight[class.index()] >= self.limits.in_flight_max[class.index()];
        let position = if is_full { None } else { self.take_position() };
        let Some(position) = position else {
            self.refused[class.index()] = true;
            return Err((RpcError::LocalBusy(class), waiter));
        };
        let slot = &mut self.slots[position as usize];
        let id = position | u32::from(slot.generation) << POSITION_BITS;
        let timer = self.deadlines.schedule(id, deadline);
        slot.waiting = Some(Waiting {
            waiter,
            class,
            timer,
        });
        self.in_flight[class.index()] += 1;
        self.invariants();
        Ok(id)
    }

    /// Takes the waiter of a request whose response or failure has come. None for a late response,
    /// and for an id that was never given.
    pub fn complete(&mut self, id: u32) -> Option<W> {
        let waiter = self.remove(id);
        self.late += u64::from(waiter.is_none());
        waiter
    }

    /// Takes the waiter of a request that the asker cancels; the caller sends a cancel frame.
    pub fn cancel(&mut self, id: u32) -> Option<W> {
        self.remove(id)
    }

    /// The waiter of a request, still waiting.
    pub fn get_mut(&mut self, id: u32) -> Option<&mut W> {
        let slot = self.slots.get_mut((id & POSITION_MASK) as usize)?;
        if u32::from(slot.generation) != id >> POSITION_BITS {
            return None;
        }
        slot.waiting.as_mut().map(|waiting| &mut waiting.waiter)
    }

    /// Hands over the waiters whose deadline has passed; the caller sends cancel frames.
    pub fn expire(&mut self, now: Instant, on_expired: &mut impl FnMut(u32, W)) {
        self.expire_unless(now, &mut |_, _| None, on_expired);
    }

    /// As [`Self::expire`], and asks of each waiter whose deadline has passed whether it is to have
    /// a later one.
    pub fn expire_unless(
        &mut self,
        now: Instant,
        extend: &mut impl FnMut(u32, &mut W) -> Option<Instant>,
        on_expired: &mut impl FnMut(u32, W),
    ) {
        let Self {
            slots,
            deadlines,
            free_head,
            free_tail,
            free,
            in_flight,
            ..
        } = self;
        let mut extended = Vec::new();
        deadlines.poll(now, &mut |id| {
            let position = id & POSITION_MASK;
            let waiting = &mut slots[position as usize].waiting;
            if let Some(held) = waiting
                && let Some(at) = extend(id, &mut held.waiter)
            {
                extended.push((position, id, at));
            } else if let Some(waiting) = waiting.take() {
                in_flight[waiting.class.index()] -= 1;
                push_free(slots, free_head, free_tail, free, position);
                on_expired(id, waiting.waiter);
            }
        });
        for (position, id, at) in extended {
            if let Some(waiting) = &mut slots[position as usize].waiting {
                waiting.timer = deadlines.schedule(id, at);
            }
        }
        self.invariants();
    }

    /// When to call [`Self::expire`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadlines.next()
    }

    /// Empties the table after the loss of the connection, and returns every waiter.
    pub fn take_all(&mut self, on_lost: &mut impl FnMut(u32, W)) {
        self.take_if(&mut |_| true, on_lost);
    }

    /// Takes the waiters that `is_taken` names; the caller sends cancel frames for those of live
    /// requests. O(requests that were ever in flight at a time).
    pub fn take_if(
        &mut self,
        is_taken: &mut impl FnMut(&W) -> bool,
        on_taken: &mut impl FnMut(u32, W),
    ) {
        for position in 0..self.slots.len() as u32 {
            let slot = &self.slots[position as usize];
            let id = position | u32::from(slot.generation) << POSITION_BITS;
            let waiting = slot.waiting.as_ref();
            if waiting.is_some_and(|waiting| is_taken(&waiting.waiter))
                && let Some(waiter) = self.remove(id)
            {
                on_taken(id, waiter);
            }
        }
    }

    /// Number of requests of a class that wait.
    pub fn in_flight(&self, class: Class) -> u32 {
        self.in_flight[class.index()]
    }

    /// Whether the class refused no request, or has fallen under half of its limit since.
    pub fn is_writable(&mut self, class: Class) -> bool {
        let at = class.index();
        let has_position = self.free > 0 || self.slots.len() < self.limits.slots() as usize;
        let is_low = 2 * u64::from(self.in_flight[at]) < u64::from(self.limits.in_flight_max[at]);
        self.refused[at] &= !(has_position && is_low);
        !self.refused[at]
    }

    /// Number of requests that wait.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free
    }

    /// Whether no request waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of responses that found no waiter.
    pub fn late(&self) -> u64 {
        self.late
    }

    fn remove(&mut self, id: u32) -> Option<W> {
        let position = id & POSITION_MASK;
        let slot = self.slots.get_mut(position as usize)?;
        if u32::from(slot.generation) != id >> POSITION_BITS {
            return None;
        }
        let waiting = slot.waiting.take()?;
        self.deadlines.cancel(waiting.timer);
        self.in_flight[waiting.class.index()] -= 1;
        let Self {
            slots,
            free_head,
            free_tail,
            free,
            ..
        } = self;
        push_free(slots, free_head, free_tail, free, position);
        self.invariants();
        Some(waiting.waiter)
    }

    /// A new position while few are free, so that none is used again soon; else the one that has
    /// been free longest.
    fn take_position(&mut self) -> Option<u32> {
        let room = self.slots.len() < self.limits.slots() as usize;
        if room && self.free < REUSE_AFTER {
            let slot = Slot {
                waiting: None,
                generation: 0,
                next_free: NIL,
            };
            self.slots.push(slot);
            return Some(self.slots.len() as u32 - 1);
        }
        let position = self.free_head;
        let slot = self.slots.get_mut(position as usize)?;
        self.free_head = slot.next_free;
        if self.free_head == NIL {
            self.free_tail = NIL;
        }
        self.free -= 1;
        Some(position)
    }

    fn invariants(&self) {
        debug_assert_eq!(self.in_flight.iter().sum::<u32>() as usize, self.len());
        debug_assert_eq!(self.deadlines.len(), self.len());
        debug_assert!(self.slots.len() <= self.limits.slots() as usize);
    }
}

/// Puts a position at the end of the free list, with its next generation.
fn push_free<W>(
    slots: &mut [Slot<W>],
    head: &mut u32,
    tail: &mut u32,
    free: &mut usize,
    position: u32,
) {
    let slot = &mut slots[position as usize];
    slot.generation = slot.generation.wrapping_add(1);
    slot.next_free = NIL;
    if *tail == NIL {
        *head = position;
    } else {
        slots[*tail as usize].next_free = position;
    }
    *tail = position;
    *free += 1;
}

impl<W> fmt::Debug for RpcTable<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            in_flight, late, ..
        } = self;
        f.debug_struct("RpcTable")
            .field("in_flight", in_flight)
            .field("late", late)
            .finish()
    }
}
