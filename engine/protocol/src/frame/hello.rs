//! The first frame of each side: who speaks which version, and what of the registry it holds.
//!
//! 1. Bytes behind the known fields are ignored, so that a later version can say more.

use super::PROTOCOL_VERSION;
use thiserror::Error;

/// Why a hello ends the connection. Always the peer's fault.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum HelloError {
    /// Shorter than the fields that every version has.
    #[error("hello of {0} bytes is too short")]
    PeerTooShort(usize),
    /// A version that we do not speak.
    #[error("peer speaks protocol version {0}, this node speaks {PROTOCOL_VERSION}")]
    PeerVersion(u16),
    /// A node without shards.
    #[error("peer claims to have no shards")]
    PeerNoShards,
}

impl HelloError {
    /// Stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::PeerTooShort(_) => "peer_hello_too_short",
            Self::PeerVersion(_) => "peer_hello_version",
            Self::PeerNoShards => "peer_hello_no_shards",
        }
    }
}

/// Body of a [`super::Kind::Hello`] frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub protocol_version: u16,
    /// Newest registry version that the sender holds.
    pub registry_version: u64,
    /// Bits for what both sides must know to use; none yet.
    pub features: u32,
    /// Shards of the sender.
    pub shards: u8,
}

impl Hello {
    /// Bytes of the fields that this version writes.
    pub const BYTES: usize = 15;
    /// Longest hello that is read: room for later versions.
    pub const BYTES_MAX: u32 = 256;

    /// The body as it stands on the wire.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..2].copy_from_slice(&self.protocol_version.to_le_bytes());
        bytes[2..10].copy_from_slice(&self.registry_version.to_le_bytes());
        bytes[10..14].copy_from_slice(&self.features.to_le_bytes());
        bytes[14] = self.shards;
        bytes
    }

    /// Reads a body, and whatever a later version adds to it.
    pub fn decode(body: &[u8]) -> Result<Self, HelloError> {
        let Some((fields, _later)) = body.split_first_chunk::<{ Self::BYTES }>() else {
            return Err(HelloError::PeerTooShort(body.len()));
        };
        let [
            v0,
            v1,
            r0,
            r1,
            r2,
            r3,
            r4,
            r5,
            r6,
            r7,
            f0,
            f1,
            f2,
            f3,
            shards,
        ] = *fields;
        let hello = Self {
            protocol_version: u16::from_le_bytes([v0, v1]),
            registry_version: u64::from_le_bytes([r0, r1, r2, r3, r4, r5, r6, r7]),
            features: u32::from_le_bytes([f0, f1, f2, f3]),
            shards,
        };
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(HelloError::PeerVersion(hello.protocol_version));
        }
        if hello.shards == 0 {
            return Err(HelloError::PeerNoShards);
        }
        Ok(hello)
    }
}
