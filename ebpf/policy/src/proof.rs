//! How a dialling registry peer proves itself in its first packet: it chooses a destination ID that
//! carries a MAC.
//!
//! 1. A proof is valid for one source address, for one to two minutes of wall time on either side.
//! 2. Only a holder of the pair's key can make one. A listener on the path can repeat one, so its
//!    uses are limited.
//! 3. It carries eight bits of its epoch, and the MAC covers the whole epoch: when the bits come
//!    round, the proof stays invalid.

use std::net::IpAddr;

use crate::siphash::{Key, siphash24};
use crate::source::Source;

/// Bytes of a proof: the longest ID that QUIC allows.
pub const BYTES: usize = 20;

/// Wall time in nanoseconds, shifted right by this, is the epoch: 69 seconds each.
pub const EPOCH_SHIFT: u32 = 36;

/// The tag of a node in proofs: the first four bytes of its ID, padded with zeros.
pub fn node_tag_of(id: &[u8]) -> u32 {
    let byte = |index| id.get(index).copied().unwrap_or(0);
    u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
}

/// Makes the destination ID of a dialler's first packet.
///
/// `steer` selects the listener's shard, `node_tag` and `source` are the dialler's, `wall_ns` is
/// the time since 1970 in nanoseconds, `key` is the pair's.
pub fn make(
    steer: u8,
    node_tag: u32,
    nonce: [u8; 6],
    source: IpAddr,
    wall_ns: u64,
    key: Key,
) -> [u8; BYTES] {
    let mut id = [0; BYTES];
    id[0] = steer;
    let epoch = wall_ns >> EPOCH_SHIFT;
    id[1] = epoch as u8;
    id[2..6].copy_from_slice(&node_tag.to_le_bytes());
    id[6..12].copy_from_slice(&nonce);
    let mac = mac(&id, epoch, source, key);
    id[12..].copy_from_slice(&mac.to_le_bytes());
    id
}

/// The nonce of an ID that has the length of a proof. What it says holds once the proof does.
pub fn nonce_of(id: &[u8]) -> Option<[u8; 6]> {
    let id: &[u8; BYTES] = id.try_into().ok()?;
    let [_, _, _, _, _, _, n0, n1, n2, n3, n4, n5, ..] = *id;
    Some([n0, n1, n2, n3, n4, n5])
}

/// The tag of the node that made this ID for its first packet from `source`; none if it is no valid
/// proof. `key_of` returns the key of a known node, `wall_ns` is the time since 1970 in
/// nanoseconds.
pub fn check(
    id: &[u8],
    source: IpAddr,
    wall_ns: u64,
    key_of: impl FnOnce(u32) -> Option<Key>,
) -> Option<u32> {
    let id: &[u8; BYTES] = id.try_into().ok()?;
    let [_, made_in, n0, n1, n2, n3, ..] = *id;
    let epoch = made_around(made_in, wall_ns >> EPOCH_SHIFT)?;
    let node_tag = u32::from_le_bytes([n0, n1, n2, n3]);
    let key = key_of(node_tag)?;
    let right = id[12..] == mac(id, epoch, source, key).to_le_bytes();
    right.then_some(node_tag)
}

/// The epoch that ends in this byte, if it is the present one or a neighbour.
fn made_around(byte: u8, present: u64) -> Option<u64> {
    let next = present.wrapping_add(1);
    let age = (next as u8).wrapping_sub(byte);
    (age <= 2).then(|| next.wrapping_sub(u64::from(age)))
}

/// The MAC under `epoch`, the whole number whose low byte the ID carries.
fn mac(id: &[u8; BYTES], epoch: u64, source: IpAddr, key: Key) -> u64 {
    let [b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, ..] = *id;
    let head = u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]);
    let rest = u32::from_le_bytes([b8, b9, b10, b11]);
    let [low, high] = Source::of(source).words();
    siphash24(key, &[head, u64::from(rest), low, high, epoch])
}

#[cfg(test)]
mod tests;
