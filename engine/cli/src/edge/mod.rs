//! The edge of this node: what the config and the registry ask for, put in force and kept in force.
//!
//! | file | job |
//! |---|---|
//! | `applied.rs` | the config's side of a set |
//! | `plan.rs` | from config and registry to a compiled set |
//! | `commands.rs` | `millrace xdp attach`, `apply`, `confirm`, `revert`, `allow`, `deny`, `detach` |
//! | `force.rs` | puts a set in force, for good or on probation |
//! | `table.rs` | the table of nftables, as it should be |
//! | `sets.rs` | what published sets were made from, and their rules in words |
//! | `show.rs` | `millrace xdp status`, `rules`, `trace`, `events` |
//! | `start.rs` | what a node does before its first thread: adopt or attach, steer, give up capabilities |
//! | `keeper.rs` | what it does from then on: lease, stress, keys, limiter |
//! | `follow.rs` | and when others change something: rules, the table, interfaces |
//!
//! 1. Whoever changes the edge holds the lock of its pins: commands and a running node do not cross.
//! 2. What fails leaves the last good set in force, and says which registry version, rule and reason.

mod applied;
pub(crate) mod commands;
mod follow;
pub(crate) mod force;
pub(crate) mod keeper;
pub(crate) mod plan;
pub(crate) mod sets;
pub(crate) mod show;
pub(crate) mod start;
pub(crate) mod table;
