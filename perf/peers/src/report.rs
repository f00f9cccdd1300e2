//! Medians, per-round ratios and the targets.
//!
//! A ratio compares two engines within one round and is then the median over the rounds, because
//! the host has slow minutes. "The better peer" is the one of quinn and s2n-quic with the better
//! median.

use std::collections::BTreeMap;

use millrace_perf::report::{Better, Check, Target, cell, faults, median, targets_table};
use serde::Serialize;

use crate::limits::Limits;
use crate::measure::Measurement;
use crate::plan::{Engine, Workload};

/// Every measurement of a run.
#[derive(Debug, Default)]
pub(crate) struct Results(BTreeMap<(Workload, Engine), BTreeMap<usize, Measurement>>);

/// One figure of a measurement.
type Metric = fn(&Measurement) -> Option<f64>;

const GBIT: Metric = |m| m.gbit_per_s;
const CPU: Metric = |m| m.cpu_s_per_gb;
const P50: Metric = |m| m.p50_us;
const P99: Metric = |m| m.p99_us;
const RPS: Metric = |m| m.rps;
const CORES: Metric = |m| m.cores_used;

impl Results {
    pub(crate) fn add(
        &mut self,
        workload: Workload,
        engine: Engine,
        round: usize,
        measurement: Measurement,
    ) {
        self.0
            .entry((workload, engine))
            .or_default()
            .insert(round, measurement);
    }

    fn median_of(&self, workload: Workload, engine: Engine, metric: Metric) -> Option<f64> {
        median(
            self.0
                .get(&(workload, engine))?
                .values()
                .filter_map(metric)
                .collect(),
        )
    }

    /// Median over the rounds of ours by theirs.
    fn ratio(
        &self,
        ours: (Workload, Engine),
        theirs: (Workload, Engine),
        metric: Metric,
    ) -> Option<f64> {
        let theirs = self.0.get(&theirs)?;
        let ratios = self
            .0
            .get(&ours)?
            .iter()
            .filter_map(|(round, measurement)| {
                Some(metric(measurement)? / metric(theirs.get(round)?)?)
            });
        median(ratios.collect())
    }
}

/// What is written to `perf/out/peers.json`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    rounds: usize,
    quick: bool,
    rows: Vec<Row>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<Limits>,
    targets: Vec<Target>,
}

#[derive(Debug, Serialize)]
struct Row {
    workload: String,
    engine: String,
    #[serde(flatten)]
    medians: Measurement,
}

impl Report {
    pub(crate) fn new(
        results: &Results,
        limits: Option<Limits>,
        rounds: usize,
        quick: bool,
    ) -> Self {
        let rows = results.0.iter().map(|(&(workload, engine), measured)| {
            let of = |metric| results.median_of(workload, engine, metric);
            Row {
                workload: workload.to_string(),
                engine: engine.to_string(),
                medians: Measurement {
                    gbit_per_s: of(GBIT),
                    cpu_s_per_gb: of(CPU),
                    p50_us: of(P50),
                    p99_us: of(P99),
                    rps: of(RPS),
                    cores_used: of(CORES),
                    rss_bytes: measured.values().map(|m| m.rss_bytes).max().unwrap_or(0),
                },
            }
        });
        Self {
            rounds,
            quick,
            rows: rows.collect(),
            limits,
            targets: targets(results),
        }
    }

    pub(crate) fn print(&self) {
        println!(
            "{:<20} {:<14} {:>8} {:>9} {:>9} {:>9} {:>11} {:>6} {:>7}",
            "workload",
            "engine",
            "Gbit/s",
            "CPU s/GB",
            "p50 us",
            "p99 us",
            "per second",
            "cores",
            "RSS MiB"
        );
        for row in &self.rows {
            let m = &row.medians;
            println!(
                "{:<20} {:<14} {} {} {} {} {} {} {:>7}",
                row.workload,
                row.engine,
                cell(m.gbit_per_s, 8, 2),
                cell(m.cpu_s_per_gb, 9, 2),
                cell(m.p50_us, 9, 1),
                cell(m.p99_us, 9, 1),
                cell(m.rps, 11, 0),
                cell(m.cores_used, 6, 2),
                m.rss_bytes >> 20,
            );
        }
        if let Some(serde_json::Value::Object(limits)) = self
            .limits
            .as_ref()
            .and_then(|limits| serde_json::to_value(limits).ok())
        {
            println!("\nlimit");
            for (name, value) in limits {
                println!("{name:<44} {}", cell(value.as_f64(), 8, 1));
            }
        }
        let heading = "target (median of per-round ratios)";
        print!("\n{}", targets_table(heading, &self.targets));
    }

    /// The targets that fail the run, one line each.
    pub(crate) fn faults(&self, check: Check) -> Vec<String> {
        faults(&self.targets, check)
    }
}

