//! The properties that the sketch needs of its hash: every bit of a key changes every bit of the
//! hash, and keys in a row spread like random ones.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;
use crate::limiter::Purpose;
use crate::source::Source;

const SEED: Key = Key {
    k0: 0x0123_4567_89ab_cdef,
    k1: 0xfedc_ba98_7654_3210,
};
const KIND_OF_QUIC: u64 = (Purpose::Quic as u64) << 8;

fn hash_of(seed: Key, address: IpAddr, level: usize) -> u64 {
    let [a, b] = Source::of(address).at_level(level).words();
    mix(seed, a, b, KIND_OF_QUIC | level as u64)
}

fn v4(bits: u32) -> IpAddr {
    Ipv4Addr::from_bits(bits).into()
}

fn v6(network: u64) -> IpAddr {
    Ipv6Addr::from_bits(u128::from(network) << 64).into()
}

/// How often each bit of the hash changes with a bit of the key, over all keys; returns the share
/// that is farthest from a half.
fn worst_share(keys: &[[u64; 2]], bits: impl Iterator<Item = usize>) -> f64 {
    let mut worst: f64 = 0.0;
    for bit in bits {
        let mut changed = [0_u32; 64];
        for &[a, b] in keys {
            let mut other = [a, b];
            other[bit / 64] ^= 1 << (bit % 64);
            let both = mix(SEED, a, b, KIND_OF_QUIC) ^ mix(SEED, other[0], other[1], KIND_OF_QUIC);
            for (place, count) in changed.iter_mut().enumerate() {
                *count += (both >> place & 1) as u32;
            }
        }
        for count in changed {
            let share = f64::from(count) / keys.len() as f64;
            worst = worst.max((share - 0.5).abs());
        }
    }
    worst
}

// Protects the buckets from senders who try neighbours of an address: no neighbour is a better
// choice.
#[test]
fn every_bit_of_an_address_changes_half_of_the_hash() {
    const KEYS: u32 = 4_096;
    let v4: Vec<_> = (0..KEYS)
        .map(|number| Source::of(v4(0xc000_0200 + number)).words())
        .collect();
    // What varies of IPv4 is the last four bytes.
    let worst = worst_share(&v4, 96..128);
    assert!(worst < 0.1, "IPv4: {worst}");
    let v6: Vec<_> = (0..u64::from(KEYS))
        .map(|number| Source::of(v6(0x2001_0db8_0000_0000 + number)).words())
        .collect();
    let worst = worst_share(&v6, 0..64);
    assert!(worst < 0.1, "IPv6: {worst}");
}

/// Keys on each of 1,024 buckets against an even spread: chi squared over its degrees of freedom,
/// which is 1 for random keys.
fn unevenness(hashes: impl Iterator<Item = u64>) -> f64 {
    const BUCKETS: usize = 1_024;
    let mut buckets = [0_u32; BUCKETS];
    let mut keys = 0;
    for hash in hashes {
        buckets[hash as usize % BUCKETS] += 1;
        keys += 1;
    }
    let even = f64::from(keys) / BUCKETS as f64;
    let squares = buckets
        .iter()
        .map(|&count| (f64::from(count) - even).powi(2) / even);
    squares.sum::<f64>() / (BUCKETS - 1) as f64
}

// Protects innocent sources beside a botnet of neighbours: a walk through a prefix fills all
// buckets alike.
#[test]
fn addresses_in_a_row_spread_over_the_lines() {
    const KEYS: u32 = 1 << 16;
    type Walk = (&'static str, usize, fn(u32) -> IpAddr);
    let walks: [Walk; 5] = [
        ("addresses", 0, |number| v4(0x0a00_0000 + number)),
        ("first addresses of each /24", 0, |number| {
            v4(number << 8 | 1)
        }),
        ("/24", 1, |number| v4(number << 8)),
        ("/64", 0, |number| {
            v6(0x2001_0db8_0000_0000 + u64::from(number))
        }),
        ("/48", 2, |number| {
            v6(0x2001_0000_0000_0000 + (u64::from(number) << 16))
        }),
    ];
    for seed in [
        SEED,
        Key { k0: 1, k1: 2 },
        Key {
            k0: u64::MAX,
            k1: 0,
        },
    ] {
        for (name, level, address) in walks {
            let hashes = || (0..KEYS).map(|number| hash_of(seed, address(number), level));
            // Six standard deviations of random keys are 0.27 here.
            for (part, shift) in [("buckets", 0), ("slots", 32), ("tags", 48)] {
                let spread = unevenness(hashes().map(|hash| hash >> shift));
                assert!(spread < 1.27, "{name}, {part}: {spread}");
            }
        }
    }
}

proptest! {
    // Protects the promise that keys share a word only if bucket and tag, the bits that are kept,
    // are the same.
    #[test]
    fn keys_that_differ_in_one_word_differ(k0: u64, k1: u64, a: u64, b: u64, other: u64) {
        let seed = Key { k0, k1 };
        let hash = mix(seed, a, b, KIND_OF_QUIC);
        prop_assert_eq!(hash == mix(seed, other, b, KIND_OF_QUIC), a == other);
        prop_assert_eq!(hash == mix(seed, a, other, KIND_OF_QUIC), b == other);
    }

    #[test]
    fn seeds_and_kinds_set_keys_apart(k0: u64, k1: u64, a: u64, b: u64) {
        let seed = Key { k0, k1 };
        let hash = mix(seed, a, b, KIND_OF_QUIC);
        let flipped = Key { k0: k0 ^ 1, k1 };
        prop_assert_ne!(hash, mix(flipped, a, b, KIND_OF_QUIC));
        prop_assert_ne!(hash, mix(seed, a, b, KIND_OF_QUIC | 1));
        prop_assert_ne!(hash, mix(seed, a, b, (Purpose::Tcp as u64) << 8));
    }
}
