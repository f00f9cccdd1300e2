//! Bodies that are small enough to travel as bytes.

use millrace_shards::chunk::Body;
use millrace_transport::{INLINE_BYTES_MAX, Payload};

/// A body as a payload. A small one goes as bytes, because it travels beside other small messages.
pub(crate) fn payload_of(body: Body) -> Payload {
    if body.len() > INLINE_BYTES_MAX {
        return Payload::Chunks(body);
    }
    match body.chunks() {
        [] => Payload::Empty,
        chunks => {
            let bytes = chunks.iter().flat_map(|chunk| chunk.iter().copied());
            Payload::Bytes(bytes.collect::<Vec<u8>>().into())
        }
    }
}
