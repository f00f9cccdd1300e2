//! The buffers that quiche holds for us while they are in flight: slices of chunks, or small owned
//! bytes.
//!
//! Invariants
//! 1. A body is never copied into a buffer: a [`StreamBuffer::Chunk`] keeps its chunk alive until
//!    the peer acknowledged it.
//! 2. Nothing here allocates per packet: cloning and splitting count references.

use bytes::Bytes;
use millrace_shards::chunk::ChunkSlice;

/// One piece of stream data on its way out.
#[derive(Clone, Debug)]
pub enum StreamBuffer {
    /// A part of a body.
    Chunk(ChunkSlice),
    /// Frames and headers.
    Small(Bytes),
}

impl Default for StreamBuffer {
    fn default() -> Self {
        Self::Small(Bytes::new())
    }
}

impl StreamBuffer {
    /// Keeps the first `at` bytes and returns the rest; no byte is copied.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn split_at(&mut self, at: usize) -> Self {
        match self {
            Self::Chunk(slice) => Self::Chunk(slice.split_at(at)),
            Self::Small(bytes) => Self::Small(bytes.split_off(at)),
        }
    }
}

impl AsRef<[u8]> for StreamBuffer {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Chunk(slice) => slice.as_ref(),
            Self::Small(bytes) => bytes,
        }
    }
}

impl quiche::BufSplit for StreamBuffer {
    fn split_at(&mut self, at: usize) -> Self {
        Self::split_at(self, at)
    }
}

/// Tells quiche which buffers to use.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffers;

impl quiche::BufFactory for Buffers {
    type Buf = StreamBuffer;
    type DgramBuf = Vec<u8>;

    fn buf_from_slice(slice: &[u8]) -> StreamBuffer {
        StreamBuffer::Small(Bytes::copy_from_slice(slice))
    }

    fn dgram_buf_from_slice(slice: &[u8]) -> Vec<u8> {
        slice.to_vec()
    }
}

/// A quiche connection with our buffers.
pub(crate) type QuicConnection = quiche::Connection<Buffers>;
