//! What the run and its two child processes say to each other: a job to the driving process, an
//! outcome back, and from the serving process what arrived when.
//!
//! Times are nanoseconds of the host's monotonic clock, which both processes share.

use std::collections::BTreeMap;
use std::io::{Read, Write, stdin, stdout};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::clock;
use crate::Result;
use crate::measure::{Latencies, own_peak_rss_bytes};

/// How often the serving process looks at what has arrived.
const SAMPLE_EVERY: Duration = Duration::from_millis(5);
/// How long an RPC that is under way when the body ends may still take.
pub(crate) const LAST_RPC: Duration = Duration::from_secs(5);

/// What the connection carries between its handshake and the first body.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Before {
    Idle {
        seconds: f64,
    },
    /// One-way messages of 200 bytes, 100 a second; millrace alone.
    SmallMessages {
        seconds: f64,
    },
}

impl Before {
    pub(crate) fn lasts(self) -> Duration {
        match self {
            Self::Idle { seconds } | Self::SmallMessages { seconds } => {
                Duration::from_secs_f64(seconds)
            }
        }
    }
}

/// What the driving process does, once it is connected.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) to: SocketAddr,
    /// Of the link, for the contender that is the link.
    pub(crate) link_bits_per_s: u64,
    pub(crate) connect_within_s: f64,
    pub(crate) before: Before,
    pub(crate) body_bytes: usize,
    /// Bodies on the same connection, one after the other.
    pub(crate) bodies: u32,
    /// A body that takes longer is cut, and is the last one.
    pub(crate) cut_s: f64,
    /// A body that runs at this time is cut then.
    pub(crate) until_ns: Option<u64>,
    /// When the first body starts, if that is later than `before` allows.
    pub(crate) starts_at_ns: Option<u64>,
    /// RPCs of 1 KiB, one after the other, from the start of the first body to its end.
    pub(crate) has_rpcs: bool,
    /// Where the node keeps what it knows of paths; millrace alone.
    pub(crate) remembered_paths: Option<PathBuf>,
}

impl Job {
    /// How long a body that starts now may take.
    pub(crate) fn cut_in(&self) -> Duration {
        let cut = Duration::from_secs_f64(self.cut_s);
        self.until_ns.map_or(cut, |at| cut.min(clock::until(at)))
    }
}

/// How a body ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum End {
    /// The receiver said that it has all of it.
    Whole,
    /// Its time was over.
    Cut,
    /// The connection or the request failed.
    Lost(String),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BodyOutcome {
    pub(crate) started_ns: u64,
    pub(crate) ended_ns: u64,
    pub(crate) end: End,
}

/// What the driving process saw.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// `None` when the handshake was not done in time.
    pub(crate) connected_s: Option<f64>,
    pub(crate) bodies: Vec<BodyOutcome>,
    pub(crate) rpcs: usize,
    pub(crate) rpc_p50_ms: Option<f64>,
    pub(crate) rpc_p99_ms: Option<f64>,
    /// Packets sent on the connection, and of them lost, where the engine tells.
    pub(crate) packets: Option<(u64, u64)>,
    pub(crate) rss_bytes: u64,
}

impl Outcome {
    /// How its bodies ended, and after how many seconds each.
    pub(crate) fn ends(&self) -> Vec<(f64, End)> {
        let bodies = self.bodies.iter();
        let seconds = |body: &BodyOutcome| (body.ended_ns - body.started_ns) as f64 / 1e9;
        bodies
            .map(|body| (seconds(body), body.end.clone()))
            .collect()
    }

    pub(crate) fn report(mut self) -> Result<()> {
        self.rss_bytes = own_peak_rss_bytes()?;
        println!("{}", serde_json::to_string(&self)?);
        Ok(())
    }
}

/// What the process of a mesh saw.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct MeshOutcome {
    /// `None` when it did not come up in time.
    pub(crate) full_mesh_s: Option<f64>,
    /// Connections that were up and ended while the mesh idled, counted at both ends.
    pub(crate) ended: u64,
    /// All that ended meanwhile by reason, also those that never came up.
    pub(crate) closed: BTreeMap<String, u64>,
    /// Dials while the mesh idled.
    pub(crate) dials: u64,
    pub(crate) pairs_up_at_end: usize,
}

/// Latencies of RPCs that follow one another, and when the last one was asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct RpcLog(Arc<Mutex<RpcState>>);

#[derive(Debug, Default)]
struct RpcState {
    latencies: Latencies,
    asked_ns: Option<u64>,
    is_over: bool,
}

