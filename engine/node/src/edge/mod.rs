//! The edge of this node: what the config and the registry ask for, put in force and kept in force.
//!
//! | file | job |
//! |---|---|
//! | `plan.rs` | from config and registry to a compiled set |
//! | `commands.rs` | `millrace xdp attach`, `apply`, `confirm`, `revert`, `allow`, `deny`, `detach` |
//! | `force.rs` | puts a set in force, for good or on probation |
//! | `sets.rs` | the rules of published sets in words |
//! | `show.rs` | `millrace xdp status`, `rules`, `trace`, `events` |
//! | `start.rs` | what a node does before its first thread: adopt or attach, steer, give up capabilities |
//! | `keeper.rs` | what it does from then on: lease, stress, keys, limiter, rules |
//!
//! 1. Whoever changes the edge holds the lock of its pins: commands and a running node do not cross.
//! 2. What fails leaves the last good set in force, and says which registry version, rule and reason.

pub(crate) mod commands;
pub(crate) mod force;
pub(crate) mod keeper;
pub(crate) mod plan;
pub(crate) mod sets;
pub(crate) mod show;
pub(crate) mod start;
