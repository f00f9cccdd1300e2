//! Compiled rules against the same rules in nftables: for each packet, the same rule decides.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::{Command, Stdio};

use common::{Namespace, ok, privileged, until};
use ipnet::IpNet;
use millrace_edge_policy::packet::Protocol;
use millrace_edge_policy::rules::{
    Bounds, Compiled, Direction, Provenance, Rule, RuleAction, Sources, compile,
};
use millrace_edge_policy::settings::{DefaultAction, Kind, Service, Settings};
use millrace_edge_policy::trie::RULE_DEFAULT;
use millrace_testkit::sockets::raw_socket;
use proptest::prelude::RngExt as _;
use proptest::test_runner::{RngAlgorithm, TestRng};
use rustix::net::{AddressFamily, SendFlags, ipproto, sendto};

const LISTS: usize = 1_000;
/// Lists that one transaction puts into nftables.
const LISTS_AT_ONCE: usize = 50;
const PROBES_OF_A_LIST: usize = 10;
const RULES_MAX: usize = 12;
const SEED: &[u8; 16] = b"millrace and nft";

/// Declared ports; each list of rules covers all of them.
const SERVICES: [(u16, Kind); 5] = [
    (4_100, Kind::Quic),
    (9_000, Kind::Udp),
    (4_100, Kind::Tcp),
    (8_080, Kind::Tcp),
    (8_081, Kind::Tcp),
];
const HERE4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const HERE6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);

/// A packet that is sent, and to which list.
struct Probe {
    /// Port of the sender: tells it from all others of its transaction.
    number: u16,
    source: IpAddr,
    protocol: Protocol,
    port: u16,
}

// Protects readers of a list of rules: the tries mean what the list says.
#[test]
fn compiled_rules_decide_as_nftables_does() {
    if !privileged("compiled_rules_decide_as_nftables_does") {
        return;
    }
    if Command::new("nft").arg("--version").output().is_err() {
        common::skip::skip("compiled_rules_decide_as_nftables_does", "nft");
        return;
    }
    let namespace = Namespace::new("rules");
    namespace.ip(&format!("addr add {HERE4}/32 dev lo"));
    namespace.ip(&format!("addr add {HERE6}/128 dev lo nodad"));
    let mut rng = TestRng::from_seed(RngAlgorithm::XorShift, SEED);
    let (mut compared, mut by_rule) = (0, 0);
    for _ in 0..LISTS / LISTS_AT_ONCE {
        let lists: Vec<Vec<Rule>> = (0..LISTS_AT_ONCE).map(|_| list(&mut rng)).collect();
        let probes: Vec<Probe> = (0..LISTS_AT_ONCE * PROBES_OF_A_LIST)
            .map(|number| probe(&mut rng, number as u16, &lists[number / PROBES_OF_A_LIST]))
            .collect();
        let found = namespace.enter(|| ask_nftables(&lists, &probes));
        let sets: Vec<Compiled> = lists.iter().map(|list| compiled(list)).collect();
        for probe in &probes {
            let list = usize::from(probe.number) / PROBES_OF_A_LIST;
            let expected = found[&probe.number];
            let decided = rule_of(&sets[list], probe);
            assert_eq!(
                decided,
                expected,
                "from {} to {} port {}, nftables on the right; rules:\n{}",
                probe.source,
                probe.protocol,
                probe.port,
                text(&lists[list]),
            );
            compared += 1;
            by_rule += usize::from(expected != RULE_DEFAULT);
        }
    }
    assert_eq!(compared, LISTS * PROBES_OF_A_LIST);
    let share = by_rule * 100 / compared;
    assert!(
        (25..=90).contains(&share),
        "a rule decided {share} % of {compared} packets"
    );
}

fn compiled(rules: &[Rule]) -> Compiled {
    let service = |(port, kind)| Service {
        port,
        kind,
        default_action: DefaultAction::Deny,
    };
    let settings = Settings {
        services: SERVICES.map(service).into(),
        ..Settings::default()
    };
    let bounds = Bounds {
        rules_max: RULES_MAX,
        nodes4_max: 1_000,
        nodes6_max: 4_000,
    };
    compile(&settings, rules, bounds).unwrap()
}

/// Number of the rule that decides on a packet.
fn rule_of(set: &Compiled, probe: &Probe) -> u16 {
    let service = set.settings.service(probe.protocol, probe.port).unwrap();
    let roots = set.services[service];
    let leaf = match probe.source {
        IpAddr::V4(source) => set.trie4.lookup(roots.root4, &source.octets()),
        IpAddr::V6(source) => set.trie6.lookup(roots.root6, &source.octets()),
    };
    leaf.unwrap().rule
}

