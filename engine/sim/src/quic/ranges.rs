//! A set of packet numbers as ranges, bounded: what an acknowledgement says (RFC 9000, 19.3).
//!
//! Invariants
//! 1. Ranges are disjoint, do not touch, and are at most [`RANGES_MAX`].
//! 2. Everything below the floor counts as contained: a peer that forgot a gap treats what comes
//!    for it as a duplicate, and its sender sends it again under a new number.

use std::collections::BTreeMap;

/// Ranges that are remembered.
const RANGES_MAX: usize = 256;
/// Of them, ranges that an acknowledgement names: the newest.
const NAMED_MAX: usize = 32;

/// Packet numbers that were received.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ranges {
    /// First number of a range to the number after its last.
    ranges: BTreeMap<u64, u64>,
    /// Numbers below are contained.
    floor: u64,
}

impl Ranges {
    /// Adds a number; false when it was there.
    pub(crate) fn insert(&mut self, number: u64) -> bool {
        if self.contains(number) {
            return false;
        }
        let before = self.ranges.range(..number).next_back();
        let before = before
            .filter(|(_, end)| **end == number)
            .map(|(start, _)| *start);
        let after = self.ranges.remove(&(number + 1));
        let end = after.unwrap_or(number + 1);
        self.ranges.insert(before.unwrap_or(number), end);
        if self.ranges.len() > RANGES_MAX
            && let Some((_, end)) = self.ranges.pop_first()
        {
            self.floor = end;
        }
        true
    }

    /// Whether a number was added, or is below the floor.
    pub(crate) fn contains(&self, number: u64) -> bool {
        let before = self.ranges.range(..=number).next_back();
        number < self.floor || before.is_some_and(|(_, end)| number < *end)
    }

    /// What an acknowledgement says, newest first: first number, and the number after the last.
    pub(crate) fn named(&self) -> Vec<(u64, u64)> {
        let newest = self.ranges.iter().rev().take(NAMED_MAX);
        newest.map(|(start, end)| (*start, *end)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        // Protects "at most once": a packet that was taken is known again, whatever the order.
        #[test]
        fn behaves_like_a_set(numbers in proptest::collection::vec(0_u64..200, 0..300)) {
            let (mut ranges, mut set) = (Ranges::default(), BTreeSet::new());
            for number in numbers {
                prop_assert_eq!(ranges.insert(number), set.insert(number));
            }
            let held: BTreeSet<u64> =
                ranges.ranges.iter().flat_map(|(start, end)| *start..*end).collect();
            prop_assert_eq!(&held, &set);
            let newest = ranges.named().first().map(|(_, end)| end - 1);
            prop_assert_eq!(newest, set.last().copied());
        }
    }

    #[test]
    fn forgets_the_oldest_gaps_and_takes_nothing_twice() {
        let mut ranges = Ranges::default();
        let numbers = || (0..10 * RANGES_MAX as u64).map(|n| 2 * n);
        assert!(numbers().all(|number| ranges.insert(number)));
        assert_eq!(ranges.ranges.len(), RANGES_MAX);
        assert_eq!(ranges.named().len(), NAMED_MAX);
        assert!(!numbers().any(|number| ranges.insert(number)));
        assert!(!ranges.insert(1), "below the floor");
    }
}
