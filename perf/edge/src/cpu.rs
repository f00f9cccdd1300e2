//! Cores and their time.
//!
//! A packet's whole way (generator, veth, filter, stack) is softirq work on the generator's core: inside the generating
//! thread, or in `ksoftirqd` when that takes over. Both threads' run time in nanoseconds (`schedstat`) is what a row cost;
//! time stolen by the host or spent on other processes is in neither.

use std::fs;
use std::time::Duration;

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::Result;

/// Keeps the calling thread, and every process and thread it starts later, on one core.
pub(crate) fn pin_to(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

/// Run time of the calling thread and of its core's `ksoftirqd`.
#[derive(Debug)]
pub(crate) struct Clock {
    ksoftirqd: String,
}

impl Clock {
    /// The calling thread must stay on `cpu`.
    pub(crate) fn of(cpu: usize) -> Result<Self> {
        let name = format!("ksoftirqd/{cpu}");
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            // Not a process, or gone.
            let Ok(command) = fs::read_to_string(path.join("comm")) else {
                continue;
            };
            if command.trim_end() == name {
                let ksoftirqd = path.join("schedstat").to_string_lossy().into_owned();
                return Ok(Self { ksoftirqd });
            }
        }
        Err(format!("no thread {name}: is this a container without the host's /proc?").into())
    }

    pub(crate) fn now(&self) -> Result<Duration> {
        Ok(run_time("/proc/thread-self/schedstat")? + run_time(&self.ksoftirqd)?)
    }
}

fn run_time(path: &str) -> Result<Duration> {
    let text = fs::read_to_string(path)?;
    let nanoseconds = text.split_whitespace().next().ok_or("schedstat is empty")?;
    Ok(Duration::from_nanos(nanoseconds.parse()?))
}
