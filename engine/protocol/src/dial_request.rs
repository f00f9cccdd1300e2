//! The datagram by which a listener asks its dialler to dial now.
//!
//! The node with the lower id dials. A listener that restarts, whose network comes back, or that
//! has another address than before, would wait for the dialler's backoff, its idle timeout, or the
//! next registry version; it sends a dial request instead. Its source address is where the dialler
//! dials next: see [`crate::peers`], which bounds what a dial request can cause.
//!
//! ```text
//! 0       1       2        6          7        36       65        72     80
//! | 0x0d  | steer | "dial" | version  | sender | target | sent_ms | mac  |
//! ```
//!
//! 1. No QUIC packet starts with 0x0d: QUIC has one of the two top bits set (RFC 9443).
//! 2. Byte 1 steers like the first byte of a connection ID, so a dial request reaches the shard
//!    that owns the connection.
//! 3. The MAC covers all that stands before it, under the key of the pair: see [`crate::pair`]. A
//!    proof of a first packet is under the same key; it has five words and this has nine, and the
//!    hash covers the length.
//! 4. The source address is not covered: a listener behind a NAT does not know it. Who repeats a
//!    request from another address can do no more than have that address dialled; the key that the
//!    dialler pins keeps it from anything else.

use crate::id::NodeId;

const FIRST: u8 = 0x0d;
const MAGIC: [u8; 4] = *b"dial";
const VERSION: u8 = 2;
/// Bytes that the MAC covers.
const COVERED: usize = 72;
/// 56 bits: the years up to 2,285,000.
const SENT_MS_MAX: u64 = (1 << 56) - 1;

/// What a dial request says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DialRequest {
    /// The listener, which has no connection.
    pub sender: NodeId,
    /// The peer that should dial.
    pub target: NodeId,
    /// Which of the pair's connections it is about.
    pub index: u8,
    /// When it was sent: milliseconds since 1970, by the sender's clock.
    pub sent_ms: u64,
}

/// A dial request as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed([u8; Self::BYTES]);

impl DialRequest {
    /// The datagram; `mac` is computed of the words that it covers.
    pub fn seal(&self, mac: impl FnOnce(&[u64; Sealed::WORDS]) -> u64) -> Sealed {
        let mut bytes = [FIRST; Sealed::BYTES];
        bytes[1] = self.sender.spread().wrapping_add(self.index);
        bytes[2..6].copy_from_slice(&MAGIC);
        bytes[6] = VERSION;
        bytes[7..36].copy_from_slice(self.sender.as_bytes());
        bytes[36..65].copy_from_slice(self.target.as_bytes());
        bytes[65..COVERED].copy_from_slice(&self.sent_ms.min(SENT_MS_MAX).to_le_bytes()[..7]);
        let mac = mac(&words(&bytes));
        bytes[COVERED..].copy_from_slice(&mac.to_le_bytes());
        Sealed(bytes)
    }
}

impl Sealed {
    /// Bytes of the datagram.
    pub const BYTES: usize = COVERED + 8;
    /// Little-endian words that the MAC covers.
    pub const WORDS: usize = COVERED / 8;

    /// The datagram.
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// Reads a datagram; none for anything else. Costs one comparison for a QUIC packet.
    pub fn read(datagram: &[u8]) -> Option<Self> {
        if *datagram.first()? != FIRST {
            return None;
        }
        let bytes: &[u8; Self::BYTES] = datagram.try_into().ok()?;
        (bytes[2..6] == MAGIC && bytes[6] == VERSION).then_some(Self(*bytes))
    }

    /// What it says, if the MAC is right. `mac` computes it for the sender and target that the
    /// datagram claims; none when there is no key of that pair.
    pub fn open(
        &self,
        mac: impl FnOnce(&DialRequest, &[u64; Self::WORDS]) -> Option<u64>,
    ) -> Option<DialRequest> {
        let bytes = &self.0;
        let id = |at: usize| {
            let bytes = bytes[at..].first_chunk()?;
            Some(NodeId::from_bytes(*bytes))
        };
        let mut sent_ms = [0; 8];
        sent_ms[..7].copy_from_slice(&bytes[65..COVERED]);
        let sender = id(7)?;
        let claimed = DialRequest {
            sender,
            target: id(36)?,
            index: bytes[1].wrapping_sub(sender.spread()),
            sent_ms: u64::from_le_bytes(sent_ms),
        };
        let right = mac(&claimed, &words(bytes))?;
        (bytes[COVERED..] == right.to_le_bytes()).then_some(claimed)
    }
}

fn words(bytes: &[u8; Sealed::BYTES]) -> [u64; Sealed::WORDS] {
    std::array::from_fn(|word| {
        u64::from_le_bytes(std::array::from_fn(|byte| bytes[word * 8 + byte]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Any function of all words will do here.
    fn mac(words: &[u64; Sealed::WORDS]) -> u64 {
        words.iter().fold(7, |sum, word| {
            (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        })
    }

    proptest! {
        // Protects the dialler from a request that was altered in any byte: the MAC covers all.
        #[test]
        fn what_was_sealed_opens_and_nothing_else(
            sender: [u8; 29],
            target: [u8; 29],
            index: u8,
            sent_ms in 0..=SENT_MS_MAX,
            at in 0..Sealed::BYTES,
            flip in 1u8..,
        ) {
            let request = DialRequest {
                sender: NodeId::from_bytes(sender),
                target: NodeId::from_bytes(target),
                index,
                sent_ms,
            };
            let sealed = request.seal(mac);
            let open = |bytes: &[u8]| Sealed::read(bytes)?.open(|_, words| Some(mac(words)));
            let mut bytes = *sealed.as_bytes();
            prop_assert_eq!(open(&bytes), Some(request));
            prop_assert_eq!(sealed.open(|claimed, _| (*claimed != request).then_some(0)), None);
            prop_assert_eq!(bytes[1] % 7, request.sender.owner_shard(index, 7));
            prop_assert_eq!(bytes[0] & 0xc0, 0, "could be a QUIC packet");
            prop_assert_eq!(Sealed::read(&bytes[..Sealed::BYTES - 1]), None);
            bytes[at] ^= flip;
            prop_assert_eq!(open(&bytes), None);
            prop_assert!(at >= 7 || at == 1 || Sealed::read(&bytes).is_none());
        }
    }
}
