//! The config's side of a set: what an operator may edit, and apply while a node runs.
//!
//! 1. Every key of `[edge]` is in exactly one of the lists below, or says where the edge is, or its mode.
//! 2. A set is written down with its side of the config, so that what comes later goes on from what was applied, and not from a file that
//!    somebody has edited since, nor from the one that the node was started with.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use millrace_edge::state::State;
use millrace_tuning::{NodeConfig, schema};
use serde::{Deserialize, Serialize};

/// Keys that belong to a set.
const OF_SETS: [&str; 16] = [
    "scope",
    "default_action",
    "roles",
    "tcp_ports",
    "udp_ports",
    "quic_per_minute",
    "quic_burst",
    "quic_connections_max",
    "tcp_per_minute",
    "tcp_burst",
    "tcp_connections_max",
    "unvalidated_per_second",
    "syn_per_second",
    "peer_per_second",
    "id_packets_per_second",
    "sample_every",
];

/// Keys that the program is loaded and attached with.
const OF_PROGRAMS: [&str; 6] = [
    "xdp",
    "trie_nodes_max",
    "limiter_buckets",
    "rules_max",
    "peers_max",
    "sources_max",
];

/// Keys that a node is started with.
const OF_NODES: [&str; 3] = ["lease", "quic_half_open_max", "peer_half_open_max"];

/// Keys, and their values as TOML.
pub(crate) type Keys = BTreeMap<String, String>;

/// The config's side of a set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Applied {
    /// The transport's.
    pub(crate) port: u16,
    pub(crate) keys: Keys,
}

impl Applied {
    pub(crate) fn of(config: &NodeConfig, port: u16) -> Self {
        Self {
            port,
            keys: values(config, &OF_SETS),
        }
    }

    /// The config with this side of it; none if it was written by a version with other keys.
    pub(crate) fn onto(&self, config: &NodeConfig) -> Option<NodeConfig> {
        // A config has a key; which one is nothing to this section, and in `dev` there is none.
        let any_key = "ab".repeat(32);
        let mut text = format!("[registry]\npublic_key = \"{any_key}\"\n[edge]\n");
        for (key, value) in &self.keys {
            let _ = writeln!(text, "{key} = {value}");
        }
        for (key, value) in values(config, &others()) {
            let _ = writeln!(text, "{key} = {value}");
        }
        let parsed = millrace_tuning::parse(&text);
        parsed.is_usable().then(|| NodeConfig {
            edge: parsed.config.edge,
            ..config.clone()
        })
    }

    /// Names of the keys that another one has otherwise.
    pub(crate) fn differs_in(&self, other: &Self) -> Vec<&str> {
        differing(&self.keys, &other.keys)
    }
}

/// What the program is loaded with.
pub(crate) fn of_programs(config: &NodeConfig) -> Keys {
    values(config, &OF_PROGRAMS)
}

/// What a node is started with.
pub(crate) fn of_nodes(config: &NodeConfig) -> Keys {
    values(config, &OF_NODES)
}

/// What the config says otherwise than what runs, though no `apply` changes it: the key, and what does.
pub(crate) fn left_alone(config: &NodeConfig, state: &State) -> Vec<(String, &'static str)> {
    let mut attached: Vec<_> = state.interfaces.iter().map(|known| &known.name).collect();
    let mut wanted: Vec<_> = config.edge.interfaces.iter().collect();
    attached.sort();
    wanted.sort();
    let interfaces = (attached != wanted).then(|| "interfaces".to_owned());
    let with = |keys: Vec<&str>, how| {
        let keys: Vec<_> = keys.into_iter().map(str::to_owned).collect();
        keys.into_iter().map(move |key| (key, how))
    };
    interfaces
        .map(|key| {
            (
                key,
                "`millrace xdp attach` adds one, `detach` takes all away",
            )
        })
        .into_iter()
        .chain(with(
            differing(&state.attached, &of_programs(config)),
            "`millrace xdp detach` and `attach` do",
        ))
        .chain(with(
            differing(&state.node, &of_nodes(config)),
            "a restart of the node does",
        ))
        .collect()
}

/// Of those that both have.
fn differing<'k>(these: &'k Keys, those: &Keys) -> Vec<&'k str> {
    let other = |(key, value): &(&String, &String)| those.get(*key).is_some_and(|v| v != *value);
    these
        .iter()
        .filter(other)
        .map(|(key, _)| key.as_str())
        .collect()
}

fn values(config: &NodeConfig, keys: &[&str]) -> Keys {
    let fields = schema::section("edge").map_or(&[][..], |section| section.fields);
    fields
        .iter()
        .filter(|field| keys.contains(&field.name))
        .map(|field| (field.name.to_owned(), field.value(config).to_string()))
        .filter(|(_, value)| !value.is_empty())
        .collect()
}

/// All keys that are not a set's.
fn others() -> Vec<&'static str> {
    let fields = schema::section("edge").map_or(&[][..], |section| section.fields);
    let names = fields.iter().map(|field| field.name);
    names.filter(|name| !OF_SETS.contains(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(edge: &str) -> NodeConfig {
        let text = format!(
            "[registry]\npublic_key = \"{}\"\n[edge]\n{edge}",
            "ab".repeat(32)
        );
        let parsed = millrace_tuning::parse(&text);
        assert!(parsed.is_usable(), "{:?}", parsed.problems);
        parsed.config
    }

    // Protects invariant 1: whoever adds a key says whose it is.
    #[test]
    fn every_key_is_somebodys() {
        let section = schema::section("edge").unwrap();
        let mut named: Vec<_> = section.fields.iter().map(|field| field.name).collect();
        let place = ["interfaces", "mode", "pins"];
        let mut listed = [&OF_SETS[..], &OF_PROGRAMS, &OF_NODES, &place].concat();
        named.sort_unstable();
        listed.sort_unstable();
        assert_eq!(named, listed);
    }

    #[test]
    fn a_side_goes_onto_another_config() {
        let one = config(
            "roles = [\"a\\\"b\", \"c\"]\ntcp_ports = [80, 443]\nquic_burst = 7\nlease = \"3s\"\n",
        );
        let two = config("tcp_ports = [22]\nlimiter_buckets = 2048\nlease = \"5s\"\n");
        let applied = Applied::of(&one, 4100);
        let both = applied.onto(&two).unwrap();
        assert!(
            applied.onto(&NodeConfig::default()).is_some(),
            "without a registry's key"
        );
        assert_eq!(both.edge.roles, ["a\"b", "c"]);
        assert_eq!(both.edge.tcp_ports, [80, 443]);
        assert_eq!((both.edge.quic_burst, both.edge.limiter_buckets), (7, 2048));
        assert_eq!(both.edge.lease, two.edge.lease);
        assert_eq!(Applied::of(&both, 4100), applied);
        let differs = applied.differs_in(&Applied::of(&two, 4100));
        assert_eq!(differs, ["quic_burst", "roles", "tcp_ports"]);
    }

    #[test]
    fn what_apply_does_not_change_is_named() {
        let attached = config("interfaces = [\"a0\"]\n");
        let state = State {
            attached: of_programs(&attached),
            node: of_nodes(&attached),
            ..State::default()
        };
        let edited = config(
            "interfaces = [\"a0\", \"b0\"]\nlimiter_buckets = 2048\nlease = \"5s\"\nquic_burst = 7\n",
        );
        let named: Vec<_> = left_alone(&edited, &state)
            .into_iter()
            .map(|(key, _)| key)
            .collect();
        assert_eq!(named, ["interfaces", "limiter_buckets", "lease"]);
    }
}
