//! Threads on CPUs of their own.

use std::thread::available_parallelism;

use rustix::thread::{CpuSet, sched_setaffinity};

/// Whether there are two CPUs; says so otherwise.
pub fn are_two(test: &str) -> bool {
    let two = available_parallelism().is_ok_and(|cpus| cpus.get() >= 2);
    if !two {
        super::skip::skip(test, "two CPUs");
    }
    two
}

/// Keeps the calling thread on one CPU.
pub fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).unwrap();
}
