//! Proofs: the layout shared with the kernel, the addresses that may use them, and their lifetime.

use std::net::Ipv6Addr;

use proptest::prelude::*;

use super::*;

const EPOCH: u64 = 1 << EPOCH_SHIFT;
const KEY: Key = Key { k0: 1, k1: 2 };
const NODE: u32 = 0x0403_0201;

fn key_of(node_tag: u32) -> Option<Key> {
    (node_tag == NODE).then_some(KEY)
}

fn source() -> IpAddr {
    "192.0.2.1".parse().unwrap()
}

// Protects the agreement with the kernel's program.
#[test]
fn layout_is_fixed() {
    let wall_ns = 300 * EPOCH + 5;
    let id = make(42, NODE, [5, 6, 7, 8, 9, 10], source(), wall_ns, KEY);
    assert_eq!(
        id[..12],
        [42, (300 % 256) as u8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    );
    let words = [
        u64::from_le_bytes([42, 44, 1, 2, 3, 4, 5, 6]),
        u64::from_le_bytes([7, 8, 9, 10, 0, 0, 0, 0]),
        0,
        u64::from_le_bytes([0, 0, 0xff, 0xff, 192, 0, 2, 1]),
        300,
    ];
    assert_eq!(id[12..], siphash24(KEY, &words).to_le_bytes());
}

#[test]
fn a_node_tag_is_the_start_of_its_id() {
    assert_eq!(node_tag_of(&[1, 2, 3, 4, 5]), NODE);
    assert_eq!(node_tag_of(&[1, 2]), 0x0201);
    assert_eq!(node_tag_of(&[]), 0);
}

#[test]
fn counts_within_one_epoch_of_the_present() {
    for epoch in 1..=600 {
        let id = make(0, NODE, [0; 6], source(), epoch * EPOCH + 7, KEY);
        let check = |wall_ns| check(&id, source(), wall_ns, key_of).is_some();
        assert!(check(epoch * EPOCH));
        assert!(check((epoch - 1) * EPOCH), "a clock that is behind");
        assert!(check((epoch + 2) * EPOCH - 1));
        assert!(!check((epoch + 2) * EPOCH));
        for come_round in [255, 256, 257, 512] {
            assert!(!check((epoch + come_round) * EPOCH));
        }
        if let Some(before) = ((epoch - 1) * EPOCH).checked_sub(1) {
            assert!(!check(before));
        }
    }
}

#[test]
fn unknown_nodes_and_other_lengths_prove_nothing() {
    let id = make(0, NODE + 1, [0; 6], source(), 0, KEY);
    assert_eq!(check(&id, source(), 0, key_of), None);
    let id = make(0, NODE, [0; 6], source(), 0, KEY);
    assert_eq!(check(&id, source(), 0, key_of), Some(NODE));
    assert_eq!(
        check(&id, source(), 0, |_| Some(Key { k0: 1, k1: 3 })),
        None
    );
    assert_eq!(check(&id[..19], source(), 0, key_of), None);
    assert_eq!(
        check(&[id[..].to_vec(), vec![0]].concat(), source(), 0, key_of),
        None
    );
}

proptest! {
    #[test]
    fn round_trips(steer: u8, nonce: [u8; 6], address: [u8; 16], wall_ns: u64) {
        let id = make(steer, NODE, nonce, address.into(), wall_ns, KEY);
        prop_assert_eq!(check(&id, address.into(), wall_ns, key_of), Some(NODE));
        prop_assert_eq!(id[0], steer);
    }

    // All nodes have the same key, so that a changed node tag finds one as well.
    #[test]
    fn every_bit_counts(steer: u8, nonce: [u8; 6], wall_ns: u64) {
        let address: Ipv6Addr = "2001:db8::77".parse().unwrap();
        let id = make(steer, NODE, nonce, address.into(), wall_ns, KEY);
        for bit in 0..id.len() * 8 {
            let mut forged = id;
            forged[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(check(&forged, address.into(), wall_ns, |_| Some(KEY)), None);
        }
        for bit in 0..128 {
            let other = Ipv6Addr::from_bits(address.to_bits() ^ 1 << bit);
            prop_assert_eq!(check(&id, other.into(), wall_ns, key_of), None, "from {}", other);
        }
    }
}
