//! Order and bounds; compiling equals a scan of the ordered rules.

#![allow(clippy::unwrap_used, reason = "test code")]

use super::{
    Bounds, Compiled, Direction, Locality, Provenance, Rule, RuleAction, RuleSet, RulesError,
    Sources, Temporary, compile, in_order,
};
use crate::packet::Protocol;
use crate::settings::{DefaultAction, Kind, Service, Settings, SettingsError};
use crate::trie::{Leaf, NodeKind, RULE_DEFAULT, TrieSet};
use ipnet::IpNet;
use proptest::collection::vec;
use proptest::prelude::*;
use std::net::IpAddr;

const BOUNDS: Bounds = Bounds {
    rules_max: 4_096,
    nodes4_max: 4_096,
    nodes6_max: 4_096,
};

fn settings() -> Settings {
    let service = |port, kind, default_action| Service {
        port,
        kind,
        default_action,
    };
    Settings {
        services: vec![
            service(4_100, Kind::Quic, DefaultAction::Deny),
            service(8_080, Kind::Tcp, DefaultAction::Deny),
            service(8_081, Kind::Tcp, DefaultAction::Deny),
            service(9_000, Kind::Udp, DefaultAction::Allow),
        ],
        ..Settings::default()
    }
}

fn tables(document: &str) -> Vec<toml::Table> {
    let document: toml::Table = document.parse().unwrap();
    let rules = document["firewall"].as_array().unwrap().clone();
    rules
        .into_iter()
        .map(|rule| rule.try_into().unwrap())
        .collect()
}

fn rule(prefix: &str, action: RuleAction) -> Rule {
    let temporary = Temporary {
        prefix: prefix.parse().unwrap(),
        action,
        until_unix_seconds: u64::MAX,
    };
    Rule {
        provenance: Provenance::Registry {
            version: 1,
            number: 1,
        },
        ..Rule::temporary(&temporary)
    }
}

fn decides(compiled: &Compiled, service: usize, address: &str) -> Leaf {
    look_up(compiled, service, address.parse().unwrap())
}

fn look_up(compiled: &Compiled, service: usize, address: IpAddr) -> Leaf {
    let roots = compiled.services[service];
    let leaf = match address {
        IpAddr::V4(v4) => compiled.trie4.lookup(roots.root4, &v4.octets()),
        IpAddr::V6(v6) => compiled.trie6.lookup(roots.root6, &v6.octets()),
    };
    leaf.unwrap()
}

#[test]
fn every_field_is_read() {
    let document = r#"
        [[firewall]]
        scope = "role:gateway"
        prefixes = ["192.0.2.0/24", "2001:db8::/32"]
        ports = [8080, "9000-9100"]
        protocol = "tcp"
        action = "reject"
        direction = "inbound"
        comment = "the gateway"

        [[firewall]]
        scope = "global"
        action = "deny"
        direction = "outbound"
        user = "adapter"
    "#;
    let set = RuleSet::read(7, &tables(document)).unwrap();
    assert_eq!(set.version(), 7);
    let node = Locality {
        roles: vec!["gateway".into()],
        ..Locality::default()
    };
    let [inbound, outbound] = set.for_node(&node).try_into().unwrap();
    assert_eq!(
        inbound,
        Rule {
            sources: Sources::Prefixes(vec![
                "192.0.2.0/24".parse().unwrap(),
                "2001:db8::/32".parse().unwrap()
            ]),
            ports: Some(vec![8_080..=8_080, 9_000..=9_100]),
            protocol: Some(Protocol::Tcp),
            action: RuleAction::Reject,
            direction: Direction::Inbound,
            user: None,
            comment: Some("the gateway".into()),
            provenance: Provenance::Registry {
                version: 7,
                number: 1
            },
        }
    );
    assert_eq!(
        inbound.to_string(),
        "reject tcp from 192.0.2.0/24, 2001:db8::/32 port 8080, 9000-9100"
    );
    assert_eq!(outbound.sources, Sources::Any);
    assert_eq!(outbound.to_string(), "deny to any by user adapter");
    assert_eq!(
        outbound.provenance.to_string(),
        "registry version 7, rule 2"
    );

    let compiled = compile(&settings(), &[inbound, outbound.clone()], BOUNDS).unwrap();
    assert_eq!(compiled.outbound, [outbound]);
    assert_eq!(compiled.rules.len(), 1);
    assert_eq!(compiled.rules[0].services, [1]);
}

