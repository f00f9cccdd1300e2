//! The binary `millrace`: arguments, printing and exit codes around the library `millrace-node`.
//!
//! Data goes to stdout, messages to stderr, and the exit code says what happened; see [`exit`].

mod artifacts_cmd;
mod check;
mod cli;
mod config_cmd;
mod dev;
mod exit;
mod keygen;
mod load;
mod log;
mod node;
mod output;
mod progress;
mod registry_cmd;
mod status;
mod versions;
mod xdp;

use std::process::ExitCode;

use clap::Parser;
use millrace_node::CountingAllocator;
use mimalloc::MiMalloc;

use cli::{Cli, Command};
use exit::{Exit, Failure};

// Admin bodies, TOML and quiche's packets are small, short-lived allocations on many threads. The
// count bounds what peers make quiche hold.
#[global_allocator]
static ALLOCATOR: CountingAllocator<MiMalloc> = CountingAllocator::new(MiMalloc);

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::usage(&error),
    };
    let _flush = log::start(&cli.log);
    match run(cli.command) {
        Ok(exit) => exit.into(),
        Err(failure) => output::report(&failure),
    }
}

fn run(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Dev(args) => dev::run(&args),
        Command::Node(args) => node::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Keygen(args) => keygen::run(&args),
        Command::Registry(command) => registry_cmd::run(command),
        Command::Put(args) => artifacts_cmd::put(&args),
        Command::Get(args) => artifacts_cmd::get(&args),
        Command::Status(args) => status::run(&args),
        Command::Xdp(command) => xdp::run(command),
        Command::Config(command) => config_cmd::run(command),
        Command::EdgeHelper => millrace_edge::helper::serve_stdin()
            .map(|()| Exit::Ok)
            .map_err(|error| Failure::io("the edge's helper", &error)),
    }
}
