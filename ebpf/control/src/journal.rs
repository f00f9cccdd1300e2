//! The journal's content: everything that must outlive a process and that the kernel cannot say.
//!
//! 1. One file, replaced whole under [`EdgeLock`]: each change is there or is not.
//! 2. A set is written down before it is published: its number in the kernel leads to its rules.
//! 3. The set before one that awaits a confirmation is kept.

use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use millrace_edge::interface::Interface;
use millrace_edge::journal;
use millrace_edge::nft::{Fingerprint, Table};
use millrace_edge::pins::{EdgeLock, Pins};
use millrace_edge_policy::rules::{Compiled, Locality, Temporary};
use serde::{Deserialize, Serialize};

use crate::error::ControlError;
use crate::plan::Firewall;
use crate::policy::{EdgePolicy, NodePolicy, ProgramPolicy};

/// The file: its control part is none before the first set.
pub type Journal = journal::Journal<Option<Record>>;

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

/// What a set was made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetInputs {
    /// Public key of the registry: versions of another one are not comparable.
    pub registry: String,
    /// What the registry said.
    pub firewall: Firewall,
    /// The transport's port.
    pub port: u16,
    /// What the config said.
    pub policy: EdgePolicy,
    /// Temporary rules that had not ended.
    pub temporary: Vec<Temporary>,
}

impl SetInputs {
    /// Its rules, for the members of now.
    pub(crate) fn rules_for(&self, now: Firewall) -> Firewall {
        Firewall {
            version: self.firewall.version,
            tables: self.firewall.tables.clone(),
            ..now
        }
    }

    /// What the registry said then, for a node and its roles of now.
    pub(crate) fn firewall_for(&self, now: &Firewall) -> Firewall {
        let locality = Locality {
            subnet: self.firewall.locality.subnet.clone(),
            ..now.locality.clone()
        };
        Firewall {
            locality,
            ..self.firewall.clone()
        }
    }
}

