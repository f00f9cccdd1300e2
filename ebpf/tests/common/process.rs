//! Processes that tests start: `tests/process` is the program.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use millrace_edge::pins::Pins;

use super::Namespace;

/// What the process prints once its set is in force.
pub const ATTACHED: &str = "attached and published";

/// The program.
pub fn path() -> &'static OsStr {
    OsStr::new(env!("CARGO_BIN_EXE_edge-test-process"))
}

/// The program with the job that it does.
pub fn command(job: &str) -> Command {
    let mut command = Command::new(path());
    command.arg(job);
    command
}

/// Starts a job in the node's namespace that attaches an edge and then waits for the end of its
/// standard input. The edge is in force when this returns.
pub fn attached(node: &Namespace, pins: &Pins, job: &str) -> Child {
    let start = || {
        command(job)
            .arg(pins.root())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let mut child = node.enter(start);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(
        lines.any(|line| line.unwrap().contains(ATTACHED)),
        "the process ended"
    );
    child
}
