//! Changes of the state around the packets: sets of rules, limits, stress, clocks, keys, counts.

use ipnet::IpNet;
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::model::{Count, Flow, REPLY_TCP_NS, REPLY_UDP_NS};
use millrace_edge_policy::packet::Protocol;
use millrace_edge_policy::rules::{
    Compiled, Direction, Provenance, Rule, RuleAction, Sources, compile,
};
use millrace_edge_policy::settings::{
    Caps, DefaultAction, Kind, Limits, Mode, Scope, Service, Settings,
};
use millrace_edge_policy::source::Source;
use millrace_edge_policy::trie::RUNS;
use std::net::IpAddr;
use std::time::Duration;

use crate::generator::{Generator, NODES, PORTS};
use crate::lockstep::{BOUNDS, Lockstep};

const SECOND: u64 = 1_000_000_000;

/// A set of a few rules over a few services.
pub(crate) fn set(generator: &mut Generator) -> Compiled {
    let settings = settings(generator);
    let rules: Vec<Rule> = (0..generator.below(8)).map(|_| rule(generator)).collect();
    let mut set = compile(&settings, &rules, BOUNDS).unwrap();
    if generator.once_in(40) {
        // A set that no compiler makes: a service without a trie.
        if let Some(roots) = set.services.first_mut() {
            roots.root4 = 1 << 20;
        }
    }
    set
}

fn settings(generator: &mut Generator) -> Settings {
    let kinds = [Kind::Quic, Kind::Quic, Kind::Tcp, Kind::Tcp, Kind::Udp];
    let mut services: Vec<Service> = PORTS
        .into_iter()
        .zip(kinds)
        .map(|(port, kind)| service(generator, port, kind))
        .collect();
    services.push(service(generator, PORTS[0], Kind::Tcp));
    let absent = generator.below(12) as usize;
    if absent < services.len() {
        services.remove(absent);
    }
    Settings {
        mode: match generator.below(4) {
            0 => Mode::Count,
            _ => Mode::Enforce,
        },
        scope: generator.one_of(&[Scope::Ports, Scope::Ports, Scope::Host]),
        services,
        host_default: default_action(generator),
        limits: Limits {
            unvalidated: limit(generator),
            syn: limit(generator),
            version: limit(generator),
            dial_request: limit(generator),
            reject: limit(generator),
            source_quic: limit(generator),
            source_tcp: limit(generator),
            peer: limit(generator),
            proof: limit(generator),
            id: limit(generator),
        },
        caps: Caps {
            quic: generator.below(4) as u32,
            tcp: generator.below(4) as u32,
        },
    }
}

fn service(generator: &mut Generator, port: u16, kind: Kind) -> Service {
    Service {
        port,
        kind,
        default_action: default_action(generator),
    }
}

fn default_action(generator: &mut Generator) -> DefaultAction {
    generator.one_of(&[
        DefaultAction::Allow,
        DefaultAction::Allow,
        DefaultAction::Deny,
    ])
}

/// From one an hour to a million a second.
fn limit(generator: &mut Generator) -> Limit {
    let burst = generator.one_of(&[1, 2, 3, 10, 100]);
    match generator.below(6) {
        0 => Limit::NONE,
        1 => Limit::per(1, Duration::from_secs(3_600), burst.min(8)),
        2 => Limit::per(1, Duration::from_secs(1), burst),
        3 => Limit::per(1_000_000, Duration::from_secs(1), burst * 100),
        _ => Limit::per(1_000, Duration::from_secs(1), burst),
    }
}

/// A rule over the prefixes of the generator's sources, or over some that hold few of them.
pub(crate) fn rule(generator: &mut Generator) -> Rule {
    let prefixes = if generator.once_in(4) {
        crowd(generator)
    } else {
        let count = generator.below(4);
        (0..count).map(|_| prefix(generator)).collect()
    };
    Rule {
        sources: match generator.below(6) {
            0 => Sources::Any,
            _ => Sources::Prefixes(prefixes),
        },
        ports: generator.once_in(3).then(|| {
            let port = generator.one_of(&PORTS);
            vec![port..=port + generator.below(2) as u16]
        }),
        protocol: match generator.below(6) {
            0 => Some(Protocol::Udp),
            1 => Some(Protocol::Tcp),
            _ => None,
        },
        action: generator.one_of(&[
            RuleAction::Allow,
            RuleAction::Allow,
            RuleAction::Deny,
            RuleAction::Reject,
        ]),
        direction: Direction::Inbound,
        user: None,
        comment: None,
        provenance: Provenance::Members,
    }
}

