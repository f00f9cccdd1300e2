//! Rounds: every engine once per workload and round, a pair of fresh processes each.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use clap::ValueEnum;
use millrace_perf::report::write_json;

use crate::measure::Measurement;
use crate::plan::{Engine, Workload};
use crate::report::{Report, Results};
use crate::{Result, Run, limits};

pub(crate) fn run(run: &Run) -> Result<()> {
    let plan = Plan::new(run);
    let mut results = Results::default();
    for round in 0..plan.rounds {
        for &workload in &plan.workloads {
            for &engine in plan.engines.iter().filter(|engine| engine.runs(workload)) {
                eprint!(
                    "\rround {}/{}: {workload:<20} {engine:<14}",
                    round + 1,
                    plan.rounds
                );
                let measurement = plan
                    .measure(engine, workload)
                    .map_err(|error| format!("{workload} by {engine}: {error}"))?;
                results.add(workload, engine, round, measurement);
            }
        }
    }
    let limits = if run.no_limits {
        None
    } else {
        eprint!("\rlimits of the machine{:<40}", "");
        Some(limits::measure(
            plan.limit_lasts,
            run.drive_cpu,
            run.serve_cpu,
        )?)
    };
    eprintln!("\r{:<60}", "");
    let report = Report::new(&results, limits, plan.rounds, run.quick);
    report.print();
    write_json(&run.out, &report)?;
    eprintln!("written to {}", run.out.display());
    match run.check.map(|check| report.faults(check)) {
        Some(faults) if !faults.is_empty() => Err(faults.join("; ").into()),
        _ => Ok(()),
    }
}

/// The rounds and what every child is told.
#[derive(Debug)]
struct Plan<'a> {
    run: &'a Run,
    engines: Vec<Engine>,
    workloads: Vec<Workload>,
    rounds: usize,
    seconds: f64,
    transfers: usize,
    limit_lasts: Duration,
}

impl<'a> Plan<'a> {
    fn new(run: &'a Run) -> Self {
        let engines = if run.engines.is_empty() {
            Engine::all()
        } else {
            run.engines.clone()
        };
        let workloads = if run.only.is_empty() {
            Workload::value_variants().to_vec()
        } else {
            run.only.clone()
        };
        let (rounds, seconds, transfers, limit_ms) = if run.quick {
            (1, 0.3, 2, 100)
        } else {
            (7, 1.2, 5, 1000)
        };
        Self {
            run,
            engines,
            workloads,
            rounds: run.rounds.unwrap_or(rounds).max(1),
            seconds: run.seconds.unwrap_or(seconds),
            transfers: run.transfers.unwrap_or(transfers).max(1),
            limit_lasts: Duration::from_millis(limit_ms),
        }
    }

    fn measure(&self, engine: Engine, workload: Workload) -> Result<Measurement> {
        let mut server = Server::start(self, engine, workload)?;
        let mut drive = self.child("drive", engine, workload, self.run.drive_cpu)?;
        drive.args(["--server-pid", &server.child.id().to_string()]);
        drive.args(["--seconds", &self.seconds.to_string()]);
        drive.args(["--transfers", &self.transfers.to_string()]);
        for address in &server.addresses {
            drive.args(["--address", address]);
        }
        let output = drive.stderr(Stdio::inherit()).output()?;
        server.stop()?;
        if !output.status.success() {
            return Err("the driving process failed".into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn child(&self, role: &str, engine: Engine, workload: Workload, cpu: usize) -> Result<Command> {
        let mut command = Command::new(env::current_exe()?);
        command.args([role, &engine.to_string(), &workload.to_string()]);
        command.args(["--cpu", &cpu.to_string()]);
        for change in &self.run.set {
            command.args(["--set", change]);
        }
        Ok(command)
    }
}

/// A serving process; it ends when its standard input is closed.
#[derive(Debug)]
struct Server {
    child: Child,
    addresses: Vec<String>,
}

impl Server {
    fn start(plan: &Plan<'_>, engine: Engine, workload: Workload) -> Result<Self> {
        let mut child = plan
            .child("serve", engine, workload, plan.run.serve_cpu)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let out = child.stdout.take().ok_or("no standard output")?;
        BufReader::new(out).read_line(&mut line)?;
        let addresses = line
            .strip_prefix("ready ")
            .ok_or("the serving process failed")?;
        let addresses = addresses.split_whitespace().map(str::to_owned).collect();
        Ok(Self { child, addresses })
    }

    fn stop(&mut self) -> Result<()> {
        drop(self.child.stdin.take());
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _already_waited = self.child.wait();
    }
}
