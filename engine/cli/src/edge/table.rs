//! The edge's table of nftables, as this host should have it: who changes it, and what becomes of it when others do.
//!
//! 1. What was put in force is written down beside the state, with its fingerprint: whoever looks later can tell a table that others changed.
//! 2. A command fails where `nft` does. A node goes on, because the program matters more: it tries again until the table is as written down.
//! 3. Whoever changes or compares it has the [`Turn`].
//! 4. `nft` alone can say how a table reads that was put in force. So a change by others in the milliseconds between the two is taken for ours,
//!    until the next set.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use millrace_edge::helper::{Helper, HelperError, Request};
use millrace_edge::nft::{Fingerprint, Nft, NftError, RULE_REFUSED, Table};
use millrace_edge::pins::Pins;
use millrace_edge::state;
use serde::{Deserialize, Serialize};

use super::force::Turn;
use crate::exit::{Exit, Failure};

/// Follows the name of the pins.
const FILE: &str = "table.json";

/// Who changes nftables for this process.
pub(crate) trait Nftables {
    /// Whether nftables would take the table. A rule that it does not take is [`Exit::BadConfig`].
    fn check(&self, table: &Table) -> Result<(), Failure>;
    fn apply(&self, table: &Table) -> Result<(), Failure>;
    /// None: there is no table.
    fn fingerprint(&self) -> Result<Option<Fingerprint>, Failure>;
    /// Whether somebody will [`restore`] what fails now.
    fn is_tried_again(&self) -> bool;
}

/// A command: it has the privileges.
impl Nftables for Nft {
    fn check(&self, table: &Table) -> Result<(), Failure> {
        Self::check(self, table).map_err(|error| of_nft(&error))
    }

    fn apply(&self, table: &Table) -> Result<(), Failure> {
        Self::apply(self, table).map_err(|error| of_nft(&error))
    }

    fn fingerprint(&self) -> Result<Option<Fingerprint>, Failure> {
        Self::fingerprint(self).map_err(|error| of_nft(&error))
    }

    fn is_tried_again(&self) -> bool {
        false
    }
}

/// A node: its helper has them.
impl Nftables for Helper {
    fn check(&self, table: &Table) -> Result<(), Failure> {
        let request = Request::CheckNft(table.clone());
        self.request(&request).map_err(|error| of_helper(&error))
    }

    fn apply(&self, table: &Table) -> Result<(), Failure> {
        let request = Request::ApplyNft(table.clone());
        self.request(&request).map_err(|error| of_helper(&error))
    }

    fn fingerprint(&self) -> Result<Option<Fingerprint>, Failure> {
        self.nft_fingerprint().map_err(|error| of_helper(&error))
    }

    fn is_tried_again(&self) -> bool {
        true
    }
}

/// A node without a helper: the table that is there closes the same ports; only outbound rules stay as they were.
pub(crate) struct LeftAlone;

impl Nftables for LeftAlone {
    fn check(&self, _table: &Table) -> Result<(), Failure> {
        Ok(())
    }

    fn apply(&self, _table: &Table) -> Result<(), Failure> {
        Ok(())
    }

    fn fingerprint(&self) -> Result<Option<Fingerprint>, Failure> {
        Ok(None)
    }

    fn is_tried_again(&self) -> bool {
        false
    }
}

/// What was put in force last.
#[derive(Serialize, Deserialize)]
struct Written {
    table: Table,
    /// None: it could not be put in force, or somebody removed it in the same moment, or nobody could look.
    fingerprint: Option<Fingerprint>,
}

/// Whether nftables would take the table, as far as it can be asked.
pub(crate) fn check(nftables: &dyn Nftables, table: &Table) -> Result<(), Failure> {
    match nftables.check(table) {
        Err(failure) if failure.exit != Exit::BadConfig && nftables.is_tried_again() => Ok(()),
        checked => checked,
    }
}

/// Replaces the table.
pub(crate) fn replace(
    pins: &Pins,
    _turn: &Turn,
    nftables: &dyn Nftables,
    table: &Table,
) -> Result<(), Failure> {
    let applied = nftables.apply(table).and_then(|()| nftables.fingerprint());
    let fingerprint = match applied {
        Err(_) if nftables.is_tried_again() => None,
        applied => applied?,
    };
    write(pins, table, fingerprint)
}