// Protects the order: the scope that is nearest to the node decides, and inside a scope the
// document.
#[test]
fn rules_are_tried_in_order() {
    let document = r#"
        [[firewall]]
        scope = "global"
        action = "deny"
        comment = "global"
        [[firewall]]
        scope = "role:storage"
        action = "deny"
        comment = "other role"
        [[firewall]]
        scope = "role:gateway"
        action = "deny"
        comment = "role 1"
        [[firewall]]
        scope = "node:abc"
        action = "allow"
        comment = "node"
        [[firewall]]
        scope = "role:edge"
        action = "deny"
        comment = "role 2"
        [[firewall]]
        scope = "subnet:def"
        action = "deny"
        comment = "subnet"
        [[firewall]]
        scope = "node:def"
        action = "deny"
        comment = "other node"
    "#;
    let set = RuleSet::read(3, &tables(document)).unwrap();
    let node = Locality {
        node: "abc".into(),
        subnet: Some("def".into()),
        roles: vec!["edge".into(), "gateway".into()],
    };
    let temporary = |prefix: &str, action, until_unix_seconds| Temporary {
        prefix: prefix.parse().unwrap(),
        action,
        until_unix_seconds,
    };
    let live = [
        temporary("10.0.0.0/8", RuleAction::Deny, 101),
        temporary("192.0.2.0/24", RuleAction::Allow, 100),
        temporary("10.0.0.0/9", RuleAction::Allow, 200),
    ];
    let members: [IpAddr; 2] = [
        "::ffff:192.0.2.9".parse().unwrap(),
        "2001:db8::9".parse().unwrap(),
    ];
    let rules = in_order(&live, members, &set, &node, 100);
    let texts: Vec<_> = rules
        .iter()
        .map(|rule| rule.comment.clone().unwrap_or_else(|| rule.to_string()))
        .collect();
    assert_eq!(
        texts,
        [
            "allow from 10.0.0.0/9",
            "deny from 10.0.0.0/8",
            "allow from 192.0.2.9/32, 2001:db8::9/128",
            "node",
            "subnet",
            "role 1",
            "role 2",
            "global",
        ]
    );
    let compiled = compile(&settings(), &rules, BOUNDS).unwrap();
    assert_eq!(decides(&compiled, 0, "10.1.2.3").rule, 0);
    assert_eq!(decides(&compiled, 0, "10.200.2.3").rule, 1);
    assert_eq!(decides(&compiled, 0, "192.0.2.9").rule, 2);
    assert_eq!(decides(&compiled, 0, "2001:db8::9").rule, 2);
    assert_eq!(decides(&compiled, 0, "192.0.2.8").rule, 3);
}

// Protects a new subnet: an empty list of members matches no source, not every one.
#[test]
fn no_members_are_nobody() {
    let rules = in_order(&[], [], &RuleSet::default(), &Locality::default(), 0);
    let compiled = compile(&settings(), &rules, BOUNDS).unwrap();
    assert_eq!(compiled.rules[0].rule.to_string(), "allow from no address");
    for address in ["192.0.2.1", "2001:db8::1"] {
        assert_eq!(decides(&compiled, 0, address).action, RuleAction::Deny);
        assert_eq!(decides(&compiled, 0, address).rule, RULE_DEFAULT);
        assert_eq!(decides(&compiled, 3, address).action, RuleAction::Allow);
    }
}

