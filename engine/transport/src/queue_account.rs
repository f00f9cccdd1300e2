//! What the connections of one shard hold queued together: frames on lanes, and answers in memory
//! of their own.
//!
//! Each queue has a bound of its own; so many peers that read nothing would fill so many queues.
//! The rule is the receive budget's: who holds something gets more only while it would hold no more
//! than what stays free. One connection reaches its own bound, n together n/(n+1) of the whole, and
//! a connection that holds nothing finds room.
//!
//! Invariants
//! 1. `used_bytes` is what was added less what was removed.
//! 2. It exceeds `max_bytes` by refusals and cancellations alone, of which a connection has as many
//!    as requests in flight.

use std::cell::Cell;

use crate::carrier::QueueFull;

/// Bytes that the connections of a shard hold queued, and their bound.
#[derive(Debug)]
pub(crate) struct QueueAccount {
    max_bytes: u64,
    used_bytes: Cell<u64>,
}

impl QueueAccount {
    pub(crate) fn new(max_bytes: u64) -> Self {
        Self {
            max_bytes,
            used_bytes: Cell::new(0),
        }
    }

    /// Adds `bytes` to a queue that holds `held_bytes`.
    ///
    /// # Errors
    /// When that is more than its share now. Nothing changes then.
    #[inline]
    pub(crate) fn try_add(&self, held_bytes: u64, bytes: u64) -> Result<(), QueueFull> {
        let free_bytes = self.free_bytes();
        if bytes > free_bytes || held_bytes > 0 && held_bytes + bytes > free_bytes - bytes {
            return Err(QueueFull::Queue);
        }
        self.add(bytes);
        Ok(())
    }

    /// Adds `bytes` that cannot be refused.
    #[inline]
    pub(crate) fn add(&self, bytes: u64) {
        self.used_bytes.set(self.used_bytes.get() + bytes);
    }

    /// `bytes` have left a queue.
    #[inline]
    pub(crate) fn remove(&self, bytes: u64) {
        let used_bytes = self.used_bytes.get();
        debug_assert!(bytes <= used_bytes, "{bytes} of {used_bytes}");
        self.used_bytes.set(used_bytes.saturating_sub(bytes));
    }

    /// Held by all queues.
    #[inline]
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes.get()
    }

    /// Not held.
    #[inline]
    pub(crate) fn free_bytes(&self) -> u64 {
        self.max_bytes.saturating_sub(self.used_bytes.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Protects a peer from others that read nothing: however many fill their queues, a frame to it
    // finds room.
    #[test]
    fn queues_that_fill_leave_room_for_one_that_is_empty() {
        const MAX: u64 = 1_000_000;
        const FRAME: u64 = 1_000;
        for queues in [1, 2, 8, 60] {
            let account = QueueAccount::new(MAX);
            let mut held = vec![0; queues];
            loop {
                let mut grown = false;
                for held in &mut held {
                    if account.try_add(*held, FRAME).is_ok() {
                        *held += FRAME;
                        grown = true;
                    }
                }
                if !grown {
                    break;
                }
            }
            assert_eq!(account.used_bytes(), held.iter().sum::<u64>());
            let share = MAX / (queues as u64 + 1);
            let is_fair = |held: &u64| held.abs_diff(share) <= 2 * FRAME;
            assert!(held.iter().all(is_fair), "{queues}: {held:?}");
            assert_eq!(account.try_add(0, FRAME), Ok(()), "{queues}");
            // What left is there for all again.
            held.iter().for_each(|held| account.remove(*held));
            account.remove(FRAME);
            assert_eq!(account.free_bytes(), MAX);
        }
    }

    // Protects the bound: only what cannot be refused goes over it.
    #[test]
    fn the_whole_is_a_bound() {
        let account = QueueAccount::new(100);
        assert_eq!(account.try_add(0, 101), Err(QueueFull::Queue));
        assert_eq!(account.try_add(0, 100), Ok(()));
        assert_eq!(account.try_add(0, 1), Err(QueueFull::Queue));
        account.add(16);
        assert_eq!((account.used_bytes(), account.free_bytes()), (116, 0));
        account.remove(116);
        assert_eq!(account.used_bytes(), 0);
    }
}
