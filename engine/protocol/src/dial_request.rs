//! The datagram by which a listener asks its dialler to dial now.
//!
//! The node with the lower id dials. A listener that restarts, or whose network comes back, would
//! wait for the dialler's backoff, up to 10 s; it sends a dial request instead. A dial request is
//! not signed. It can cause a dial that was due anyway, or one probe of a live connection, at a
//! bounded rate, and nothing else.
//!
//! ```text
//! 0       1       2        6          7        36       65
//! | 0x0d  | steer | "dial" | version  | sender | target  |
//! ```
//!
//! 1. No QUIC packet starts with 0x0d: QUIC has one of the two top bits set (RFC 9443).
//! 2. Byte 1 steers like the first byte of a connection ID, so a dial request reaches the shard
//!    that owns the connection.

use crate::id::NodeId;

const FIRST: u8 = 0x0d;
const MAGIC: [u8; 4] = *b"dial";
const VERSION: u8 = 1;

/// A dial request, as sent and received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DialRequest {
    /// The listener, which has no connection.
    pub sender: NodeId,
    /// The peer that should dial.
    pub target: NodeId,
}

impl DialRequest {
    /// Bytes of the datagram.
    pub const BYTES: usize = 65;

    /// The datagram, for the connection with this index.
    pub fn encode(&self, index: u8) -> [u8; Self::BYTES] {
        let mut bytes = [FIRST; Self::BYTES];
        bytes[1] = self.sender.spread().wrapping_add(index);
        bytes[2..6].copy_from_slice(&MAGIC);
        bytes[6] = VERSION;
        bytes[7..36].copy_from_slice(self.sender.as_bytes());
        bytes[36..].copy_from_slice(self.target.as_bytes());
        bytes
    }

    /// Reads a datagram; none for anything else. Costs one comparison for a QUIC packet.
    pub fn decode(datagram: &[u8]) -> Option<Self> {
        if *datagram.first()? != FIRST || datagram.len() != Self::BYTES {
            return None;
        }
        if datagram[2..6] != MAGIC || datagram[6] != VERSION {
            return None;
        }
        let id = |bytes: &[u8]| bytes.try_into().ok().map(NodeId::from_bytes);
        Some(Self {
            sender: id(&datagram[7..36])?,
            target: id(&datagram[36..])?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trips(sender: [u8; 29], target: [u8; 29], index: u8, at in 0usize..65, flip in 1u8..) {
            let dial_request =
                DialRequest { sender: NodeId::from_bytes(sender), target: NodeId::from_bytes(target) };
            let mut bytes = dial_request.encode(index);
            prop_assert_eq!(DialRequest::decode(&bytes), Some(dial_request));
            prop_assert_eq!(bytes[1] % 7, dial_request.sender.owner_shard(index, 7));
            prop_assert_eq!(bytes[0] & 0xc0, 0, "could be a QUIC packet");
            prop_assert_eq!(DialRequest::decode(&bytes[..64]), None);
            bytes[at] ^= flip;
            prop_assert!(at == 1 || DialRequest::decode(&bytes) != Some(dial_request));
            prop_assert!(at == 0 || at >= 7 || at == 1 || DialRequest::decode(&bytes).is_none());
        }
    }
}