impl SetRecord {
    pub(crate) fn new(number: u32, set: &Compiled, inputs: SetInputs) -> Self {
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
    /// [`Fault::Permission`](crate::Fault::Permission) where capabilities are missing.
    pub fn read(pins: &Pins) -> Result<Self, ControlError> {
        Ok(Journal::read(pins)?.control.unwrap_or_default())
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
        change(journal.control.get_or_insert_default());
        Ok(journal.write(pins, lock)?)
    }

    /// Temporary rules that have not ended.
    #[must_use]
    pub fn live_temporary(&self, now: SystemTime) -> Vec<Temporary> {
        let now = now
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let live = self
            .temporary
            .iter()
            .filter(|rule| rule.until_unix_seconds > now);
        live.cloned().collect()
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
    pub(crate) fn keep(&mut self, set: SetRecord, in_force: u32) {
        let kept = [in_force, self.set];
        let is_kept =
            |known: &SetRecord| kept.contains(&known.number) && known.number != set.number;
        self.sets.retain(is_kept);
        self.sets.push(set);
    }
}

/// The journal as it was read last: a file that has not changed is not read again.
#[derive(Debug, Default)]
pub(crate) struct CachedJournal {
    /// Device, inode, length and time of the file that was read: every write makes another file.
    read: Option<(u64, u64, u64, i64, i64)>,
    /// Interfaces that the edge is attached to.
    pub(crate) interfaces: Vec<Interface>,
    record: Arc<Record>,
}

impl CachedJournal {
    /// Reads the file if it changed, and writes it again as it was read last if it was removed.
    pub(crate) fn read(
        &mut self,
        pins: &Pins,
        lock: &EdgeLock,
    ) -> Result<Arc<Record>, ControlError> {
        let path = pins.journal_path();
        if self.read.is_some() && !path.exists() {
            let journal = Journal {
                interfaces: self.interfaces.clone(),
                control: Some((*self.record).clone()),
                ..Journal::default()
            };
            journal.write(pins, lock)?;
        }
        let file = std::fs::metadata(path).ok();
        let now = file.map(|f| (f.dev(), f.ino(), f.size(), f.mtime(), f.mtime_nsec()));
        if now.is_none() || self.read != now {
            let journal = Journal::read(pins)?;
            self.read = now;
            self.interfaces = journal.interfaces;
            self.record = Arc::new(journal.control.unwrap_or_default());
        }
        Ok(Arc::clone(&self.record))
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::time::Duration;

    use millrace_edge_policy::rules::{Bounds, Rule, RuleAction, compile};
    use millrace_edge_policy::settings::Settings;
    use millrace_tuning::NodeConfig;

    use super::*;

    fn allowing(number: u32, address: &str, tables: Vec<toml::Table>) -> SetRecord {
        let address: IpAddr = address.parse().unwrap();
        let bounds = Bounds {
            rules_max: 1,
            nodes4_max: 100,
            nodes6_max: 100,
        };
        let set = compile(&Settings::default(), &[Rule::members([address])], bounds).unwrap();
        let inputs = SetInputs {
            registry: "ab".into(),
            firewall: Firewall {
                version: 7,
                tables,
                members: vec![address],
                locality: Locality {
                    subnet: Some("blue".into()),
                    ..Locality::default()
                },
            },
            port: 4100,
            policy: EdgePolicy::of(&NodeConfig::default().edge),
            temporary: vec![Temporary {
                prefix: "192.0.2.0/24".parse().unwrap(),
                action: RuleAction::Deny,
                until_unix_seconds: 1_900_000_000,
            }],
        };
        SetRecord::new(number, &set, inputs)
    }

    fn pins() -> (tempfile::TempDir, Pins) {
        let folder = tempfile::tempdir().unwrap();
        let pins = Pins::at(folder.path().join("edge"));
        (folder, pins)
    }

    // Protects the last good set: its rules come back as the registry said them.
    #[test]
    fn what_a_set_was_made_from_is_read_again() {
        let (_folder, pins) = pins();
        let document = "[[firewall]]\nscope = \"global\"\nports = [80, \"90-99\"]\naction = \"deny\"\n\
                        [[firewall]]\nscope = \"role:gate\"\naction = \"allow\"\n";
        let document = document.parse::<toml::Table>().unwrap();
        let tables = document["firewall"].as_array().unwrap().iter();
        let tables: Vec<_> = tables.map(|t| t.as_table().unwrap().clone()).collect();
        let set = allowing(1, "192.0.2.1", tables.clone());
        Record::update(&pins, &pins.lock().unwrap(), |record| {
            record.keep(set.clone(), 0);
        })
        .unwrap();
        let read = Record::read(&pins).unwrap();
        assert_eq!(read.set(1), Some(&set));
        assert_eq!(read.set(2), None);
        let again = read.inputs(1).unwrap().firewall_for(&Firewall::default());
        assert_eq!((again.tables, again.version), (tables, 7));
        assert_eq!(again.locality.subnet.as_deref(), Some("blue"));
    }

    // Protects `rules`, `trace` and a rollback: the set in force and the newest are kept, whatever
    // their numbers.
    #[test]
    fn sets_that_may_be_in_force_are_kept() {
        let mut record = Record::default();
        for (set, in_force) in [(1, 0), (2, 1), (3, 2), (3, 2)] {
            record.keep(allowing(set, "192.0.2.3", Vec::new()), in_force);
        }
        let numbers =
            |record: &Record| -> Vec<_> { record.sets.iter().map(|set| set.number).collect() };
        assert_eq!(numbers(&record), [2, 3]);
        // Another process has published sets that the journal does not know.
        record.set = 3;
        record.keep(allowing(9, "192.0.2.3", Vec::new()), 8);
        assert_eq!(numbers(&record), [3, 9]);
    }

    #[test]
    fn temporary_rules_end_when_their_time_is_over() {
        let rule = |until_unix_seconds| Temporary {
            prefix: "192.0.2.0/24".parse().unwrap(),
            action: RuleAction::Allow,
            until_unix_seconds,
        };
        let record = Record {
            temporary: vec![rule(100), rule(160)],
            ..Record::default()
        };
        let live =
            |seconds| record.live_temporary(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(live(99), record.temporary);
        assert_eq!(live(100), [rule(160)]);
        assert_eq!(live(200), []);
    }

    // Protects what a running node knows: a file that was removed is written again, one that
    // changed is read again.
    #[test]
    fn a_removed_journal_is_written_again() {
        let (_folder, pins) = pins();
        let lock = pins.lock().unwrap();
        let mut cached = CachedJournal::default();
        assert_eq!(cached.read(&pins, &lock).unwrap().set, 0);
        assert!(!pins.journal_path().exists(), "nothing was known");
        for set in 1..3 {
            Record::update(&pins, &lock, |record| record.set = set).unwrap();
            assert_eq!(cached.read(&pins, &lock).unwrap().set, set);
            std::fs::remove_file(pins.journal_path()).unwrap();
            assert_eq!(cached.read(&pins, &lock).unwrap().set, set);
            assert_eq!(Record::read(&pins).unwrap().set, set);
        }
    }
}
