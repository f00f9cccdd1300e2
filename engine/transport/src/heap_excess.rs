//! By how much a peer's packets make QUIC hold more than they bring.
//!
//! What cannot be read yet costs quiche a block for each STREAM frame: 146 bytes, and a place in an
//! ordered map. The QUIC of a node writes one such frame in a packet, which has 42 bytes at least:
//! so its packets pay for its blocks, however small its messages are. A client that writes 200
//! frames of one byte in each packet makes a node hold twenty times what it sends, and work a
//! hundred times as long for it.
//!
//! Invariants
//! 1. Packets of one STREAM frame each add nothing, read or unread, in any order.
//! 2. What is read again is no excess.

/// Bytes that each byte of a packet may make quiche hold: 168 for the smallest with a STREAM frame.
const HELD_BYTES_PER_BYTE: u64 = 4;

/// The excess of one connection.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HeapExcess {
    bytes: u64,
}

impl HeapExcess {
    /// A packet came, and quiche holds so much more than before it, or less.
    #[inline]
    pub(crate) fn on_packet(&mut self, packet_bytes: usize, held_bytes: i64) {
        let paid = (packet_bytes as u64 * HELD_BYTES_PER_BYTE) as i64;
        self.bytes = self.bytes.saturating_add_signed(held_bytes - paid);
    }

    /// Something was read, by which quiche holds so much less.
    #[inline]
    pub(crate) fn on_read(&mut self, held_bytes: i64) {
        self.bytes = self.bytes.saturating_add_signed(held_bytes);
    }

    pub(crate) fn bytes(self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What quiche holds for each STREAM frame beside its bytes.
    const BLOCK: i64 = 146;
    const HEADER_AND_TAG: usize = 42;

    // Protects honest peers, and the shard from others.
    #[test]
    fn only_packets_of_many_small_frames_add_up() {
        // Frames of a packet, bytes of each; what 1,000 such packets add up to.
        for (what, frames, bytes, excess) in [
            ("full packets", 1, 1_400, 0),
            ("one small message", 1, 36, 0),
            ("one byte", 1, 1, 0),
            ("three frames", 3, 400, 0),
            (
                "many bytes",
                200,
                1,
                1_000 * (200 * 147 - 4 * (42 + 200 * 7)),
            ),
        ] {
            let mut held = HeapExcess::default();
            let headers = if frames == 1 { 0 } else { 6 * frames };
            for _ in 0..1_000 {
                let packet_bytes = HEADER_AND_TAG + headers + frames * bytes;
                held.on_packet(packet_bytes, frames as i64 * (BLOCK + bytes as i64));
            }
            assert_eq!(held.bytes(), excess, "{what}");
        }
    }

    #[test]
    fn what_is_read_again_is_no_excess() {
        let mut held = HeapExcess::default();
        for _ in 0..1_000 {
            held.on_packet(100, 30_000);
            held.on_read(-30_000);
        }
        assert_eq!(held.bytes(), 0);
        held.on_packet(100, 30_400);
        held.on_packet(100, -10_000);
        assert_eq!(held.bytes(), 30_000 - 10_400);
    }
}
