use super::*;
use proptest::prelude::*;
use std::net::SocketAddr;

fn key() -> SigningKey {
    SigningKey::from_seed([42; 32])
}

fn subnet() -> SubnetId {
    SubnetId::from_public_key_der(b"subnet")
}

fn node(seed: u8, port: u16) -> NodeRecord {
    let public_key = SigningKey::from_seed([seed; 32]).public_key();
    let addresses = vec![
        SocketAddr::from(([127, 0, 0, 1], port)).into(),
        format!("node{seed}.example:{}", port + 1).parse().unwrap(),
    ];
    NodeRecord::new(public_key, subnet(), addresses)
}

fn version(number: u64, seeds: &[u8]) -> RegistryVersion {
    RegistryVersion {
        number,
        subnets: vec![SubnetRecord {
            id: subnet(),
            name: Some("dev".into()),
            settings: toml::toml! { size = 4 },
        }],
        nodes: seeds
            .iter()
            .map(|seed| node(*seed, 1000 + u16::from(*seed)))
            .collect(),
        firewall: vec![toml::toml! { action = "allow" }],
        settings: toml::toml! { poll = "3s" },
        skipped: vec![],
    }
}

fn signed(number: u64, seeds: &[u8]) -> SignedVersion {
    SignedVersion::sign(version(number, seeds).to_document(), &key())
}

fn registry(versions_max: usize) -> Registry {
    let config = RegistryConfig {
        versions_max,
        ..RegistryConfig::default()
    };
    Registry::new(key().public_key(), config)
}

#[test]
fn document_round_trips() {
    let want = version(7, &[1, 2, 3]);
    assert_eq!(RegistryVersion::parse(&want.to_document()), Ok(want));
    let empty = RegistryVersion {
        number: 1,
        ..RegistryVersion::default()
    };
    assert_eq!(RegistryVersion::parse(&empty.to_document()), Ok(empty));
}

// Protects a subnet from one bad record: the others work, and the bad one is named.
#[test]
fn bad_records_are_skipped_and_reported() {
    let good = node(1, 5);
    let (id, key, subnet) = (good.id, good.public_key, good.subnet);
    let other = node(2, 5).public_key;
    let record = |id: &str, key: &str, addresses: &str| {
        format!(
            "[[nodes]]\nid = \"{id}\"\npublic_key = \"{key}\"\nsubnet = \"{subnet}\"\n\
             addresses = {addresses}\n"
        )
    };
    let (id, key, other) = (id.to_string(), key.to_string(), other.to_string());
    let at = "[\"127.0.0.1:5\", \"NODE1.example.:6\"]";
    let document = [
        "number = 3\n".to_string(),
        record("nobody", &key, at),
        record(&id, "00", at),
        record(&id, &other, at),
        record(&id, &key, "[]"),
        record(&id, &key, "[\"here\"]"),
        record(&id, &key, "[\"0.0.0.0:5\"]"),
        record(&id, &key, "[\"[fe80::1%2]:5\"]"),
        record(&id, &key, "[\"127.0.0.1:5\", \"[fe80::1]:5\"]"),
        record(&id, &key, at),
        record(&id, &key, at),
        "[[subnets]]\nname = \"no id\"\n".to_string(),
    ]
    .concat();
    let version = RegistryVersion::parse(&document).unwrap();
    assert_eq!(version.nodes, [good]);
    let skipped: Vec<_> = version
        .skipped
        .iter()
        .map(|s| (s.table, s.index, s.reason))
        .collect();
    assert_eq!(
        skipped,
        [
            ("subnets", 0, "record_id"),
            ("nodes", 0, "record_id"),
            ("nodes", 1, "record_public_key"),
            ("nodes", 2, "record_key_of_another"),
            ("nodes", 3, "record_addresses"),
            ("nodes", 4, "record_address"),
            ("nodes", 5, "record_address"),
            ("nodes", 6, "record_address"),
            ("nodes", 7, "record_address"),
            ("nodes", 9, "record_duplicate"),
        ]
    );
}

#[test]
fn unsigned_and_unreadable_is_refused() {
    let reason = |signed: SignedVersion| registry(9).offer(signed).map_err(|e| e.reason());
    let good = signed(1, &[1]);
    let mut tampered = good.clone();
    tampered.document.push(' ');
    assert_eq!(reason(tampered), Err("registry_bad_signature"));
    let forged = SignedVersion::sign(good.document.clone(), &SigningKey::from_seed([1; 32]));
    assert_eq!(reason(forged), Err("registry_bad_signature"));
    let bare = key().sign(good.document.as_bytes());
    let bare = SignedVersion {
        document: good.document.clone(),
        signature: bare,
    };
    assert_eq!(reason(bare), Err("registry_bad_signature"));
    let sign = |text: &str| SignedVersion::sign(text.into(), &key());
    assert_eq!(reason(sign("number = ")), Err("registry_syntax"));
    assert_eq!(reason(sign("nodes = []")), Err("registry_syntax"));
    assert_eq!(reason(sign("number = 0")), Err("registry_number"));
    assert_eq!(
        reason(sign(&" ".repeat((1 << 20) + 1))),
        Err("registry_too_long")
    );
    assert_eq!(
        reason(good),
        Ok(Offered::Newest {
            number: 1,
            missing: 0
        })
    );
}

