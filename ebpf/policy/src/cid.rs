//! Connection IDs that the node issues. They are the one field of a QUIC packet that routes it.
//!
//! The kernel checks one for every packet, user space for few: one SipHash, no table, no
//! allocation.
//!
//! 1. An ID of ours has [`LocalCid::BYTES`] bytes, so a short header can be read without state.
//! 2. Byte 0 modulo the number of shards is the owner, for IDs that this node issued and for those
//!    that a dialler chose for its first packet. The kernel's steering program computes the same.
//! 3. A *handshake* ID is valid for one address and port, for 17 to 34 seconds. A *roaming* ID is
//!    valid from any address, for 73 to 146 minutes; the node issues it only after the handshake
//!    has completed.
//! 4. A key outlives the IDs that it signed: see [`KeySchedule`].
//! 5. An ID carries five bits of its epoch, and its tag covers the whole epoch: when the five bits
//!    come round, the ID stays invalid.

mod keys;

use std::fmt;
use std::net::SocketAddr;

pub use keys::{KeySchedule, Keys};

use crate::siphash::siphash24;
use crate::source::Source;

/// CLOCK_MONOTONIC in nanoseconds, shifted right by this, is the epoch of handshake IDs and tokens:
/// 17 seconds each.
pub const HANDSHAKE_EPOCH_SHIFT: u32 = 34;

/// The same for the epoch of roaming IDs: 73 minutes each.
pub const ROAMING_EPOCH_SHIFT: u32 = 42;

/// Number of slots that an ID can name.
pub const SLOTS_MAX: u32 = 1 << 24;

const EPOCH_MASK: u64 = 0x1f;

/// What an ID is valid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The time until the handshake has completed, from one address.
    Handshake,
    /// The time after the handshake, from any address that the client moves to.
    Roaming,
}

impl Kind {
    fn epoch(self, now_ns: u64) -> u64 {
        match self {
            Self::Handshake => now_ns >> HANDSHAKE_EPOCH_SHIFT,
            Self::Roaming => now_ns >> ROAMING_EPOCH_SHIFT,
        }
    }
}

/// The place of a connection in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The steering byte: owner = shard modulo the number of shards.
    pub shard: u8,
    /// The run of the process: random at start, so that packets of an earlier run stand out.
    pub generation: u8,
    /// Index of the connection in its shard's table, below [`SLOTS_MAX`].
    pub slot: u32,
}

/// A connection ID that this process issued.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalCid {
    /// The steering byte: owner = shard modulo the number of shards.
    pub shard: u8,
    /// The run of the process.
    pub generation: u8,
    /// Index of the connection in its shard's table: 24 bits.
    pub slot: u32,
    /// Tells apart the IDs of one connection.
    pub nonce: u16,
    /// What it is valid for.
    pub kind: Kind,
    /// Key that signed it: 0 to 3.
    pub key: u8,
    /// The time of issue: five bits of the epoch of its kind.
    pub epoch: u8,
    /// Proves that this process issued it.
    pub tag: u64,
}

/// Why an ID is refused. The fault is the sender's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadId {
    /// This node did not issue it, or not to this address.
    #[error("the connection ID was not issued to this address")]
    Unknown,
    /// It has expired.
    #[error("the connection ID has expired")]
    Expired,
}

impl LocalCid {
    /// Bytes of an encoded ID.
    pub const BYTES: usize = 16;

    /// Issues a handshake ID for the connection at `place`, valid for `peer` alone. `now_ns` is
    /// CLOCK_MONOTONIC.
    ///
    /// # Panics
    ///
    /// If the slot is not below [`SLOTS_MAX`].
    pub fn issue_handshake(
        place: Place,
        nonce: u16,
        peer: SocketAddr,
        keys: &Keys,
        now_ns: u64,
    ) -> [u8; Self::BYTES] {
        Self::issue(place, nonce, Kind::Handshake, peer, keys, now_ns)
    }

    /// Issues a roaming ID for the connection at `place`. `now_ns` is CLOCK_MONOTONIC.
    ///
    /// # Panics
    ///
    /// If the slot is not below [`SLOTS_MAX`].
    pub fn issue_roaming(place: Place, nonce: u16, keys: &Keys, now_ns: u64) -> [u8; Self::BYTES] {
        let nobody = SocketAddr::from(([0; 4], 0));
        Self::issue(place, nonce, Kind::Roaming, nobody, keys, now_ns)
    }

    fn issue(
        place: Place,
        nonce: u16,
        kind: Kind,
        peer: SocketAddr,
        keys: &Keys,
        now_ns: u64,
    ) -> [u8; Self::BYTES] {
        assert!(
            place.slot < SLOTS_MAX,
            "slot {} does not fit into a connection ID",
            place.slot
        );
        let epoch = kind.epoch(now_ns);
        let mut cid = Self {
            shard: place.shard,
            generation: place.generation,
            slot: place.slot,
            nonce,
            kind,
            key: keys.active,
            epoch: low_bits(epoch),
            tag: 0,
        };
        cid.tag = cid.tag_for(epoch, peer, keys);
        cid.encode()
    }