fn one_of<T: Clone>(rng: &mut TestRng, of: &[T]) -> T {
    of[rng.random_range(0..of.len())].clone()
}

fn list(rng: &mut TestRng) -> Vec<Rule> {
    let rules = rng.random_range(0..=RULES_MAX);
    (0..rules).map(|_| rule(rng)).collect()
}

fn rule(rng: &mut TestRng) -> Rule {
    let prefixes = rng.random_range(0..5);
    Rule {
        sources: match rng.random_range(0..10) {
            0 => Sources::Any,
            _ => Sources::Prefixes((0..prefixes).map(|_| prefix(rng)).collect()),
        },
        ports: rng.random_ratio(1, 3).then(|| {
            let ranges = rng.random_range(1..3);
            (0..ranges).map(|_| ports(rng)).collect()
        }),
        protocol: one_of(rng, &[None, None, Some(Protocol::Udp), Some(Protocol::Tcp)]),
        action: one_of(
            rng,
            &[RuleAction::Allow, RuleAction::Deny, RuleAction::Reject],
        ),
        direction: Direction::Inbound,
        user: None,
        comment: None,
        provenance: Provenance::Members,
    }
}

fn ports(rng: &mut TestRng) -> std::ops::RangeInclusive<u16> {
    let (port, _) = one_of(rng, &SERVICES);
    let below = one_of(rng, &[0, 0, 1, 100, port]);
    let above = one_of(rng, &[0, 0, 1, 100, u16::MAX - port]);
    port - below..=port + above
}

/// Nested, equal, neighbours: of all lengths, around few addresses.
fn prefix(rng: &mut TestRng) -> IpNet {
    let address = address(rng);
    let bits = match address {
        IpAddr::V4(_) => rng.random_range(0..=32),
        IpAddr::V6(_) => rng.random_range(0..=128),
    };
    IpNet::new(address, bits).unwrap().trunc()
}

/// Addresses that differ in few bits, anywhere.
fn address(rng: &mut TestRng) -> IpAddr {
    if rng.random_ratio(1, 2) {
        let flipped = 1_u32 << rng.random_range(0..31);
        let base = u32::from(Ipv4Addr::new(10, 170, 85, 165));
        return Ipv4Addr::from(base ^ one_of(rng, &[0, flipped])).into();
    }
    let flipped = 1_u128 << rng.random_range(0..120);
    let base = u128::from(Ipv6Addr::new(
        0x2001, 0xdb8, 0xaa55, 1, 0, 0xffff, 0x1234, 0x8001,
    ));
    Ipv6Addr::from(base ^ one_of(rng, &[0, flipped])).into()
}

/// A packet to one of the services; half of the time from the edge of a prefix.
fn probe(rng: &mut TestRng, number: u16, rules: &[Rule]) -> Probe {
    let (port, kind) = one_of(rng, &SERVICES);
    let prefixes: Vec<IpNet> = rules
        .iter()
        .filter_map(|rule| match &rule.sources {
            Sources::Any => None,
            Sources::Prefixes(prefixes) => Some(prefixes.clone()),
        })
        .flatten()
        .collect();
    let edge = !prefixes.is_empty() && rng.random_ratio(1, 2);
    let source = if edge {
        let prefix = one_of(rng, &prefixes);
        one_of(rng, &[prefix.network(), prefix.broadcast()])
    } else {
        address(rng)
    };
    Probe {
        number,
        source: if arrives(source) {
            source
        } else {
            address(rng)
        },
        protocol: kind.protocol(),
        port,
    }
}

