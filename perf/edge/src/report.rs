//! Medians, per-round ratios and the targets.
//!
//! A ratio compares two rows within one round and is then the median over the rounds, because the
//! host has slow minutes.

use std::collections::BTreeMap;

use millrace_perf::report::{Better, Check, Target, cell, faults, median, targets_table};
use serde::Serialize;

use crate::cost::{Cost, Subject};
use crate::edge::Case;
use crate::filters::Filter;
use crate::frames::Shape;
use crate::generator::Sources;
use crate::host::Host;
use crate::rows::{Measured, Row};

/// Every measurement of a run.
#[derive(Debug, Default)]
pub(crate) struct Results {
    rows: BTreeMap<Row, BTreeMap<usize, Measured>>,
    costs: BTreeMap<Subject, Vec<Cost>>,
    skipped: Vec<String>,
}

impl Results {
    pub(crate) fn add(&mut self, row: Row, round: usize, measured: Measured) {
        self.rows.entry(row).or_default().insert(round, measured);
    }

    pub(crate) fn add_cost(&mut self, subject: Subject, cost: Cost) {
        self.costs.entry(subject).or_default().push(cost);
    }

    pub(crate) fn skip(&mut self, what: String) {
        self.skipped.push(what);
    }

    fn median_of(&self, row: Row, metric: fn(&Measured) -> f64) -> Option<f64> {
        median(self.rows.get(&row)?.values().map(metric).collect())
    }

    /// Median over the rounds of the number of packets of `ours` in the time of one packet of
    /// `theirs`.
    fn ratio(&self, ours: Row, theirs: Row) -> Option<f64> {
        let theirs = self.rows.get(&theirs)?;
        let ratios = self.rows.get(&ours)?.iter().filter_map(|(round, ours)| {
            Some(ours.mpps_per_cpu_second / theirs.get(round)?.mpps_per_cpu_second)
        });
        median(ratios.collect())
    }

    /// Least of the rounds: interruptions only add time.
    fn cost(&self, subject: Subject) -> Option<f64> {
        self.costs
            .get(&subject)?
            .iter()
            .map(|cost| cost.net_ns())
            .reduce(f64::min)
    }
}

/// The contents of `perf/out/edge.json`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    host: Host,
    rounds: usize,
    quick: bool,
    rows: Vec<RowMedians>,
    costs: Vec<CostLine>,
    targets: Vec<Target>,
    /// Figures beside the targets, for people: none has to hold.
    figures: Vec<Figure>,
    skipped: Vec<String>,
}

#[derive(Debug, Serialize)]
struct RowMedians {
    filter: String,
    packets: &'static str,
    sources: Sources,
    #[serde(flatten)]
    medians: Measured,
}

#[derive(Debug, Serialize)]
struct CostLine {
    what: String,
    /// Least of the rounds, without the loop.
    ns_per_packet: f64,
    /// Time of the loop, which is subtracted.
    loop_ns: f64,
}

#[derive(Debug, Serialize)]
struct Figure {
    name: &'static str,
    /// Null when the run left out one of its rows.
    value: Option<f64>,
}

impl Report {
    pub(crate) fn new(results: &Results, host: Host, rounds: usize, quick: bool) -> Self {
        let rows = results.rows.keys().map(|&row| {
            let of = |metric| results.median_of(row, metric).unwrap_or_default();
            RowMedians {
                filter: row.filter.label(),
                packets: row.shape.label(),
                sources: row.sources,
                medians: Measured {
                    mpps_per_cpu_second: of(|m| m.mpps_per_cpu_second),
                    ns_per_packet: of(|m| m.ns_per_packet),
                    passed: of(|m| m.passed),
                    answered: of(|m| m.answered),
                },
            }
        });
        let costs = results.costs.iter().map(|(subject, costs)| CostLine {
            what: subject.name(),
            ns_per_packet: results.cost(*subject).unwrap_or_default(),
            loop_ns: costs
                .iter()
                .map(|cost| cost.loop_ns)
                .reduce(f64::min)
                .unwrap_or_default(),
        });
        Self {
            host,
            rounds,
            quick,
            rows: rows.collect(),
            costs: costs.collect(),
            targets: targets(results),
            figures: figures(results),
            skipped: results.skipped.clone(),
        }
    }

