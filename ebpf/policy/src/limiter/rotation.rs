//! When a sketch changes its generation, and the seed of the next one.
//!
//! A sender may find sources that share a bucket; a new seed now and then ends its profit. The
//! owner of the sketch asks on every tick; a turn costs one pass over the idle generation.
//!
//! 1. The generation that is left still counts until every word in it is past.
//! 2. The next turn clears it only after that.

use super::Limit;
use crate::siphash::Key;

/// Shortest time between two turns, in nanoseconds.
pub const PERIOD_MIN_NS: u64 = 60_000_000_000;

/// A turn of the sketch. Its owner calls `clear_idle`, then writes the fields in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switch {
    /// New seed of the generation that becomes active.
    pub seed: Key,
    /// Until when the generation that is left counts as well, in nanoseconds of CLOCK_MONOTONIC.
    pub old_until_ns: u64,
    /// Generation that is charged from now on.
    pub active: usize,
}

/// Decides when to turn.
#[derive(Clone, Debug)]
pub struct Rotation {
    active: usize,
    reach_ns: u64,
    turned_at_ns: u64,
}

impl Rotation {
    /// A sketch with these limits, whose generation `active` is in use since `now_ns`
    /// (CLOCK_MONOTONIC).
    pub fn new(active: usize, limits: impl IntoIterator<Item = Limit>, now_ns: u64) -> Self {
        Self {
            active: active & 1,
            reach_ns: reach_of(limits),
            turned_at_ns: now_ns,
        }
    }

    /// Takes other limits into account. Words of the earlier limits stay as far ahead as they are,
    /// so the reach never shrinks.
    pub fn widen(&mut self, limits: impl IntoIterator<Item = Limit>) {
        self.reach_ns = self.reach_ns.max(reach_of(limits));
    }

    /// Nanoseconds from one turn to the next.
    pub fn period_ns(&self) -> u64 {
        self.reach_ns.max(PERIOD_MIN_NS)
    }

    /// When the next turn is due, in nanoseconds of CLOCK_MONOTONIC.
    pub fn due_at_ns(&self) -> u64 {
        self.turned_at_ns.saturating_add(self.period_ns())
    }

    /// Turns if a turn is due. `random` becomes the new seed.
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

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn limit(interval_ns: u64, tolerance_ns: u64) -> Limit {
        Limit {
            interval_ns,
            tolerance_ns,
        }
    }

    // Protects the limits through a turn: what is left must count until it is past.
    #[test]
    fn turns_no_sooner_than_the_slowest_limit_is_past() {
        let cases = [
            (vec![], 0, PERIOD_MIN_NS),
            (vec![Limit::NONE, limit(5, 10)], 15, PERIOD_MIN_NS),
            (
                vec![limit(1, 2), limit(40 * SECOND, 80 * SECOND)],
                120 * SECOND,
                120 * SECOND,
            ),
        ];
        for (limits, reach_ns, period_ns) in cases {
            let start = 7 * SECOND;
            let mut rotation = Rotation::new(0, limits, start);
            assert_eq!(rotation.period_ns(), period_ns);
            assert_eq!(rotation.turn(start + period_ns - 1, [1; 16]), None);
            let turned_at = start + period_ns + 3;
            let switch = rotation.turn(turned_at, [1; 16]).unwrap();
            let expected = Switch {
                seed: Key::from_bytes([1; 16]),
                old_until_ns: turned_at + reach_ns,
                active: 1,
            };
            assert_eq!(switch, expected);
            assert_eq!(rotation.due_at_ns(), turned_at + period_ns);
            assert_eq!(rotation.turn(turned_at, [2; 16]), None);
            assert_eq!(
                rotation
                    .turn(turned_at + period_ns, [2; 16])
                    .unwrap()
                    .active,
                0
            );
        }
    }

    #[test]
    fn a_reach_never_shrinks() {
        let mut rotation = Rotation::new(0, [limit(1, 90 * SECOND)], 0);
        rotation.widen([limit(1, 1)]);
        assert_eq!(rotation.period_ns(), 90 * SECOND + 1);
        rotation.widen([limit(1, 100 * SECOND)]);
        assert_eq!(rotation.period_ns(), 100 * SECOND + 1);
    }
}