    /// The ID as it stands in packets.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        (u128::from(self.tag) << 64 | u128::from(self.head())).to_le_bytes()
    }

    /// Reads the form of an ID, and does not check who made it. None if the length is not ours.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let [shard, generation, s0, s1, s2, about, n0, n1, tag @ ..] = *bytes;
        Some(Self {
            shard,
            generation,
            slot: u32::from_le_bytes([s0, s1, s2, 0]),
            nonce: u16::from_le_bytes([n0, n1]),
            kind: if about & 0x80 == 0 {
                Kind::Handshake
            } else {
                Kind::Roaming
            },
            key: about >> 5 & 3,
            epoch: low_bits(u64::from(about)),
            tag: u64::from_le_bytes(tag),
        })
    }

    /// Reads the destination ID of a packet from `peer`, and checks that `peer` may use it at
    /// `now_ns` (CLOCK_MONOTONIC). Computes one SipHash.
    ///
    /// # Errors
    ///
    /// [`BadId::Unknown`] if this node did not issue it to `peer`, [`BadId::Expired`] if it did and
    /// its epoch is over.
    pub fn check(bytes: &[u8], keys: &Keys, peer: SocketAddr, now_ns: u64) -> Result<Self, BadId> {
        let cid = Self::decode(bytes).ok_or(BadId::Unknown)?;
        let made = Made::of(cid.epoch, cid.kind.epoch(now_ns));
        if cid.tag != cid.tag_for(made.epoch, peer, keys) {
            return Err(BadId::Unknown);
        }
        if !made.holds() {
            return Err(BadId::Expired);
        }
        Ok(cid)
    }

    /// The shard that owns a connection ID, whether this node or a dialler chose it.
    pub fn owner(cid: &[u8], shards: u8) -> u8 {
        cid.first().map_or(0, |byte| byte % shards.max(1))
    }

    /// The place of its connection.
    pub fn place(&self) -> Place {
        Place {
            shard: self.shard,
            generation: self.generation,
            slot: self.slot,
        }
    }

    /// The tag under `epoch`, the whole number whose low bits the ID carries.
    fn tag_for(&self, epoch: u64, peer: SocketAddr, keys: &Keys) -> u64 {
        let key = keys.keys[usize::from(self.key)];
        match self.kind {
            Kind::Handshake => {
                let [low, high, port] = address_words(peer);
                siphash24(key, &[self.head(), low, high, port, epoch])
            }
            Kind::Roaming => siphash24(key, &[self.head(), epoch]),
        }
    }

    /// Bytes 0 to 8.
    fn head(&self) -> u64 {
        let roaming = u8::from(self.kind == Kind::Roaming) << 7;
        let [s0, s1, s2, _] = self.slot.to_le_bytes();
        let [n0, n1] = self.nonce.to_le_bytes();
        let about = roaming | self.key << 5 | self.epoch;
        u64::from_le_bytes([self.shard, self.generation, s0, s1, s2, about, n0, n1])
    }
}

impl fmt::Debug for LocalCid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            shard,
            generation,
            slot,
            kind,
            ..
        } = self;
        write!(
            f,
            "LocalCid({kind:?}, shard {shard}, generation {generation}, slot {slot})"
        )
    }
}

/// When the node must have replaced a roaming ID that it issued at `now_ns`: half an epoch before
/// the ID expires.
pub fn reissue_at(now_ns: u64) -> u64 {
    let end = (Kind::Roaming.epoch(now_ns) + 2) << ROAMING_EPOCH_SHIFT;
    end - (1 << (ROAMING_EPOCH_SHIFT - 1))
}

/// The destination ID of a dialler's first packets when it proves nothing. It steers them to the
/// shard that will own the connection: `target_spread` is `NodeId::spread` of the dialler plus the
/// connection's index.
pub fn initial_dcid(target_spread: u8, random: [u8; 15]) -> [u8; LocalCid::BYTES] {
    let mut bytes = [target_spread; LocalCid::BYTES];
    bytes[1..].copy_from_slice(&random);
    bytes
}

/// The destination connection ID of a datagram, and whether its header is a long one.
///
/// Reads what all versions of QUIC have in common (RFC 8999). None for a datagram that is too
/// short, and for IDs over 20 bytes, which no version that this node speaks has.
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

/// The words that bind a tag to a client: two of its address, IPv4 mapped, and its port.
pub(crate) fn address_words(client: SocketAddr) -> [u64; 3] {
    let [low, high] = Source::of(client.ip()).words();
    [low, high, u64::from(client.port())]
}

/// The five bits of its epoch that an ID or a token carries.
pub(crate) fn low_bits(epoch: u64) -> u8 {
    (epoch & EPOCH_MASK) as u8
}

/// The epoch in which an ID or a token was made, provided that its tag is right.
pub(crate) struct Made {
    /// The last epoch, up to the present one, that ends in the five bits. The tag covers it.
    pub(crate) epoch: u64,
    age: u64,
}

impl Made {
    /// Reads the low five bits of a byte in the epoch `present`.
    pub(crate) fn of(byte: u8, present: u64) -> Self {
        let age = present.wrapping_sub(u64::from(byte)) & EPOCH_MASK;
        Self {
            epoch: present.wrapping_sub(age),
            age,
        }
    }

    /// Whether it is the present epoch or the one before.
    pub(crate) fn holds(&self) -> bool {
        self.age <= 1
    }
}

#[cfg(test)]
mod tests;
