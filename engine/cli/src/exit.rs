//! Exit codes, and the one form in which a command fails.

use std::process::ExitCode;

use millrace_edge_control::{ControlError, Fault};
use millrace_node::admin::client::ClientError;
use millrace_node::{DraftError, KeyError, StartError};

/// How the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Ok = 0,
    /// Tried and failed.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// A check found problems of the host.
    Problems = 3,
    /// There is no node to talk to (`EX_UNAVAILABLE`).
    NotRunning = 69,
    /// The system does not permit it (`EX_NOPERM`).
    NotPermitted = 77,
    /// The config is wrong (`EX_CONFIG`).
    BadConfig = 78,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A command that could not do what was asked: what to print and how to exit.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
        }
    }

    /// An I/O error about a file or socket, with the exit code that fits it.
    pub(crate) fn io(what: impl std::fmt::Display, error: &std::io::Error) -> Self {
        let exit = match error.kind() {
            std::io::ErrorKind::PermissionDenied => Exit::NotPermitted,
            _ => Exit::Failed,
        };
        Self::new(exit, format!("{what}: {error}"))
    }
}

impl From<KeyError> for Failure {
    fn from(error: KeyError) -> Self {
        let exit = match &error {
            KeyError::NotAPublicKey { .. } => Exit::Usage,
            KeyError::Exposed { .. } => Exit::NotPermitted,
            KeyError::Io { file, error } => return Self::io(file.display(), error),
            _ => Exit::Failed,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let exit = match error {
            StartError::Key(error) => return error.into(),
            StartError::Edge(error) => return error.into(),
            StartError::Config { .. } => Exit::BadConfig,
            StartError::NotPermitted { .. } => Exit::NotPermitted,
            _ => Exit::Failed,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let exit = match &error {
            ClientError::NotRunning { .. } => Exit::NotRunning,
            ClientError::NotPermitted { .. } => Exit::NotPermitted,
            ClientError::Path { .. } => Exit::Usage,
            ClientError::Output(error) => return Self::io("output", error),
            _ => Exit::Failed,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<DraftError> for Failure {
    fn from(error: DraftError) -> Self {
        Self::new(Exit::Failed, error.to_string())
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let exit = match error.fault {
            Fault::Config | Fault::Registry => Exit::BadConfig,
            Fault::Absent => Exit::NotRunning,
            Fault::Permission => Exit::NotPermitted,
            Fault::Operator | Fault::Held | Fault::Journal | Fault::Host | Fault::Kernel => {
                Exit::Failed
            }
        };
        Self::new(exit, error.text)
    }
}

/// What clap says: help and version are no failures.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    // With stdout or stderr closed there is no way to report it.
    let _ = error.print();
    if error.use_stderr() {
        Exit::Usage.into()
    } else {
        Exit::Ok.into()
    }
}
