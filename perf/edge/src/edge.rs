//! The edge, set up for one verdict.

use std::collections::BTreeMap;

use libbpf_rs::Link;
use serde::Serialize;

use crate::Result;
use crate::filters::Tally;
use crate::generator::Sources;

/// Which verdict of the edge a row is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Case {
    /// No rule allows the source.
    Deny,
    /// Firewall, caps and all levels of a source that has spent its burst.
    Full,
    /// Firewall, caps, levels and a global budget that is spent: answered in place.
    Retry,
    /// A connection ID that nobody gave out.
    Garbage,
    /// A SYN beyond the budget, with nobody listening.
    Syn,
}

impl Case {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Full => "full path",
            Self::Retry => "Retry",
            Self::Garbage => "garbage",
            Self::Syn => "SYN",
        }
    }
}

#[derive(Debug)]
pub(crate) struct Edge {}

impl Edge {
    pub(crate) fn attach(&self, _index: i32) -> Result<Link> {
        Err("no edge yet".into())
    }
    pub(crate) fn tally(&self) -> Result<Tally> {
        Err("no edge yet".into())
    }
}

/// One edge for each kind of row.
#[derive(Debug, Default)]
pub(crate) struct Edges(BTreeMap<(Case, Sources), Edge>);

impl Edges {
    pub(crate) fn of(&self, case: Case, sources: Sources) -> Result<&Edge> {
        self.0
            .get(&(case, sources))
            .ok_or_else(|| "this edge was not loaded".into())
    }
}
