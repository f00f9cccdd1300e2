//! Rule sets that tests publish, and options that they attach with.
#![allow(dead_code, unreachable_pub, reason = "each test takes what it needs")]

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use millrace_edge::edge::AttachOptions;
use millrace_edge::interface::AttachMode;
use millrace_edge::load::LoadOptions;
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::rules::{Bounds, Compiled, Rule, RuleAction, Temporary, compile};
use millrace_edge_policy::settings::{Caps, DefaultAction, Kind, Limits, Mode, Service, Settings};

/// Where the service of UDP listens.
pub const PORT: u16 = 4200;
/// The port of the TCP service, open to all sources that no rule matches.
pub const TCP_PORT: u16 = 8080;
pub const QUIC_PORT: u16 = 4100;
/// A service with a listener for both families.
pub const DUAL_PORT: u16 = 8081;
/// A service without a listener.
pub const SILENT_PORT: u16 = 8082;
/// The remote end of a pair of namespaces.
pub const REMOTE4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
/// What [`limited`] lets one source open at once.
pub const BURST: u64 = 3;

pub fn sizes() -> LoadOptions {
    LoadOptions {
        trie_nodes4: 128,
        trie_nodes6: 128,
        limiter_buckets: 256,
        rules_max: 64,
        peers_max: 16,
        sources_max: 64,
        replies_max: 64,
        ..LoadOptions::default()
    }
}

pub fn options(mode: AttachMode) -> AttachOptions {
    AttachOptions {
        interfaces: vec!["mr0".into()],
        mode,
        sizes: sizes(),
    }
}

/// A set in which one rule allows or denies UDP to [`PORT`] from every remote address.
pub fn set(mode: Mode, action: RuleAction) -> Compiled {
    set_of(mode, &["10.77.0.0/24"], action)
}

pub fn set_of(mode: Mode, prefixes: &[&str], action: RuleAction) -> Compiled {
    let settings = Settings {
        mode,
        services: vec![
            Service {
                port: PORT,
                kind: Kind::Udp,
                default_action: DefaultAction::Deny,
            },
            Service {
                port: TCP_PORT,
                kind: Kind::Tcp,
                default_action: DefaultAction::Allow,
            },
        ],
        ..Settings::default()
    };
    let rule = |prefix: &&str| {
        let prefix = prefix.parse().unwrap();
        Rule::temporary(&Temporary {
            prefix,
            action,
            until_unix_seconds: u64::MAX,
        })
    };
    let rules: Vec<Rule> = prefixes.iter().map(rule).collect();
    let bounds = Bounds {
        rules_max: 1_000,
        nodes4_max: 10_000,
        nodes6_max: 10_000,
    };
    compile(&settings, &rules, bounds).unwrap()
}

pub fn services(limits: Limits, caps: Caps) -> Compiled {
    let service = |port, kind| Service {
        port,
        kind,
        default_action: DefaultAction::Allow,
    };
    let settings = Settings {
        mode: Mode::Enforce,
        services: vec![
            service(QUIC_PORT, Kind::Quic),
            service(TCP_PORT, Kind::Tcp),
            service(DUAL_PORT, Kind::Tcp),
            service(SILENT_PORT, Kind::Tcp),
        ],
        limits,
        caps,
        ..Settings::default()
    };
    let bounds = Bounds {
        rules_max: 10,
        nodes4_max: 100,
        nodes6_max: 100,
    };
    compile(&settings, &[], bounds).unwrap()
}

/// [`services`] that one source may open [`BURST`] times, then once an hour.
pub fn limited() -> Compiled {
    let hourly = Limit::per(1, Duration::from_secs(3_600), BURST);
    let limits = Limits {
        source_quic: hourly,
        source_tcp: hourly,
        ..Limits::default()
    };
    services(limits, Caps::default())
}
