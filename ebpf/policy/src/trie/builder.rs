//! Inserts prefixes into tries of dense nodes, and packs the tries into a [`TrieSet`].
//!
//! 1. An insertion fills only what is still blank: the first prefix that holds an address decides,
//!    and no node is made that no address reaches.
//! 2. A finished trie has no blank entry: the caller inserts the default last, over everything.
//! 3. A trie is packed before the next one begins. So the bound on dense nodes bounds all memory:
//!    that of the set (a quarter more for sparse nodes), and that of the trie in progress.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use super::{BLANK, LEAF, Leaf, Node, SPARSE, Sparse, TrieSet};
use thiserror::Error;

/// Sparse nodes that are kept for each dense one: 64 bytes each, a quarter of its memory.
pub const SPARSE_PER_NODE: usize = 4;
/// All nodes of a trie are dense while it is built; it may take as many as both kinds together may
/// take once it is packed.
const BUILDING_PER_NODE: usize = 1 + SPARSE_PER_NODE;

/// The kind of nodes that run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// Nodes of 1 KiB, in the kernel.
    Dense,
    /// Nodes of 64 bytes, in the kernel.
    Sparse,
    /// Nodes of 1 KiB, while one trie is built.
    Building,
}

impl fmt::Display for NodeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dense => "dense trie nodes (1 KiB each)",
            Self::Sparse => "sparse trie nodes (64 bytes each)",
            Self::Building => "trie nodes at a time (1 KiB each) to compile",
        })
    }
}

/// More nodes are needed than are allowed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{nodes} {kind} are needed, {nodes_max} are allowed")]
pub struct Full {
    /// Kind of the nodes.
    pub kind: NodeKind,
    /// Nodes that are needed, up to the trie that did not fit. For [`NodeKind::Building`], up to
    /// the first node that did not.
    pub nodes: usize,
    /// Nodes that are allowed.
    pub nodes_max: usize,
}

impl Full {
    fn check(kind: NodeKind, nodes: usize, nodes_max: usize) -> Result<(), Self> {
        let full = Self {
            kind,
            nodes,
            nodes_max,
        };
        (nodes <= nodes_max).then_some(()).ok_or(full)
    }
}

/// Builds tries, one after the other.
#[derive(Clone, Debug)]
pub struct TrieBuilder {
    /// Nodes of the trie in progress; its root is the first.
    nodes: Vec<Node>,
    /// Whether a node, and all below it, has no blank entry.
    complete: Vec<bool>,
    packed: Packing,
    nodes_max: usize,
}

impl TrieBuilder {
    /// A builder without tries. The set may take `nodes_max` dense nodes and [`SPARSE_PER_NODE`]
    /// times as many sparse ones; a trie in progress may take as many dense nodes as both together.
    pub fn new(nodes_max: usize) -> Self {
        Self {
            nodes: Vec::new(),
            complete: Vec::new(),
            packed: Packing::default(),
            // An index leaves room for both generations.
            nodes_max: nodes_max.min(SPARSE as usize / 2 / SPARSE_PER_NODE),
        }
    }

    /// Begins a blank trie, and packs the one before, which must be complete. Returns the index of
    /// its root in the set.
    ///
    /// # Errors
    ///
    /// [`Full`] if the trie before takes more nodes than are allowed.
    pub fn begin_trie(&mut self) -> Result<u32, Full> {
        self.pack()?;
        self.push()?;
        Ok(self.packed.nodes.len() as u32)
    }

