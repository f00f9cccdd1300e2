//! First-match tries: ordered prefixes become tables of 256 entries, one for each byte of an address.
//!
//! The kernel walks at most 4 (IPv4) or 16 (IPv6) entries a packet, one cache line each; this is the same walk. A node is 1 KiB.
//!
//! 1. Prefixes are painted from the first to the last, and only what is still blank takes colour: the first that fits decides, and
//!    no node is ever made in vain.
//! 2. A painted tree has no blank entry: the default is painted last, over everything.
//! 3. Nodes never exceed the bound that the forest was made with.

use crate::rules::RuleAction;
use thiserror::Error;

/// One table: an entry for each value of a byte.
pub type Node = [u32; 256];

/// A leaf; without this bit an entry is a node's index (`EDGE_LEAF`).
pub const LEAF: u32 = 0x8000_0000;
/// Number of no rule: the default decides (`EDGE_RULE_DEFAULT`).
pub const RULE_DEFAULT: u16 = 0xffff;

const RULE_BITS: u32 = 16;
/// No leaf yet. Node 0 is the first root, which is nobody's child.
const BLANK: u32 = 0;

/// What a lookup ends at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// What to do.
    pub action: RuleAction,
    /// Which rule says so, or [`RULE_DEFAULT`].
    pub rule: u16,
}

impl Leaf {
    /// As it stands in a node.
    pub fn entry(self) -> u32 {
        LEAF | (self.action as u32) << RULE_BITS | u32::from(self.rule)
    }

    /// The leaf in an entry; none if that is a node's index.
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

/// More nodes are needed than are allowed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("more than {nodes_max} trie nodes are needed")]
pub struct Full {
    /// Allowed.
    pub nodes_max: usize,
}

/// Several tries over one array of nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forest {
    nodes: Vec<Node>,
    /// Whether a node, and all below it, has no blank entry.
    painted: Vec<bool>,
    nodes_max: usize,
}

impl Forest {
    /// A forest without trees, of at most so many nodes.
    pub fn new(nodes_max: usize) -> Self {
        Self {
            nodes: Vec::new(),
            painted: Vec::new(),
            nodes_max,
        }
    }

    /// Plants a blank tree; returns its root's index.
    pub fn plant(&mut self) -> Result<u32, Full> {
        self.push()
    }

    /// Paints the blank parts of a prefix: `bits` of `address`.
    ///
    /// An address has 4 or 16 bytes, all alike in one tree; `bits` is at most their number times eight.
    pub fn paint(&mut self, root: u32, address: &[u8], bits: u8, leaf: Leaf) -> Result<(), Full> {
        debug_assert!(usize::from(bits) <= address.len() * 8);
        let mut path = Vec::with_capacity(address.len());
        let mut node = root;
        let mut bits = u32::from(bits);
        for &byte in address {
            if self.painted[node as usize] {
                return Ok(());
            }
            if bits <= 8 {
                let first = usize::from(byte) & !(0xff >> bits);
                for slot in first..first + (0x100 >> bits) {
                    self.fill(node, slot, leaf.entry());
                }
                break;
            }
            path.push(node);
            let slot = usize::from(byte);
            match self.nodes[node as usize][slot] {
                BLANK => {
                    let child = self.push()?;
                    self.nodes[node as usize][slot] = child;
                    node = child;
                }
                entry if entry & LEAF != 0 => return Ok(()),
                child => node = child,
            }
            bits -= 8;
        }
        // From the lowest up: a parent is painted once its last child is.
        self.note_painted(node);
        while let Some(parent) = path.pop() {
            self.note_painted(parent);
        }
        Ok(())
    }

    /// The nodes; indices count from the first of them.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The nodes as they stand in an array where the first of them has index `base`.
    pub fn relocated(&self, base: u32) -> impl Iterator<Item = Node> {
        self.nodes.iter().map(move |node| {
            node.map(|entry| match entry & LEAF {
                0 => entry + base,
                _ => entry,
            })
        })
    }

    /// What the tree says of an address; none if a part that was never painted holds it.
    pub fn lookup(&self, root: u32, address: &[u8]) -> Option<Leaf> {
        lookup(&self.nodes, root, address)
    }

    /// Fills what is blank in an entry and below it. Each node is painted once, so this is cheap over a whole forest.
    fn fill(&mut self, node: u32, slot: usize, leaf: u32) {
        match self.nodes[node as usize][slot] {
            BLANK => self.nodes[node as usize][slot] = leaf,
            entry if entry & LEAF != 0 => {}
            child if self.painted[child as usize] => {}
            child => {
                // At most 16 deep: a level for each byte of an address.
                for slot in 0..256 {
                    self.fill(child, slot, leaf);
                }
                self.painted[child as usize] = true;
            }
        }
    }

    fn note_painted(&mut self, node: u32) {
        let painted = self.nodes[node as usize].iter().all(|&entry| match entry {
            BLANK => false,
            entry => entry & LEAF != 0 || self.painted[entry as usize],
        });
        self.painted[node as usize] = painted;
    }

    fn push(&mut self) -> Result<u32, Full> {
        let index = self.nodes.len();
        if index >= self.nodes_max.min(LEAF as usize) {
            return Err(Full {
                nodes_max: self.nodes_max,
            });
        }
        self.nodes.push([BLANK; 256]);
        self.painted.push(false);
        Ok(index as u32)
    }
}

/// Walks an address through the nodes. None for what no forest holds: an index past the nodes, a blank entry.
pub fn lookup(nodes: &[Node], root: u32, address: &[u8]) -> Option<Leaf> {
    let mut node = root;
    for &byte in address {
        match nodes.get(node as usize)?[usize::from(byte)] {
            BLANK => return None,
            entry if entry & LEAF != 0 => return Leaf::from_entry(entry),
            child => node = child,
        }
    }
    None
}

#[cfg(test)]
mod tests;
