//! From the config and the registry to what the edge puts in force.
//!
//! 1. The rules are those of the newest registry version that is held; members are those of all held versions, so that a node that follows slowly
//!    is not locked out.
//! 2. The same config, registry and temporary rules give the same plan.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::rules::{Bounds, Compiled, Locality, RuleSet, RulesError, Temporary};
use millrace_edge_policy::rules::{compile, in_order};
use millrace_edge_policy::settings::{
    Caps, DefaultAction, Kind, Limits, Mode, Scope, Service, Settings,
};
use millrace_tuning::NodeConfig;
use millrace_tuning::config::{self, EdgeMode, EdgeScope};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// What the registry says to the edge of this node.
#[derive(Debug, Clone, Default)]
pub(crate) struct Firewall {
    /// The newest version; 0: none is held.
    pub(crate) version: u64,
    /// Its `[[firewall]]` tables.
    pub(crate) tables: Vec<toml::Table>,
    /// Addresses of all nodes of all held versions.
    pub(crate) members: Vec<IpAddr>,
    /// Who this node is to the scopes of rules.
    pub(crate) locality: Locality,
}

/// The mode of a config or a command line.
pub(crate) fn mode(mode: EdgeMode) -> Mode {
    match mode {
        EdgeMode::Count => Mode::Count,
        EdgeMode::Enforce => Mode::Enforce,
    }
}

/// What the operator says, for a transport that listens on `port`.
pub(crate) fn settings(config: &NodeConfig, port: u16, mode: Mode) -> Settings {
    let edge = &config.edge;
    let default_action = match edge.default_action {
        config::DefaultAction::Allow => DefaultAction::Allow,
        config::DefaultAction::Deny => DefaultAction::Deny,
    };
    let service = |port, kind| Service {
        port,
        kind,
        default_action,
    };
    let of_kind = |ports: &[u64], kind| {
        let ports = ports.iter().filter_map(|port| u16::try_from(*port).ok());
        ports.map(|port| service(port, kind)).collect::<Vec<_>>()
    };
    let services = [service(port, Kind::Quic)]
        .into_iter()
        .chain(of_kind(&edge.tcp_ports, Kind::Tcp))
        .chain(of_kind(&edge.udp_ports, Kind::Udp))
        .collect();
    Settings {
        mode,
        scope: match edge.scope {
            EdgeScope::Host => Scope::Host,
            EdgeScope::Ports => Scope::Ports,
        },
        services,
        host_default: default_action,
        limits: limits(config),
        caps: Caps {
            quic: to_u32(edge.quic_connections_max),
            tcp: to_u32(edge.tcp_connections_max),
        },
    }
}

fn limits(config: &NodeConfig) -> Limits {
    let edge = &config.edge;
    let a_second = |rate: u64| Limit::per(rate, SECOND, rate);
    Limits {
        unvalidated: a_second(edge.unvalidated_per_second),
        syn: a_second(edge.syn_per_second),
        source_quic: Limit::per(edge.quic_per_minute, MINUTE, edge.quic_burst),
        source_tcp: Limit::per(edge.tcp_per_minute, MINUTE, edge.tcp_burst),
        // A peer that restarts dials on all its connections at once.
        peer: Limit::per(edge.peer_per_second, SECOND, edge.peer_per_second * 2),
        // Thirty milliseconds' worth, so that a train of one connection is not cut.
        id: Limit::per(
            edge.id_packets_per_second,
            SECOND,
            edge.id_packets_per_second.div_ceil(32),
        ),
        ..Limits::default()
    }
}

/// How large a set may be.
pub(crate) fn bounds(config: &NodeConfig) -> Bounds {
    let nodes = to_usize(config.edge.trie_nodes_max);
    Bounds {
        rules_max: to_usize(config.edge.rules_max),
        nodes4_max: nodes,
        nodes6_max: nodes,
    }
}

/// Compiles what is to be in force now.
pub(crate) fn compiled(
    config: &NodeConfig,
    settings: &Settings,
    firewall: &Firewall,
    temporary: &[Temporary],
) -> Result<Compiled, RulesError> {
    let set = RuleSet::read(firewall.version, &firewall.tables)?;
    let rules = in_order(
        temporary,
        firewall.members.iter().copied(),
        &set,
        &firewall.locality,
        unix_seconds(SystemTime::now()),
    );
    compile(settings, &rules, bounds(config))
}

/// Seconds since 1970; a clock before that is 1970.
pub(crate) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

pub(crate) fn to_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

pub(crate) fn to_u32(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> NodeConfig {
        let text = format!("[registry]\npublic_key = \"{}\"\n{text}", "ab".repeat(32));
        let parsed = millrace_tuning::parse(&text);
        assert!(parsed.is_usable(), "{:?}", parsed.problems);
        parsed.config
    }

    #[test]
    fn every_key_arrives() {
        let config = config(
            "[edge]\nscope = \"host\"\ntcp_ports = [443, 8080]\nudp_ports = [53]\ndefault_action = \"allow\"\n\
             quic_connections_max = 7\ntcp_connections_max = 8\nquic_per_minute = 60\nquic_burst = 3\n",
        );
        let settings = settings(&config, 4100, Mode::Enforce);
        settings.validate().unwrap();
        let services: Vec<_> = settings.services.iter().map(|s| (s.port, s.kind)).collect();
        assert_eq!(
            services,
            [
                (4100, Kind::Quic),
                (443, Kind::Tcp),
                (8080, Kind::Tcp),
                (53, Kind::Udp)
            ]
        );
        assert_eq!(
            (settings.mode, settings.scope),
            (Mode::Enforce, Scope::Host)
        );
        assert_eq!((settings.caps.quic, settings.caps.tcp), (7, 8));
        assert_eq!(settings.limits.source_quic, Limit::per(1, SECOND, 3));
        assert_eq!(settings.host_default, DefaultAction::Allow);
    }

    #[test]
    fn the_defaults_of_the_config_are_those_of_the_policy() {
        let settings = settings(&NodeConfig::default(), 4100, Mode::Count);
        assert_eq!(
            settings.limits,
            Limits {
                id: settings.limits.id,
                ..Limits::default()
            }
        );
        assert_eq!(settings.caps, Caps::default());
    }

    #[test]
    fn members_are_allowed_and_a_bad_rule_refuses_the_set() {
        let config = NodeConfig::default();
        let settings = settings(&config, 4100, Mode::Enforce);
        let mut firewall = Firewall {
            version: 3,
            members: vec!["192.0.2.1".parse().unwrap()],
            ..Firewall::default()
        };
        let set = compiled(&config, &settings, &firewall, &[]).unwrap();
        assert_eq!(set.rules.len(), 1);
        firewall.tables = vec![toml::from_str("action = \"perhaps\"\nscope = \"global\"").unwrap()];
        let error = compiled(&config, &settings, &firewall, &[]).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("registry version 3, firewall rule 1"),
            "{error}"
        );
    }
}
