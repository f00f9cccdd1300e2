//! First-match tries: ordered prefixes become tables of 256 entries, one table for each byte of an
//! address.
//!
//! The kernel walks at most 4 (IPv4) or 16 (IPv6) nodes for a packet; [`TrieSet::lookup`] is the
//! same walk. A dense node has an entry for each byte and takes 1 KiB, of which a packet touches
//! one cache line. A sparse node ([`Sparse`]) is one cache line as a whole, so that the nodes of
//! scattered prefixes stay in the cache.
//!
//! 1. Roots are dense: a trie begins with an index, not with an entry.
//! 2. Every node that can be sparse is, except roots, and no two sparse nodes are alike.
//! 3. No entry is blank: a trie is packed only after its default was inserted over everything.

mod builder;
mod sparse;

pub use builder::{Full, NodeKind, SPARSE_PER_NODE, TrieBuilder};
pub use sparse::{RUNS, Sparse};

use crate::action::RuleAction;

/// One table: an entry for each value of a byte.
pub type Node = [u32; 256];

/// Marks a leaf; without this bit an entry is the index of a node (`EDGE_LEAF`).
pub const LEAF: u32 = 0x8000_0000;
/// In an entry that is no leaf: the index is that of a sparse node (`EDGE_SPARSE`).
pub const SPARSE: u32 = 0x4000_0000;
/// The rule number that stands for the default (`EDGE_RULE_DEFAULT`).
pub const RULE_DEFAULT: u16 = 0xffff;

const RULE_BITS: u32 = 16;
/// No leaf yet. Index 0 is a root, which is the child of no node.
const BLANK: u32 = 0;

/// The result of a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// What to do with the packet.
    pub action: RuleAction,
    /// The rule that decides, or [`RULE_DEFAULT`].
    pub rule: u16,
}

impl Leaf {
    /// The entry that stands in a node.
    pub fn entry(self) -> u32 {
        LEAF | (self.action as u32) << RULE_BITS | u32::from(self.rule)
    }

    /// The leaf in an entry; none if the entry is the index of a node.
    pub fn from_entry(entry: u32) -> Option<Self> {
        let action = match entry >> RULE_BITS & 3 {
            0 => RuleAction::Allow,
            1 => RuleAction::Deny,
            _ => RuleAction::Reject,
        };
        (entry & LEAF != 0).then_some(Self {
            action,
            rule: entry as u16,
        })
    }
}

/// Where the nodes of a set begin in the arrays that hold them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Base {
    /// Index of its first dense node.
    pub nodes: u32,
    /// Index of its first sparse node.
    pub sparse: u32,
}

impl Base {
    fn relocate(self, entry: u32) -> u32 {
        if entry & LEAF != 0 {
            entry
        } else if entry & SPARSE != 0 {
            entry + self.sparse
        } else {
            entry + self.nodes
        }
    }
}

/// Several tries over one array of dense nodes and one of sparse nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrieSet {
    nodes: Vec<Node>,
    sparse: Vec<Sparse>,
}

impl TrieSet {
    /// The dense nodes; indices count from the first of them.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The sparse nodes; indices count from the first of them.
    pub fn sparse(&self) -> &[Sparse] {
        &self.sparse
    }

    /// The dense nodes for arrays in which the set begins at `base`.
    pub fn nodes_at(&self, base: Base) -> impl Iterator<Item = Node> {
        let nodes = self.nodes.iter();
        nodes.map(move |node| node.map(|entry| base.relocate(entry)))
    }

    /// The sparse nodes for arrays in which the set begins at `base`.
    pub fn sparse_at(&self, base: Base) -> impl Iterator<Item = Sparse> {
        self.sparse.iter().map(move |node| Sparse {
            entries: node.entries.map(|entry| base.relocate(entry)),
            ..*node
        })
    }

    /// Looks an address up in the trie at `root`. None for an index past the nodes, or a blank
    /// entry.
    pub fn lookup(&self, root: u32, address: &[u8]) -> Option<Leaf> {
        let mut entry = root;
        for &byte in address {
            entry = if entry & SPARSE != 0 {
                self.sparse.get((entry & !SPARSE) as usize)?.entry(byte)
            } else {
                self.nodes.get(entry as usize)?[usize::from(byte)]
            };
            match entry {
                BLANK => return None,
                entry if entry & LEAF != 0 => return Leaf::from_entry(entry),
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
