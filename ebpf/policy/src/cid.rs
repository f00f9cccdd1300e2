//! Connection IDs that we give out, and the one field of a QUIC packet that routes it.
//!
//! Checked for every packet in the kernel, for few in user space: one SipHash, no table, no allocation.
//!
//! 1. An ID of ours is [`LocalCid::BYTES`] long, so a short header needs no state to be read.
//! 2. Byte 0 modulo the number of shards is the owner, for IDs that we chose and for those that a
//!    dialler chose for its first packet. The kernel's steering program does the same sum.
//! 3. A *handshake* ID holds for one address and port, and for 17 to 34 seconds. A *roaming* ID holds from anywhere, for 73 to 146
//!    minutes: it is given out only when the handshake has completed.
//! 4. A key outlives the IDs that it signed: see [`KeySchedule`].
//! 5. An ID carries five bits of its epoch, and its tag is over all of them: when the bits come round, the ID does not.

mod keys;

use std::fmt;
use std::net::SocketAddr;

pub use keys::{KeySchedule, Keys};

use crate::siphash::siphash24;
use crate::source::Source;

/// CLOCK_MONOTONIC in nanoseconds, shifted by this, is the epoch of handshake IDs and of tokens: 17 seconds each.
pub const HANDSHAKE_EPOCH_SHIFT: u32 = 34;

/// The same for roaming IDs: 73 minutes each.
pub const ROAMING_EPOCH_SHIFT: u32 = 42;

/// Slots that an ID can name.
pub const SLOTS_MAX: u32 = 1 << 24;

const EPOCH_MASK: u64 = 0x1f;

/// What an ID may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Until the handshake has completed: from one address.
    Handshake,
    /// Afterwards: from wherever the client has moved to.
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

/// Where a connection lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The steering byte: owner = shard modulo the number of shards.
    pub shard: u8,
    /// Which run of the process: random at start, so that packets of an earlier run stand out.
    pub generation: u8,
    /// Index of the connection in its shard's table, below [`SLOTS_MAX`].
    pub slot: u32,
}

/// A connection ID that this process gave out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalCid {
    /// The steering byte: owner = shard modulo the number of shards.
    pub shard: u8,
    /// Which run of the process.
    pub generation: u8,
    /// Index of the connection in its shard's table: 24 bits.
    pub slot: u32,
    /// Tells apart the IDs of one connection.
    pub nonce: u16,
    /// What it may be used for.
    pub kind: Kind,
    /// Key that signed it: 0 to 3.
    pub key: u8,
    /// When it was given out: 5 bits of the epoch of its kind.
    pub epoch: u8,
    /// Proves that we gave it out.
    pub tag: u64,
}

/// Why an ID does not count; the fault is the sender's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadId {
    /// We did not give it out, or not to this address.
    #[error("the connection ID was not given to this address")]
    Unknown,
    /// Its time is over.
    #[error("the connection ID's time is over")]
    Expired,
}

impl LocalCid {
    /// Bytes of an encoded ID.
    pub const BYTES: usize = 16;

    /// A handshake ID for the connection at `place`, to be used by `peer` alone.
    ///
    /// # Panics
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

    /// A roaming ID for the connection at `place`.
    ///
    /// # Panics
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

    /// Reads an ID's form; none if its length is not ours. Says nothing about who made it.
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

    /// Reads the destination ID of a packet from `peer`, and checks that it may use it now.
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

    /// The shard that owns a connection ID, ours or a dialler's.
    pub fn owner(cid: &[u8], shards: u8) -> u8 {
        cid.first().map_or(0, |byte| byte % shards.max(1))
    }

    /// Where its connection lives.
    pub fn place(&self) -> Place {
        Place {
            shard: self.shard,
            generation: self.generation,
            slot: self.slot,
        }
    }

    /// `epoch` is the whole number of which the ID carries the low bits.
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

/// When a roaming ID that is given out at `now_ns` must have been replaced: half an epoch before it ends to count.
pub fn reissue_at(now_ns: u64) -> u64 {
    let end = (Kind::Roaming.epoch(now_ns) + 2) << ROAMING_EPOCH_SHIFT;
    end - (1 << (ROAMING_EPOCH_SHIFT - 1))
}

/// Destination ID of a dialler's first packets that proves nothing: steers them to the shard that will own the
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

/// What binds a tag to a client: two words of its address, IPv4 mapped, and its port.
pub(crate) fn address_words(client: SocketAddr) -> [u64; 3] {
    let [low, high] = Source::of(client.ip()).words();
    [low, high, u64::from(client.port())]
}

/// What an ID or a token carries of its epoch: five bits.
pub(crate) fn low_bits(epoch: u64) -> u8 {
    (epoch & EPOCH_MASK) as u8
}

/// When an ID or a token was made, if its tag is right.
pub(crate) struct Made {
    /// The last epoch up to the present one that ends in its five bits: what its tag is over.
    pub(crate) epoch: u64,
    age: u64,
}

impl Made {
    /// What the low five bits of a byte say in this epoch.
    pub(crate) fn of(byte: u8, present: u64) -> Self {
        let age = present.wrapping_sub(u64::from(byte)) & EPOCH_MASK;
        Self {
            epoch: present.wrapping_sub(age),
            age,
        }
    }

    /// Whether that is the present epoch or the one before.
    pub(crate) fn holds(&self) -> bool {
        self.age <= 1
    }
}

#[cfg(test)]
mod tests;
