//! QUIC version 1, and the part that all versions have in common (RFC 8999, RFC 9000 section 17).

use crate::reason::Reason;

/// Longest connection ID of version 1.
pub const ID_BYTES_MAX: usize = 20;
/// Length of the connection IDs that this node issues.
pub const OUR_ID_BYTES: usize = 16;
/// Shortest datagram that may open a connection (RFC 9000, 14.1).
pub const INITIAL_BYTES_MIN: usize = 1_200;

const DIAL_REQUEST_FIRST: u8 = 0x0d;
const DIAL_REQUEST_BYTES: usize = 80;
const LONG_HEADER: u8 = 0x80;
const FIXED_BIT: u8 = 0x40;
const VERSION_1: u32 = 1;
/// Bytes of first byte, version, and length of the destination ID.
const LONG_FIXED_BYTES: usize = 6;

/// The class of a datagram, before its IDs and tokens are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quic<'p> {
    /// A listener asks its dialler to dial.
    DialRequest,
    /// Belongs to a connection, if its destination ID is one that this node issued.
    Known(&'p [u8]),
    /// A version that this node does not speak, in a datagram long enough for an answer. The IDs
    /// are all that can be read of it (RFC 8999).
    Version {
        /// The answer's source ID.
        destination_id: &'p [u8],
        /// The answer's destination ID.
        source_id: &'p [u8],
    },
    /// A long header of type Initial.
    Initial(Initial<'p>),
}

/// An Initial, read up to its token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initial<'p> {
    /// The client chose it in its first packets, this node in later ones.
    pub destination_id: &'p [u8],
    /// The ID that answers carry.
    pub source_id: &'p [u8],
    /// Length of the whole UDP payload.
    pub datagram_bytes: usize,
    /// The payload from the length of the token on.
    rest: &'p [u8],
}

impl<'p> Quic<'p> {
    /// Reads the payload of a UDP datagram.
    ///
    /// # Errors
    ///
    /// The [`Reason`] by section 2 of the specification: [`Reason::QuicMalformed`],
    /// [`Reason::QuicFixedBit`], [`Reason::QuicIdLength`], [`Reason::QuicShortInitial`] or
    /// [`Reason::QuicZeroRtt`].
    pub fn parse(payload: &'p [u8]) -> Result<Self, Reason> {
        let first = *payload.first().ok_or(Reason::QuicMalformed)?;
        if first == DIAL_REQUEST_FIRST {
            return dial_request(payload);
        }
        if first & LONG_HEADER != 0 {
            return long(first, payload);
        }
        if first & FIXED_BIT == 0 {
            return Err(Reason::QuicFixedBit);
        }
        payload
            .get(1..1 + OUR_ID_BYTES)
            .map(Self::Known)
            .ok_or(Reason::QuicMalformed)
    }
}

impl<'p> Initial<'p> {
    /// The token, empty if the packet has none.
    ///
    /// # Errors
    ///
    /// [`Reason::QuicMalformed`] if its length is cut short, or reaches past the end of the
    /// payload.
    pub fn token(&self) -> Result<&'p [u8], Reason> {
        let (token_bytes, rest) = varint(self.rest).ok_or(Reason::QuicMalformed)?;
        let token_bytes = usize::try_from(token_bytes).map_err(|_| Reason::QuicMalformed)?;
        rest.get(..token_bytes).ok_or(Reason::QuicMalformed)
    }
}

fn dial_request(payload: &[u8]) -> Result<Quic<'_>, Reason> {
    if payload.len() == DIAL_REQUEST_BYTES && payload[2..6] == *b"dial" {
        Ok(Quic::DialRequest)
    } else {
        Err(Reason::QuicFixedBit)
    }
}

fn long(first: u8, payload: &[u8]) -> Result<Quic<'_>, Reason> {
    let Some(([_, v0, v1, v2, v3, id_bytes], rest)) =
        payload.split_first_chunk::<LONG_FIXED_BYTES>()
    else {
        return Err(Reason::QuicMalformed);
    };
    if rest.is_empty() {
        return Err(Reason::QuicMalformed);
    }
    let (destination_id, rest) = id(*id_bytes, rest)?;
    let (source_bytes, rest) = rest.split_first().ok_or(Reason::QuicMalformed)?;
    let (source_id, rest) = id(*source_bytes, rest)?;
    match u32::from_be_bytes([*v0, *v1, *v2, *v3]) {
        0 => return Ok(Quic::Known(destination_id)),
        VERSION_1 => {}
        _ if payload.len() < INITIAL_BYTES_MIN => return Err(Reason::QuicShortInitial),
        _ => {
            return Ok(Quic::Version {
                destination_id,
                source_id,
            });
        }
    }
    if first & FIXED_BIT == 0 {
        return Err(Reason::QuicFixedBit);
    }
    match first >> 4 & 3 {
        0 => Ok(Quic::Initial(Initial {
            destination_id,
            source_id,
            datagram_bytes: payload.len(),
            rest,
        })),
        1 => Err(Reason::QuicZeroRtt),
        _ => Ok(Quic::Known(destination_id)),
    }
}

/// An ID of this length, and what follows it.
fn id(bytes: u8, rest: &[u8]) -> Result<(&[u8], &[u8]), Reason> {
    let bytes = usize::from(bytes);
    if bytes > ID_BYTES_MAX {
        return Err(Reason::QuicIdLength);
    }
    rest.split_at_checked(bytes).ok_or(Reason::QuicMalformed)
}

/// A variable-length integer (RFC 9000, section 16), and what follows it.
fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let first = *bytes.first()?;
    let (encoded, rest) = bytes.split_at_checked(1 << (first >> 6))?;
    let value = encoded[1..]
        .iter()
        .fold(u64::from(first & 0x3f), |value, byte| {
            value << 8 | u64::from(*byte)
        });
    Some((value, rest))
}

#[cfg(test)]
pub(super) mod tests;