#[test]
fn services_with_the_same_rules_share_a_trie() {
    let quic = Rule {
        protocol: Some(Protocol::Udp),
        ..rule("10.0.0.0/8", RuleAction::Allow)
    };
    let web = Rule {
        ports: Some(vec![8_000..=8_100]),
        ..rule("192.0.2.0/24", RuleAction::Allow)
    };
    let rules = [quic, web, rule("::/0", RuleAction::Deny)];
    let compiled = compile(&settings(), &rules, BOUNDS).unwrap();
    let [quic, web, admin, plain] = compiled.services[..] else {
        panic!("four services");
    };
    assert_eq!(web, admin);
    assert_ne!(quic, web);
    assert_ne!(quic, plain, "same rules, other default");
    assert_ne!(compiled.host, web);
    let services: Vec<_> = compiled
        .rules
        .iter()
        .map(|rule| &rule.services[..])
        .collect();
    assert_eq!(services, [&[0, 3][..], &[1, 2], &[0, 1, 2, 3]]);
    assert_eq!(decides(&compiled, 1, "192.0.2.5").rule, 1);
    assert_eq!(decides(&compiled, 0, "192.0.2.5").rule, RULE_DEFAULT);
    assert_eq!(decides(&compiled, 3, "2001:db8::1").rule, 2);
    let host = compiled
        .trie6
        .lookup(compiled.host.root6, &[0; 16])
        .unwrap();
    assert_eq!(host.rule, 2);
}

/// Dense nodes, and sparse ones.
fn sizes(tries: &TrieSet) -> (usize, usize) {
    (tries.nodes().len(), tries.sparse().len())
}

// Protects the maps in the kernel: a set that does not fit is refused as a whole, with both
// numbers.
#[test]
fn sets_over_their_bounds_are_refused() {
    let three = [
        rule("10.1.0.0/16", RuleAction::Allow),
        rule("10.2.3.0/24", RuleAction::Allow),
        rule("2001:db8::/32", RuleAction::Allow),
    ];
    let two_rules = Bounds {
        rules_max: 2,
        ..BOUNDS
    };
    assert_eq!(
        compile(&settings(), &three, two_rules).unwrap_err(),
        RulesError::TooManyRules {
            rules: 3,
            rules_max: 2
        }
    );
    // Two columns (default deny, default allow) of three nodes each: root, 10, 10.2. Only roots
    // must be dense.
    let exact = Bounds {
        nodes4_max: 2,
        ..BOUNDS
    };
    let compiled = compile(&settings(), &three, exact).unwrap();
    assert_eq!(sizes(&compiled.trie4), (2, 4));
    assert_eq!(sizes(&compiled.trie6), (2, 2 * 3));
    // All nodes of one column are dense while it is compiled: the root, five shared bytes, ten of
    // each prefix.
    let deep: Vec<_> = (0..4)
        .map(|n| rule(&format!("2001:db8:{n}::1/128"), RuleAction::Allow))
        .collect();
    let seven = Bounds {
        nodes6_max: 7,
        ..BOUNDS
    };
    let error = compile(&settings(), &deep, seven).unwrap_err();
    let needed = 1 + 5 + 4 * 10;
    assert_eq!(
        error.to_string(),
        format!(
            "the IPv6 prefixes take about {needed} trie nodes at a time (1 KiB each) to compile, 35 are allowed; name fewer or shorter prefixes, or raise trie_nodes_max"
        )
    );
    // Two columns again: the roots are dense, and so is the node that holds 20 prefixes apart.
    let crowd: Vec<_> = (0..20)
        .map(|n| rule(&format!("2001:{:x}::/32", n * 2), RuleAction::Allow))
        .collect();
    let roots_only = Bounds {
        nodes6_max: 3,
        ..BOUNDS
    };
    assert_eq!(
        compile(&settings(), &crowd, roots_only).unwrap_err(),
        RulesError::TooManyNodes {
            family: 6,
            kind: NodeKind::Dense,
            nodes: 4,
            nodes_max: 3
        }
    );
    let many = vec![rule("10.0.0.0/8", RuleAction::Deny); 65_535];
    let unbounded = Bounds {
        rules_max: usize::MAX,
        ..BOUNDS
    };
    assert_eq!(
        compile(&settings(), &many, unbounded).unwrap_err(),
        RulesError::TooManyRules {
            rules: 65_535,
            rules_max: 65_534
        }
    );
    assert!(compile(&settings(), &many[1..], unbounded).is_ok());
    let mut no_port = settings();
    no_port.services[0].port = 0;
    assert_eq!(
        compile(&no_port, &[], BOUNDS).unwrap_err(),
        RulesError::Settings(SettingsError::PortZero)
    );
}

