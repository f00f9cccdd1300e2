//! Why the edge does not do what was asked, and whose fault that is.

use millrace_edge::edge::EdgeError;
use millrace_edge::helper::HelperError;
use millrace_edge::journal::JournalError;
use millrace_edge::nft::{NftError, RULE_REFUSED};
use millrace_edge::pins::PinError;
use millrace_edge::privileges;
use millrace_edge::publish::PublishError;
use millrace_edge_policy::rules::RulesError;
use millrace_edge_policy::settings::SettingsError;

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
    /// The caller's: it lacks capabilities.
    Permission,
    /// The host's: a program, a thread, an interface or random bytes are missing.
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
}

impl From<EdgeError> for ControlError {
    fn from(error: EdgeError) -> Self {
        let fault = match &error {
            EdgeError::Absent { .. } => Fault::Absent,
            EdgeError::Publish(
                PublishError::AwaitingConfirm { .. } | PublishError::NotAwaitingConfirm,
            ) => Fault::Operator,
            // Whatever else stands in the way, this does first.
            _ if !privileges::missing().is_empty() => Fault::Permission,
            EdgeError::Journal(_) => Fault::Journal,
            EdgeError::Present { .. } | EdgeError::Pins(PinError::Busy { .. }) => Fault::Held,
            EdgeError::Elsewhere { .. }
            | EdgeError::OutOfSight { .. }
            | EdgeError::NotAttached { .. } => Fault::Operator,
            EdgeError::Interface { .. } | EdgeError::Random { .. } => Fault::Host,
            _ => Fault::Kernel,
        };
        Self::new(fault, error.to_string())
    }
}

impl From<JournalError> for ControlError {
    fn from(error: JournalError) -> Self {
        EdgeError::from(error).into()
    }
}

impl From<PinError> for ControlError {
    fn from(error: PinError) -> Self {
        EdgeError::from(error).into()
    }
}

impl From<RulesError> for ControlError {
    fn from(error: RulesError) -> Self {
        let fault = match &error {
            RulesError::Rule { .. } => Fault::Registry,
            _ => Fault::Config,
        };
        Self::new(fault, error.to_string())
    }
}

impl From<SettingsError> for ControlError {
    fn from(error: SettingsError) -> Self {
        Self::new(Fault::Config, format!("[edge]: {error}"))
    }
}

impl From<NftError> for ControlError {
    fn from(error: NftError) -> Self {
        Self::new(fault_of_nft(error.reason()), error.to_string())
    }
}

impl From<HelperError> for ControlError {
    fn from(error: HelperError) -> Self {
        Self::new(fault_of_nft(error.reason()), error.to_string())
    }
}

fn fault_of_nft(reason: &str) -> Fault {
    let is_rule = reason == RULE_REFUSED;
    if is_rule {
        Fault::Registry
    } else {
        Fault::Host
    }
}