    /// Gives the leaf to the blank parts of a prefix, `bits` of `address`, in the trie in progress.
    ///
    /// An address has 4 or 16 bytes, the same number in the whole trie; `bits` is at most eight
    /// times that.
    ///
    /// # Errors
    ///
    /// [`Full`] of [`NodeKind::Building`] if the trie in progress takes too many nodes.
    pub fn insert(&mut self, address: &[u8], bits: u8, leaf: Leaf) -> Result<(), Full> {
        debug_assert!(usize::from(bits) <= address.len() * 8);
        let mut path = Vec::with_capacity(address.len());
        let mut node = 0;
        let mut bits = u32::from(bits);
        for &byte in address {
            if self.complete[node as usize] {
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
        // From the lowest up: a parent is complete once its last child is.
        self.note_complete(node);
        while let Some(parent) = path.pop() {
            self.note_complete(parent);
        }
        Ok(())
    }

    /// Packs the last trie, and returns the set of all tries.
    ///
    /// # Errors
    ///
    /// [`Full`] if the set takes more nodes than are allowed.
    pub fn finish(mut self) -> Result<TrieSet, Full> {
        self.pack()?;
        let Packing { nodes, sparse, .. } = self.packed;
        Ok(TrieSet { nodes, sparse })
    }

    /// Packs the trie in progress, if there is one.
    fn pack(&mut self) -> Result<(), Full> {
        if self.nodes.is_empty() {
            return Ok(());
        }
        debug_assert!(self.complete[0]);
        self.packed.add(&self.nodes);
        self.nodes.clear();
        self.complete.clear();
        let (nodes, sparse) = (self.packed.nodes.len(), self.packed.sparse.len());
        Full::check(NodeKind::Dense, nodes, self.nodes_max)?;
        let sparse_max = self.nodes_max * SPARSE_PER_NODE;
        Full::check(NodeKind::Sparse, sparse, sparse_max)
    }

    /// Fills what is blank in an entry and below it. It enters each node once until the node is
    /// complete, so broad prefixes over many nodes are cheap.
    fn fill(&mut self, node: u32, slot: usize, leaf: u32) {
        match self.nodes[node as usize][slot] {
            BLANK => self.nodes[node as usize][slot] = leaf,
            entry if entry & LEAF != 0 => {}
            child if self.complete[child as usize] => {}
            child => {
                // At most 16 deep: a level for each byte of an address.
                for slot in 0..256 {
                    self.fill(child, slot, leaf);
                }
                self.complete[child as usize] = true;
            }
        }
    }

    fn note_complete(&mut self, node: u32) {
        let complete = self.nodes[node as usize].iter().all(|&entry| match entry {
            BLANK => false,
            entry => entry & LEAF != 0 || self.complete[entry as usize],
        });
        self.complete[node as usize] = complete;
    }

    fn push(&mut self) -> Result<u32, Full> {
        let index = self.nodes.len();
        let building_max = self.nodes_max * BUILDING_PER_NODE;
        Full::check(NodeKind::Building, index + 1, building_max)?;
        self.nodes.push([BLANK; 256]);
        self.complete.push(false);
        Ok(index as u32)
    }
}

/// Packed tries: a node with few runs is sparse, and sparse nodes that are alike are one.
#[derive(Clone, Debug, Default)]
struct Packing {
    nodes: Vec<Node>,
    sparse: Vec<Sparse>,
    /// Entry of each sparse node that there is.
    known: BTreeMap<Sparse, u32>,
}

impl Packing {
    /// Adds a trie from the leaves up; its root comes first.
    fn add(&mut self, built: &[Node]) {
        let root = self.nodes.len();
        self.nodes.push([BLANK; 256]);
        self.nodes[root] = self.node(built, 0);
    }

    /// A node whose children are packed. At most 16 deep.
    fn node(&mut self, built: &[Node], node: u32) -> Node {
        built[node as usize].map(|entry| match entry {
            BLANK => BLANK,
            entry if entry & LEAF != 0 => entry,
            child => self.child(built, child),
        })
    }

    /// Packs a node and all below it; returns its parent's entry for it.
    fn child(&mut self, built: &[Node], node: u32) -> u32 {
        let node = self.node(built, node);
        let Some(sparse) = Sparse::of(&node) else {
            self.nodes.push(node);
            return self.nodes.len() as u32 - 1;
        };
        match self.known.entry(sparse) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(place) => {
                let entry = SPARSE | self.sparse.len() as u32;
                self.sparse.push(sparse);
                *place.insert(entry)
            }
        }
    }
}
