//! The edge's control loop: from config, registry and operator to what the kernel and nftables have
//! in force.
//!
//! | module | job |
//! |---|---|
//! | [`policy`] | the config's side: what belongs to a set, to the program, to the node |
//! | [`plan`] | from policy and registry to a compiled set |
//! | [`apply`] | puts a set in force, for good or to be confirmed; finishes an apply that was cut off |
//! | [`journal`] | what must outlive a process: one file under one lock |
//! | `nftables` | the table of nftables, as it should be |
//! | [`open`] | attaches, or takes over what is pinned; what a node holds of it |
//! | [`agent`] | the node's threads: lease, keys and stress; the reconciler |
//! | `reconcile` | compares what should be in force with what is, and mends it |
//! | [`probe`] | what the edge asks of its node |
//! | [`view`] | what metrics and status reports show |
//! | [`error`] | whose fault it is, and whether to try again |
//!
//! 1. A process that changes an edge holds its lock: commands and a running node do not cross.
//! 2. The kernel says what is in force. The journal says what the kernel cannot.
//! 3. A change that fails leaves the last good set in force, and says which rule failed and why.
//! 4. Nothing here prints, ends the process or knows the command line. What it needs of a node
//!    comes through [`probe::NodeProbe`] and plain values.

pub mod agent;
pub mod apply;
pub mod error;
pub mod journal;
mod nftables;
pub mod open;
pub mod plan;
pub mod policy;
pub mod probe;
mod reconcile;
pub mod view;

pub use agent::EdgeAgent;
pub use apply::{ApplyOptions, ApplyReport, ApplyRequest, LockedEdge, detach};
pub use error::{ControlError, Fault, Retry};
pub use journal::Record;
pub use open::{AttachedEdge, EdgeHandles, attach};
pub use plan::Firewall;
pub use probe::NodeProbe;
pub use view::{EdgeStatus, EdgeView};
