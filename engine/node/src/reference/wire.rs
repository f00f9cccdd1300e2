//! What the reference application says to peers: methods, and the few fixed forms of their bodies.

use std::ops::RangeInclusive;

use millrace_protocol::frame::Method;
use millrace_protocol::id::ArtifactId;

/// "I have an artifact of this id and length": [`Announce`]; answered by [`WANTED`] or [`HELD`].
pub const ANNOUNCE: Method = Method(1);
/// The announced body; answered by the id that the peer computed.
pub const PUT: Method = Method(2);
/// An id; answered by the body.
pub const GET: Method = Method(3);
/// An id: "do you hold it?"; answered by the body's length, as [`encode_length`] writes it, or by
/// [`FailureCode::NotFound`](millrace_protocol::frame::FailureCode::NotFound).
pub const LOOK_UP: Method = Method(4);

/// The methods that are kept for the reference application.
pub const METHODS: RangeInclusive<Method> = ANNOUNCE..=Method(0x00ff);

/// Answer to an announcement: send it.
pub const WANTED: &[u8] = &[0];
/// Answer to an announcement: it is here already.
pub const HELD: &[u8] = &[1];

/// Id and length of an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announce {
    /// SHA-256 of its bytes.
    pub id: ArtifactId,
    /// Its bytes.
    pub length: u64,
}

impl Announce {
    /// The body: the id, then the length (u64, little endian).
    pub fn encode(&self) -> Vec<u8> {
        [self.id.as_bytes().as_slice(), &self.length.to_le_bytes()].concat()
    }

    /// Reads a body; `None` when it has another length.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (id, length) = bytes.split_first_chunk::<32>()?;
        let length = u64::from_le_bytes(length.try_into().ok()?);
        Some(Self {
            id: ArtifactId::from_bytes(*id),
            length,
        })
    }
}

/// Reads the id of an artifact; `None` when it has another length.
pub fn decode_id(bytes: &[u8]) -> Option<ArtifactId> {
    bytes.try_into().ok().map(ArtifactId::from_bytes)
}

/// Answer to [`LOOK_UP`]: 8 bytes, little endian.
pub fn encode_length(length: u64) -> Vec<u8> {
    length.to_le_bytes().to_vec()
}

/// Reads an answer to [`LOOK_UP`]; `None` when it has another length.
pub fn decode_length(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_round_trip_and_refuse_other_lengths() {
        let announce = Announce {
            id: ArtifactId::from_bytes([7; 32]),
            length: 1 << 27,
        };
        assert_eq!(Announce::decode(&announce.encode()), Some(announce));
        assert_eq!(Announce::decode(&announce.encode()[1..]), None);
        assert_eq!(decode_id(&[1; 32]), Some(ArtifactId::from_bytes([1; 32])));
        assert_eq!(decode_id(&[1; 33]), None);
        assert_eq!(decode_length(&encode_length(1 << 27)), Some(1 << 27));
        assert_eq!(decode_length(&[1; 7]), None);
    }
}
