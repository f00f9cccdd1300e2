//! Data to stdout, messages to stderr, both without panicking when the reader went away.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use crate::exit::{Exit, Failure};
use crate::log;
use serde::Serialize;

/// Writes a line of data.
pub(crate) fn data(line: impl fmt::Display) -> Result<(), Failure> {
    written(writeln!(std::io::stdout().lock(), "{line}"))
}

/// Writes text that ends by itself.
pub(crate) fn text(text: &str) -> Result<(), Failure> {
    written(std::io::stdout().lock().write_all(text.as_bytes()))
}

/// Writes one JSON document on one line.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let line = serde_json::to_string(value)
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot write JSON: {error}")))?;
    data(line)
}

/// Writes a message for people.
pub(crate) fn message(line: impl fmt::Display) {
    log::say(format!("{line}\n").as_bytes());
}

/// Prints a failure and gives its code.
pub(crate) fn report(failure: &Failure) -> ExitCode {
    if !failure.message.is_empty() {
        message(format_args!("millrace: {}", failure.message));
    }
    failure.exit.into()
}

fn written(result: std::io::Result<()>) -> Result<(), Failure> {
    match result {
        // `millrace … | head` is no failure worth a message.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Failed, ""))
        }
        Err(error) => Err(Failure::io("stdout", &error)),
        Ok(()) => Ok(()),
    }
}
