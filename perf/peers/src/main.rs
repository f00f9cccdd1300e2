//! Side-by-side runs of millrace, quinn and s2n-quic on one machine, and the limits of that
//! machine.
//!
//! `peers` starts two copies of itself for every measurement: `serve` on one core and `drive` on
//! another. Engines take turns round by round, so that a slow minute of the host hits all alike,
//! and only ratios inside one round are compared. What each engine is given is in `README.md`.

mod engines;
mod identity;
mod limits;
mod measure;
mod orchestrate;
mod plan;
mod report;
mod settings;
mod socket;
mod stack;
mod wan;
mod workloads;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use millrace_perf::report::Check;

use plan::{Engine, Workload};
use settings::Settings;

// One allocator for all engines: the comparison is of engines, not of malloc.
#[cfg(not(feature = "millrace"))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

// As millrace's binary has it: it counts.
#[cfg(feature = "millrace")]
#[global_allocator]
static ALLOCATOR: millrace_shards::CountingAllocator<mimalloc::MiMalloc> =
    millrace_shards::CountingAllocator::new(mimalloc::MiMalloc);

/// A fault of the bench itself; it ends the run.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Measure millrace beside quinn and s2n-quic, and beside what the machine can do.
#[derive(Debug, Parser)]
#[command(name = "peers", version)]
struct Cli {
    #[command(subcommand)]
    role: Option<Role>,
    #[command(flatten)]
    run: Run,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Receiving side of one measurement (started by the run itself).
    #[command(hide = true)]
    Serve(ServeArgs),
    /// Sending side of one measurement (started by the run itself).
    #[command(hide = true)]
    Drive(DriveArgs),
    /// Long and lossy links: bodies and small requests over them, a mesh, shares, restarts.
    Wan(wan::WanRun),
    /// Receiving side of one cell of `wan` (started by the run itself).
    #[command(hide = true)]
    WanServe(wan::ServeArgs),
    /// Sending side of one cell of `wan` (started by the run itself).
    #[command(hide = true)]
    WanDrive(wan::DriveArgs),
    /// The nodes of the mesh (started by the run itself).
    #[command(hide = true)]
    WanMesh(wan::MeshArgs),
    /// The limits of the machine alone.
    Limits {
        /// Seconds per limit.
        #[arg(long, default_value_t = 0.5)]
        seconds: f64,
    },
}

/// What to run.
#[derive(Debug, Args)]
struct Run {
    /// One short round of everything, under 50 s.
    #[arg(long)]
    quick: bool,
    /// Only these workloads.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Workload>,
    /// Only these engines.
    #[arg(long, value_delimiter = ',')]
    engines: Vec<Engine>,
    /// Interleaved rounds (default 7, or 1 with --quick).
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds per timed measurement (default 1.2, or 0.3 with --quick).
    #[arg(long)]
    seconds: Option<f64>,
    /// Transfers of 128 MiB per bulk measurement (default 5, or 2 with --quick).
    #[arg(long)]
    transfers: Option<usize>,
    /// Core of the receiving side.
    #[arg(long, default_value_t = 1)]
    serve_cpu: usize,
    /// Core of the sending side.
    #[arg(long, default_value_t = 0)]
    drive_cpu: usize,
    /// Change a setting of the engines, as `name=value`; see README.md.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Leave the limits out.
    #[arg(long)]
    no_limits: bool,
    /// Where the result goes.
    #[arg(long, default_value = "perf/out/peers.json")]
    out: PathBuf,
    /// Fail when a target does not hold, or (`collapse`) when it is missed by a factor of three.
    #[arg(long, num_args = 0..=1, default_missing_value = "targets")]
    check: Option<Check>,
}

#[derive(Debug, Args)]
struct ServeArgs {
    engine: Engine,
    workload: Workload,
    #[arg(long)]
    cpu: usize,
    #[arg(long = "set")]
    set: Vec<String>,
}

#[derive(Debug, Args)]
struct DriveArgs {
    engine: Engine,
    workload: Workload,
    #[arg(long)]
    cpu: usize,
    #[arg(long)]
    server_pid: u32,
    #[arg(long = "address", required = true)]
    addresses: Vec<SocketAddr>,
    #[arg(long)]
    seconds: f64,
    #[arg(long)]
    transfers: usize,
    #[arg(long = "set")]
    set: Vec<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.role {
        Some(Role::Serve(args)) => serve(&args),
        Some(Role::Drive(args)) => drive(args),
        Some(Role::Wan(run)) => wan::run(&run),
        Some(Role::WanServe(args)) => wan::serve(&args),
        Some(Role::WanDrive(args)) => wan::drive(&args),
        Some(Role::WanMesh(args)) => wan::mesh(&args),
        Some(Role::Limits { seconds }) => print_limits(Duration::from_secs_f64(seconds)),
        None => orchestrate::run(&cli.run),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peers: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print_limits(each: Duration) -> Result<()> {
    let limits = limits::measure(each, 0, 1)?;
    println!("{}", serde_json::to_string(&limits)?);
    Ok(())
}

fn serve(args: &ServeArgs) -> Result<()> {
    socket::pin_to(args.cpu)?;
    socket::exit_with_parent();
    let settings = Settings::for_engine(args.engine, args.workload, &args.set)?;
    engines::serve(args.engine, args.workload, settings)
}

fn drive(args: DriveArgs) -> Result<()> {
    socket::pin_to(args.cpu)?;
    let settings = Settings::for_engine(args.engine, args.workload, &args.set)?;
    let job = workloads::Job {
        workload: args.workload,
        server_pid: args.server_pid,
        addresses: args.addresses,
        duration: Duration::from_secs_f64(args.seconds),
        transfers: args.transfers,
    };
    let measurement = engines::drive(args.engine, job, settings)?;
    println!("{}", serde_json::to_string(&measurement)?);
    Ok(())
}