/// Why a table was put in force again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Restored {
    /// It could not be before: nobody else is to blame.
    Missing,
    /// Others changed or removed it.
    Changed,
}

/// Puts the table in force if it is not what it should be; none if it is.
pub(crate) fn restore(
    pins: &Pins,
    _turn: &Turn,
    nftables: &dyn Nftables,
) -> Result<Option<Restored>, Failure> {
    let Some(written) = read(pins)? else {
        // Nothing was put in force yet.
        return Ok(None);
    };
    let now = nftables.fingerprint()?;
    if now.is_some() && now == written.fingerprint {
        return Ok(None);
    }
    nftables.apply(&written.table)?;
    write(pins, &written.table, nftables.fingerprint()?)?;
    Ok(Some(match written.fingerprint {
        None => Restored::Missing,
        Some(_) => Restored::Changed,
    }))
}

/// Whether the table could not be put in force, or nobody could look: somebody has to try again.
pub(crate) fn is_missing(pins: &Pins) -> bool {
    matches!(read(pins), Ok(Some(written)) if written.fingerprint.is_none())
}

/// Forgets what was put in force.
pub(crate) fn forget(pins: &Pins) {
    // A file too many harms nobody: the next one replaces it.
    let _ = fs::remove_file(path(pins));
}

fn write(pins: &Pins, table: &Table, fingerprint: Option<Fingerprint>) -> Result<(), Failure> {
    let written = Written {
        table: table.clone(),
        fingerprint,
    };
    let path = path(pins);
    let text = serde_json::to_vec(&written)
        .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    state::replace(&path, &text).map_err(|error| Failure::io(path.display(), &error))
}

fn read(pins: &Pins) -> Result<Option<Written>, Failure> {
    let path = path(pins);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::io(path.display(), &error)),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| Failure::new(Exit::Failed, format!("{}: {error}", path.display())))
}

fn path(pins: &Pins) -> PathBuf {
    pins.state_path().with_extension(FILE)
}

pub(crate) fn of_nft(error: &NftError) -> Failure {
    Failure::new(exit_of(error.reason()), error.to_string())
}

fn of_helper(error: &HelperError) -> Failure {
    Failure::new(exit_of(error.reason()), error.to_string())
}

fn exit_of(reason: &str) -> Exit {
    match reason {
        RULE_REFUSED => Exit::BadConfig,
        _ => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Stands in for nftables: the fingerprint of its table, and whether it takes another.
    struct Host {
        now: Cell<Option<u64>>,
        takes: Cell<bool>,
    }

    const OURS: u64 = 7;

    impl Nftables for Host {
        fn check(&self, _table: &Table) -> Result<(), Failure> {
            Ok(())
        }

        fn apply(&self, _table: &Table) -> Result<(), Failure> {
            if !self.takes.get() {
                return Err(Failure::new(Exit::Failed, "no nft"));
            }
            self.now.set(Some(OURS));
            Ok(())
        }

        fn fingerprint(&self) -> Result<Option<Fingerprint>, Failure> {
            let of = |number: u64| serde_json::from_value(number.into()).unwrap();
            Ok(self.now.get().map(of))
        }

        fn is_tried_again(&self) -> bool {
            true
        }
    }

    // Protects everybody else from blame for a table that could not be put in force.
    #[test]
    fn others_are_to_blame_only_for_what_was_in_force() {
        let folder = tempfile::tempdir().unwrap();
        let pins = Pins::at(folder.path().join("edge"));
        let turn = Turn::wait(&pins).unwrap();
        let host = Host {
            now: Cell::new(None),
            takes: Cell::new(false),
        };
        let table = Table {
            enforce: true,
            udp: [4100].into(),
            tcp: [].into(),
            rejects_per_second: 1,
            outbound: Vec::new(),
        };
        let restored = || restore(&pins, &turn, &host).unwrap();
        assert_eq!(restored(), None, "nothing was to be in force");
        replace(&pins, &turn, &host, &table).unwrap();
        assert!(is_missing(&pins));
        assert!(restore(&pins, &turn, &host).is_err());
        host.takes.set(true);
        assert_eq!(restored(), Some(Restored::Missing));
        assert!(!is_missing(&pins));
        assert_eq!(restored(), None);
        for by_others in [None, Some(OURS + 1)] {
            host.now.set(by_others);
            assert_eq!(restored(), Some(Restored::Changed), "{by_others:?}");
            assert_eq!(restored(), None);
        }
    }
}