#[test]
fn series_only_grows() {
    let mut registry = registry(9);
    assert_eq!(
        registry.offer(signed(3, &[1])),
        Ok(Offered::Newest {
            number: 3,
            missing: 0
        })
    );
    assert_eq!(
        registry.offer(signed(3, &[1])),
        Ok(Offered::Known { number: 3 })
    );
    assert_eq!(
        registry.offer(signed(3, &[2])),
        Err(RegistryError::Conflict { number: 3 })
    );
    assert_eq!(
        registry.offer(signed(2, &[2])),
        Err(RegistryError::Older {
            number: 2,
            newest: 3
        })
    );
    assert_eq!(
        registry.offer(signed(6, &[1, 2])),
        Ok(Offered::Newest {
            number: 6,
            missing: 2
        })
    );
    assert_eq!(
        registry
            .newer_than(3)
            .map(|(number, _)| number)
            .collect::<Vec<_>>(),
        [6]
    );
    assert_eq!(registry.newest().map(|v| v.nodes.len()), Some(2));
}

// Protects the walk of a member: added, removed but still in use, dropped, added again.
#[test]
fn membership_follows_the_versions_in_use() {
    let mut registry = registry(9);
    let members = |registry: &Registry| {
        [1, 2, 3].map(|seed| {
            let id = node(seed, 0).id;
            let mut nodes = registry
                .versions_in_use()
                .flat_map(|version| &version.nodes);
            nodes.any(|node| node.id == id)
        })
    };
    assert_eq!(members(&registry), [false, false, false]);
    registry.offer(signed(1, &[1, 2])).unwrap();
    registry.set_oldest_in_use(1);
    registry.offer(signed(2, &[1, 2, 3])).unwrap();
    assert_eq!(members(&registry), [true, true, true]);
    registry.offer(signed(3, &[1, 2])).unwrap();
    assert_eq!(members(&registry), [true, true, true]);
    registry.set_oldest_in_use(2);
    registry.set_oldest_in_use(1);
    assert_eq!(members(&registry), [true, true, true]);
    registry.set_oldest_in_use(3);
    assert_eq!(members(&registry), [true, true, false]);
    registry.offer(signed(4, &[1, 2, 3])).unwrap();
    assert_eq!(members(&registry), [true, true, true]);
}

#[test]
fn missing_number_in_use_means_the_one_before_it() {
    let oldest = |registry: &Registry| registry.versions_in_use().next().unwrap().number;
    let mut registry = registry(9);
    for (number, seeds) in [(2, &[1, 2][..]), (5, &[1]), (9, &[1])] {
        registry.offer(signed(number, seeds)).unwrap();
    }
    assert_eq!(oldest(&registry), 9);
    registry.set_oldest_in_use(4);
    assert_eq!(oldest(&registry), 2);
    registry.set_oldest_in_use(7);
    assert_eq!(oldest(&registry), 5);
    registry.set_oldest_in_use(100);
    assert_eq!(oldest(&registry), 9);
}

#[test]
fn held_versions_are_bounded() {
    let mut registry = registry(3);
    registry.set_oldest_in_use(1);
    for number in 1..=10 {
        registry.offer(signed(number, &[1])).unwrap();
        assert!(registry.newer_than(0).count() <= 3);
    }
    assert_eq!(registry.dropped_in_use(), 7);
    assert_eq!(registry.newest_number(), 10);
}

#[test]
fn files() {
    let version = signed(1, &[1]);
    let again =
        SignedVersion::from_files(version.document.clone(), &(version.signature_hex() + "\n"));
    assert_eq!(again, Ok(version));
    for bad in ["", "00", &"g".repeat(128), &"0".repeat(127)] {
        let error = SignedVersion::from_files(String::new(), bad);
        assert_eq!(error, Err(RegistryError::SignatureForm));
    }
    assert_eq!(document_file_name(17), "000000000017.toml");
    assert_eq!(signature_file_name(17), "000000000017.sig");
    assert_eq!(
        number_of_document_file(&document_file_name(NUMBER_MAX)),
        Some(NUMBER_MAX)
    );
    for bad in ["17.toml", "000000000017.sig", "+00000000017.toml", ".toml"] {
        assert_eq!(number_of_document_file(bad), None);
    }
}

proptest! {
    #[test]
    fn any_text_is_a_version_or_an_error(
        text in proptest::collection::vec(
            proptest::sample::select(&[
                "number = 1\n", "[[nodes]]\n", "id = \"a\"\n", "addresses = [1]\n", "nodes = 3\n",
                "[settings]\n", "settings = 1\n", "=", "[[", "\"", "firewall = [1]\n", "é",
            ][..]),
            0..8,
        ),
    ) {
        if let Ok(version) = RegistryVersion::parse(&text.concat()) {
            prop_assert!(version.number == 1 && version.nodes.is_empty());
        }
    }
}