#[test]
fn neighbours_of_one_rule_are_one_prefix() {
    let nets = (0..=255)
        .map(|low| format!("10.0.0.{low}/32").parse().unwrap())
        .collect();
    let hosts = Rule {
        sources: Sources::Prefixes(nets),
        ..rule("10.0.0.0/8", RuleAction::Allow)
    };
    let text = hosts.to_string();
    assert_eq!(
        text,
        "allow from 10.0.0.0/32, 10.0.0.1/32, 10.0.0.2/32 and 253 more"
    );
    let compiled = compile(&settings(), &[hosts], BOUNDS).unwrap();
    // A column with each default: root, 10, 10.0.
    assert_eq!(sizes(&compiled.trie4), (2, 4));
    assert_eq!(decides(&compiled, 0, "10.0.0.255").rule, 0);
    assert_eq!(decides(&compiled, 0, "10.0.1.0").rule, RULE_DEFAULT);
}

/// Addresses of few values, so that prefixes nest, repeat and hold the addresses that are looked
/// up.
fn address() -> impl Strategy<Value = IpAddr> {
    let byte = || prop_oneof![4 => 0..3_u8, 1 => any::<u8>()];
    prop_oneof![
        proptest::array::uniform4(byte()).prop_map(IpAddr::from),
        proptest::array::uniform16(byte()).prop_map(IpAddr::from),
    ]
}

fn prefix() -> impl Strategy<Value = IpNet> {
    (address(), 0..=128_u8).prop_map(|(address, bits)| {
        let bits = if address.is_ipv4() { bits % 33 } else { bits };
        IpNet::new(address, bits).unwrap().trunc()
    })
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let action = prop_oneof![
        Just(RuleAction::Allow),
        Just(RuleAction::Deny),
        Just(RuleAction::Reject)
    ];
    let ports = prop_oneof![
        2 => Just(None),
        1 => Just(Some(vec![4_100..=4_100])),
        1 => Just(Some(vec![1..=10, 8_080..=8_080])),
    ];
    let protocol = prop_oneof![2 => Just(None), 1 => Just(Some(Protocol::Tcp))];
    let sources = prop_oneof![
        1 => Just(Sources::Any),
        9 => vec(prefix(), 0..5).prop_map(Sources::Prefixes),
    ];
    (sources, ports, protocol, action).prop_map(|(sources, ports, protocol, action)| Rule {
        sources,
        ports,
        protocol,
        ..rule("10.0.0.0/8", action)
    })
}

/// The decision of the rules without a trie.
fn scan(settings: &Settings, rules: &[Rule], service: usize, address: IpAddr) -> Leaf {
    let Service {
        port,
        kind,
        default_action,
    } = settings.services[service];
    let fits = |rule: &Rule| {
        let from = match &rule.sources {
            Sources::Any => true,
            Sources::Prefixes(prefixes) => prefixes.iter().any(|net| net.contains(&address)),
        };
        from && rule.covers(kind.protocol(), port)
    };
    match rules.iter().position(fits) {
        Some(index) => Leaf {
            action: rules[index].action,
            rule: index as u16,
        },
        None if default_action == DefaultAction::Allow => Leaf {
            action: RuleAction::Allow,
            rule: RULE_DEFAULT,
        },
        None => Leaf {
            action: RuleAction::Deny,
            rule: RULE_DEFAULT,
        },
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    // Protects the firewall: 120,000 (rules, service, address) cases, and the first and last
    // address of each prefix.
    #[test]
    fn compiled_rules_equal_a_scan(
        rules in vec(any_rule(), 0..14),
        addresses in vec(address(), 20..=20),
    ) {
        let settings = settings();
        let compiled = compile(&settings, &rules, BOUNDS).unwrap();
        let borders = rules.iter().flat_map(|rule| match &rule.sources {
            Sources::Any => vec![],
            Sources::Prefixes(nets) => nets.iter().flat_map(|net| [net.network(), net.broadcast()]).collect(),
        });
        for address in addresses.iter().copied().chain(borders) {
            for service in 0..settings.services.len() {
                let expected = scan(&settings, &rules, service, address);
                prop_assert_eq!(look_up(&compiled, service, address), expected, "{}", address);
            }
        }
    }
}
