//! The config's side of the edge: what belongs to a set, to the program, to the node.
//!
//! 1. Every key of `[edge]` is in exactly one part, or says where the edge is, or its mode.
//! 2. A set is written down with its policy. A later set goes on from what was applied, and not
//!    from a file that was edited since, nor from the one that the node was started with.

use std::iter::once;
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
        let tcp = self.tcp_ports.iter().map(|port| (*port, Kind::Tcp));
        let udp = self.udp_ports.iter().map(|port| (*port, Kind::Udp));
        let declared = once((u64::from(port), Kind::Quic)).chain(tcp).chain(udp);
        let services = declared.filter_map(|(port, kind)| {
            Some(Service {
                port: u16::try_from(port).ok()?,
                kind,
                default_action,
            })
        });
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
