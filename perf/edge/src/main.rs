//! The edge against nftables and xdp-filter on one testbed: the cost of a hostile packet, and the
//! service that honest clients still get.
//!
//! Two namespaces and a veth pair; a generator that writes every packet anew. Filters take turns
//! round by round, so that a slow minute of the host hits all alike. Every packet is accounted for,
//! or the row is an error. `README.md` says how to read the figures.

mod cost;
mod cpu;
mod edge;
mod filters;
mod frames;
mod generator;
#[cfg(feature = "goodput")]
mod goodput;
mod host;
mod namespace;
mod receiver;
mod reference;
mod report;
mod rows;
mod tally;
mod testbed;

use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use millrace_perf::report::{Check, write_json};

use crate::cpu::Clock;
use crate::edge::Edges;
use crate::filters::{Filter, Parts};
use crate::host::Host;
use crate::receiver::Receiver;
use crate::report::{Report, Results};
use crate::testbed::Testbed;

/// A fault of the bench itself, or a packet that is not accounted for; it ends the run.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Measure the cost of refusing a hostile packet, and the service that honest clients get
/// meanwhile.
#[derive(Debug, Parser)]
#[command(name = "bench-edge", version)]
struct Cli {
    #[command(subcommand)]
    role: Option<Role>,
    #[command(flatten)]
    run: Run,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Goodput of honest clients under attack, with plots.
    #[cfg(feature = "goodput")]
    Goodput(goodput::Run),
    /// The attacked node (started by the run itself).
    #[cfg(feature = "goodput")]
    #[command(hide = true)]
    Serve(goodput::RoleArgs),
    /// The honest clients (started by the run itself).
    #[cfg(feature = "goodput")]
    #[command(hide = true)]
    Drive(goodput::RoleArgs),
}

/// Options: which rows, and for how long.
#[derive(Debug, Args)]
struct Run {
    /// One short round of everything, under 50 s.
    #[arg(long)]
    quick: bool,
    /// Only rows whose name contains one of these.
    #[arg(long, value_delimiter = ';')]
    only: Vec<String>,
    /// Interleaved rounds (default 7, or 1 with --quick).
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds for each measurement (default 1, or 0.3 with --quick).
    #[arg(long)]
    seconds: Option<f64>,
    /// Core of generator, veth and filter.
    #[arg(long, default_value_t = 1)]
    cpu: usize,
    /// File for the result.
    #[arg(long, default_value = "perf/out/edge.json")]
    out: PathBuf,
    /// Fail when a target does not hold or a row was skipped, or (`collapse`) when a target is
    /// missed by a factor of three.
    #[arg(long, num_args = 0..=1, default_missing_value = "targets")]
    check: Option<Check>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.role {
        #[cfg(feature = "goodput")]
        Some(Role::Goodput(run)) => goodput::run(&run),
        #[cfg(feature = "goodput")]
        Some(Role::Serve(role)) => goodput::serve(role),
        #[cfg(feature = "goodput")]
        Some(Role::Drive(role)) => goodput::drive(role),
        None => run(&cli.run),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-edge: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Run) -> Result<()> {
    namespace::guard()?;
    // Read before the process is bound to one of the cores.
    let host = Host::read()?;
    cpu::pin_to(cli.cpu)?;
    let clock = Clock::of(cli.cpu)?;
    let (rounds, seconds) = if cli.quick { (1, 0.3) } else { (7, 1.0) };
    let rounds = cli.rounds.unwrap_or(rounds).max(1);
    let lasts = Duration::from_secs_f64(cli.seconds.unwrap_or(seconds));

    let packets = if cli.quick { 200_000 } else { 1_000_000 };

    let mut object = MaybeUninit::uninit();
    let receiver = Receiver::load(&mut object, testbed::CLIENT.into())?;
    let testbed = Testbed::build(&receiver)?;
    let mut results = Results::default();
    let mut rows = rows::all();
    let is_wanted = |name: &str| {
        cli.only.is_empty() || cli.only.iter().any(|part| name.contains(part.as_str()))
    };
    rows.retain(|row| is_wanted(&row.name()));
    rows.retain(|row| match row.filter.missing() {
        Some(why) => {
            results.skip(format!("{}: {why}", row.name()));
            false
        }
        None => true,
    });
    let mut subjects = cost::all();
    subjects.retain(|subject| is_wanted(&subject.name()));
    let mut edges = Edges::default();
    for row in &rows {
        if let Filter::Edge(case) = row.filter {
            edges.prepare(case, row.sources)?;
        }
    }
    for subject in &subjects {
        edges.prepare(subject.case, subject.sources)?;
    }
    let parts = Parts {
        testbed: &testbed,
        receiver: &receiver,
        edges: &edges,
    };
    for round in 0..rounds {
        for &row in &rows {
            eprint!("\rround {}/{rounds}: {:<60}", round + 1, row.name());
            let measured = row
                .measure(&parts, &clock, lasts)
                .map_err(|error| format!("{}: {error}", row.name()))?;
            results.add(row, round, measured);
        }
        for &subject in &subjects {
            eprint!("\rround {}/{rounds}: {:<60}", round + 1, subject.name());
            results.add_cost(subject, subject.measure(&edges, &receiver, packets)?);
        }
    }
    eprintln!("\r{:<76}", "");
    let report = Report::new(&results, host, rounds, cli.quick);
    report.print();
    write_json(&cli.out, &report)?;
    eprintln!("written to {}", cli.out.display());
    match cli.check.map(|check| report.faults(check)) {
        Some(faults) if !faults.is_empty() => Err(faults.join("; ").into()),
        _ => Ok(()),
    }
}
