//! The figures of a run, computed from what the processes and the relay saw.

use std::collections::BTreeMap;

use millrace_perf::relay::LinkConfig;
use serde::Serialize;

use super::child::{BodyOutcome, End, MeshOutcome, Outcome, Served, bytes_at};
use super::plan::{Contender, Part};
use super::relay::RelayReport;
use crate::Result;

/// All figures of a run.
#[derive(Debug, Default, Serialize)]
pub(super) struct Results {
    pub(super) rounds: usize,
    pub(super) quick: bool,
    pub(super) cells: Vec<Cell>,
    pub(super) shares: Vec<Shares>,
    pub(super) resumed: Vec<Ramp>,
    pub(super) mesh: Option<MeshCell>,
}

impl Results {
    /// The cells of a contender in a part, by round.
    pub(super) fn of(&self, part: Part, contender: Contender) -> impl Iterator<Item = &Cell> {
        let names = (part.to_string(), contender.to_string());
        let is_it = move |cell: &&Cell| cell.part == names.0 && cell.contender == names.1;
        self.cells.iter().filter(is_it)
    }
}

/// A body, or several on one connection.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Cell {
    pub(super) part: String,
    pub(super) contender: String,
    pub(super) round: usize,
    /// Null when the handshake was not done in time.
    pub(super) connected_s: Option<f64>,
    pub(super) bodies: Vec<BodyFigures>,
    pub(super) rpcs: usize,
    pub(super) rpc_p50_ms: Option<f64>,
    pub(super) rpc_p99_ms: Option<f64>,
    pub(super) packets_sent: Option<u64>,
    pub(super) packets_lost: Option<u64>,
    /// The sender's holds the body.
    pub(super) sender_rss_mib: u64,
    pub(super) receiver_rss_mib: u64,
    /// What failed in the bench or in a process.
    pub(super) fault: Option<String>,
    pub(super) relay: RelayReport,
}

/// One body.
#[derive(Clone, Debug, Serialize)]
pub(super) struct BodyFigures {
    /// What had arrived by its end, by the time until then.
    pub(super) mbit_per_s: f64,
    pub(super) arrived_bytes: u64,
    pub(super) seconds: f64,
    pub(super) end: End,
}

impl Cell {
    pub(super) fn new(
        part: Part,
        contender: Contender,
        round: usize,
        outcome: Result<Outcome>,
        served: &Served,
        relay: RelayReport,
    ) -> Self {
        let (outcome, fault) = match outcome {
            Ok(outcome) => (outcome, None),
            Err(error) => (Outcome::default(), Some(error.to_string())),
        };
        let bodies = outcome.bodies.iter();
        let bodies = if contender == Contender::Link {
            served.whole().into_iter().collect()
        } else {
            bodies.map(|body| BodyFigures::new(body, served)).collect()
        };
        Self {
            part: part.to_string(),
            contender: contender.to_string(),
            round,
            connected_s: outcome.connected_s,
            bodies,
            rpcs: outcome.rpcs,
            rpc_p50_ms: outcome.rpc_p50_ms,
            rpc_p99_ms: outcome.rpc_p99_ms,
            packets_sent: outcome.packets.map(|(sent, _)| sent),
            packets_lost: outcome.packets.map(|(_, lost)| lost),
            sender_rss_mib: outcome.rss_bytes >> 20,
            receiver_rss_mib: served.rss_bytes >> 20,
            fault,
            relay,
        }
    }
}

impl Cell {
    /// Goodput of a body, by its place on the connection.
    pub(super) fn rate(&self, body: usize) -> Option<f64> {
        self.bodies.get(body).map(|body| body.mbit_per_s)
    }
}

impl BodyFigures {
    fn new(body: &BodyOutcome, served: &Served) -> Self {
        let arrived = served.bytes_at(body.ended_ns) - served.bytes_at(body.started_ns);
        Self::from_parts(arrived, body.started_ns, body.ended_ns, body.end.clone())
    }

    fn from_parts(arrived: f64, started_ns: u64, ended_ns: u64, end: End) -> Self {
        let seconds = ended_ns.saturating_sub(started_ns) as f64 / 1e9;
        Self {
            mbit_per_s: arrived * 8.0 / 1e6 / seconds,
            arrived_bytes: arrived as u64,
            seconds,
            end,
        }
    }
}

impl Served {
    /// Goodput between two times.
    pub(super) fn mbit_per_s(&self, [from, to]: [u64; 2]) -> f64 {
        (self.bytes_at(to) - self.bytes_at(from)) * 8e3 / (to - from) as f64
    }

    /// All that arrived, by the time from its beginning to its end; nothing when nothing arrived.
    fn whole(&self) -> Option<BodyFigures> {
        let last = self.samples.last()?.1;
        let first = self.samples.iter().rposition(|&(_, bytes)| bytes == 0)?;
        let end = self.samples.iter().position(|&(_, bytes)| bytes == last)?;
        let at = |index: usize| self.samples[index].0;
        (first < end).then(|| BodyFigures::from_parts(last as f64, at(first), at(end), End::Cut))
    }
}