/// Prefixes that differ in one byte, more than a sparse node holds apart: its node is dense, also
/// where it is no root.
fn crowd(generator: &mut Generator) -> Vec<IpNet> {
    let mut bytes = match generator.address().to_canonical() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let all = bytes.len() * 8;
    let place = 1 + generator.below(bytes.len() as u64 - 1) as usize;
    let bits = (place * 8 + 8 + generator.below(9) as usize).min(all) as u8;
    let one = |_| {
        let address = match <[u8; 4]>::try_from(&bytes[..]) {
            Ok(bytes) => IpAddr::from(bytes),
            Err(_) => IpAddr::from(<[u8; 16]>::try_from(&bytes[..]).unwrap()),
        };
        // No two are neighbours, which would make one prefix.
        bytes[place] = bytes[place].wrapping_add(2);
        IpNet::new(address, bits).unwrap().trunc()
    };
    (0..RUNS).map(one).collect()
}

fn prefix(generator: &mut Generator) -> IpNet {
    let address = generator.address();
    // Mapped addresses are of no family here.
    let address = address.to_canonical();
    let bits = match address {
        IpAddr::V4(_) => generator.below(33),
        IpAddr::V6(_) => generator.below(129),
    };
    IpNet::new(address, bits as u8).unwrap().trunc()
}

/// One change of the state, or of the clock.
pub(crate) fn change(generator: &mut Generator, both: &mut Lockstep, now_ns: &mut u64) {
    match generator.below(20) {
        0 | 1 => *now_ns += generator.below(10_000_000),
        2 => *now_ns += generator.below(SECOND),
        3 => *now_ns += generator.below(40 * SECOND),
        4 if generator.once_in(8) => *now_ns += generator.below(6_000 * SECOND),
        4 | 5 => {
            let stress = generator.below(3) as u32;
            both.change(|model| model.stress = stress);
        }
        6 => {
            let lease = generator.one_of(&[0, *now_ns, *now_ns + 1, u64::MAX, u64::MAX]);
            both.change(|model| model.lease_until_ns = lease);
        }
        7 if generator.once_in(2) => {
            let until = generator.one_of(&[0, *now_ns, *now_ns + 1, *now_ns + 100 * SECOND]);
            both.change(|model| model.cookies_watched_until_ns = until);
        }
        7 => {
            let revert = generator.one_of(&[0, 0, *now_ns, *now_ns + 1, *now_ns + SECOND]);
            both.change(|model| model.revert_at_ns = revert);
        }
        8 => {
            both.change(|model| model.active ^= 1);
        }
        9 => {
            let seed = generator.key();
            let old_until_ns = *now_ns + generator.below(10 * SECOND);
            both.turn_sketch(seed, old_until_ns);
        }
        10 => {
            let (place, key) = (generator.below(4) as usize, generator.key());
            let active = generator.below(4) as u8;
            both.change(|model| {
                model.keys.keys[place] = key;
                model.keys.active = active;
            });
        }
        11 => {
            let any = generator.word();
            let offset = generator.one_of(&[0, 1 << 36, 1_700_000_000 * SECOND, any]);
            both.change(|model| model.wall_offset_ns = offset);
        }
        12 => {
            let run = generator.below(2) as u32;
            both.change(|model| model.run = run);
        }
        13 => {
            let (node, key) = (generator.one_of(&NODES), generator.key());
            if generator.once_in(4) {
                both.forget_peer(node);
            } else {
                both.peer(node, key);
            }
        }
        14 => {
            let count = Count {
                run: generator.below(2) as u32,
                connections: generator.below(5) as u32,
            };
            both.quic_connections(source(generator), count);
        }
        15 => {
            let connections = generator.below(5) as u32;
            let mark = generator.word() as u32;
            both.tcp_connections(source(generator), connections, mark);
        }
        16 | 17 => {
            let source = source(generator);
            for _ in 0..generator.below(12) {
                both.established(source, *now_ns);
            }
        }
        18 if generator.once_in(8) => both.forget_replies(),
        _ => {
            // Half of the time one that a frame answers which comes again.
            let seen = if generator.once_in(2) {
                generator.answered()
            } else {
                None
            };
            let flow = seen.unwrap_or_else(|| Flow {
                remote: source(generator),
                remote_port: generator.source().port(),
                port: generator.port(),
                protocol: generator.one_of(&[Protocol::Udp, Protocol::Tcp]),
            });
            let lives_ns = match flow.protocol {
                Protocol::Udp => REPLY_UDP_NS,
                Protocol::Tcp => REPLY_TCP_NS,
            };
            let ago_ns = generator.one_of(&[0, SECOND, lives_ns - SECOND, lives_ns, lives_ns + 1]);
            // Also a little ahead, like a clock that was read later.
            let sent_ns = *now_ns + generator.below(2) * 1_000 - ago_ns;
            both.reply(flow, sent_ns);
        }
    }
}

fn source(generator: &mut Generator) -> Source {
    Source::of(generator.address())
}
