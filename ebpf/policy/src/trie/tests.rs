//! Forests against a scan of the list that they were painted from.

#![allow(clippy::unwrap_used, reason = "test code")]

use super::{Forest, Full, LEAF, Leaf, RULE_DEFAULT, lookup};
use crate::rules::RuleAction;
use proptest::collection::vec;
use proptest::prelude::*;

const DEFAULT: Leaf = Leaf {
    action: RuleAction::Deny,
    rule: RULE_DEFAULT,
};

fn leaf(rule: u16) -> Leaf {
    let action = [RuleAction::Allow, RuleAction::Deny, RuleAction::Reject][usize::from(rule % 3)];
    Leaf { action, rule }
}

/// Whether two addresses agree in their first bits.
fn agree(left: &[u8], right: &[u8], bits: u8) -> bool {
    (0..usize::from(bits)).all(|bit| (left[bit / 8] ^ right[bit / 8]) & (0x80 >> (bit % 8)) == 0)
}

/// The first prefix that holds the address.
fn scan<const N: usize>(list: &[([u8; N], u8)], address: &[u8; N]) -> Leaf {
    let first = list
        .iter()
        .position(|(prefix, bits)| agree(prefix, address, *bits));
    first.map_or(DEFAULT, |index| leaf(index as u16))
}

fn painted<const N: usize>(forest: &mut Forest, list: &[([u8; N], u8)]) -> u32 {
    let root = forest.plant().unwrap();
    for (index, (prefix, bits)) in list.iter().enumerate() {
        forest
            .paint(root, prefix, *bits, leaf(index as u16))
            .unwrap();
    }
    forest.paint(root, &[0; N], 0, DEFAULT).unwrap();
    root
}

/// Bytes of few values, so that prefixes nest, repeat and border on each other.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![6 => 0..4_u8, 1 => Just(0x80), 1 => Just(0xff), 1 => any::<u8>()]
}

fn prefixes<const N: usize>() -> impl Strategy<Value = Vec<([u8; N], u8)>> {
    let address = proptest::array::uniform::<_, N>(byte());
    let bits = prop_oneof![0..=(N * 8) as u8, Just((N * 8) as u8), Just(8), Just(16)];
    vec((address, bits), 0..24)
}

fn addresses<const N: usize>() -> impl Strategy<Value = Vec<[u8; N]>> {
    vec(proptest::array::uniform::<_, N>(byte()), 60..=60)
}

/// Random addresses, and those at the borders of each prefix.
fn with_borders<const N: usize>(
    list: &[([u8; N], u8)],
    mut addresses: Vec<[u8; N]>,
) -> Vec<[u8; N]> {
    for (prefix, bits) in list {
        addresses.push(*prefix);
        if let Some(last) = bits.checked_sub(1) {
            let mut beside = *prefix;
            beside[usize::from(last / 8)] ^= 0x80 >> (last % 8);
            addresses.push(beside);
        }
    }
    addresses
}

fn agrees_with_scan<const N: usize>(
    list: &[([u8; N], u8)],
    addresses: Vec<[u8; N]>,
) -> Result<(), TestCaseError> {
    let mut forest = Forest::new(1_000);
    // A tree in front: indices must not be taken for those of the first.
    painted(&mut forest, &list[list.len() / 2..]);
    let root = painted(&mut forest, list);
    let relocated: Vec<_> = [[0; 256]; 3]
        .into_iter()
        .chain(forest.relocated(3))
        .collect();
    for address in with_borders(list, addresses) {
        let expected = Some(scan(list, &address));
        prop_assert_eq!(forest.lookup(root, &address), expected);
        prop_assert_eq!(lookup(&relocated, root + 3, &address), expected);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    // Protects the firewall: at least 60,000 lookups each, of which none may differ.
    #[test]
    fn ipv4_equals_a_scan(list in prefixes::<4>(), addresses in addresses()) {
        agrees_with_scan(&list, addresses)?;
    }

    #[test]
    fn ipv6_equals_a_scan(list in prefixes::<16>(), addresses in addresses()) {
        agrees_with_scan(&list, addresses)?;
    }
}

#[test]
fn entries_are_laid_out_as_the_kernel_reads_them() {
    for (leaf, entry) in [
        (
            Leaf {
                action: RuleAction::Allow,
                rule: 0,
            },
            0x8000_0000,
        ),
        (
            Leaf {
                action: RuleAction::Deny,
                rule: 7,
            },
            0x8001_0007,
        ),
        (
            Leaf {
                action: RuleAction::Reject,
                rule: RULE_DEFAULT,
            },
            0x8002_ffff,
        ),
    ] {
        assert_eq!(leaf.entry(), entry);
        assert_eq!(Leaf::from_entry(entry), Some(leaf));
    }
    assert_eq!(Leaf::from_entry(5), None);
}

// Protects the bound of memory: what is hidden or done costs no node, and a full forest says so.
#[test]
fn nodes_are_bounded_and_never_in_vain() {
    let mut forest = Forest::new(4);
    let root = forest.plant().unwrap();
    forest.paint(root, &[10, 0, 0, 0], 8, leaf(0)).unwrap();
    forest.paint(root, &[10, 1, 2, 3], 32, leaf(1)).unwrap();
    assert_eq!(forest.nodes().len(), 1);
    forest.paint(root, &[11, 1, 2, 3], 32, leaf(2)).unwrap();
    assert_eq!(forest.nodes().len(), 4);
    assert_eq!(
        forest.paint(root, &[12, 1, 2, 3], 32, leaf(3)),
        Err(Full { nodes_max: 4 })
    );

    let mut all = Forest::new(2);
    let root = all.plant().unwrap();
    all.paint(root, &[0; 4], 0, DEFAULT).unwrap();
    all.paint(root, &[9, 9, 9, 9], 32, leaf(1)).unwrap();
    assert_eq!(all.nodes().len(), 1);
    assert!(all.nodes()[0].iter().all(|&entry| entry == DEFAULT.entry()));
    assert_eq!(all.lookup(7, &[0; 4]), None);
    assert_eq!(all.nodes()[0][0] & LEAF, LEAF);
}

// Protects the time to compile: a thousand broad rules over many nodes repaint none of them.
#[test]
fn broad_rules_over_many_nodes_are_cheap() {
    let mut forest = Forest::new(5_000);
    let root = forest.plant().unwrap();
    for high in 0..=255 {
        for low in 0..16 {
            forest
                .paint(root, &[10, high, low, 0], 25, leaf(u16::from(high)))
                .unwrap();
        }
    }
    for rule in 0..60_000 {
        forest
            .paint(root, &[10, 0, 0, 0], 7 + (rule % 2) as u8, leaf(rule))
            .unwrap();
    }
    forest.paint(root, &[0; 4], 0, DEFAULT).unwrap();
    assert_eq!(forest.lookup(root, &[10, 3, 4, 200]), Some(leaf(0)));
    assert_eq!(forest.lookup(root, &[11, 3, 4, 200]), Some(leaf(0)));
    assert_eq!(forest.lookup(root, &[12, 3, 4, 200]), Some(DEFAULT));
}
