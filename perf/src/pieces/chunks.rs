//! Bodies on their way through chunks: cut for sending, filled on receipt.

use std::hint::black_box;

use millrace_shards::{BodyMut, CHUNK_BYTES, ChunkPool, HugePages};

use super::Piece;

const BODY_BYTES: usize = CHUNK_BYTES + 300_000;
/// Bytes that the transport queues on a stream at a time.
const SLICE_BYTES: usize = 64 << 10;
/// STREAM payload of a packet of 1452 bytes.
const PACKET_BYTES: usize = 1413;

pub(super) const CHUNK_SLICE: Piece = Piece {
    name: "chunk_slice",
    operations: packets(SLICE_BYTES),
    prepare: || {
        let body = BodyMut::with_len(&pool(), BODY_BYTES)
            .expect("the pool has room for one body")
            .freeze();
        Box::new(move || {
            let mut sent = 0;
            for mut slice in black_box(&body).slices(SLICE_BYTES) {
                // As quiche takes it: the front goes into a packet, the rest stays queued.
                while slice.len() > PACKET_BYTES {
                    let rest = slice.split_at(PACKET_BYTES);
                    sent += black_box(slice).len();
                    slice = rest;
                }
                sent += black_box(slice).len();
            }
            assert_eq!(sent, BODY_BYTES);
        })
    },
};

pub(super) const BODY_FILL: Piece = Piece {
    name: "body_fill",
    operations: packets(CHUNK_BYTES),
    prepare: || {
        let pool = pool();
        Box::new(move || {
            let mut body = BodyMut::with_len(&pool, black_box(BODY_BYTES))
                .expect("the pool has room for one body");
            while !body.is_full() {
                let spare = black_box(body.spare());
                let bytes = spare.len().min(PACKET_BYTES);
                body.advance(bytes);
            }
            black_box(body.freeze());
        })
    },
};

/// Packets of a body that is cut every `piece_bytes`.
const fn packets(piece_bytes: usize) -> u64 {
    let whole = BODY_BYTES / piece_bytes * piece_bytes.div_ceil(PACKET_BYTES);
    (whole + (BODY_BYTES % piece_bytes).div_ceil(PACKET_BYTES)) as u64
}

fn pool() -> ChunkPool {
    ChunkPool::new((2 * CHUNK_BYTES) as u64, HugePages::Never).expect("two megabytes of memory")
}
