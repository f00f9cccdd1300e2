//! Sizes and kinds of memory that the config and the buffers agree on. A leaf: it imports nothing.

/// Bytes of one chunk: 1 MiB, half of a huge page.
pub const CHUNK_BYTES: usize = 1 << 20;

/// Bytes of the unit in which space is taken from a pool: a sixteenth of a chunk.
pub const UNIT_BYTES: usize = 64 << 10;

/// Whether chunk memory may, must or must not come from huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// Reserved huge pages, else transparent ones, else ordinary pages.
    #[default]
    Auto,
    /// Ordinary pages only.
    Never,
    /// Reserved huge pages or a start error.
    Require,
}