impl RpcLog {
    fn with<T>(&self, act: impl FnOnce(&mut RpcState) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// An RPC is asked now; false when no more are wanted.
    pub(crate) fn ask(&self) -> bool {
        self.with(|state| {
            if !state.is_over {
                state.asked_ns = Some(clock::now_ns());
            }
            !state.is_over
        })
    }

    pub(crate) fn answered(&self) {
        self.with(|state| {
            if let Some(asked) = state.asked_ns.take() {
                state.latencies.record(clock::since(asked));
            }
        });
    }

    pub(crate) fn stop(&self) {
        self.with(|state| state.is_over = true);
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.with(|state| state.asked_ns.is_some())
    }

    /// Fills in the figures. An RPC without an answer counts with the time that it has waited, so
    /// that one that never came back is not left out.
    pub(crate) fn fill(&self, outcome: &mut Outcome) {
        let latencies = self.with(|state| {
            if let Some(asked) = state.asked_ns {
                state.latencies.record(clock::since(asked));
            }
            std::mem::take(&mut state.latencies)
        });
        outcome.rpcs = latencies.len();
        let [p50, p99] = latencies.quantiles_us([0.5, 0.99]);
        outcome.rpc_p50_ms = p50.map(|us| us / 1e3);
        outcome.rpc_p99_ms = p99.map(|us| us / 1e3);
    }
}

/// What the serving process saw.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Served {
    /// Times, and the body bytes that had arrived by then.
    pub(crate) samples: Vec<(u64, u64)>,
    pub(crate) rss_bytes: u64,
}

impl Served {
    /// Body bytes that had arrived at a time, between two samples in proportion.
    pub(crate) fn bytes_at(&self, ns: u64) -> f64 {
        bytes_at(&self.samples, ns)
    }
}

/// The value of a growing count at a time, from its samples; steps between samples are spread.
pub(crate) fn bytes_at(samples: &[(u64, u64)], ns: u64) -> f64 {
    let after = samples.partition_point(|&(at, _)| at <= ns);
    let before = after.checked_sub(1).map(|index| samples[index]);
    match (before, samples.get(after)) {
        (Some((from, low)), Some(&(to, high))) => {
            let share = (ns - from) as f64 / (to - from) as f64;
            low as f64 + share * (high - low) as f64
        }
        (Some((_, last)), None) => last as f64,
        (None, _) => 0.0,
    }
}

/// Body bytes that have arrived in a serving process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrivals(Arc<AtomicU64>);

impl Arrivals {
    pub(crate) fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Starts to sample. When the standard input closes, the process prints what it saw and ends.
    pub(crate) fn report_at_end(&self) {
        let is_over = Arc::new(AtomicBool::new(false));
        let watcher = Arc::clone(&is_over);
        std::thread::spawn(move || {
            let mut rest = Vec::new();
            let _closed = stdin().read_to_end(&mut rest);
            watcher.store(true, Ordering::Release);
        });
        let arrived = Arc::clone(&self.0);
        std::thread::spawn(move || {
            let mut served = Served::default();
            while !is_over.load(Ordering::Acquire) {
                let sample = (clock::now_ns(), arrived.load(Ordering::Relaxed));
                // Of a pause only its first and last sample.
                if let [.., (_, one), two] = &mut served.samples[..]
                    && *one == two.1
                    && two.1 == sample.1
                {
                    *two = sample;
                } else {
                    served.samples.push(sample);
                }
                std::thread::sleep(SAMPLE_EVERY);
            }
            served.rss_bytes = own_peak_rss_bytes().unwrap_or_default();
            let text = serde_json::to_string(&served).unwrap_or_default();
            let mut out = stdout().lock();
            let written = writeln!(out, "{text}").and_then(|()| out.flush());
            std::process::exit(i32::from(written.is_err()));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_known_between_its_samples() {
        let samples = [(100, 0), (200, 10), (300, 10), (400, 110)];
        let table = [
            (0, 0.0),
            (100, 0.0),
            (150, 5.0),
            (250, 10.0),
            (350, 60.0),
            (400, 110.0),
            (900, 110.0),
        ];
        for (at, bytes) in table {
            assert_eq!(bytes_at(&samples, at), bytes, "at {at}");
        }
        assert_eq!(bytes_at(&[], 5), 0.0);
    }

    /// Protects the p99 beside a body: an RPC that never comes back is not left out.
    #[test]
    fn an_rpc_without_an_answer_counts_with_its_wait() {
        let log = RpcLog::default();
        assert!(log.ask());
        log.answered();
        assert!(log.ask());
        log.stop();
        assert!(log.is_waiting() && !log.ask());
        let mut outcome = Outcome::default();
        log.fill(&mut outcome);
        assert_eq!(outcome.rpcs, 2);
    }
}
