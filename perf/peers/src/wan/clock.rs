//! The kernel's monotonic clock, which all processes of a host share.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

pub(crate) fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

/// Nanoseconds, for what goes from one process to another.
pub(crate) fn now_ns() -> u64 {
    now().as_nanos() as u64
}

/// What is left until a time; zero once it is over.
pub(crate) fn until(ns: u64) -> Duration {
    Duration::from_nanos(ns.saturating_sub(now_ns()))
}

/// What has passed since a time.
pub(crate) fn since(ns: u64) -> Duration {
    Duration::from_nanos(now_ns().saturating_sub(ns))
}
