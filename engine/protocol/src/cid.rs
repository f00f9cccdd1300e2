//! Our connection IDs, and the one field of a QUIC packet that routes it.
//!
//! Called for every received datagram that the kernel could not steer; no allocation, no table.
//!
//! 1. Byte 0 modulo the number of shards is the owner, for IDs that we chose and for those that a
//!    dialler chose for its first packet. The kernel's steering program does the same sum.
//! 2. An ID of ours is [`LocalCid::BYTES`] long, so a short header needs no state to be read.

use std::fmt;

/// A connection ID that this process gave out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalCid {
    /// The steering byte: owner = shard modulo the number of shards.
    pub shard: u8,
    /// Which run of the process: random at start, so that packets of an earlier run stand out.
    pub generation: u8,
    /// Index of the connection in its shard's table.
    pub slot: u32,
    /// Unguessable rest; the table keeps it, and an ID with another tag belongs to no connection.
    pub tag: [u8; 10],
}

impl LocalCid {
    /// Bytes of an encoded ID.
    pub const BYTES: usize = 16;

    /// The ID as it stands in packets.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = self.shard;
        bytes[1] = self.generation;
        bytes[2..6].copy_from_slice(&self.slot.to_le_bytes());
        bytes[6..].copy_from_slice(&self.tag);
        bytes
    }

    /// Reads an ID; none if its length is not ours.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let [shard, generation, s0, s1, s2, s3, tag @ ..] = *bytes;
        Some(Self {
            shard,
            generation,
            slot: u32::from_le_bytes([s0, s1, s2, s3]),
            tag,
        })
    }

    /// The shard that owns a connection ID, ours or a dialler's.
    pub fn owner(cid: &[u8], shards: u8) -> u8 {
        cid.first().map_or(0, |byte| byte % shards.max(1))
    }
}

impl fmt::Debug for LocalCid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            shard,
            generation,
            slot,
            ..
        } = self;
        write!(
            f,
            "LocalCid(shard {shard}, generation {generation}, slot {slot})"
        )
    }
}

/// Destination ID of a dialler's first packets: steers them to the shard that will own the
/// connection, which is `NodeId::spread` of the dialler plus the connection's index.
pub fn initial_dcid(target_spread: u8, random: [u8; 15]) -> [u8; LocalCid::BYTES] {
    let mut bytes = [target_spread; LocalCid::BYTES];
    bytes[1..].copy_from_slice(&random);
    bytes
}

/// The destination connection ID of a datagram, and whether its header is a long one.
///
/// Reads what all versions of QUIC have in common (RFC 8999). None for what is too short, and for
/// IDs over 20 bytes, which no version that we speak has.
pub fn dcid_of(datagram: &[u8]) -> Option<(&[u8], bool)> {
    let first = *datagram.first()?;
    if first & 0x80 == 0 {
        return Some((datagram.get(1..1 + LocalCid::BYTES)?, false));
    }
    let len = usize::from(*datagram.get(5)?);
    if len > 20 {
        return None;
    }
    Some((datagram.get(6..6 + len)?, true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // Protects steering: the layout is shared with a program in the kernel.
    #[test]
    fn layout_is_fixed() {
        let cid = LocalCid {
            shard: 3,
            generation: 9,
            slot: 0x0403_0201,
            tag: [7; 10],
        };
        let bytes = cid.encode();
        assert_eq!(bytes, [3, 9, 1, 2, 3, 4, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]);
        assert_eq!(LocalCid::owner(&bytes, 2), 1);
        assert_eq!(LocalCid::owner(&[], 2), 0);
        assert_eq!(LocalCid::owner(&initial_dcid(7, [0; 15]), 4), 3);
        assert_eq!(LocalCid::decode(&bytes[..15]), None);
    }

    #[test]
    fn reads_both_headers() {
        let mut long = vec![0xc0, 0, 0, 0, 1, 16];
        long.extend_from_slice(&[5; 16]);
        assert_eq!(dcid_of(&long), Some((&[5; 16][..], true)));
        assert_eq!(dcid_of(&long[..21]), None);
        long[5] = 21;
        long.extend_from_slice(&[5; 40]);
        assert_eq!(dcid_of(&long), None);
        let mut short = vec![0x40];
        short.extend_from_slice(&[6; 20]);
        assert_eq!(dcid_of(&short), Some((&[6; 16][..], false)));
        assert_eq!(dcid_of(&short[..16]), None);
        assert_eq!(dcid_of(&[]), None);
    }

    proptest! {
        #[test]
        fn round_trips(shard: u8, generation: u8, slot: u32, tag: [u8; 10]) {
            let cid = LocalCid { shard, generation, slot, tag };
            prop_assert_eq!(LocalCid::decode(&cid.encode()), Some(cid));
        }

        #[test]
        fn any_datagram_is_read_or_refused(datagram in proptest::collection::vec(any::<u8>(), 0..60)) {
            if let Some((cid, long)) = dcid_of(&datagram) {
                prop_assert!(cid.len() <= 20);
                prop_assert!(long || cid.len() == LocalCid::BYTES);
            } else {
                prop_assert!(datagram.len() < 27 || datagram[5] > 20);
            }
        }
    }
}
