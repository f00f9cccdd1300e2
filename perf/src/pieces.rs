//! The pure hot pieces, each as one pass over a fixed input.
//!
//! 1. Inputs follow from a seed in the code, and time from an instant at a whole second: a pass
//!    executes the same instructions in every run and on every machine.
//! 2. A pass leaves its state as it found it, so it can be repeated without end.
//! 3. Passes after the first allocate only what the piece itself allocates in its steady state.

mod chunks;
mod frames;
mod tables;

use std::time::{Duration, Instant};

use millrace_protocol::rng::Rng;

/// One piece.
#[derive(Clone, Copy)]
pub struct Piece {
    /// Name in tables, in the baseline and on the command line.
    pub name: &'static str,
    /// Operations of a pass, for figures per operation.
    pub operations: u64,
    /// Builds the input; what it returns does one pass.
    pub prepare: fn() -> Box<dyn FnMut()>,
}

impl std::fmt::Debug for Piece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// All pieces.
pub const ALL: &[Piece] = &[
    frames::FRAME_ENCODE,
    frames::FRAME_DECODE,
    frames::LANE_PARSER,
    frames::CID_ROUTE,
    tables::WHEEL_SCHEDULE_CANCEL,
    tables::WHEEL_REARM,
    tables::WHEEL_EXPIRE,
    tables::RPC_TABLE,
    tables::RPC_IN_FLIGHT,
    tables::BUDGET,
    chunks::CHUNK_SLICE,
    chunks::BODY_FILL,
];

/// The piece of this name.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static Piece> {
    ALL.iter().find(|piece| piece.name == name)
}

/// One pass, under the name that callgrind collects by.
#[inline(never)]
pub fn measured(pass: &mut dyn FnMut()) {
    pass();
}

fn rng() -> Rng {
    Rng::new(0x6d69_6c6c_7261_6365)
}

/// `0..len` in an order of the seed.
fn shuffled(len: usize, rng: &mut Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    for i in (1..len).rev() {
        order.swap(i, rng.below(i as u64 + 1) as usize);
    }
    order
}

/// An instant without a fraction of a second on its own clock. Whether a sum carries into the
/// seconds is a branch, and must not depend on when the process started.
fn whole_second() -> Instant {
    let now = Instant::now();
    let seconds = largest(u64::MAX, |s| {
        now.checked_sub(Duration::from_secs(s)).is_some()
    });
    let in_first_second = now - Duration::from_secs(seconds);
    let fraction = largest(999_999_999, |ns| {
        in_first_second
            .checked_sub(Duration::from_nanos(ns))
            .is_some()
    });
    now - Duration::from_nanos(fraction)
}

/// The largest number up to `max` of which `holds` is true; it must be for 0 and for no number
/// behind one for which it is not.
fn largest(max: u64, holds: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (0, max);
    while low < high {
        let middle = high - (high - low) / 2;
        if holds(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Invariant 2: the pieces are passes of benches that repeat them millions of times.
    #[test]
    fn every_piece_can_be_repeated() {
        for piece in ALL {
            let mut pass = (piece.prepare)();
            (0..3).for_each(|_| measured(&mut *pass));
            assert!(piece.operations > 0);
        }
        let names: BTreeSet<_> = ALL.iter().map(|piece| piece.name).collect();
        assert_eq!(names.len(), ALL.len());
        assert_eq!(by_name("budget").map(|piece| piece.name), Some("budget"));
    }

    /// Invariant 1: adding a millisecond less than a second never carries.
    #[test]
    fn whole_seconds_have_no_fraction() {
        let start = whole_second();
        // The debug form is the only place where the standard library shows the fraction.
        let shown = format!("{start:?}");
        assert!(shown.contains("tv_nsec: 0 "), "{shown}");
        assert!(start <= Instant::now());
    }

    #[test]
    fn largest_is_exact() {
        assert_eq!(largest(u64::MAX, |n| n <= 77), 77);
        assert_eq!(largest(u64::MAX, |_| true), u64::MAX);
        assert_eq!(largest(9, |n| n == 0), 0);
    }
}
