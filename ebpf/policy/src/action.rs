//! What the edge does with a packet, and what a rule asks it to do.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the edge does with a packet in mode `enforce`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Goes on to the host.
    Pass,
    /// Is answered from here: a Retry or a SYN cookie.
    Transmit,
    /// Ends here.
    Drop,
}

impl Action {
    /// The word for it in metrics and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Transmit => "transmit",
            Self::Drop => "drop",
        }
    }
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u32)]
pub enum RuleAction {
    /// Lets the packet go on.
    Allow = 0,
    /// Drops it.
    Deny = 1,
    /// Drops it. An error is sent to the sender while the budget for answers lasts.
    Reject = 2,
}

impl fmt::Display for RuleAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Reject => "reject",
        })
    }
}
