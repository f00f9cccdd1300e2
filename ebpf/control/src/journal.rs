//! The journal's content: everything that must outlive a process and that the kernel cannot say.
//!
//! 1. One file, replaced whole under [`EdgeLock`]: each change is there or is not.
//! 2. A set is written down before it is published: its number in the kernel leads to its rules.
//! 3. The set before one that awaits a confirmation is kept.

use std::time::{SystemTime, UNIX_EPOCH};

use millrace_edge::journal;
use millrace_edge::nft::{Fingerprint, Table};
use millrace_edge::pins::{EdgeLock, Pins};
use millrace_edge_policy::rules::{Compiled, Temporary};
use serde::{Deserialize, Serialize};

use crate::error::ControlError;
use crate::plan::SetInputs;
use crate::policy::{NodePolicy, ProgramPolicy};

/// The file.
pub type Journal = journal::Journal<Record>;

/// The control loop's part of the journal.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The last set that table and journal have followed: 0 before the first.
    pub set: u32,
    /// Rules that end by themselves, in the order of their issue.
    pub temporary: Vec<Temporary>,
    /// A newer version of the registry, whose rules are refused.
    pub refused: Option<Refused>,
    /// The last set that awaited a confirmation and got none, until an operator applies anew.
    pub rolled_back: Option<RolledBack>,
    /// What the program was loaded with.
    pub program: Option<ProgramPolicy>,
    /// What the node was started with.
    pub node: Option<NodePolicy>,
    /// A set that is about to be in force, and what follows.
    pub pending: Option<Pending>,
    /// What `nft` said of that set's table; none: it is to be tried again.
    pub fingerprint: Option<Fingerprint>,
    /// The set in force, the one before or after it, and the last committed one.
    pub sets: Vec<SetRecord>,
}

/// A version of the registry that cannot be in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused {
    /// Its number.
    pub registry_version: u64,
    /// What is wrong with it, for people.
    pub message: String,
}

/// A set that awaited a confirmation and got none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolledBack {
    /// Its number.
    pub set: u32,
    /// What it was made from.
    pub inputs: SetInputs,
}

/// A set that is about to be in force, until table and journal have followed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pending {
    /// Its number.
    pub set: u32,
    /// The kernel goes back unless it is confirmed.
    pub to_confirm: bool,
    /// An operator asked for it: what was rolled back before is forgotten.
    pub anew: bool,
    /// A newer version of the registry, whose rules are refused.
    pub refused: Option<Refused>,
}

/// A published set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetRecord {
    /// Its number.
    pub number: u32,
    /// Its inbound rules, each at its index.
    pub rules: Vec<RuleText>,
    /// What it was made from.
    pub inputs: SetInputs,
    /// The table of nftables that goes with it.
    pub table: Table,
}

/// One rule of a set in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleText {
    /// The rule.
    pub rule: String,
    /// Its source.
    pub origin: String,
}

impl SetRecord {
    /// A set that was compiled from these inputs.
    #[must_use]
    pub fn new(number: u32, set: &Compiled, inputs: SetInputs) -> Self {
        let rules = set.rules.iter().map(|line| RuleText {
            rule: line.rule.to_string(),
            origin: line.rule.provenance.to_string(),
        });
        Self {
            number,
            rules: rules.collect(),
            inputs,
            table: Table::of(set),
        }
    }
}

impl Record {
    /// Reads the journal of an edge; an empty record if there is none.
    ///
    /// # Errors
    ///
    /// [`Fault::Journal`](crate::Fault::Journal), or
    /// [`Fault::Permission`](crate::Fault::Permission) where the kernel denies it.
    pub fn read(pins: &Pins) -> Result<Self, ControlError> {
        Ok(Journal::read(pins)?.control)
    }

    /// Changes the record in one write. The interfaces stay.
    ///
    /// # Errors
    ///
    /// As [`Self::read`]; the journal is as before.
    pub fn update(
        pins: &Pins,
        lock: &EdgeLock,
        change: impl FnOnce(&mut Self),
    ) -> Result<(), ControlError> {
        let mut journal = Journal::read(pins)?;
        change(&mut journal.control);
        Ok(journal.write(pins, lock)?)
    }

    /// Temporary rules that have not ended.
    #[must_use]
    pub fn live_temporary(&self, now: SystemTime) -> Vec<Temporary> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut live = self.temporary.clone();
        live.retain(|rule| rule.until_unix_seconds > now);
        live
    }

    /// A published set; none if the journal does not hold it.
    #[must_use]
    pub fn set(&self, number: u32) -> Option<&SetRecord> {
        self.sets.iter().find(|set| set.number == number)
    }

    /// What a set was made from; none if the journal does not hold it.
    #[must_use]
    pub fn inputs(&self, number: u32) -> Option<&SetInputs> {
        Some(&self.set(number)?.inputs)
    }

    /// Adds a set, and forgets those that are neither in force nor committed.
    pub fn keep(&mut self, set: SetRecord, in_force: u32) {
        let kept = [in_force, self.set];
        self.sets
            .retain(|known| kept.contains(&known.number) && known.number != set.number);
        self.sets.push(set);
    }
}
