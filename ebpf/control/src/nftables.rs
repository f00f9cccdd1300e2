//! The edge's table of nftables: which process changes it, and what it does when another did.
//!
//! 1. The journal holds the fingerprint of the table that was put in force: a later look tells
//!    whether another program changed it.
//! 2. A command fails where `nft` does. A node goes on, because the program in the kernel matters
//!    more: it tries again until the table is as the journal says.
//! 3. `nft` says how a table reads after it was put in force: a change by another program in the
//!    milliseconds between is taken for ours, until the next set.

use millrace_edge::helper::{Helper, Request};
use millrace_edge::nft::{Fingerprint, Nft, Table};

use crate::error::{ControlError, Retry};

/// The process that changes nftables for this one.
pub(crate) trait Nftables: std::fmt::Debug {
    /// Whether nftables would take the table.
    fn check(&self, table: &Table) -> Result<(), ControlError>;
    fn apply(&self, table: &Table) -> Result<(), ControlError>;
    /// None: there is no table.
    fn fingerprint(&self) -> Result<Option<Fingerprint>, ControlError>;
}

/// A command: it has the privileges.
impl Nftables for Nft {
    fn check(&self, table: &Table) -> Result<(), ControlError> {
        Ok(Self::check(self, table)?)
    }

    fn apply(&self, table: &Table) -> Result<(), ControlError> {
        Ok(Self::apply(self, table)?)
    }

    fn fingerprint(&self) -> Result<Option<Fingerprint>, ControlError> {
        Ok(Self::fingerprint(self)?)
    }
}

/// A node: its helper has them.
impl Nftables for Helper {
    fn check(&self, table: &Table) -> Result<(), ControlError> {
        Ok(self.request(&Request::CheckNft(table.clone()))?)
    }

    fn apply(&self, table: &Table) -> Result<(), ControlError> {
        Ok(self.request(&Request::ApplyNft(table.clone()))?)
    }

    fn fingerprint(&self) -> Result<Option<Fingerprint>, ControlError> {
        Ok(self.nft_fingerprint()?)
    }
}

/// What a failure of `nft` means.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tables<'n> {
    /// A command fails with it.
    OfCommand(&'n dyn Nftables),
    /// A node goes on and tries again.
    OfNode(&'n dyn Nftables),
    /// A node without a helper cannot ask: the table that is there closes the same ports, and only
    /// outbound rules stay as they were.
    Unreachable,
}

impl Tables<'_> {
    /// Whether nftables would take the table, as far as it can be asked.
    pub(crate) fn check(self, table: &Table) -> Result<(), ControlError> {
        match self {
            Self::Unreachable => Ok(()),
            Self::OfCommand(nftables) => nftables.check(table),
            Self::OfNode(nftables) => match nftables.check(table) {
                Err(error) if error.fault.retry() == Retry::Later => Ok(()),
                checked => checked,
            },
        }
    }

    /// Replaces the table. None: it has to be tried again.
    pub(crate) fn replace(self, table: &Table) -> Result<Option<Fingerprint>, ControlError> {
        match self {
            Self::Unreachable => Ok(None),
            Self::OfCommand(nftables) => {
                nftables.apply(table)?;
                nftables.fingerprint()
            }
            Self::OfNode(nftables) => Ok(Self::OfCommand(nftables).replace(table).unwrap_or(None)),
        }
    }
}

/// Why a table was put in force again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Restored {
    /// It could not be before.
    Missing,
    /// Another program changed or removed it.
    Changed,
}

/// Puts a table in force again if its fingerprint is not the one that was written down; then why,
/// and its fingerprint now.
pub(crate) fn mend(
    nftables: &dyn Nftables,
    table: &Table,
    written: Option<Fingerprint>,
) -> Result<Option<(Restored, Option<Fingerprint>)>, ControlError> {
    let now = nftables.fingerprint()?;
    if now.is_some() && now == written {
        return Ok(None);
    }
    nftables.apply(table)?;
    let restored = written.map_or(Restored::Missing, |_| Restored::Changed);
    Ok(Some((restored, nftables.fingerprint()?)))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::error::Fault;

    /// Stands in for nftables: the fingerprint of its table, and whether it takes another.
    #[derive(Debug)]
    struct Host {
        now: Cell<Option<u64>>,
        takes: Cell<bool>,
    }

    const OURS: u64 = 7;

    impl Nftables for Host {
        fn check(&self, _table: &Table) -> Result<(), ControlError> {
            Ok(())
        }

        fn apply(&self, _table: &Table) -> Result<(), ControlError> {
            if !self.takes.get() {
                return Err(ControlError::new(Fault::Host, "no nft"));
            }
            self.now.set(Some(OURS));
            Ok(())
        }

        fn fingerprint(&self) -> Result<Option<Fingerprint>, ControlError> {
            let of = |number: u64| serde_json::from_value(number.into()).unwrap();
            Ok(self.now.get().map(of))
        }
    }

    // Protects other programs from blame for a table that could not be put in force.
    #[test]
    fn others_are_to_blame_only_for_what_was_in_force() {
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
        let ours = serde_json::from_value(OURS.into()).unwrap();
        Tables::OfCommand(&host).replace(&table).unwrap_err();
        let written = Tables::OfNode(&host).replace(&table).unwrap();
        assert_eq!(written, None);
        mend(&host, &table, written).unwrap_err();
        host.takes.set(true);
        let mended = mend(&host, &table, written).unwrap();
        assert_eq!(mended, Some((Restored::Missing, Some(ours))));
        assert_eq!(mend(&host, &table, Some(ours)).unwrap(), None);
        for by_others in [None, Some(OURS + 1)] {
            host.now.set(by_others);
            let mended = mend(&host, &table, Some(ours)).unwrap();
            let changed = Some((Restored::Changed, Some(ours)));
            assert_eq!(mended, changed, "{by_others:?}");
            assert_eq!(mend(&host, &table, Some(ours)).unwrap(), None);
        }
    }
}
