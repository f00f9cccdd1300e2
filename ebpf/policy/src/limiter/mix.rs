//! The hash that places keys in the sketch: three products, which take a few nanoseconds where
//! SipHash takes twenty.
//!
//! 1. The seed is secret and changes with each generation, so a sender cannot choose where a key
//!    goes. The hash is no MAC and need not be one: a key is charged only after its sender has
//!    shown that the address is its own, or that this node made the ID.
//! 2. Keys that differ in one word alone never have the same 64 bits.

use crate::siphash::Key;

/// Separates purposes and levels: the golden ratio, as an odd number.
const KIND: u64 = 0x9e37_79b9_7f4a_7c15;
/// The finaliser of SplitMix64.
const FIRST: u64 = 0xbf58_476d_1ce4_e5b9;
const SECOND: u64 = 0x94d0_49bb_1331_11eb;

/// Hash of the key `a, b`; `kind` is its purpose and level.
pub(super) fn mix(seed: Key, a: u64, b: u64, kind: u64) -> u64 {
    let mixed = (a ^ seed.k0).wrapping_mul(SECOND);
    let mixed = (mixed ^ mixed >> 32 ^ seed.k1 ^ b).wrapping_add(kind.wrapping_mul(KIND));
    let mixed = (mixed ^ mixed >> 30).wrapping_mul(FIRST);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(SECOND);
    mixed ^ mixed >> 31
}

#[cfg(test)]
mod tests;
