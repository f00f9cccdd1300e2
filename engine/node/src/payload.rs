//! Bodies that are small enough to travel as bytes.

use millrace_shards::chunk::{Body, Chunk};
use millrace_transport::{INLINE_BYTES_MAX, Payload};

/// A body as a payload. A small one goes as bytes, because it travels beside other small messages.
pub(crate) fn payload_of(body: Body) -> Payload {
    if body.len() > INLINE_BYTES_MAX {
        return Payload::Chunks(body);
    }
    match body.chunks() {
        [] => Payload::Empty,
        chunks => Payload::Bytes(joined(chunks).into()),
    }
}

/// The bytes of a few chunks in one piece.
pub(crate) fn joined(chunks: &[Chunk]) -> Vec<u8> {
    chunks
        .iter()
        .flat_map(|chunk| chunk.iter().copied())
        .collect()
}
