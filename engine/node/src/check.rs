//! `millrace check`: every mistake of a config and every obstacle of this host, each with its fix.

use std::path::Path;

use millrace_tuning::{HostFacts, MemoryBudget, Problem, Severity, host};
use serde::Serialize;

use crate::budget;
use crate::cli::CheckArgs;
use crate::exit::{Exit, Failure};
use crate::host_facts;
use crate::load::{Loaded, count, print_problems};
use crate::output;

pub(crate) fn run(args: &CheckArgs) -> Result<Exit, Failure> {
    let loaded = Loaded::read(&args.config)?;
    let parsed = &loaded.parsed;
    let facts = if args.no_environment {
        HostFacts {
            cpus: host_facts::usable_cpus(),
            ..HostFacts::default()
        }
    } else {
        host_facts::probe(&parsed.config, &loaded.paths())
    };
    let budget = budget::of(&parsed.config, &facts.cpus);
    let environment = if args.no_environment {
        Vec::new()
    } else {
        host::check(parsed, &facts, &budget)
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

fn print_budget(budget: &MemoryBudget) -> Result<(), Failure> {
    output::data("memory budget")?;
    for line in budget.lines() {
        let total = mib(line.total().0);
        output::data(format_args!(
            "  {:<44} {:>6} x {:>10.2} MiB = {total:>10.1} MiB",
            line.name,
            line.count,
            mib(line.each.0)
        ))?;
    }
    output::data(format_args!(
        "  {:<44} {:>35.1} MiB",
        "total",
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
            memory: budget
                .lines()
                .iter()
                .map(|line| LineJson {
                    name: line.name.clone(),
                    each_bytes: line.each.0,
                    count: line.count,
                })
                .collect(),
        }
    }
}
