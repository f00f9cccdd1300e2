//! The token that a Retry gives to a client. The client's next first packet brings it back, which
//! shows the client's address.
//!
//! 1. A token is valid for one address and port, for 17 to 34 seconds.
//! 2. A node gives tokens by Retry alone. A client that brings back one that is not valid would
//!    take no second Retry, and no handshake without the first one's IDs, so its packet is dropped
//!    (RFC 9000, 8.1.2). The CONNECTION_CLOSE that the RFC recommends would be sealed for each
//!    forged packet, and an honest client meets the case only when its Retry is too old, or when
//!    its address changes within the round trip: it times out and dials again.
//! 3. It carries the client's original destination ID, and determines the destination ID of the
//!    packet that brings it back: the node that answers with a Retry keeps no state.

use std::fmt;
use std::net::SocketAddr;

use crate::cid::{HANDSHAKE_EPOCH_SHIFT, Keys, Made, address_words, low_bits};
use crate::siphash::siphash24;

/// Bytes of a token.
pub const BYTES: usize = 32;

/// Bytes of the source ID of a Retry, which the packet with the token has as its destination ID.
pub const RETRY_ID_BYTES: usize = 16;

/// Byte 0 of a token.
const MARK: u8 = 0x4d;
/// Spreads the tag over the rest of the retry ID.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
const ID_BYTES_MIN: usize = 8;
const ID_BYTES_MAX: usize = 20;

/// The destination ID that a client chose for its very first packet: 8 to 20 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct OriginalId {
    bytes: [u8; ID_BYTES_MAX],
    len: u8,
}

impl OriginalId {
    /// The ID; none if it has fewer than 8 or more than 20 bytes.
    pub fn new(id: &[u8]) -> Option<Self> {
        if !(ID_BYTES_MIN..=ID_BYTES_MAX).contains(&id.len()) {
            return None;
        }
        let mut bytes = [0; ID_BYTES_MAX];
        bytes[..id.len()].copy_from_slice(id);
        Some(Self {
            bytes,
            len: id.len() as u8,
        })
    }

    /// The ID's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl fmt::Debug for OriginalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OriginalId({:02x?})", self.as_bytes())
    }
}

/// The contents of a Retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Minted {
    /// The token.
    pub token: [u8; BYTES],
    /// The Retry's source ID. Its first byte is that of the original ID, so that the shard stays
    /// the same.
    pub retry_id: [u8; RETRY_ID_BYTES],
}

/// Why a token does not show an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadToken {
    /// It has not the form of a token of any node: another server gave it. Its packet is one
    /// without a token (RFC 9000, 8.1.3).
    #[error("the token is none of a node")]
    Unknown,
    /// No node with these keys gave it to this address, or it belongs to another destination ID.
    #[error("the token was not given to this address")]
    Forged,
    /// It was valid, and has expired.
    #[error("the token has expired")]
    Expired,
}

/// Makes a token for a client that began with the destination ID `original`. `now_ns` is
/// CLOCK_MONOTONIC. None for an ID that no client may choose.
pub fn mint(original: &[u8], client: SocketAddr, keys: &Keys, now_ns: u64) -> Option<Minted> {
    let original = OriginalId::new(original)?;
    let epoch = now_ns >> HANDSHAKE_EPOCH_SHIFT;
    let mut token = [0; BYTES];
    token[0] = MARK;
    token[1] = keys.active << 5 | low_bits(epoch);
    token[2] = original.len;
    token[3..23].copy_from_slice(&original.bytes);
    let tag = tag(&token, epoch, client, keys);
    token[24..].copy_from_slice(&tag.to_le_bytes());
    Some(Minted {
        token,
        retry_id: retry_id(&original, tag),
    })
}

/// Reads the token of a first packet from `client` to `destination_id`, at `now_ns`
/// (CLOCK_MONOTONIC). Returns the ID that the client began with.
///
/// # Errors
///
/// [`BadToken::Unknown`] if it has not the form of a token, [`BadToken::Forged`] if no node with
/// these keys made it for this client and this ID, [`BadToken::Expired`] if one did and its epoch
/// is over.
pub fn open(
    token: &[u8],
    destination_id: &[u8],
    client: SocketAddr,
    keys: &Keys,
    now_ns: u64,
) -> Result<OriginalId, BadToken> {
    let token: &[u8; BYTES] = token.try_into().map_err(|_| BadToken::Unknown)?;
    let original = original_of(token).ok_or(BadToken::Unknown)?;
    let made = Made::of(token[1], now_ns >> HANDSHAKE_EPOCH_SHIFT);
    let tag = tag(token, made.epoch, client, keys);
    if token[24..] != tag.to_le_bytes() || destination_id != retry_id(&original, tag) {
        return Err(BadToken::Forged);
    }
    if !made.holds() {
        return Err(BadToken::Expired);
    }
    Ok(original)
}

/// The original ID, if the bytes before the tag have the right form.
fn original_of(token: &[u8; BYTES]) -> Option<OriginalId> {
    let len = usize::from(token[2]);
    let original = OriginalId::new(token.get(3..3 + len)?)?;
    let padding_is_zero = token[3 + len..24].iter().all(|&byte| byte == 0);
    (token[0] == MARK && padding_is_zero).then_some(original)
}

/// The tag under `epoch`, the whole number whose low bits the token carries.
fn tag(token: &[u8; BYTES], epoch: u64, client: SocketAddr, keys: &Keys) -> u64 {
    let mut words = [0; 7];
    for (word, bytes) in words.iter_mut().zip(token[..24].as_chunks().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    words[3..6].copy_from_slice(&address_words(client));
    words[6] = epoch;
    siphash24(keys.of(token[1]), &words)
}

fn retry_id(original: &OriginalId, tag: u64) -> [u8; RETRY_ID_BYTES] {
    let mut id = [0; RETRY_ID_BYTES];
    id[0] = original.bytes[0];
    id[1..9].copy_from_slice(&tag.to_le_bytes());
    id[9..].copy_from_slice(&tag.wrapping_mul(SPREAD).to_le_bytes()[..7]);
    id
}

#[cfg(test)]
mod tests;
