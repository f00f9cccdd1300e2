//! The table of all keys: name, kind, bounds, documentation, and how to reach the value.
//!
//! Invariants
//! 1. Every field of [`NodeConfig`] that an operator can set has exactly one row here.
//! 2. A row's `set` accepts every [`Value`] its kind produces (tested over the whole table).
//! 3. Every default is inside its own bounds (tested).

mod keys;
mod value;

use crate::config::{CoreProfile, NodeConfig};
use crate::units::{ByteSize, Period};

pub use value::Value;

/// What a key's value may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A whole number.
    Integer {
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// A size with a unit.
    Bytes {
        /// Smallest.
        min: ByteSize,
        /// Largest.
        max: ByteSize,
    },
    /// A duration with a unit.
    Duration {
        /// Shortest.
        min: Period,
        /// Longest.
        max: Period,
    },
    /// A file or folder.
    Path,
    /// A name, such as a subnet's id.
    Name,
    /// An Ed25519 public key.
    PublicKey,
    /// IP address and port.
    Address,
    /// A list of nodes: public key, `@`, address.
    Seeds,
    /// One of some words.
    Choice(&'static [&'static str]),
    /// `"auto"` or a list of core numbers.
    Cores,
    /// A list of names.
    Names,
    /// A list of node ids.
    Nodes,
    /// A list of ports.
    Ports,
}

/// Whether a key has to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// There is a default.
    Default,
    /// It may be absent, and its absence has a meaning.
    Optional,
    /// A node does not start without it.
    Required,
}

/// One key of a section that lives in a `C`.
pub struct Field<C> {
    /// The key.
    pub name: &'static str,
    /// Its kind and bounds.
    pub kind: Kind,
    /// Whether it has to be written.
    pub presence: Presence,
    /// Its documentation, one or two sentences.
    pub doc: &'static str,
    /// A valid value, for keys without a default.
    pub example: &'static str,
    pub(crate) set: fn(&mut C, Value) -> Result<(), Value>,
    pub(crate) get: fn(&C) -> Value,
}

impl<C> std::fmt::Debug for Field<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Field")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .finish()
    }
}

impl<C> Field<C> {
    /// The value it has in `config`.
    pub fn value(&self, config: &C) -> Value {
        (self.get)(config)
    }
}

/// One `[section]`.
#[derive(Debug)]
pub struct Section {
    /// Name between the brackets.
    pub name: &'static str,
    /// Its documentation.
    pub doc: &'static str,
    /// Its keys, in the order they are printed.
    pub fields: &'static [Field<NodeConfig>],
}

impl Section {
    /// The key of that name.
    pub fn field(&self, name: &str) -> Option<&'static Field<NodeConfig>> {
        self.fields.iter().find(|field| field.name == name)
    }
}

/// Name of the section that holds the list of [`CORE_NAME`].
pub const SHARDS_NAME: &str = "shards";
/// Name of the list of cores with values of their own: `[[shards.core]]`.
pub const CORE_NAME: &str = "core";

/// All sections, in the order they are printed.
pub fn sections() -> &'static [Section] {
    keys::SECTIONS
}

/// The keys of `[[shards.core]]`.
pub fn core_fields() -> &'static [Field<CoreProfile>] {
    keys::CORE
}

/// The section of that name.
pub fn section(name: &str) -> Option<&'static Section> {
    sections().iter().find(|section| section.name == name)
}

impl Kind {
    /// The form of a value, in words for the operator.
    pub fn expected(&self) -> String {
        match self {
            Self::Integer { .. } => "a whole number".into(),
            Self::Bytes { .. } => "a size with a unit such as \"64MiB\"".into(),
            Self::Duration { .. } => "a duration with a unit such as \"250ms\"".into(),
            Self::Path => "a path in quotes".into(),
            Self::Name => "a name in quotes".into(),
            Self::PublicKey => "a public key of 64 hexadecimal digits in quotes".into(),
            Self::Address => "an address with a port such as \"192.0.2.1:4100\"".into(),
            Self::Seeds => "a list of \"<public key>@<address>\"".into(),
            Self::Choice(words) => format!("one of {}", quoted(words)),
            Self::Cores => "\"auto\" or a list of core numbers such as [0, 1]".into(),
            Self::Names => "a list of names such as [\"eth0\"]".into(),
            Self::Nodes => "a list of node ids".into(),
            Self::Ports => "a list of ports such as [443, 8080]".into(),
        }
    }

    /// The bounds, in words for the operator; empty when there are none.
    pub fn bounds(&self) -> String {
        match self {
            Self::Integer { min, max } => format!("{min} to {max}"),
            Self::Bytes { min, max } => format!("{min} to {max}"),
            Self::Duration { min, max } => format!("{min} to {max}"),
            Self::Choice(words) => quoted(words),
            _ => String::new(),
        }
    }

    /// Name of the kind in the reference.
    pub fn title(&self) -> &'static str {
        match self {
            Self::Integer { .. } => "integer",
            Self::Bytes { .. } => "size",
            Self::Duration { .. } => "duration",
            Self::Path => "path",
            Self::Name => "text",
            Self::PublicKey => "public key",
            Self::Address => "address",
            Self::Seeds => "list of nodes",
            Self::Choice(_) => "choice",
            Self::Cores => "cores",
            Self::Names => "list of names",
            Self::Nodes => "list of node ids",
            Self::Ports => "list of ports",
        }
    }
}

fn quoted(words: &[&str]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    quoted.join(", ")
}

#[cfg(test)]
mod tests;