/// Whether the host lets a packet from there come as far as nftables.
fn arrives(source: IpAddr) -> bool {
    let mapped = matches!(source, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    !source.is_multicast() && !source.is_unspecified() && !mapped
}

/// The rule of its list that each packet ends at.
fn ask_nftables(lists: &[Vec<Rule>], probes: &[Probe]) -> BTreeMap<u16, u16> {
    let mut script = String::from("table inet probe\ndelete table inet probe\n");
    writeln!(script, "table inet probe {{").unwrap();
    writeln!(
        script,
        "set seen {{ type inet_service . mark; size 65535; flags dynamic; }}"
    )
    .unwrap();
    for (number, list) in lists.iter().enumerate() {
        writeln!(script, "chain list{number} {{\n{}}}", text(list)).unwrap();
    }
    writeln!(
        script,
        "chain come {{ type filter hook prerouting priority raw;"
    )
    .unwrap();
    writeln!(script, "meta l4proto != {{ tcp, udp }} accept").unwrap();
    writeln!(script, "meta mark set {RULE_DEFAULT}").unwrap();
    let jumps = (0..lists.len()).map(|number| {
        let first = number * PROBES_OF_A_LIST;
        format!(
            "{first}-{} : jump list{number}",
            first + PROBES_OF_A_LIST - 1
        )
    });
    let jumps: Vec<String> = jumps.collect();
    writeln!(script, "th sport vmap {{ {} }}", jumps.join(", ")).unwrap();
    writeln!(script, "add @seen {{ th sport . meta mark }} drop\n}}\n}}").unwrap();
    run_script(&script);
    for probe in probes {
        send(probe);
    }
    let mut found = BTreeMap::new();
    until("every packet comes", || {
        found = seen();
        found.len() == probes.len()
    });
    found
}

/// The list for nftables. A packet that matches gets the number of the rule as its mark, and leaves
/// the list.
fn text(rules: &[Rule]) -> String {
    let mut text = String::new();
    for (number, rule) in rules.iter().enumerate() {
        let sources = match &rule.sources {
            Sources::Any => vec![String::new()],
            Sources::Prefixes(prefixes) => prefixes.iter().map(of_source).collect(),
        };
        let protocol = rule
            .protocol
            .map_or(String::new(), |of| format!("meta l4proto {of}"));
        let ports = match &rule.ports {
            None => vec![String::new()],
            Some(ranges) => ranges
                .iter()
                .map(|range| format!("th dport {}-{}", range.start(), range.end()))
                .collect(),
        };
        for source in &sources {
            for ports in &ports {
                writeln!(
                    text,
                    "{source} {protocol} {ports} meta mark set {number} return"
                )
                .unwrap();
            }
        }
    }
    text
}

fn of_source(prefix: &IpNet) -> String {
    match prefix {
        IpNet::V4(prefix) if prefix.prefix_len() == 0 => "meta nfproto ipv4".into(),
        IpNet::V6(prefix) if prefix.prefix_len() == 0 => "meta nfproto ipv6".into(),
        IpNet::V4(prefix) => format!("ip saddr {prefix}"),
        IpNet::V6(prefix) => format!("ip6 saddr {prefix}"),
    }
}

fn run_script(script: &str) {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(script.as_bytes()).unwrap();
    drop(stdin);
    assert!(child.wait().unwrap().success(), "{script}");
}

/// What nftables recorded of the packets: sender's port, rule.
fn seen() -> BTreeMap<u16, u16> {
    let json = ok(Command::new("nft").args(["-j", "list", "set", "inet", "probe", "seen"]));
    let listed: serde_json::Value = serde_json::from_str(&json).unwrap();
    let objects = listed["nftables"].as_array().unwrap();
    let set = objects.iter().find_map(|object| object.get("set")).unwrap();
    let Some(elements) = set.get("elem").and_then(|elements| elements.as_array()) else {
        return BTreeMap::new();
    };
    elements
        .iter()
        .map(|element| {
            let element = element
                .get("elem")
                .map_or(element, |element| &element["val"]);
            let part = |index: usize| element["concat"][index].as_u64().unwrap() as u16;
            (part(0), part(1))
        })
        .collect()
}

/// Sends a packet from an address that is not ours.
fn send(probe: &Probe) {
    let (family, to) = match probe.source {
        IpAddr::V4(_) => (AddressFamily::INET, SocketAddr::from((HERE4, 0))),
        IpAddr::V6(_) => (AddressFamily::INET6, SocketAddr::from((HERE6, 0))),
    };
    let socket = raw_socket(family, ipproto::RAW);
    let packet = packet(probe);
    let sent = sendto(&socket, &packet, SendFlags::empty(), &to).unwrap();
    assert_eq!(sent, packet.len());
}

fn packet(probe: &Probe) -> Vec<u8> {
    let builder = match probe.source {
        IpAddr::V4(source) => etherparse::PacketBuilder::ipv4(source.octets(), HERE4.octets(), 64),
        IpAddr::V6(source) => etherparse::PacketBuilder::ipv6(source.octets(), HERE6.octets(), 64),
    };
    let mut packet = Vec::new();
    match probe.protocol {
        Protocol::Udp => builder
            .udp(probe.number, probe.port)
            .write_to_vec(&mut packet, &[]),
        Protocol::Tcp => builder
            .tcp(probe.number, probe.port, 1, 1)
            .syn()
            .write_to_vec(&mut packet, &[]),
    }
    .unwrap();
    packet
}