    /// Why the run fails: targets by `check`, and rows that are missing where all of them count.
    pub(crate) fn faults(&self, check: Check) -> Vec<String> {
        let mut faults = faults(&self.targets, check);
        if check == Check::Targets {
            faults.extend(self.skipped.iter().map(|row| format!("skipped: {row}")));
        }
        faults
    }

    pub(crate) fn print(&self) {
        println!("{}\n", self.host);
        println!(
            "{:<46} {:<18} {:>7} {:>11} {:>10} {:>8} {:>9}",
            "filter", "packets", "sources", "Mpps/CPU s", "ns/packet", "passed", "answered"
        );
        for row in &self.rows {
            let m = &row.medians;
            println!(
                "{:<46} {:<18} {:>7} {:>11.2} {:>10.0} {:>8} {:>9}",
                row.filter,
                row.packets,
                row.sources.label(),
                m.mpps_per_cpu_second,
                m.ns_per_packet,
                percent(m.passed),
                percent(m.answered),
            );
        }
        if !self.costs.is_empty() {
            println!(
                "\n{:<64} {:>10} {:>10}",
                "program alone (test run)", "ns/packet", "loop"
            );
        }
        for cost in &self.costs {
            println!(
                "{:<64} {:>10.0} {:>10.0}",
                cost.what, cost.ns_per_packet, cost.loop_ns
            );
        }
        print!("\n{}", targets_table("target", &self.targets));
        println!("\n{:<64} {:>10}", "further figures", "value");
        for figure in &self.figures {
            println!("{:<64} {}", figure.name, cell(figure.value, 10, 2));
        }
        for skipped in &self.skipped {
            println!("SKIPPED: {skipped}");
        }
    }
}

fn percent(share: f64) -> String {
    if share == 0.0 {
        "-".into()
    } else {
        format!("{:.1} %", share * 100.0)
    }
}

fn initial(filter: Filter, sources: Sources) -> Row {
    Row {
        filter,
        shape: Shape::Initial,
        sources,
    }
}

/// Number of packets of a verdict in the time of one packet under the reference's rules.
fn to_reference(results: &Results, case: Case, sources: Sources) -> Option<f64> {
    let ours = initial(Filter::Edge(case), sources);
    results.ratio(ours, initial(Filter::Reference, sources))
}

/// The reference's rules end at the source's rate as well (at one source), or at the lists behind
/// it: none of its rows looks up a count of connections that user space keeps. So these figures are
/// no targets.
fn figures(results: &Results) -> Vec<Figure> {
    let figure = |name, case, sources| Figure {
        name,
        value: to_reference(results, case, sources),
    };
    vec![
        figure(
            "refused by its source's cap, 1 source: times the reference",
            Case::Cap,
            Sources::ONE,
        ),
        figure(
            "refused by its source's cap, 1 M sources: times the reference",
            Case::Cap,
            Sources::MILLION,
        ),
        figure(
            "denied, 1 source: times the reference",
            Case::Deny,
            Sources::ONE,
        ),
        figure(
            "denied, 1 M sources: times the reference",
            Case::Deny,
            Sources::MILLION,
        ),
    ]
}