/// Protects a node that has lost its newest version but not the number: it does not go back.
#[test]
fn no_version_below_the_number_that_was_set_is_taken() {
    let mut registry = registry(8);
    registry.set_number_min(3);
    registry.set_number_min(2);
    let older = RegistryError::Older {
        number: 2,
        newest: 3,
    };
    assert_eq!(registry.offer(signed(2, &[1])), Err(older));
    assert_eq!(registry.newest_number(), 0);
    let newest = |number| Ok(Offered::Newest { number, missing: 0 });
    assert_eq!(registry.offer(signed(3, &[1])), newest(3));
    assert_eq!(registry.offer(signed(4, &[1])), newest(4));
    assert_eq!(registry.number_min(), 4);
}

/// A record with these TLS keys, by their seeds.
fn rotated(seed: u8, keys: &[u8]) -> NodeRecord {
    let keys: Vec<_> = keys
        .iter()
        .map(|seed| PublicKey::from_bytes([*seed; 32]))
        .collect();
    NodeRecord {
        tls_keys: TlsKeys::of(&keys).unwrap(),
        ..node(seed, 1000 + u16::from(seed))
    }
}

// Protects documents of nodes that never rotated, which older programs read too: their form is the
// same as before. And the order of the keys, which says which one is newer.
#[test]
fn tls_keys_stand_in_the_document_where_they_are_not_the_identity_key() {
    let with = |node: NodeRecord| RegistryVersion {
        nodes: vec![node],
        ..version(7, &[])
    };
    let plain = with(node(1, 1001)).to_document();
    assert!(!plain.contains("tls_keys"), "{plain}");
    for keys in [&[60][..], &[60, 61], &[61, 60]] {
        let want = with(rotated(1, keys));
        let document = want.to_document();
        assert!(document.contains("tls_keys"), "{document}");
        assert_eq!(RegistryVersion::parse(&document), Ok(want));
    }
}

// Protects a node from a record that no rotation makes: it is skipped, as other bad ones are.
#[test]
fn a_record_has_one_or_two_tls_keys_that_differ() {
    let key = |seed: u8| format!("\"{}\"", PublicKey::from_bytes([seed; 32]));
    let two = format!("[{}, {}]", key(60), key(61));
    let document = RegistryVersion {
        nodes: vec![rotated(1, &[60])],
        ..version(7, &[])
    };
    let document = document.to_document();
    let start = document.find("tls_keys = ").unwrap() + "tls_keys = ".len();
    let end = start + document[start..].find(']').unwrap() + 1;
    let table = [
        (two.clone(), true),
        ("[]".into(), false),
        (format!("[{}, {}, {}]", key(60), key(61), key(62)), false),
        (format!("[{0}, {0}]", key(60)), false),
        ("[\"00\"]".into(), false),
        ("[3]".into(), false),
        (key(60), false),
    ];
    for (written, is_read) in table {
        let text = format!("{}{written}{}", &document[..start], &document[end..]);
        let read = RegistryVersion::parse(&text).unwrap();
        let skipped: Vec<_> = read.skipped.iter().map(|one| one.reason).collect();
        let (nodes, reasons) = if is_read {
            (1, vec![])
        } else {
            (0, vec!["record_tls_keys"])
        };
        assert_eq!((read.nodes.len(), skipped), (nodes, reasons), "{written}");
    }
}

// Protects every node's name: a key that two nodes share would prove either. Such a version is
// refused whole, with both names.
#[test]
fn no_two_nodes_share_a_key() {
    let identity = |seed: u8| *node(seed, 5).public_key.as_bytes();
    let mut of_another = rotated(2, &[60]);
    of_another.tls_keys = TlsKeys::one(PublicKey::from_bytes(identity(1)));
    let mut retired_of_another = rotated(1, &[60]);
    retired_of_another.tls_keys = TlsKeys::one(PublicKey::from_bytes([70; 32]));
    let mut own = rotated(1, &[60]);
    own.tls_keys = TlsKeys::of(&[own.public_key, PublicKey::from_bytes([60; 32])]).unwrap();
    let table = [
        (
            "the newest",
            vec![rotated(1, &[60]), rotated(2, &[60])],
            false,
        ),
        (
            "an older",
            vec![rotated(1, &[60, 61]), rotated(2, &[62, 60])],
            false,
        ),
        ("an identity", vec![node(1, 5), of_another.clone()], false),
        (
            "an identity not in use",
            vec![retired_of_another, of_another],
            false,
        ),
        ("its own", vec![own, rotated(2, &[61])], true),
        (
            "none",
            vec![rotated(1, &[60, 61]), rotated(2, &[62, 63])],
            true,
        ),
    ];
    for (what, nodes, is_read) in table {
        let want = RegistryVersion {
            nodes,
            ..version(7, &[])
        };
        let offered = registry(9).offer(SignedVersion::sign(want.to_document(), &key()));
        if is_read {
            assert!(offered.is_ok(), "{what}: {offered:?}");
            continue;
        }
        let error = offered.unwrap_err();
        assert_eq!(error.reason(), "registry_shared_key", "{what}");
        for name in want.nodes.iter().map(|node| node.id.to_string()) {
            assert!(error.to_string().contains(&name), "{what}: {error}");
        }
    }
}