fn targets(results: &Results) -> Vec<Target> {
    use Better::{Higher, Lower};
    use Engine::{Millrace, MillracePark, MillraceSpin};
    use Workload::{Bulk1452, Bulk8972, Handshakes, Rpc1, Rpc64, Rpc400};

    let peers = |ours, workload, metric, better| {
        to_better_peer(results, (workload, ours), &[workload], metric, better)
    };
    let oneway = [
        Workload::OnewayDatagram,
        Workload::OnewayUni,
        Workload::OnewayLane,
    ];
    let mut targets = Vec::new();
    let mut add = |name: &str, value: Option<f64>, target: f64, better: Better| {
        targets.push(Target::new(name, value, target, better));
    };
    add(
        "bulk-1452 rate, default",
        peers(Millrace, Bulk1452, GBIT, Higher),
        1.15,
        Higher,
    );
    add(
        "bulk-1452 CPU s/GB, default",
        peers(Millrace, Bulk1452, CPU, Lower),
        0.8,
        Lower,
    );
    add(
        "bulk-8972 rate, default",
        peers(Millrace, Bulk8972, GBIT, Higher),
        1.05,
        Higher,
    );
    add(
        "bulk-8972 CPU s/GB, default",
        peers(Millrace, Bulk8972, CPU, Lower),
        0.8,
        Lower,
    );
    add(
        "rpc-1 p50, default",
        peers(Millrace, Rpc1, P50, Lower),
        0.35,
        Lower,
    );
    add(
        "rpc-64 rate, default",
        peers(Millrace, Rpc64, RPS, Higher),
        1.1,
        Higher,
    );
    add(
        "rpc-400 rate, default",
        peers(Millrace, Rpc400, RPS, Higher),
        1.4,
        Higher,
    );
    add(
        "rpc-64 rate, spinning",
        peers(MillraceSpin, Rpc64, RPS, Higher),
        1.4,
        Higher,
    );
    add(
        "rpc-400 rate, spinning",
        peers(MillraceSpin, Rpc400, RPS, Higher),
        1.6,
        Higher,
    );
    add(
        "rpc-1 p50, parking",
        peers(MillracePark, Rpc1, P50, Lower),
        0.95,
        Lower,
    );
    add(
        "oneway-200 rate, default, to the best shape of the peers",
        to_better_peer(
            results,
            (Workload::OnewayLane, Millrace),
            &oneway,
            RPS,
            Higher,
        ),
        2.0,
        Higher,
    );
    add(
        "rpc-under-bulk p99, default, to quinn",
        results.ratio(
            (Workload::RpcUnderBulk, Millrace),
            (Workload::RpcUnderBulk, Engine::Quinn),
            P99,
        ),
        1.0 / 3.0,
        Lower,
    );
    add(
        "handshakes rate, default",
        peers(Millrace, Handshakes, RPS, Higher),
        1.0,
        Higher,
    );
    targets
}

/// Ratio to the better of quinn and s2n-quic, in the best of the given workloads.
fn to_better_peer(
    results: &Results,
    ours: (Workload, Engine),
    theirs: &[Workload],
    metric: Metric,
    better: Better,
) -> Option<f64> {
    let mut best: Option<((Workload, Engine), f64)> = None;
    for &workload in theirs {
        for engine in [Engine::Quinn, Engine::S2n] {
            let Some(value) = results.median_of(workload, engine, metric) else {
                continue;
            };
            let wins = best.is_none_or(|(_, so_far)| match better {
                Better::Higher => value > so_far,
                Better::Lower => value < so_far,
            });
            if wins {
                best = Some(((workload, engine), value));
            }
        }
    }
    results.ratio(ours, best?.0, metric)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_rate(gbit_per_s: f64) -> Measurement {
        Measurement {
            gbit_per_s: Some(gbit_per_s),
            ..Measurement::default()
        }
    }

    #[test]
    fn ratios_are_taken_inside_a_round_and_to_the_better_peer() {
        let mut results = Results::default();
        // The second round is slow for all: the ratio does not see it.
        for (round, host) in [1.0, 0.5, 1.0].into_iter().enumerate() {
            results.add(
                Workload::Bulk1452,
                Engine::Quinn,
                round,
                with_rate(7.0 * host),
            );
            results.add(
                Workload::Bulk1452,
                Engine::S2n,
                round,
                with_rate(8.0 * host),
            );
            results.add(
                Workload::Bulk1452,
                Engine::Millrace,
                round,
                with_rate(10.0 * host),
            );
        }
        let targets = targets(&results);
        let bulk = &targets[0];
        assert_eq!(bulk.value, Some(1.25));
        assert!(bulk.holds);
        assert!(targets[1].value.is_none() && !targets[1].holds);
    }

    #[test]
    fn the_report_has_the_agreed_form() {
        let mut results = Results::default();
        results.add(Workload::Bulk1452, Engine::Quinn, 0, with_rate(7.0));
        let report = serde_json::to_value(Report::new(&results, None, 1, true)).unwrap();
        assert_eq!(report["rows"][0]["workload"], "bulk-1452");
        assert_eq!(report["rows"][0]["engine"], "quinn");
        assert_eq!(report["rows"][0]["gbit_per_s"], 7.0);
        assert_eq!(report["targets"][0]["better"], "higher");
    }
}
