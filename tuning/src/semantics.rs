//! Contradictions between keys whose values are each inside their own bounds.

use crate::config::NodeConfig;
use crate::problem::{Origins, Problem, ProblemKind, Severity};
use crate::units::ByteSize;

/// All contradictions of a config.
pub(crate) fn check(config: &NodeConfig, origins: &Origins) -> Vec<Problem> {
    let mut found = Found {
        origins,
        problems: Vec::new(),
    };
    timing(config, &mut found);
    memory(config, &mut found);
    cores(config, &mut found);
    edge(config, &mut found);
    if config
        .registry
        .public_key
        .bytes()
        .all(|digit| digit == b'0')
        && !config.registry.public_key.is_empty()
    {
        found.error(
            "registry.public_key",
            "public_key is all zero, which is no key".into(),
            "copy the line that `millrace registry init` prints".into(),
        );
    }
    found.problems
}

fn timing(config: &NodeConfig, found: &mut Found<'_>) {
    let transport = &config.transport;
    if transport.idle_timeout.get() < transport.keep_alive.get() * 2 {
        found.error(
            "transport.idle_timeout",
            format!(
                "idle_timeout {} is less than two keep_alive intervals of {}: one lost packet would cut the connection",
                transport.idle_timeout, transport.keep_alive
            ),
            format!(
                "raise idle_timeout to three times keep_alive, or lower keep_alive to at most a third of {}",
                transport.idle_timeout
            ),
        );
    }
    if transport.redial_delay_min > transport.redial_delay_max {
        found.error(
            "transport.redial_delay_max",
            format!(
                "redial_delay_max {} is less than redial_delay_min {}",
                transport.redial_delay_max, transport.redial_delay_min
            ),
            "swap them, or raise redial_delay_max".into(),
        );
    }
}

fn memory(config: &NodeConfig, found: &mut Found<'_>) {
    let transport = &config.transport;
    let windows = [
        (
            "lan",
            transport.lan_stream_window_bytes,
            transport.lan_connection_window_bytes,
        ),
        (
            "wan",
            transport.wan_stream_window_bytes,
            transport.wan_connection_window_bytes,
        ),
    ];
    for (profile, stream, connection) in windows {
        if stream > connection {
            found.error(
                &format!("transport.{profile}_stream_window_bytes"),
                format!(
                    "{profile}_stream_window_bytes {stream} is more than {profile}_connection_window_bytes {connection}: one stream can never use it"
                ),
                format!("lower it to \"{connection}\" or raise {profile}_connection_window_bytes"),
            );
        }
    }
    if let Some(both) = transport
        .lan_peers
        .iter()
        .find(|peer| transport.wan_peers.contains(peer))
    {
        found.error(
            "transport.wan_peers",
            format!("{both} is in lan_peers too"),
            "name it once".into(),
        );
    }
    if transport.handshakes_max >= transport.connections_max {
        found.error(
            "transport.handshakes_max",
            format!(
                "handshakes_max {} leaves none of connections_max {} for connections",
                transport.handshakes_max, transport.connections_max
            ),
            "lower handshakes_max or raise connections_max".into(),
        );
    }
    let window = transport
        .lan_connection_window_bytes
        .max(transport.wan_connection_window_bytes);
    // And a quarter for what the allocator rounds up.
    let connection = (2 * window.bytes() + ByteSize::mib(1).bytes()) / 4 * 5;
    let connection = ByteSize(connection);
    if connection > transport.quic_heap_bytes_max {
        found.error(
            "transport.quic_heap_bytes_max",
            format!(
                "quic_heap_bytes_max {} is less than one connection may hold, {connection}: twice the window {window} and 1MiB, and a quarter for the allocator",
                transport.quic_heap_bytes_max
            ),
            format!("raise it to \"{connection}\" or lower the connection windows"),
        );
    }
    if transport.receive_budget_peer_bytes > transport.receive_budget_bytes {
        found.error(
            "transport.receive_budget_peer_bytes",
            format!(
                "receive_budget_peer_bytes {} is more than receive_budget_bytes {}",
                transport.receive_budget_peer_bytes, transport.receive_budget_bytes
            ),
            format!("lower it to at most \"{}\"", transport.receive_budget_bytes),
        );
    }
    if transport.body_bytes_max > transport.receive_budget_peer_bytes {
        found.error(
            "transport.body_bytes_max",
            format!(
                "body_bytes_max {} is more than receive_budget_peer_bytes {}: the longest body could never be received",
                transport.body_bytes_max, transport.receive_budget_peer_bytes
            ),
            format!("raise receive_budget_peer_bytes to at least \"{}\"", transport.body_bytes_max),
        );
    }
    // What the store holds of a peer's is charged to it, and a peer alone reaches half of the
    // budget.
    let share = transport
        .receive_budget_peer_bytes
        .min(ByteSize(transport.receive_budget_bytes.0 / 2));
    if config.artifacts.store_bytes > share {
        found.error(
            "artifacts.store_bytes",
            format!(
                "store_bytes {} is more than one peer may fill, {share}: artifacts of a peer alone would be refused while the store has room",
                config.artifacts.store_bytes
            ),
            format!("lower it to at most \"{share}\", or raise transport.receive_budget_bytes and receive_budget_peer_bytes"),
        );
    }
    for (key, profile) in profiles(config) {
        let needed = ByteSize(
            transport
                .receive_budget_bytes
                .0
                .saturating_add(config.artifacts.store_bytes.0),
        );
        if needed > profile.chunk_pool_bytes {
            found.error(
                &format!("{key}.chunk_pool_bytes"),
                format!(
                    "chunk_pool_bytes {} of [{}] is less than transport.receive_budget_bytes {} and artifacts.store_bytes {} together: peers could reserve chunks that do not exist",
                    profile.chunk_pool_bytes,
                    shown(&key),
                    transport.receive_budget_bytes,
                    config.artifacts.store_bytes
                ),
                format!("raise it to at least \"{needed}\", or lower one of the others"),
            );
        }
        for (name, now, most) in [
            ("rx_slots", profile.rx_slots, profile.rx_slots_max),
            ("tx_slots", profile.tx_slots, profile.tx_slots_max),
        ] {
            if now > most {
                found.error(
                    &format!("{key}.{name}"),
                    format!(
                        "{name} {now} is more than {name}_max {most} in [{}]",
                        shown(&key)
                    ),
                    format!("raise {name}_max to at least {now}"),
                );
            }
        }
    }
}

