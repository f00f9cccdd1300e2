//! Paints prefixes onto trees of dense nodes, and packs the trees into a forest.
//!
//! 1. Prefixes are painted from the first to the last, and only what is still blank takes colour: the first that fits decides, and
//!    no node is ever made in vain.
//! 2. A painted tree has no blank entry: the default is painted last, over everything.
//! 3. A tree is packed before the next one is planted. So the bound on dense nodes bounds all memory: of the forest (a quarter more
//!    for sparse nodes), and of the one tree that is being painted.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use super::{BLANK, Forest, LEAF, Leaf, Node, SPARSE, Sparse};
use thiserror::Error;

/// Sparse nodes that are kept for each dense one: 64 bytes each, a quarter of its memory.
pub const SPARSE_PER_NODE: usize = 4;
/// All nodes of a tree are dense while it is painted, and as many as both kinds may be afterwards.
const PAINTED_PER_NODE: usize = 1 + SPARSE_PER_NODE;

/// What there are too many of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// Of 1 KiB, in the kernel.
    Dense,
    /// Of 64 bytes, in the kernel.
    Sparse,
    /// Of 1 KiB, while one tree is compiled.
    Painted,
}

impl fmt::Display for NodeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dense => "dense trie nodes (1 KiB each)",
            Self::Sparse => "sparse trie nodes (64 bytes each)",
            Self::Painted => "trie nodes at a time (1 KiB each) to compile",
        })
    }
}

/// More nodes are needed than are allowed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{nodes} {kind} are needed, {nodes_max} are allowed")]
pub struct Full {
    /// Which.
    pub kind: NodeKind,
    /// Needed, up to the tree that did not fit; for [`NodeKind::Painted`], up to the first node that did not.
    pub nodes: usize,
    /// Allowed.
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

/// Paints trees, one after the other.
#[derive(Clone, Debug)]
pub struct Painter {
    /// Of the tree planted last; its root is the first.
    nodes: Vec<Node>,
    /// Whether a node, and all below it, has no blank entry.
    painted: Vec<bool>,
    packed: Packing,
    nodes_max: usize,
}

impl Painter {
    /// No trees; they may take so many dense nodes, [`SPARSE_PER_NODE`] times as many sparse ones, and each while it is painted as
    /// many dense nodes as both together.
    pub fn new(nodes_max: usize) -> Self {
        Self {
            nodes: Vec::new(),
            painted: Vec::new(),
            packed: Packing::default(),
            // An index leaves room for both generations.
            nodes_max: nodes_max.min(SPARSE as usize / 2 / SPARSE_PER_NODE),
        }
    }

    /// Plants a blank tree, once the one before is painted all over; returns its root's index in the forest.
    pub fn plant(&mut self) -> Result<u32, Full> {
        self.pack()?;
        self.push()?;
        Ok(self.packed.nodes.len() as u32)
    }

    /// Paints the blank parts of a prefix, `bits` of `address`, in the tree planted last.
    ///
    /// An address has 4 or 16 bytes, all alike in one tree; `bits` is at most their number times eight.
    pub fn paint(&mut self, address: &[u8], bits: u8, leaf: Leaf) -> Result<(), Full> {
        debug_assert!(usize::from(bits) <= address.len() * 8);
        let mut path = Vec::with_capacity(address.len());
        let mut node = 0;
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

    /// The forest of all trees that were planted.
    pub fn finish(mut self) -> Result<Forest, Full> {
        self.pack()?;
        let Packing { nodes, sparse, .. } = self.packed;
        Ok(Forest { nodes, sparse })
    }

    /// Packs the tree planted last, if there is one.
    fn pack(&mut self) -> Result<(), Full> {
        if self.nodes.is_empty() {
            return Ok(());
        }
        debug_assert!(self.painted[0]);
        self.packed.add(&self.nodes);
        self.nodes.clear();
        self.painted.clear();
        let (nodes, sparse) = (self.packed.nodes.len(), self.packed.sparse.len());
        Full::check(NodeKind::Dense, nodes, self.nodes_max)?;
        let sparse_max = self.nodes_max * SPARSE_PER_NODE;
        Full::check(NodeKind::Sparse, sparse, sparse_max)
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
        let painted_max = self.nodes_max * PAINTED_PER_NODE;
        Full::check(NodeKind::Painted, index + 1, painted_max)?;
        self.nodes.push([BLANK; 256]);
        self.painted.push(false);
        Ok(index as u32)
    }
}

/// Trees that are packed: what has few runs is sparse, and sparse nodes that are alike are one.
#[derive(Clone, Debug, Default)]
struct Packing {
    nodes: Vec<Node>,
    sparse: Vec<Sparse>,
    /// Entry of each sparse node that there is.
    known: BTreeMap<Sparse, u32>,
}

impl Packing {
    /// Adds a tree from the leaves up; its root comes first.
    fn add(&mut self, painted: &[Node]) {
        let root = self.nodes.len();
        self.nodes.push([BLANK; 256]);
        self.nodes[root] = self.node(painted, 0);
    }

    /// A node whose children are packed. At most 16 deep.
    fn node(&mut self, painted: &[Node], node: u32) -> Node {
        painted[node as usize].map(|entry| match entry {
            BLANK => BLANK,
            entry if entry & LEAF != 0 => entry,
            child => self.child(painted, child),
        })
    }

    /// Packs a node and all below it; returns its parent's entry for it.
    fn child(&mut self, painted: &[Node], node: u32) -> u32 {
        let node = self.node(painted, node);
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
