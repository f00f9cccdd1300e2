//! `millrace check`: every mistake of a config and every obstacle of this host, each with its fix.

use std::path::Path;

use millrace_edge::interface;
use millrace_edge_control::policy::EdgePolicy;
use millrace_edge_policy::settings::{Mode, SettingsError};
use millrace_node::{budget, host as this_host};
use millrace_tuning::problem::ProblemKind;
use millrace_tuning::{HostFacts, MemoryBudget, Parsed, Problem, Severity, host};
use serde::Serialize;

use crate::cli::CheckArgs;
use crate::exit::{Exit, Failure};
use crate::load::{Loaded, count, print_problems};
use crate::output;

pub(crate) fn run(args: &CheckArgs) -> Result<Exit, Failure> {
    let mut loaded = Loaded::read(&args.config)?;
    if loaded.parsed.is_usable() {
        let refused = limits(&loaded.parsed);
        loaded.parsed.problems.extend(refused);
    }
    let parsed = &loaded.parsed;
    let facts = if args.no_environment {
        HostFacts {
            cpus: this_host::usable_cpus(),
            ..HostFacts::default()
        }
    } else {
        this_host::probe(&parsed.config, &loaded.paths())
    };
    let budget = budget::of(&parsed.config, &facts.cpus);
    let environment = if args.no_environment {
        Vec::new()
    } else {
        let mut found = host::check(parsed, &facts, &budget);
        found.extend(interfaces(parsed));
        found
    };
    let config_errors = count(&parsed.problems, Severity::Error);
    let host_errors = count(&environment, Severity::Error);
    let exit = match (config_errors, host_errors) {
        (0, 0) => Exit::Ok,
        (0, _) => Exit::Problems,
        _ => Exit::BadConfig,
    };
    if args.json {
        let all = parsed.problems.iter().chain(&environment);
        output::json(&Report::of(&loaded.file, all, &budget, exit))?;
        return Ok(exit);
    }
    print_problems(&loaded.file, &parsed.problems);
    print_problems(&loaded.file, &environment);
    print_budget(&budget)?;
    let warnings = parsed.problems.len() + environment.len() - config_errors - host_errors;
    output::message(format_args!(
        "{}: {config_errors} mistakes, {host_errors} obstacles on this host, {warnings} warnings",
        loaded.file.display()
    ));
    Ok(exit)
}

/// What the edge would refuse of the config when it is applied: the same check.
fn limits(parsed: &Parsed) -> Option<Problem> {
    let config = &parsed.config;
    let settings = EdgePolicy::of(&config.edge).settings(config.listen.address.port(), Mode::Count);
    // A port that the kernel chooses is known once the node listens.
    let is_chosen = config.listen.address.port() == 0;
    let error = settings.validate().err();
    let error = error.filter(|error| !(is_chosen && matches!(error, SettingsError::PortZero)))?;
    let key = match &error {
        SettingsError::Limit {
            limit: "source_quic",
            ..
        } => "edge.quic_burst",
        SettingsError::Limit {
            limit: "source_tcp",
            ..
        } => "edge.tcp_burst",
        SettingsError::Limit { limit: "peer", .. } => "edge.peer_per_second",
        SettingsError::Limit { limit: "id", .. } => "edge.id_packets_per_second",
        SettingsError::PortZero | SettingsError::PortTwice { .. } => "edge.tcp_ports",
        _ => "edge",
    };
    let fix = match &error {
        SettingsError::Limit { .. } => "take a smaller burst for this rate, or a higher rate",
        SettingsError::Services { .. } => "declare fewer ports in tcp_ports and udp_ports",
        _ => "name every port once in listen.address, tcp_ports and udp_ports",
    };
    Some(Problem {
        position: parsed.origins.nearest(key),
        key: key.into(),
        kind: ProblemKind::Contradiction,
        severity: Severity::Error,
        reason: format!("the edge refuses this: {error}"),
        fix: fix.into(),
    })
}

/// Interfaces that are not there. The check may run on another host, and interfaces come and go.
fn interfaces(parsed: &Parsed) -> Vec<Problem> {
    let names = parsed.config.edge.interfaces.iter();
    let missing = names.filter(|name| !interface::exists(name));
    missing
        .map(|name| Problem {
            position: parsed.origins.nearest("edge.interfaces"),
            key: "edge.interfaces".into(),
            kind: ProblemKind::Environment,
            severity: Severity::Warning,
            reason: format!("there is no interface {name} here: nothing is attached there, and `millrace xdp attach` fails"),
            fix: "`ip link` shows those that there are; correct the name, or check where the node runs".into(),
        })
        .collect()
}

fn print_budget(budget: &MemoryBudget) -> Result<(), Failure> {
    let columns = format_args!("{:>8} {:>29}", "at start", "at most");
    output::data(format_args!("{:<50} {columns}", "memory budget, MiB"))?;
    for line in budget.lines() {
        output::data(format_args!(
            "  {:<48} {:>8.1} {:>7} x {:>8.2} = {:>8.1}",
            line.name,
            mib(line.at_start.0),
            line.count,
            mib(line.each.0),
            mib(line.total().0)
        ))?;
    }
    output::data(format_args!(
        "  {:<48} {:>8.1} {:>29.1}",
        "total",
        mib(budget.at_start().0),
        mib(budget.total().0)
    ))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[derive(Serialize)]
struct Report {
    file: String,
    exit: u8,
    problems: Vec<ProblemJson>,
    memory_budget_bytes: u64,
    memory_at_start_bytes: u64,
    memory: Vec<LineJson>,
}

#[derive(Serialize)]
struct ProblemJson {
    line: usize,
    column: usize,
    key: String,
    kind: &'static str,
    severity: &'static str,
    reason: String,
    fix: String,
}

#[derive(Serialize)]
struct LineJson {
    name: String,
    each_bytes: u64,
    count: u64,
    at_start_bytes: u64,
}

impl Report {
    fn of<'a>(
        file: &Path,
        problems: impl Iterator<Item = &'a Problem>,
        budget: &MemoryBudget,
        exit: Exit,
    ) -> Self {
        Self {
            file: file.display().to_string(),
            exit: exit as u8,
            problems: problems
                .map(|problem| ProblemJson {
                    line: problem.position.line,
                    column: problem.position.column,
                    key: problem.key.clone(),
                    kind: problem.kind.reason(),
                    severity: problem.severity.as_str(),
                    reason: problem.reason.clone(),
                    fix: problem.fix.clone(),
                })
                .collect(),
            memory_budget_bytes: budget.total().0,
            memory_at_start_bytes: budget.at_start().0,
            memory: budget
                .lines()
                .iter()
                .map(|line| LineJson {
                    name: line.name.clone(),
                    each_bytes: line.each.0,
                    count: line.count,
                    at_start_bytes: line.at_start.0,
                })
                .collect(),
        }
    }
}
