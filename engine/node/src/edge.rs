//! The edge as a node knows it: what it gives to the transport, and what it reports.

use std::fmt;
use std::sync::Arc;

use millrace_transport::EdgeStart;

use crate::status::EdgeStatus;

/// The edge of a node that is about to start; `Default`: a node without one.
#[derive(Default)]
pub struct EdgeParts {
    /// What the transport takes: sockets, admission, counts.
    pub start: EdgeStart,
    /// What `/status` and `/metrics` show.
    pub report: Option<Arc<dyn EdgeReport>>,
}

impl fmt::Debug for EdgeParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EdgeParts").finish_non_exhaustive()
    }
}

/// What an edge shows of itself.
pub trait EdgeReport: fmt::Debug + Send + Sync {
    /// For `/status`.
    fn status(&self) -> EdgeStatus;

    /// For `/metrics`: values of the metrics whose names begin with `millrace_edge_`, and of
    /// `firewall_registry_version`.
    fn samples(&self) -> Vec<EdgeSample>;
}

/// A value of a metric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeSample {
    /// The metric's name.
    pub name: &'static str,
    /// The label's value, for a metric with a label.
    pub label: Option<String>,
    /// The value.
    pub value: u64,
}