/// Two senders through one link.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Shares {
    pub(super) part: String,
    /// Who sent alone before the other came.
    pub(super) first: String,
    pub(super) first_mbit_per_s: f64,
    pub(super) second_mbit_per_s: f64,
    /// Of each sender, how its bodies ended, and after how many seconds. The last one is cut.
    pub(super) ends: Vec<Vec<(f64, End)>>,
    pub(super) faults: Vec<String>,
    pub(super) relay: RelayReport,
}

impl Shares {
    /// Of the goodput of both, what the smaller one has.
    pub(super) fn smaller(&self) -> Option<f64> {
        let (one, two) = (self.first_mbit_per_s, self.second_mbit_per_s);
        (one + two > 0.0).then(|| one.min(two) / (one + two))
    }

    pub(super) fn of_first(&self) -> Option<f64> {
        let sum = self.first_mbit_per_s + self.second_mbit_per_s;
        (sum > 0.0).then(|| self.first_mbit_per_s / sum)
    }
}

/// How a body begins that is sent after a restart, as shares of the link's rate.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Ramp {
    pub(super) part: String,
    pub(super) first_body_mbit_per_s: f64,
    pub(super) second_body_mbit_per_s: f64,
    /// Of the packets that left in the first round trip after the body was handed over, in the
    /// second, in the third, and from then on.
    pub(super) first_rtt: f64,
    pub(super) second_rtt: f64,
    pub(super) third_rtt: f64,
    pub(super) rest: f64,
    pub(super) relay: RelayReport,
}

impl Ramp {
    pub(super) fn new(
        part: Part,
        outcomes: &[Outcome],
        link: &LinkConfig,
        relay: RelayReport,
    ) -> Self {
        let bodies: Vec<_> = outcomes
            .iter()
            .flat_map(|outcome| &outcome.bodies)
            .collect();
        let mut this = Self {
            part: part.to_string(),
            first_body_mbit_per_s: 0.0,
            second_body_mbit_per_s: 0.0,
            first_rtt: 0.0,
            second_rtt: 0.0,
            third_rtt: 0.0,
            rest: 0.0,
            relay,
        };
        let [first, second] = bodies[..] else {
            return this;
        };
        let mbit_per_s = |body: &BodyOutcome| {
            let is_whole = body.end == End::Whole;
            let bytes = if is_whole { crate::plan::BULK_BYTES } else { 0 };
            bytes as f64 * 8e3 / (body.ended_ns - body.started_ns) as f64
        };
        this.first_body_mbit_per_s = mbit_per_s(first);
        this.second_body_mbit_per_s = mbit_per_s(second);
        // What leaves the sender passes the relay half of a round trip later.
        let record = &this.relay.links[0].directions[0].record;
        let rtt = link.rtt.as_nanos() as u64;
        let share = |from: u64, to: u64| {
            let bits = (bytes_at(record, to) - bytes_at(record, from)) * 8.0;
            bits / ((to - from) as f64 / 1e9) / link.bits_per_second as f64
        };
        let begins = second.started_ns + rtt / 2;
        let rtts = [0, 1, 2].map(|n| share(begins + n * rtt, begins + (n + 1) * rtt));
        [this.first_rtt, this.second_rtt, this.third_rtt] = rtts;
        let ends = second.ended_ns - rtt / 2;
        if ends > begins + 2 * rtt {
            this.rest = share(begins + 2 * rtt, ends);
        }
        this
    }
}

/// The mesh.
#[derive(Clone, Debug, Serialize)]
pub(super) struct MeshCell {
    pub(super) pairs: usize,
    pub(super) full_mesh_s: Option<f64>,
    /// Connections that were up and ended while the mesh idled, counted at both ends.
    pub(super) ended: u64,
    /// All that ended meanwhile by reason, also those that never came up.
    pub(super) closed: BTreeMap<String, u64>,
    pub(super) dials_while_idle: u64,
    pub(super) pairs_up_at_end: usize,
    pub(super) relay: RelayReport,
}

impl MeshCell {
    pub(super) fn new(outcome: MeshOutcome, pairs: usize, relay: RelayReport) -> Self {
        Self {
            pairs,
            full_mesh_s: outcome.full_mesh_s,
            ended: outcome.ended,
            closed: outcome.closed,
            dials_while_idle: outcome.dials,
            pairs_up_at_end: outcome.pairs_up_at_end,
            relay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served() -> Served {
        let second = 1_000_000_000;
        Served {
            samples: vec![
                (0, 0),
                (second, 0),
                (2 * second, 1_000_000),
                (3 * second, 4_000_000),
                (9 * second, 4_000_000),
            ],
            rss_bytes: 0,
        }
    }

    #[test]
    fn rates_are_bits_that_arrived_by_the_time_that_they_took() {
        let served = served();
        let body = BodyOutcome {
            started_ns: 1_000_000_000,
            ended_ns: 5_000_000_000,
            end: End::Cut,
        };
        let body = BodyFigures::new(&body, &served);
        assert_eq!((body.mbit_per_s, body.seconds), (8.0, 4.0));
        assert_eq!(served.mbit_per_s([2_000_000_000, 3_000_000_000]), 24.0);
        let whole = served.whole().unwrap();
        assert_eq!((whole.mbit_per_s, whole.seconds), (16.0, 2.0));
    }
}
