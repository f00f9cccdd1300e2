//! Data to stdout, messages to stderr, both without panicking when the reader went away.

use std::fmt;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::exit::{Exit, Failure};

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
    // There is no way to report that stderr is closed.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Prints a failure and gives its code.
pub(crate) fn report(failure: &Failure) -> ExitCode {
    if !failure.message.is_empty() {
        message(format_args!("millrace: {}", failure.message));
    }
    failure.exit.into()
}

/// Starts the log on stderr with a filter such as `info` or `millrace_transport=debug`.
pub(crate) fn start_log(filter: &str) {
    let subscriber = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(EnvFilter::new(filter))
        .finish();
    // Fails only when a log was started before, which nothing here does.
    let _ = tracing::subscriber::set_global_default(subscriber);
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
