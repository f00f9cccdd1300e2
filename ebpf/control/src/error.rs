//! Why the edge does not do what was asked, and whose fault that is.

use std::error::Error;
use std::io;

use millrace_edge::edge::EdgeError;
use millrace_edge::helper::HelperError;
use millrace_edge::journal::JournalError;
use millrace_edge::nft::{NftError, RULE_REFUSED};
use millrace_edge::pins::PinError;
use millrace_edge::publish::PublishError;
use millrace_edge_policy::rules::RulesError;

/// Whose fault an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The config's: what `[edge]` says cannot be in force.
    Config,
    /// The registry's: a rule cannot be in force.
    Registry,
    /// The operator's: what was asked for does not fit what is in force, or the place.
    Operator,
    /// Another process's: it holds what this one needs.
    Held,
    /// No fault: no edge is attached.
    Absent,
    /// The journal's: the file cannot be read or written.
    Journal,
    /// The caller's: the kernel denies it what it asks for (EPERM, EACCES).
    Permission,
    /// The host's: a program, a thread, a file, an interface or random bytes are missing.
    Host,
    /// The kernel's: it refuses a program, a map, a pin or a link.
    Kernel,
}

/// When it makes sense to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Once the input is another: the same is refused again.
    AfterChange,
    /// After a while: it may come right by itself.
    Later,
}

impl Fault {
    /// When it makes sense to try again.
    #[must_use]
    pub fn retry(self) -> Retry {
        match self {
            Self::Config | Self::Registry => Retry::AfterChange,
            _ => Retry::Later,
        }
    }
}

/// An error, by whose fault it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct ControlError {
    /// Whose fault it is.
    pub fault: Fault,
    /// What went wrong and what to do, for people.
    pub text: String,
}

impl ControlError {
    /// An error in these words.
    pub fn new(fault: Fault, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { fault, text }
    }

    /// The same fault in other words.
    pub(crate) fn reworded(self, words: impl FnOnce(&str) -> String) -> Self {
        Self::new(self.fault, words(&self.text))
    }

    /// This error, after what undoes its work: a second failure is mentioned behind it.
    #[must_use]
    pub fn after(self, undone: Result<(), Self>) -> Self {
        let Err(second) = undone else { return self };
        self.reworded(|text| format!("{text}; then this failed as well: {second}"))
    }
}

/// Errors of other crates, each with whose fault it is unless the kernel denies permission.
macro_rules! faults {
    ($($error:ty: $fault:expr;)*) => {$(
        impl From<$error> for ControlError {
            fn from(error: $error) -> Self {
                let fault: fn(&$error) -> Fault = $fault;
                let fault = if is_denied(&error) { Fault::Permission } else { fault(&error) };
                Self::new(fault, error.to_string())
            }
        }
    )*};
}

faults! {
    EdgeError: of_edge;
    JournalError: |_| Fault::Journal;
    PinError: of_pins;
    PublishError: of_publish;
    RulesError: |error| match error {
        RulesError::Rule { .. } => Fault::Registry,
        _ => Fault::Config,
    };
    NftError: |error| of_nft(error.reason());
    HelperError: |error| of_nft(error.reason());
}

fn of_edge(error: &EdgeError) -> Fault {
    match error {
        EdgeError::Absent { .. } => Fault::Absent,
        EdgeError::Elsewhere { .. }
        | EdgeError::OutOfSight { .. }
        | EdgeError::NotAttached { .. } => Fault::Operator,
        EdgeError::Publish(error) => of_publish(error),
        EdgeError::Present { .. } => Fault::Held,
        EdgeError::Journal(_) => Fault::Journal,
        EdgeError::Pins(error) => of_pins(error),
        EdgeError::Interface { .. } | EdgeError::Random { .. } => Fault::Host,
        _ => Fault::Kernel,
    }
}

fn of_pins(error: &PinError) -> Fault {
    match error {
        PinError::Busy { .. } => Fault::Held,
        PinError::Lock { .. } => Fault::Host,
        _ => Fault::Kernel,
    }
}

fn of_publish(error: &PublishError) -> Fault {
    match error {
        PublishError::AwaitingConfirm { .. } | PublishError::NotAwaitingConfirm => Fault::Operator,
        PublishError::TooLarge { .. } => Fault::Config,
        _ => Fault::Kernel,
    }
}

fn of_nft(reason: &str) -> Fault {
    match reason {
        RULE_REFUSED => Fault::Registry,
        _ => Fault::Host,
    }
}

/// Whether EPERM or EACCES is among an error's causes.
fn is_denied(error: &(dyn Error + 'static)) -> bool {
    let io = error.downcast_ref::<io::Error>().map(io::Error::kind);
    let bpf = error
        .downcast_ref::<libbpf_rs::Error>()
        .map(libbpf_rs::Error::kind);
    io == Some(io::ErrorKind::PermissionDenied)
        || bpf == Some(libbpf_rs::ErrorKind::PermissionDenied)
        || error.source().is_some_and(is_denied)
}
