//! Sparse nodes: 256 entries that form few runs, in one cache line.
//!
//! The run of a byte is the last one that starts at or below it, so counting the starts finds it,
//! without a branch. Unused runs start at 255 and repeat the last entry, so the count needs no
//! length.

use super::Node;

/// The most runs of one sparse node (`EDGE_RUNS`).
pub const RUNS: usize = 12;

/// A node, given by the bytes at which its entries change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sparse {
    /// The entry of each run: a leaf, or the index of a node.
    pub entries: [u32; RUNS],
    /// First byte of each run, ascending from 0.
    pub starts: [u8; RUNS],
}

impl Sparse {
    /// The same entries as runs; none if the node has too many runs.
    pub fn of(node: &Node) -> Option<Self> {
        let mut sparse = Self {
            entries: [node[0xff]; RUNS],
            starts: [0xff; RUNS],
        };
        let mut byte = 0;
        let runs = node.chunk_by(|left, right| left == right);
        for (number, run) in runs.enumerate() {
            *sparse.entries.get_mut(number)? = run[0];
            sparse.starts[number] = byte as u8;
            byte += run.len();
        }
        Some(sparse)
    }

    /// The entry of a byte.
    pub fn entry(&self, byte: u8) -> u32 {
        let later = self.starts[1..].iter().filter(|&&start| start <= byte);
        self.entries[later.count()]
    }
}