fn targets(results: &Results) -> Vec<Target> {
    use Better::{Higher, Lower};

    let to_reference = |sources| to_reference(results, Case::Rate, sources);
    let retry = initial(Filter::Edge(Case::Retry), Sources::ALL);
    let subject = |case| Subject {
        case,
        sources: Sources::ALL,
    };
    let prefixes = results
        .cost(subject(Case::Prefixes))
        .zip(results.cost(subject(Case::Admitted)))
        .map(|(with, without)| with - without);
    vec![
        Target::new(
            "refused by its source's rate, 1 source: times the reference",
            to_reference(Sources::ONE),
            5.0,
            Higher,
        ),
        Target::new(
            "refused by its source's rate, 1 M sources: times the reference",
            to_reference(Sources::MILLION),
            5.0,
            Higher,
        ),
        Target::new(
            "full path: admitted, 2^32 sources: ns",
            results.cost(subject(Case::Admitted)),
            200.0,
            Lower,
        ),
        Target::new("100,000 prefixes add: ns", prefixes, 60.0, Lower),
        Target::new(
            "Retry, 2^32 sources: million per CPU second",
            results.median_of(retry, |m| m.mpps_per_cpu_second),
            1.5,
            Higher,
        ),
    ]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    fn rate(mpps_per_cpu_second: f64) -> Measured {
        Measured {
            mpps_per_cpu_second,
            ..Measured::default()
        }
    }

    #[test]
    fn ratios_are_taken_inside_a_round() {
        let mut results = Results::default();
        let row = |filter| Row {
            filter,
            shape: Shape::Initial,
            sources: Sources::ONE,
        };
        // The second round is slow for all rows: the ratio must not show it.
        for (round, host) in [1.0, 0.5, 1.0].into_iter().enumerate() {
            results.add(row(Filter::Edge(Case::Rate)), round, rate(5.5 * host));
            results.add(row(Filter::Edge(Case::Cap)), round, rate(4.5 * host));
            results.add(row(Filter::Reference), round, rate(1.0 * host));
        }
        let targets = targets(&results);
        assert_eq!(targets[0].value, Some(5.5));
        assert!(targets[0].holds);
        assert!(targets[1].value.is_none() && !targets[1].holds);
        assert_eq!(figures(&results)[0].value, Some(4.5));
    }

    #[test]
    fn the_report_has_the_agreed_form() {
        let mut results = Results::default();
        let row = Row {
            filter: Filter::Floor,
            shape: Shape::Syn,
            sources: Sources::ALL,
        };
        results.add(row, 0, rate(7.0));
        let report = Report::new(&results, Host::default(), 1, true);
        let report = serde_json::to_value(report).unwrap();
        assert_eq!(report["rows"][0]["filter"], "XDP, drop all");
        assert_eq!(report["rows"][0]["packets"], "syn");
        assert_eq!(report["rows"][0]["sources"], 1u64 << 32);
        assert_eq!(report["rows"][0]["mpps_per_cpu_second"], 7.0);
        assert_eq!(report["targets"][0]["better"], "higher");
        assert!(report["host"]["cpu"].is_string() && report["host"]["kernel"].is_string());
    }

    // Protects unattended runs: a target that was not measured does not pass.
    #[test]
    fn a_run_that_shows_less_than_all_has_faults() {
        let mut results = Results::default();
        for sources in [Sources::ONE, Sources::MILLION] {
            results.add(initial(Filter::Edge(Case::Rate), sources), 0, rate(5.0));
            results.add(initial(Filter::Reference, sources), 0, rate(1.0));
        }
        let all = Sources::ALL;
        results.add(initial(Filter::Edge(Case::Retry), all), 0, rate(1.5));
        for (case, gross_ns) in [(Case::Admitted, 150.0), (Case::Prefixes, 200.0)] {
            let sources = all;
            let cost = Cost {
                gross_ns,
                loop_ns: 0.0,
            };
            results.add_cost(Subject { case, sources }, cost);
        }
        let faults = |results: &Results| {
            Report::new(results, Host::default(), 1, true).faults(Check::Targets)
        };
        assert_eq!(faults(&results), [""; 0]);
        results.skip("xdp-filter: not installed".into());
        assert_eq!(faults(&results).len(), 1);
        results.add(
            initial(Filter::Edge(Case::Retry), Sources::ALL),
            0,
            rate(1.4),
        );
        assert_eq!(faults(&results).len(), 2);
        let none = Results::default();
        assert_eq!(faults(&none).len(), targets(&none).len());
    }
}
