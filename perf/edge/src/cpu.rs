//! Cores and their time.
//!
//! A packet's whole way (generator, veth, filter, stack) is softirq work on the generator's core:
//! inside the generating thread, or in `ksoftirqd` when that takes over. The cost of a row is the
//! run time of both threads in nanoseconds (`schedstat`); it does not contain time that the host
//! stole or other processes used.

use std::fs;
use std::time::Duration;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::Result;

/// Keeps the calling thread on one core, and every process and thread that it starts later.
pub(crate) fn pin_to(cpu: usize) -> Result<()> {
    pin(None, cpu)
}

/// Keeps a thread on one core; none: the calling one.
pub(crate) fn pin(thread: Option<Pid>, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(thread, &set)?)
}

/// Lets a thread (none: the calling one) run before all ordinary ones, as a softirq does; processes
/// that it starts are ordinary. The kernel's reserve for ordinary threads, a twentieth, stays.
#[cfg(feature = "goodput")]
pub(crate) fn go_first(thread: Option<Pid>) -> Result<()> {
    let thread = thread
        .unwrap_or_else(rustix::thread::gettid)
        .as_raw_nonzero()
        .to_string();
    crate::namespace::run(
        "chrt",
        &["--fifo", "--reset-on-fork", "--pid", "1", &thread],
    )
    .map(drop)
}

/// Processes and kernel threads whose name begins like this.
pub(crate) fn threads_named(prefix: &str) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        // It is no process, or it is gone.
        let Ok(name) = fs::read_to_string(path.join("comm")) else {
            continue;
        };
        let number = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        if name.starts_with(prefix) {
            found.extend(number.and_then(Pid::from_raw));
        }
    }
    Ok(found)
}

/// Run time of the calling thread and of its core's `ksoftirqd`.
#[derive(Debug)]
pub(crate) struct Clock {
    ksoftirqd: String,
}

impl Clock {
    /// The calling thread must stay on `cpu`.
    pub(crate) fn of(cpu: usize) -> Result<Self> {
        // With the end of the line, so that 1 does not match 10.
        let name = format!("ksoftirqd/{cpu}\n");
        let [thread] = threads_named(&name)?[..] else {
            return Err(format!("no thread {}: is this the host's /proc?", name.trim()).into());
        };
        Ok(Self {
            ksoftirqd: format!("/proc/{}/schedstat", thread.as_raw_nonzero()),
        })
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
