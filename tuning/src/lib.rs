//! The configuration of a node: its schema, its checks and its rendered forms.
//!
//! One table ([`schema`]) names every key once, with its kind, bounds and documentation. The
//! parser, the hints for unknown keys, `millrace config default`, `millrace config show` and
//! `docs/reference/config.md` are all driven by it, so they cannot disagree.
//!
//! Invariants
//! 1. Pure: text and [`HostFacts`] come in as arguments; nothing here reads a file, a clock or the
//!    environment.
//! 2. Parsing never stops at the first mistake; it returns every [`Problem`] with a position, a
//!    reason and a fix.
//! 3. A value that is out of its bounds never reaches a [`NodeConfig`]: the default stays in its
//!    place.

pub mod budget;
pub mod config;
pub mod host;
pub mod parse;
pub mod problem;
pub mod render;
pub mod schema;
mod semantics;
pub mod units;

pub use budget::MemoryBudget;
pub use config::NodeConfig;
pub use host::HostFacts;
pub use parse::{Parsed, parse};
pub use problem::{Position, Problem, Severity};
pub use units::{ByteSize, Period};
