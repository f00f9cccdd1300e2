//! The buffers that quiche holds for us while they are in flight: slices of chunks, or small owned
//! bytes.
//!
//! Invariants
//! 1. A body is never copied into a buffer: a buffer of a chunk keeps it alive until the peer
//!    acknowledged it.
//! 2. Nothing here allocates per packet: cloning and splitting count references.
//! 3. The account of quiche's heap bytes (`quic_connection.rs`) leaves out what is on its way to
//!    the peer: it is taken before quiche gets it, and has bounds of its own.

use std::rc::Rc;

use bytes::Bytes;
use millrace_shards::chunk::ChunkSlice;
use millrace_shards::heap;

use crate::unread::UnreadSlice;

/// One piece of stream data on its way out.
#[derive(Debug, Default)]
pub struct StreamBuffer {
    piece: Piece,
}

#[derive(Clone, Debug)]
enum Piece {
    /// A part of a body.
    Chunk(ChunkSlice),
    /// A part of an answer's body, which counts until the peer acknowledged it.
    Unread(ChunkSlice, Rc<UnreadSlice>),
    /// Frames and headers.
    Small(Bytes),
}

impl Default for Piece {
    fn default() -> Self {
        Self::Small(Bytes::new())
    }
}

impl StreamBuffer {
    /// A part of a body.
    pub fn chunk(slice: ChunkSlice) -> Self {
        Self {
            piece: Piece::Chunk(slice),
        }
    }

    /// A part of an answer's body.
    pub(crate) fn unread(slice: ChunkSlice, unread: Rc<UnreadSlice>) -> Self {
        Self {
            piece: Piece::Unread(slice, unread),
        }
    }

    /// Frames and headers.
    pub fn small(bytes: Bytes) -> Self {
        Self {
            piece: Piece::Small(bytes),
        }
    }

    /// The slice of a chunk that it is, if it is one.
    pub fn as_chunk(&self) -> Option<&ChunkSlice> {
        match &self.piece {
            Piece::Chunk(slice) | Piece::Unread(slice, _) => Some(slice),
            Piece::Small(_) => None,
        }
    }

    /// Keeps the first `at` bytes and returns the rest; no byte is copied.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn split_at(&mut self, at: usize) -> Self {
        heap::uncounted(|| Self {
            piece: match &mut self.piece {
                Piece::Chunk(slice) => Piece::Chunk(slice.split_at(at)),
                Piece::Unread(slice, unread) => {
                    let [first, rest] = unread.split(at);
                    *unread = first;
                    Piece::Unread(slice.split_at(at), rest)
                }
                Piece::Small(bytes) => Piece::Small(bytes.split_off(at)),
            },
        })
    }
}

impl Clone for StreamBuffer {
    fn clone(&self) -> Self {
        heap::uncounted(|| Self {
            piece: self.piece.clone(),
        })
    }
}

impl Drop for StreamBuffer {
    fn drop(&mut self) {
        let piece = std::mem::take(&mut self.piece);
        heap::uncounted(|| drop(piece));
    }
}

impl AsRef<[u8]> for StreamBuffer {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        match &self.piece {
            Piece::Chunk(slice) | Piece::Unread(slice, _) => slice.as_ref(),
            Piece::Small(bytes) => bytes,
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
        heap::uncounted(|| StreamBuffer::small(Bytes::copy_from_slice(slice)))
    }

    fn dgram_buf_from_slice(slice: &[u8]) -> Vec<u8> {
        slice.to_vec()
    }
}
