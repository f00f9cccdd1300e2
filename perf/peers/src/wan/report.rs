//! The tables of a run, and what is written to `perf/out/wan.json`.

use millrace_perf::report::{Target, cell, median, targets_table};
use serde::Serialize;

use super::child::End;
use super::plan::Part;
use super::relay::RelayReport;
use super::results::{Cell, MeshCell, Ramp, Results, Shares};
use super::targets::targets;

#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    results: Results,
    /// Of the whole run.
    seconds: f64,
    faults: Vec<String>,
    pub(super) targets: Vec<Target>,
}

impl Report {
    pub(super) fn new(rounds: usize, quick: bool) -> Self {
        Self {
            results: Results {
                rounds,
                quick,
                ..Results::default()
            },
            seconds: 0.0,
            faults: Vec::new(),
            targets: Vec::new(),
        }
    }

    pub(super) fn add_cell(&mut self, cell: Cell) {
        let bodies = cell.bodies.iter().map(|body| {
            let (rate, seconds) = (body.mbit_per_s, body.seconds);
            format!("{rate:.1} Mbit/s, {:?} after {seconds:.1} s", body.end)
        });
        let fault = cell.fault.iter().cloned();
        eprintln!("{}", bodies.chain(fault).collect::<Vec<_>>().join("; "));
        self.results.cells.push(cell);
    }

    pub(super) fn add_shares(&mut self, shares: Shares) {
        let (first, second) = (shares.first_mbit_per_s, shares.second_mbit_per_s);
        eprintln!("{first:.1} and {second:.1} Mbit/s");
        self.results.shares.push(shares);
    }

    pub(super) fn add_ramp(&mut self, ramp: Ramp) {
        eprintln!(
            "{:.2} of the link in the second round trip",
            ramp.second_rtt
        );
        self.results.resumed.push(ramp);
    }

    pub(super) fn set_mesh(&mut self, mesh: MeshCell) {
        eprintln!(
            "up after {:?} s, closed {:?}",
            mesh.full_mesh_s, mesh.closed
        );
        self.results.mesh = Some(mesh);
    }

    pub(super) fn add_fault(&mut self, fault: String) {
        eprintln!("{fault}");
        self.faults.push(fault);
    }

    /// Computes the targets of the parts that ran.
    pub(super) fn finish(&mut self, parts: &[Part], seconds: f64) {
        self.seconds = seconds;
        self.targets = targets(&self.results, parts);
    }

    pub(super) fn print(&self) {
        self.print_cells();
        for shares in &self.results.shares {
            println!(
                "{}: {:.1} and {:.1} Mbit/s, {} for the first",
                shares.part,
                shares.first_mbit_per_s,
                shares.second_mbit_per_s,
                cell(shares.of_first(), 0, 2)
            );
        }
        for ramp in &self.results.resumed {
            println!(
                "{}: of the link {:.2}, {:.2}, {:.2} in the first three round trips, {:.2} from \
                 then on; the bodies {:.1} and {:.1} Mbit/s",
                ramp.part,
                ramp.first_rtt,
                ramp.second_rtt,
                ramp.third_rtt,
                ramp.rest,
                ramp.first_body_mbit_per_s,
                ramp.second_body_mbit_per_s
            );
        }
        if let Some(mesh) = &self.results.mesh {
            println!(
                "mesh: {} pairs, all up after {} s; in 60 s idle {} ends of connections that were \
                 up (of all {:?}), {} dials, {} up at the end",
                mesh.pairs,
                cell(mesh.full_mesh_s, 0, 2),
                mesh.ended,
                mesh.closed,
                mesh.dials_while_idle,
                mesh.pairs_up_at_end
            );
        }
        self.print_relay();
        for fault in &self.faults {
            println!("fault: {fault}");
        }
        let heading = "target (medians of the rounds)";
        print!("\n{}", targets_table(heading, &self.targets));
        println!("{:.0} s", self.seconds);
    }

    /// One line for each part and contender, medians over the rounds.
    fn print_cells(&self) {
        println!(
            "{:<14} {:<18} {:>7} {:>7} {:>7} {:>6} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7}",
            "part",
            "contender",
            "Mbit/s",
            "lowest",
            "second",
            "whole",
            "p50 ms",
            "p99 ms",
            "sent",
            "lost",
            "tx MiB",
            "rx MiB"
        );
        let mut done: Vec<(&str, &str)> = Vec::new();
        for first in &self.results.cells {
            let key = (first.part.as_str(), first.contender.as_str());
            if done.contains(&key) {
                continue;
            }
            done.push(key);
            let is_of_row = |row: &&Cell| (row.part.as_str(), row.contender.as_str()) == key;
            let rows: Vec<_> = self.results.cells.iter().filter(is_of_row).collect();
            let of = |value: &dyn Fn(&Cell) -> Option<f64>| -> Vec<f64> {
                rows.iter().filter_map(|row| value(row)).collect()
            };
            let rates = of(&|row| row.rate(0));
            let is_whole = |row: &&&Cell| row.bodies.first().is_some_and(|b| b.end == End::Whole);
            println!(
                "{:<14} {:<18} {} {} {} {:>6} {} {} {} {} {} {}",
                key.0,
                key.1,
                cell(median(rates.clone()), 7, 1),
                cell(rates.into_iter().min_by(f64::total_cmp), 7, 1),
                cell(median(of(&|row| row.rate(1))), 7, 1),
                format!("{}/{}", rows.iter().filter(is_whole).count(), rows.len()),
                cell(median(of(&|row| row.rpc_p50_ms)), 8, 1),
                cell(median(of(&|row| row.rpc_p99_ms)), 8, 1),
                cell(median(of(&|row| Some(row.packets_sent? as f64))), 8, 0),
                cell(median(of(&|row| Some(row.packets_lost? as f64))), 7, 0),
                cell(median(of(&|row| Some(row.sender_rss_mib as f64))), 7, 0),
                cell(median(of(&|row| Some(row.receiver_rss_mib as f64))), 7, 0),
            );
        }
    }

    /// The worst of the relays: what they dropped themselves, and how late they were.
    fn print_relay(&self) {
        let relays: Vec<&RelayReport> = (self.results.cells.iter().map(|cell| &cell.relay))
            .chain(self.results.shares.iter().map(|shares| &shares.relay))
            .chain(self.results.resumed.iter().map(|ramp| &ramp.relay))
            .chain(self.results.mesh.iter().map(|mesh| &mesh.relay))
            .collect();
        let most = |value: fn(&RelayReport) -> u64| relays.iter().map(|r| value(r)).max();
        let sum = |value: fn(&RelayReport) -> u64| relays.iter().map(|r| value(r)).sum::<u64>();
        let cores = relays.iter().map(|r| r.cores_used).max_by(f64::total_cmp);
        println!(
            "relay: late by at most {} us for 99 % of a cell's packets, {} us for one; {} of its \
             packets dropped by the kernel, {} by any socket; {} cores at most{}",
            most(|relay| relay.late_p99_us).unwrap_or_default(),
            most(|relay| relay.late_max_us).unwrap_or_default(),
            sum(|relay| relay.relay_drops + relay.send_failed + relay.without_end),
            sum(|relay| relay.host_drops),
            cell(cores, 0, 2),
            if relays.iter().all(|relay| relay.is_realtime) {
                ""
            } else {
                "; without real-time priority"
            }
        );
    }
}
