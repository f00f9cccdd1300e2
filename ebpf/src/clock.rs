//! The clock of the programs: CLOCK_MONOTONIC, in nanoseconds.

use rustix::time::{ClockId, Timespec, clock_gettime};

/// The value of CLOCK_MONOTONIC, in nanoseconds.
#[must_use]
pub fn now_ns() -> u64 {
    nanoseconds(clock_gettime(ClockId::Monotonic))
}

/// Wall time (since 1970) less [`now_ns`], in nanoseconds. The programs add it to get the time that
/// all nodes share.
#[must_use]
pub fn wall_offset_ns() -> u64 {
    nanoseconds(clock_gettime(ClockId::Realtime)).wrapping_sub(now_ns())
}

/// Neither clock is negative, and 64 bits last until 2554.
fn nanoseconds(time: Timespec) -> u64 {
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
