//! Sets of tries against a scan of the list that they were built from.

#![allow(clippy::unwrap_used, reason = "test code")]

use super::{
    Base, Full, Leaf, NodeKind, RULE_DEFAULT, RUNS, SPARSE_PER_NODE, Sparse, TrieBuilder, TrieSet,
};
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

fn build<const N: usize>(builder: &mut TrieBuilder, list: &[([u8; N], u8)]) -> u32 {
    let root = builder.begin_trie().unwrap();
    for (index, (prefix, bits)) in list.iter().enumerate() {
        builder.insert(prefix, *bits, leaf(index as u16)).unwrap();
    }
    builder.insert(&[0; N], 0, DEFAULT).unwrap();
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

/// Many prefixes under one byte, so that their node is dense, and what is below it is not.
fn crowd<const N: usize>() -> impl Strategy<Value = Vec<([u8; N], u8)>> {
    let under = |bytes: (u8, u8, u8)| {
        let mut address = [0; N];
        address[..4].copy_from_slice(&[1, bytes.0, bytes.1, bytes.2]);
        address
    };
    let address = (any::<u8>(), byte(), byte()).prop_map(under);
    vec((address, 12..=32_u8), 24..48)
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
) -> Result<TrieSet, TestCaseError> {
    let mut builder = TrieBuilder::new(1_000);
    // A trie in front: indices must not be taken for those of the first.
    build(&mut builder, &list[list.len() / 2..]);
    let root = build(&mut builder, list);
    let tries = builder.finish().unwrap();
    let base = Base {
        nodes: 3,
        sparse: 5,
    };
    let nothing = Sparse::of(&[0; 256]).unwrap();
    let relocated = TrieSet {
        nodes: [[0; 256]; 3]
            .into_iter()
            .chain(tries.nodes_at(base))
            .collect(),
        sparse: [nothing; 5]
            .into_iter()
            .chain(tries.sparse_at(base))
            .collect(),
    };
    for address in with_borders(list, addresses) {
        let expected = Some(scan(list, &address));
        prop_assert_eq!(tries.lookup(root, &address), expected);
        prop_assert_eq!(relocated.lookup(root + base.nodes, &address), expected);
    }
    Ok(tries)
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

    // Protects the steps between the two kinds of nodes, both ways.
    #[test]
    fn mixed_ipv4_equals_a_scan(list in crowd::<4>(), addresses in addresses()) {
        agrees_with_scan(&list, addresses)?;
    }

    #[test]
    fn mixed_ipv6_equals_a_scan(list in crowd::<16>(), addresses in addresses()) {
        agrees_with_scan(&list, addresses)?;
    }

    // Protects the conversion: the same entries, and none given up that would fit.
    #[test]
    fn sparse_nodes_equal_dense_ones(
        changes in proptest::collection::btree_map(1..=0xff_u8, any::<u32>(), 0..RUNS + 2),
        first in any::<u32>(),
    ) {
        let mut node = [first; 256];
        for (&start, &entry) in &changes {
            node[usize::from(start)..].fill(entry);
        }
        let runs = node.chunk_by(|left, right| left == right).count();
        match Sparse::of(&node) {
            Some(sparse) => {
                prop_assert!(runs <= RUNS);
                for byte in 0..=0xff {
                    prop_assert_eq!(sparse.entry(byte), node[usize::from(byte)]);
                }
            }
            None => prop_assert!(runs > RUNS),
        }
    }
}

// Protects the test above: crowds have dense nodes below the root, and sparse ones below those.
#[test]
fn both_kinds_of_nodes_are_walked() {
    let list: Vec<_> = (0..48).map(|n| ([1, n * 5, n % 3, 7], 32)).collect();
    let tries = agrees_with_scan(&list, Vec::new()).unwrap();
    // Two roots; the node of 24 prefixes, and the one of 48.
    assert_eq!(tries.nodes().len(), 4);
    assert!(!tries.sparse().is_empty());
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

// Protects the bounds of memory: prefixes that are hidden or complete take no node, and a set that
// does not fit is an error.
#[test]
fn nodes_are_bounded_and_never_in_vain() {
    let mut builder = TrieBuilder::new(1);
    builder.begin_trie().unwrap();
    builder.insert(&[10, 0, 0, 0], 8, leaf(0)).unwrap();
    builder.insert(&[10, 1, 2, 3], 32, leaf(1)).unwrap();
    builder.insert(&[11, 1, 2, 3], 32, leaf(2)).unwrap();
    // Four of five: the root, 11, 11.1, 11.1.2.
    assert_eq!(
        builder.insert(&[12, 1, 2, 3], 32, leaf(3)),
        Err(Full {
            kind: NodeKind::Building,
            nodes: 6,
            nodes_max: 5,
        })
    );

    let mut all = TrieBuilder::new(1);
    all.begin_trie().unwrap();
    all.insert(&[0; 4], 0, DEFAULT).unwrap();
    all.insert(&[9, 9, 9, 9], 32, leaf(1)).unwrap();
    let all = all.finish().unwrap();
    assert_eq!(all.nodes(), [[DEFAULT.entry(); 256]]);
    assert!(all.sparse().is_empty());
    assert_eq!(all.lookup(7, &[0; 4]), None);
}

#[test]
fn either_kind_of_node_has_its_bound() {
    let crowd: Vec<_> = (0..20).map(|n| ([1, n * 2, 0, 0], 16)).collect();
    let mut builder = TrieBuilder::new(1);
    build(&mut builder, &crowd);
    assert_eq!(
        builder.finish(),
        Err(Full {
            kind: NodeKind::Dense,
            nodes: 2,
            nodes_max: 1,
        })
    );
    // No two alike, each with a child of its own.
    let apart: Vec<_> = (0..4).map(|n| ([n, n, n, 0], 24)).collect();
    let mut builder = TrieBuilder::new(2);
    build(&mut builder, &apart);
    let nodes = builder.finish().unwrap().sparse().len();
    assert_eq!(nodes, 2 * SPARSE_PER_NODE);
    let one_more = [&apart[..], &[([4, 4, 0, 0], 16)]].concat();
    let mut builder = TrieBuilder::new(2);
    build(&mut builder, &one_more);
    assert_eq!(
        builder.finish(),
        Err(Full {
            kind: NodeKind::Sparse,
            nodes: 9,
            nodes_max: 8,
        })
    );
}

// Protects the cache: nodes that are alike are kept once, also below different nodes.
#[test]
fn sparse_nodes_that_are_alike_are_one() {
    let mut builder = TrieBuilder::new(1_000);
    let root = builder.begin_trie().unwrap();
    for high in 0..=0xff {
        builder.insert(&[high, 2, 3, 0], 24, leaf(0)).unwrap();
    }
    builder.insert(&[0; 4], 0, DEFAULT).unwrap();
    let tries = builder.finish().unwrap();
    assert_eq!((tries.nodes().len(), tries.sparse().len()), (1, 2));
    assert_eq!(tries.lookup(root, &[200, 2, 3, 9]), Some(leaf(0)));
    assert_eq!(tries.lookup(root, &[200, 2, 4, 9]), Some(DEFAULT));
}

// Protects the time to compile: a thousand broad rules over many nodes visit no node twice.
#[test]
fn broad_rules_over_many_nodes_are_cheap() {
    let mut builder = TrieBuilder::new(1_000);
    let root = builder.begin_trie().unwrap();
    for high in 0..=255 {
        for low in 0..16 {
            builder
                .insert(&[10, high, low, 0], 25, leaf(u16::from(high)))
                .unwrap();
        }
    }
    for rule in 0..60_000 {
        builder
            .insert(&[10, 0, 0, 0], 7 + (rule % 2) as u8, leaf(rule))
            .unwrap();
    }
    builder.insert(&[0; 4], 0, DEFAULT).unwrap();
    let tries = builder.finish().unwrap();
    assert_eq!(tries.lookup(root, &[10, 3, 4, 200]), Some(leaf(0)));
    assert_eq!(tries.lookup(root, &[11, 3, 4, 200]), Some(leaf(0)));
    assert_eq!(tries.lookup(root, &[12, 3, 4, 200]), Some(DEFAULT));
}
