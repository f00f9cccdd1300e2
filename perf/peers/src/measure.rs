//! Clocks: CPU time and memory of both processes, latencies.
//!
//! CPU time is read from `/proc/PID/task/*/schedstat` (nanoseconds on the core, kernel work on the
//! thread's behalf included) at the start and the end of the measured part, so that start-up,
//! handshake and warm-up are not counted.

use std::fs;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::Result;

/// What one `drive` process reports.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Measurement {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gbit_per_s: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_s_per_gb: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) p50_us: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) p99_us: Option<f64>,
    /// Operations per second: RPCs, messages, handshakes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rps: Option<f64>,
    /// CPU seconds of both processes for each second of the measured part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cores_used: Option<f64>,
    /// Peak resident memory of the larger process.
    #[serde(default)]
    pub(crate) rss_bytes: u64,
}

/// Wall and CPU time of the measured part.
#[derive(Debug)]
pub(crate) struct Meter {
    server_pid: u32,
    started: Instant,
    cpu_at_start: Duration,
}

/// What a [`Meter`] saw.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    pub(crate) wall: Duration,
    /// Both processes.
    pub(crate) cpu: Duration,
}

impl Meter {
    pub(crate) fn start(server_pid: u32) -> Result<Self> {
        let cpu_at_start = cpu_of_both(server_pid)?;
        Ok(Self {
            server_pid,
            started: Instant::now(),
            cpu_at_start,
        })
    }

    pub(crate) fn stop(&self) -> Result<Reading> {
        let wall = self.started.elapsed();
        let cpu = cpu_of_both(self.server_pid)?.saturating_sub(self.cpu_at_start);
        Ok(Reading { wall, cpu })
    }
}

impl Reading {
    pub(crate) fn cores_used(&self) -> f64 {
        self.cpu.as_secs_f64() / self.wall.as_secs_f64()
    }

    pub(crate) fn cpu_s_per_gb(&self, bytes: usize) -> f64 {
        self.cpu.as_secs_f64() / (bytes as f64 / 1e9)
    }
}

/// The larger of both processes' peak resident sizes.
pub(crate) fn peak_rss_bytes(server_pid: u32) -> Result<u64> {
    Ok(peak_rss_of(&server_pid.to_string())?.max(peak_rss_of("self")?))
}

/// This process's peak resident size.
pub(crate) fn own_peak_rss_bytes() -> Result<u64> {
    peak_rss_of("self")
}

pub(crate) fn gbit_per_s(bytes: usize, took: Duration) -> f64 {
    bytes as f64 * 8.0 / took.as_secs_f64() / 1e9
}

/// Latencies of one measured part.
#[derive(Debug, Default)]
pub(crate) struct Latencies(Vec<Duration>);

impl Latencies {
    pub(crate) fn record(&mut self, latency: Duration) {
        self.0.push(latency);
    }

    pub(crate) fn merge(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The values at the given shares (0.5 is the median), in microseconds.
    pub(crate) fn quantiles_us<const N: usize>(mut self, shares: [f64; N]) -> [Option<f64>; N] {
        self.0.sort_unstable();
        shares.map(|share| {
            let rank = (self.0.len() as f64 * share) as usize;
            self.0
                .get(rank.min(self.0.len().saturating_sub(1)))
                .map(|at| at.as_secs_f64() * 1e6)
        })
    }
}

fn cpu_of_both(server_pid: u32) -> Result<Duration> {
    Ok(cpu_of(&server_pid.to_string())? + cpu_of("self")?)
}

fn cpu_of(pid: &str) -> Result<Duration> {
    let mut total = Duration::ZERO;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let line = fs::read_to_string(task?.path().join("schedstat"))?;
        let nanos = line
            .split_whitespace()
            .next()
            .ok_or("empty schedstat")?
            .parse()?;
        total += Duration::from_nanos(nanos);
    }
    Ok(total)
}

fn peak_rss_of(pid: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .ok_or("no VmHWM")?;
    let kib: u64 = line
        .split_whitespace()
        .nth(1)
        .ok_or("no VmHWM value")?
        .parse()?;
    Ok(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_ranks() {
        let mut latencies = Latencies::default();
        for micros in (1..=100).rev() {
            latencies.record(Duration::from_micros(micros));
        }
        assert_eq!(
            latencies.quantiles_us([0.5, 0.99, 1.0]),
            [Some(51.0), Some(100.0), Some(100.0)]
        );
        assert_eq!(Latencies::default().quantiles_us([0.5]), [None]);
    }

    #[test]
    fn cpu_time_grows_with_work() {
        let before = cpu_of("self").unwrap();
        let mut sum = 0u64;
        let started = Instant::now();
        while started.elapsed() < Duration::from_millis(30) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(cpu_of("self").unwrap() > before);
        assert!(peak_rss_of("self").unwrap() > 0);
    }
}
