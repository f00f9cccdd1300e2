//! `peers wan`: bodies, small requests and a mesh over links that are long and lose packets.
//!
//! 1. Every cell has two fresh processes, and a relay in this one between them. `README.md` says
//!    how a figure comes about.
//! 2. Contenders take turns within a round, over links that lose the same share by the same seed;
//!    ratios are taken inside a round, and their median over the rounds counts.
//! 3. A cell that fails is a row with its fault, and its targets do not hold; the run goes on.

mod blast;
pub(crate) mod child;
pub(crate) mod clock;
mod peers;
mod plan;
mod relay;
mod report;
mod results;
mod run;
mod sites;
mod targets;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use millrace_perf::report::{Check, faults, write_json};

use crate::engines::quinn::Quinn;
use crate::engines::s2n::S2n;
use crate::engines::single_threaded;
use crate::{Result, socket};
use child::{Arrivals, Job};
use plan::{Contender, Part};
use report::Report;
use run::Runner;

/// What to run.
#[derive(Debug, Args)]
pub(crate) struct WanRun {
    /// The 150 ms row alone, one round, bodies cut at 20 s: about 3 minutes.
    #[arg(long)]
    quick: bool,
    /// Only these parts: a name such as body-150-0.3, or the beginning of several, such as body.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these contenders.
    #[arg(long, value_delimiter = ',')]
    engines: Vec<Contender>,
    /// Rounds of the parts that have rounds (default 3, or 1 with --quick).
    #[arg(long)]
    rounds: Option<usize>,
    /// Core of the receiving side.
    #[arg(long, default_value_t = 1)]
    serve_cpu: usize,
    /// Core of the sending side.
    #[arg(long, default_value_t = 0)]
    drive_cpu: usize,
    /// Change a setting of the peers, as `name=value`; see README.md.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Where the result goes.
    #[arg(long, default_value = "perf/out/wan.json")]
    out: PathBuf,
    /// Fail when a target does not hold, or (`collapse`) when it is missed by a factor of three.
    #[arg(long, num_args = 0..=1, default_missing_value = "targets")]
    check: Option<Check>,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    contender: Contender,
    #[arg(long)]
    cpu: usize,
    #[arg(long = "set")]
    set: Vec<String>,
    #[arg(long)]
    remembered_paths: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct DriveArgs {
    contender: Contender,
    #[arg(long)]
    cpu: usize,
    #[arg(long = "set")]
    set: Vec<String>,
    /// As JSON.
    #[arg(long)]
    job: String,
}

#[derive(Debug, Args)]
pub(crate) struct MeshArgs {
    #[arg(long)]
    idle_s: u64,
    /// As JSON: where each node finds each other.
    #[arg(long)]
    reached_at: String,
}

pub(crate) fn serve(args: &ServeArgs) -> Result<()> {
    socket::pin_to(args.cpu)?;
    let arrivals = Arrivals::default();
    arrivals.report_at_end();
    let settings = args.contender.settings(&args.set)?;
    match args.contender {
        Contender::Link => blast::serve(&arrivals),
        Contender::QuinnCubic | Contender::QuinnBbr => {
            single_threaded()?.block_on(peers::serve::<Quinn>(settings, arrivals))
        }
        Contender::S2n => single_threaded()?.block_on(peers::serve::<S2n>(settings, arrivals)),
        #[cfg(feature = "millrace")]
        Contender::Millrace | Contender::MillraceMessages => {
            crate::engines::millrace::wan::serve(&arrivals, args.remembered_paths.as_deref())
        }
        #[cfg(not(feature = "millrace"))]
        _ => Err("this build has no millrace".into()),
    }
}

pub(crate) fn drive(args: &DriveArgs) -> Result<()> {
    socket::pin_to(args.cpu)?;
    socket::exit_with_parent();
    let settings = args.contender.settings(&args.set)?;
    let job: Job = serde_json::from_str(&args.job)?;
    let outcome = match args.contender {
        Contender::Link => blast::drive(&job),
        Contender::QuinnCubic | Contender::QuinnBbr => {
            single_threaded()?.block_on(peers::drive::<Quinn>(&job, &settings))
        }
        Contender::S2n => single_threaded()?.block_on(peers::drive::<S2n>(&job, &settings)),
        #[cfg(feature = "millrace")]
        Contender::Millrace | Contender::MillraceMessages => {
            crate::engines::millrace::wan::drive(&job)
        }
        #[cfg(not(feature = "millrace"))]
        _ => Err("this build has no millrace".into()),
    };
    outcome?.report()
}

pub(crate) fn mesh(args: &MeshArgs) -> Result<()> {
    let reached_at: Vec<Vec<SocketAddr>> = serde_json::from_str(&args.reached_at)?;
    let idle = Duration::from_secs(args.idle_s);
    #[cfg(feature = "millrace")]
    let outcome = crate::engines::millrace::mesh::run(&reached_at, idle)?;
    #[cfg(not(feature = "millrace"))]
    let outcome: child::MeshOutcome = {
        let _ = (reached_at, idle);
        return Err("this build has no millrace".into());
    };
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}

pub(crate) fn run(run: &WanRun) -> Result<()> {
    let parts = match (&run.only[..], run.quick) {
        ([], false) => Part::all(),
        ([], true) => Part::named(&["body".to_owned()])?,
        (names, _) => Part::named(names)?,
    };
    let rounds = run.rounds.unwrap_or(if run.quick { 1 } else { 3 }).max(1);
    let runner = Runner { run };
    let started = clock::now();
    let mut report = Report::new(rounds, run.quick);
    for round in 0..rounds {
        for &part in &parts {
            measure(&runner, part, round, &mut report);
        }
    }
    report.finish(&parts, (clock::now() - started).as_secs_f64());
    report.print();
    write_json(&run.out, &report)?;
    eprintln!("written to {}", run.out.display());
    match run.check.map(|check| faults(&report.targets, check)) {
        Some(faults) if !faults.is_empty() => Err(faults.join("; ").into()),
        _ => Ok(()),
    }
}

/// One part, in one round.
fn measure(runner: &Runner<'_>, part: Part, round: usize, report: &mut Report) {
    let run = runner.run;
    let wanted = |contender: &Contender| match (&run.engines[..], run.quick) {
        ([], true) => part.is_in_quick_run(*contender),
        ([], false) => true,
        (engines, _) => engines.contains(contender),
    };
    for contender in part.contenders().into_iter().filter(wanted) {
        if round > 0 && !part.has_rounds(contender) {
            continue;
        }
        eprint!("round {}: {part} {contender}: ", round + 1);
        let fault = match part {
            Part::Body(_) | Part::Grid { .. } | Part::Satellite => runner
                .body(part, contender, round)
                .map(|cell| report.add_cell(cell)),
            Part::Shares(order) => runner
                .shares(part, order, round)
                .map(|shares| report.add_shares(shares)),
            Part::Resume { both } => runner.resume(part, both).map(|ramp| report.add_ramp(ramp)),
            Part::Mesh => runner.mesh().map(|mesh| report.set_mesh(mesh)),
        }
        .err();
        if let Some(fault) = fault {
            report.add_fault(format!("{part} {contender}: {fault}"));
        }
    }
}
