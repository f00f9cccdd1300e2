//! The config's side of the edge: what belongs to a set, to the program, to the node.
//!
//! 1. Every key of `[edge]` is in exactly one part, or says where the edge is, or its mode.
//! 2. A set is written down with its policy. A later set goes on from what was applied, and not
//!    from a file that was edited since, nor from the one that the node was started with.

use std::time::Duration;

use millrace_edge::edge::AttachOptions;
use millrace_edge::interface::AttachMode;
use millrace_edge::load::LoadOptions;
use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::rules::Bounds;
use millrace_edge_policy::settings::{self, Caps, Kind, Limits, Mode, Scope, Service, Settings};
use millrace_tuning::Period;
use millrace_tuning::config::{DefaultAction, EdgeScope, EdgeSection, XdpMode};
use millrace_tuning::units::{to_u32, to_usize};
use serde::{Deserialize, Serialize};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// A part of `[edge]`: keys and their types, as in [`EdgeSection`].
macro_rules! part {
    ($(#[$doc:meta])* $name:ident { $($key:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(missing_docs, reason = "the config's reference documents every key")]
        pub struct $name {
            $(pub $key: $type,)*
        }

        impl $name {
            /// Names of its keys.
            pub const KEYS: &'static [&'static str] = &[$(stringify!($key)),*];

            /// This part of a config.
            #[must_use]
            #[allow(clippy::clone_on_copy, reason = "some keys are copied, some are not")]
            pub fn of(edge: &EdgeSection) -> Self {
                Self { $($key: edge.$key.clone(),)* }
            }

            /// Names of the keys that are others there.
            #[must_use]
            pub fn differing_keys(&self, other: &Self) -> Vec<&'static str> {
                let keys = [$((stringify!($key), self.$key != other.$key)),*];
                keys.into_iter().filter_map(|(key, differs)| differs.then_some(key)).collect()
            }
        }
    };
}

part! {
    /// What belongs to a set: it may be edited and applied while a node runs.
    EdgePolicy {
        scope: EdgeScope,
        default_action: DefaultAction,
        roles: Vec<String>,
        tcp_ports: Vec<u64>,
        udp_ports: Vec<u64>,
        quic_per_minute: u64,
        quic_burst: u64,
        quic_connections_max: u64,
        tcp_per_minute: u64,
        tcp_burst: u64,
        tcp_connections_max: u64,
        unvalidated_per_second: u64,
        syn_per_second: u64,
        peer_per_second: u64,
        id_packets_per_second: u64,
        sample_every: u64,
    }
}

part! {
    /// What the program is loaded and attached with.
    ProgramPolicy {
        xdp: XdpMode,
        trie_nodes_max: u64,
        limiter_buckets: u64,
        rules_max: u64,
        peers_max: u64,
        sources_max: u64,
    }
}

part! {
    /// What a node is started with.
    NodePolicy {
        lease: Period,
        quic_half_open_max: u64,
        peer_half_open_max: u64,
    }
}

impl EdgePolicy {
    /// What the operator says, for a transport that listens on `port`.
    #[must_use]
    pub fn settings(&self, port: u16, mode: Mode) -> Settings {
        let default_action = match self.default_action {
            DefaultAction::Allow => settings::DefaultAction::Allow,
            DefaultAction::Deny => settings::DefaultAction::Deny,
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
            .chain(of_kind(&self.tcp_ports, Kind::Tcp))
            .chain(of_kind(&self.udp_ports, Kind::Udp));
        Settings {
            mode,
            scope: match self.scope {
                EdgeScope::Host => Scope::Host,
                EdgeScope::Ports => Scope::Ports,
            },
            services: services.collect(),
            host_default: default_action,
            limits: self.limits(),
            caps: Caps {
                quic: to_u32(self.quic_connections_max),
                tcp: to_u32(self.tcp_connections_max),
            },
        }
    }

    fn limits(&self) -> Limits {
        let a_second = |rate: u64| Limit::per(rate, SECOND, rate);
        Limits {
            unvalidated: a_second(self.unvalidated_per_second),
            syn: a_second(self.syn_per_second),
            source_quic: Limit::per(self.quic_per_minute, MINUTE, self.quic_burst),
            source_tcp: Limit::per(self.tcp_per_minute, MINUTE, self.tcp_burst),
            // A peer that restarts dials on all its connections at once.
            peer: Limit::per(self.peer_per_second, SECOND, self.peer_per_second * 2),
            // Thirty milliseconds' worth, so that a train of one connection is not cut.
            id: Limit::per(
                self.id_packets_per_second,
                SECOND,
                self.id_packets_per_second.div_ceil(32),
            ),
            ..Limits::default()
        }
    }
}

impl ProgramPolicy {
    /// How large a set may be.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        let nodes = to_usize(self.trie_nodes_max);
        Bounds {
            rules_max: to_usize(self.rules_max),
            nodes4_max: nodes,
            nodes6_max: nodes,
        }
    }