fn edge(config: &NodeConfig, found: &mut Found<'_>) {
    let edge = &config.edge;
    if !edge.limiter_buckets.is_power_of_two() {
        found.error(
            "edge.limiter_buckets",
            format!(
                "limiter_buckets {} is no power of two",
                edge.limiter_buckets
            ),
            format!("write {}", edge.limiter_buckets.next_power_of_two()),
        );
    }
    if edge
        .udp_ports
        .contains(&u64::from(config.listen.address.port()))
    {
        found.error(
            "edge.udp_ports",
            format!(
                "udp_ports names {}, which is the transport's port and has rules of its own",
                config.listen.address.port()
            ),
            "remove it from udp_ports".into(),
        );
    }
    let services = 1 + edge.tcp_ports.len() + edge.udp_ports.len();
    if services > 16 {
        found.error(
            "edge.tcp_ports",
            format!("{services} ports with the transport's; the program keeps 16"),
            "put services behind fewer ports".into(),
        );
    }
}

fn cores(config: &NodeConfig, found: &mut Found<'_>) {
    let shards = &config.shards;
    for (index, core) in shards.core.iter().enumerate() {
        let key = format!("shards.core.{index}.cpu");
        if shards.core[..index]
            .iter()
            .any(|other| other.cpu == core.cpu)
        {
            found.error(
                &key,
                format!("core {} has two [[shards.core]]", core.cpu),
                "put all its values into one".into(),
            );
        }
        if let crate::config::Cores::List(list) = &shards.cores
            && !list.contains(&core.cpu)
        {
            found.error(
                &key,
                format!(
                    "core {} has a [[shards.core]] but runs no shard: it is not in shards.cores",
                    core.cpu
                ),
                format!(
                    "add {} to shards.cores, or remove this [[shards.core]]",
                    core.cpu
                ),
            );
        }
    }
}

fn profiles(config: &NodeConfig) -> Vec<(String, &crate::config::ShardProfile)> {
    let defaults = std::iter::once(("shards".to_owned(), &config.shards.defaults));
    let cores = config.shards.core.iter().enumerate();
    defaults
        .chain(cores.map(|(index, core)| (format!("shards.core.{index}"), &core.profile)))
        .collect()
}

/// `shards.core.0` as it is written in a file.
fn shown(key: &str) -> &str {
    if key.starts_with("shards.core") {
        "[shards.core]"
    } else {
        key
    }
}

struct Found<'a> {
    origins: &'a Origins,
    problems: Vec<Problem>,
}

impl Found<'_> {
    fn error(&mut self, key: &str, reason: String, fix: String) {
        self.problems.push(Problem {
            position: self.origins.nearest(key),
            key: key.to_owned(),
            kind: ProblemKind::Contradiction,
            severity: Severity::Error,
            reason,
            fix,
        });
    }
}
