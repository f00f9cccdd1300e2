//! The `millrace` binary: wires configuration, registry, transport and the reference application together.
//!
//! Data goes to stdout, messages to stderr, and the exit code says what happened; see [`exit`].

mod admin;
mod app;
mod artifacts_cmd;
mod budget;
mod check;
mod cli;
mod config_cmd;
mod dev;
#[cfg(test)]
mod docs_test;
mod edge;
mod exit;
mod host_facts;
mod keygen;
mod load;
mod mapping;
mod metrics;
mod node;
mod output;
mod poller;
mod progress;
mod registry_cmd;
mod running;
mod status;
mod versions;

use std::process::ExitCode;

use clap::Parser;

// Admin bodies, TOML and quiche's packets are small, short-lived allocations on many threads.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::usage(&error),
    };
    output::start_log(&cli.log);
    match cli.command.run() {
        Ok(exit) => exit.into(),
        Err(failure) => exit::report(&failure),
    }
}
