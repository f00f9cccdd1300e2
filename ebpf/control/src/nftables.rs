//! The edge's table of nftables: which process changes it, and what it does when another did.
//!
//! 1. The journal holds the fingerprint of the table that was put in force: a later look tells
//!    whether another program changed it.
//! 2. A command fails where `nft` does. A node goes on, because the program in the kernel matters
//!    more: it tries again until the table is as the journal says.
//! 3. `nft` says how a table reads after it was put in force: a change by another program in the
//!    milliseconds between is taken for ours, until the next set.

use millrace_edge::helper::Helper;
use millrace_edge::nft::{Fingerprint, Nft, NftRequest, Table};

use crate::error::{ControlError, Retry};

/// The process that asks nftables for this one.
pub(crate) trait Nftables: std::fmt::Debug {
    /// As [`Nft::perform`].
    fn ask(&self, request: &NftRequest) -> Result<Option<Fingerprint>, ControlError>;

    /// The fingerprint of the table that replaced the other.
    fn replace(&self, table: &Table) -> Result<Option<Fingerprint>, ControlError> {
        self.ask(&NftRequest::Apply(table.clone()))?;
        self.ask(&NftRequest::Look)
    }
}

/// A command: it has the privileges.
impl Nftables for Nft {
    fn ask(&self, request: &NftRequest) -> Result<Option<Fingerprint>, ControlError> {
        Ok(self.perform(request)?)
    }
}

/// A node: its helper has them.
impl Nftables for Helper {
    fn ask(&self, request: &NftRequest) -> Result<Option<Fingerprint>, ControlError> {
        Ok(self.nft(request)?)
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
    pub(crate) fn check(self, table: Table) -> Result<(), ControlError> {
        let request = NftRequest::Check(table);
        match self {
            Self::Unreachable => Ok(()),
            Self::OfCommand(nftables) => nftables.ask(&request).map(drop),
            Self::OfNode(nftables) => match nftables.ask(&request) {
                Err(error) if error.fault.retry() == Retry::AfterChange => Err(error),
                _ => Ok(()),
            },
        }
    }

    /// Replaces the table. None: it has to be tried again.
    pub(crate) fn replace(self, table: &Table) -> Result<Option<Fingerprint>, ControlError> {
        match self {
            Self::Unreachable => Ok(None),
            Self::OfCommand(nftables) => nftables.replace(table),
            Self::OfNode(nftables) => Ok(nftables.replace(table).unwrap_or(None)),
        }
    }
}

/// Puts a table in force again if its fingerprint is not the one that was written down. Then its
/// fingerprint now, and whether another program changed or removed it: else it could not be put in
/// force before.
pub(crate) fn mend(
    nftables: &dyn Nftables,
    table: &Table,
    written: Option<Fingerprint>,
) -> Result<Option<(Option<Fingerprint>, bool)>, ControlError> {
    let now = nftables.ask(&NftRequest::Look)?;
    if now.is_some() && now == written {
        return Ok(None);
    }
    Ok(Some((nftables.replace(table)?, written.is_some())))
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
        fn ask(&self, request: &NftRequest) -> Result<Option<Fingerprint>, ControlError> {
            match request {
                NftRequest::Apply(_) if self.takes.get() => self.now.set(Some(OURS)),
                NftRequest::Apply(_) => return Err(ControlError::new(Fault::Host, "no nft")),
                _ => {}
            }
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
        let by = |by_others| Some((Some(ours), by_others));
        assert_eq!(mended, by(false));
        assert_eq!(mend(&host, &table, Some(ours)).unwrap(), None);
        for by_others in [None, Some(OURS + 1)] {
            host.now.set(by_others);
            let mended = mend(&host, &table, Some(ours)).unwrap();
            assert_eq!(mended, by(true), "{by_others:?}");
            assert_eq!(mend(&host, &table, Some(ours)).unwrap(), None);
        }
    }
}
