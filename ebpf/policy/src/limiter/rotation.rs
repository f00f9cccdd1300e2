//! When a sketch changes its generation, and to what.
//!
//! A new seed now and then keeps a sender who found sources that share a line from profiting for long. Whoever owns the sketch
//! asks on every tick; a turn costs one pass over the idle generation.
//!
//! 1. The generation that is left counts until everything in it is past.
//! 2. It is emptied, at the next turn, only after that.

use super::Limit;
use crate::siphash::Key;

/// Shortest time between two turns, in nanoseconds.
pub const PERIOD_MIN_NS: u64 = 60_000_000_000;

/// A turn of the sketch: what its owner writes, after `clear_idle` and in the order of the fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switch {
    /// New seed of the generation that becomes the active one.
    pub seed: Key,
    /// Until when the generation that is left counts as well.
    pub old_until_ns: u64,
    /// Generation that is charged from now on.
    pub active: usize,
}

/// Knows when to turn.
#[derive(Clone, Debug)]
pub struct Rotation {
    active: usize,
    reach_ns: u64,
    turned_at_ns: u64,
}

impl Rotation {
    /// A sketch whose generation `active` is in use since `now_ns`, with these limits.
    pub fn new(active: usize, limits: impl IntoIterator<Item = Limit>, now_ns: u64) -> Self {
        Self {
            active: active & 1,
            reach_ns: reach_of(limits),
            turned_at_ns: now_ns,
        }
    }

    /// Takes other limits into account. Words of the former ones stay as far ahead as they are, so a reach never shrinks.
    pub fn widen(&mut self, limits: impl IntoIterator<Item = Limit>) {
        self.reach_ns = self.reach_ns.max(reach_of(limits));
    }

    /// Time from one turn to the next.
    pub fn period_ns(&self) -> u64 {
        self.reach_ns.max(PERIOD_MIN_NS)
    }

    /// When to turn.
    pub fn due_at_ns(&self) -> u64 {
        self.turned_at_ns.saturating_add(self.period_ns())
    }

    /// Turns, if it is time to. `random` becomes the new seed.
    pub fn turn(&mut self, now_ns: u64, random: [u8; 16]) -> Option<Switch> {
        if now_ns < self.due_at_ns() {
            return None;
        }
        self.active ^= 1;
        self.turned_at_ns = now_ns;
        Some(Switch {
            seed: Key::from_bytes(random),
            old_until_ns: now_ns.saturating_add(self.reach_ns),
            active: self.active,
        })
    }
}

fn reach_of(limits: impl IntoIterator<Item = Limit>) -> u64 {
    limits.into_iter().map(Limit::reach_ns).max().unwrap_or(0)
}