    /// Where in the kernel the program is attached.
    #[must_use]
    pub fn attach_mode(&self) -> AttachMode {
        match self.xdp {
            XdpMode::Auto => AttachMode::Auto,
            XdpMode::Native => AttachMode::Native,
            XdpMode::Generic => AttachMode::Generic,
        }
    }

    /// How to attach to these interfaces.
    #[must_use]
    pub fn attach_options(&self, interfaces: &[String]) -> AttachOptions {
        AttachOptions {
            interfaces: interfaces.to_vec(),
            mode: self.attach_mode(),
            sizes: LoadOptions {
                trie_nodes4: to_u32(self.trie_nodes_max),
                trie_nodes6: to_u32(self.trie_nodes_max),
                limiter_buckets: to_u32(self.limiter_buckets),
                rules_max: to_u32(self.rules_max),
                peers_max: to_u32(self.peers_max),
                sources_max: to_u32(self.sources_max),
                ..LoadOptions::default()
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use millrace_tuning::{NodeConfig, schema};

    use super::*;

    fn edge(text: &str) -> EdgeSection {
        let key = "ab".repeat(32);
        let text = format!("[registry]\npublic_key = \"{key}\"\n[edge]\n{text}");
        let parsed = millrace_tuning::parse(&text);
        assert!(parsed.is_usable(), "{:?}", parsed.problems);
        parsed.config.edge
    }

    // Protects invariant 1: a new key says to which part it belongs.
    #[test]
    fn every_key_is_in_one_part() {
        let section = schema::section("edge").unwrap();
        let mut named: Vec<_> = section.fields.iter().map(|field| field.name).collect();
        let place = ["interfaces", "mode", "pins"];
        let parts = [
            EdgePolicy::KEYS,
            ProgramPolicy::KEYS,
            NodePolicy::KEYS,
            &place,
        ];
        let mut listed = parts.concat();
        named.sort_unstable();
        listed.sort_unstable();
        assert_eq!(named, listed);
    }

    #[test]
    fn every_key_arrives() {
        let policy = EdgePolicy::of(&edge(
            "scope = \"host\"\ntcp_ports = [443, 8080]\nudp_ports = [53]\ndefault_action = \"allow\"\n\
             quic_connections_max = 7\ntcp_connections_max = 8\nquic_per_minute = 60\nquic_burst = 3\n",
        ));
        let settings = policy.settings(4100, Mode::Enforce);
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
        assert_eq!(settings.host_default, settings::DefaultAction::Allow);
    }

    #[test]
    fn the_defaults_of_the_config_are_those_of_the_policy() {
        let policy = EdgePolicy::of(&NodeConfig::default().edge);
        let settings = policy.settings(4100, Mode::Count);
        assert_eq!(
            settings.limits,
            Limits {
                id: settings.limits.id,
                ..Limits::default()
            }
        );
        assert_eq!(settings.caps, Caps::default());
    }

    // Protects an operator's words: a policy is read again as it was written, whatever its values
    // hold.
    #[test]
    fn a_policy_outlives_its_config() {
        let one = EdgePolicy::of(&edge(
            "roles = [\"a\\\"b\", \"c\"]\ntcp_ports = [80, 443]\nquic_burst = 7\n",
        ));
        let two = EdgePolicy::of(&edge("tcp_ports = [22]\n"));
        let text = serde_json::to_string(&one).unwrap();
        assert_eq!(serde_json::from_str::<EdgePolicy>(&text).unwrap(), one);
        let differing = one.differing_keys(&two);
        assert_eq!(differing, ["roles", "tcp_ports", "quic_burst"]);
    }
}
