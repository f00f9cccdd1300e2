//! `/metrics`: OpenMetrics text of what the node counts, under our names and, where the reference has the same
//! thing, under the reference's.
//!
//! Collected when asked: nothing is kept twice.
//!
//! Invariants
//! 1. Every name is in a table: `docs/reference/metrics.md` is generated from the tables.

mod edge;
#[cfg(test)]
mod page;
mod reference;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use millrace_transport::PeerStatus;
use millrace_transport::counters::{COUNTERS, Counter, Family};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::running::Running;
use reference::OfPeer;

/// A metric of ours that is not in the transport's or the shards' tables.
struct Own {
    name: &'static str,
    #[cfg_attr(not(test), expect(dead_code, reason = "for the reference page"))]
    kind: &'static str,
    #[cfg_attr(not(test), expect(dead_code, reason = "for the reference page"))]
    label: Option<&'static str>,
    help: &'static str,
}

const OWN: &[Own] = &[
    Own {
        name: "millrace_transport_connections_open",
        kind: "gauge",
        label: None,
        help: "Connections, handshakes included",
    },
    Own {
        name: "millrace_transport_handshakes_open",
        kind: "gauge",
        label: None,
        help: "Handshakes",
    },
    Own {
        name: "millrace_chunks",
        kind: "gauge",
        label: Some("shard"),
        help: "Chunks of 1 MiB in the pool",
    },
    Own {
        name: "millrace_chunks_free",
        kind: "gauge",
        label: Some("shard"),
        help: "Chunks that nobody holds",
    },
    Own {
        name: "millrace_registry_version",
        kind: "gauge",
        label: None,
        help: "Newest registry version held",
    },
    Own {
        name: "millrace_registry_records_skipped",
        kind: "gauge",
        label: None,
        help: "Records of the newest version that cannot be used",
    },
    Own {
        name: "millrace_registry_versions_refused",
        kind: "counter",
        label: Some("reason"),
        help: "Registry versions that were refused",
    },
    Own {
        name: "millrace_topology_members",
        kind: "gauge",
        label: None,
        help: "Members of the subnet, this node included",
    },
    Own {
        name: "millrace_artifacts_held",
        kind: "gauge",
        label: None,
        help: "Artifacts in the store",
    },
    Own {
        name: "millrace_artifacts_bytes",
        kind: "gauge",
        label: None,
        help: "Chunk memory they take",
    },
    Own {
        name: "millrace_artifacts_dropped",
        kind: "counter",
        label: None,
        help: "Artifacts dropped to make room for new ones",
    },
    Own {
        name: "millrace_path_rtt_seconds",
        kind: "gauge",
        label: Some("peer"),
        help: "Smoothed round trip",
    },
    Own {
        name: "millrace_path_congestion_window",
        kind: "gauge",
        label: Some("peer"),
        help: "Congestion window in bytes",
    },
    Own {
        name: "millrace_path_sent_packets",
        kind: "gauge",
        label: Some("peer"),
        help: "Packets sent",
    },
    Own {
        name: "millrace_path_lost_packets",
        kind: "gauge",
        label: Some("peer"),
        help: "Packets lost",
    },
    Own {
        name: "millrace_path_probe_rtt_seconds",
        kind: "gauge",
        label: Some("peer"),
        help: "Smoothed round trip of health probes",
    },
    Own {
        name: "millrace_edge_in_kernel",
        kind: "gauge",
        label: None,
        help: "1 if the program refuses in the kernel, 0 if user space does by itself",
    },
    Own {
        name: "millrace_edge_stress",
        kind: "gauge",
        label: None,
        help: "0 normal, 1 addresses are validated first (Retry, SYN cookies), 2 registry peers only",
    },
    Own {
        name: "firewall_registry_version",
        kind: "gauge",
        label: None,
        help: "Registry version whose rules are in force (the reference's name)",
    },
    Own {
        name: "millrace_edge_rules_refused",
        kind: "counter",
        label: Some("reason"),
        help: "Rule sets that were refused; the last good one stayed in force",
    },
    Own {
        name: "millrace_edge_tables_restored",
        kind: "counter",
        label: None,
        help: "Times that others changed or removed the edge's table of nftables, and it was put back",
    },
    Own {
        name: "millrace_edge_interfaces_reattached",
        kind: "counter",
        label: None,
        help: "Interfaces that were made anew, and that the program was put on again",
    },
    Own {
        name: "millrace_edge_attach_failures",
        kind: "counter",
        label: None,
        help: "Times that the program could not be put on such an interface",
    },
    Own {
        name: "millrace_edge_interfaces_gone",
        kind: "gauge",
        label: None,
        help: "Interfaces that the program should be on and is not",
    },
    Own {
        name: "millrace_edge_packets",
        kind: "counter",
        label: Some("reason"),
        help: "Packets that the program passed, answered or dropped, by reason; see below",
    },
    Own {
        name: "millrace_edge_packets_counted",
        kind: "counter",
        label: Some("reason"),
        help: "Packets that mode `count` passed and mode `enforce` would not have",
    },
    Own {
        name: "millrace_edge_enforcing",
        kind: "gauge",
        label: None,
        help: "1 in mode `enforce`, 0 in mode `count`",
    },
    Own {
        name: "millrace_edge_set",
        kind: "gauge",
        label: None,
        help: "Number of the rule set in force",
    },
    Own {
        name: "millrace_edge_quic_sources",
        kind: "gauge",
        label: None,
        help: "Sources with QUIC connections, as the kernel is told",
    },
    Own {
        name: "millrace_edge_counts_missed",
        kind: "counter",
        label: None,
        help: "Changes of connection counts that the kernel could not be told",
    },
    Own {
        name: "millrace_edge_rule_hits",
        kind: "counter",
        label: Some("rule"),
        help: "Packets that a rule decided, since its set was published; `millrace xdp rules` shows the rules",
    },
];

/// All metrics of a node.
pub(crate) fn render(node: &Arc<Running>) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(NodeCollector(Arc::clone(node))));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

struct NodeCollector(Arc<Running>);

impl fmt::Debug for NodeCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeCollector")
    }
}

impl Collector for NodeCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Out(encoder);
        let node = &self.0;
        transport(node, &mut out)?;
        shards(node, &mut out)?;
        registry(node, &mut out)?;
        artifacts(node, &mut out)?;
        if let Some(view) = &node.edge {
            edge::write(view, &mut out)?;
        }
        let peers = node.transport.status().peers();
        paths(&peers, &mut out)?;
        reference::write(node, &peers, &mut out)
    }
}

/// A label, or none.
type Label<'a> = Option<(&'a str, String)>;

/// Writes metric families.
struct Out<'a>(DescriptorEncoder<'a>);

impl Out<'_> {
    fn counters<'v>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Label<'v>, u64)>,
    ) -> fmt::Result {
        let values = values
            .into_iter()
            .map(|(label, value)| (label, ConstCounter::new(value)));
        self.family(name, help, values)
    }

    fn gauges<'v>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Label<'v>, f64)>,
    ) -> fmt::Result {
        let values = values
            .into_iter()
            .map(|(label, value)| (label, ConstGauge::new(value)));
        self.family(name, help, values)
    }

    fn gauge(&mut self, name: &str, value: u64) -> fmt::Result {
        self.gauges(name, help_of(name), [(None, value as f64)])
    }

    fn counter(&mut self, name: &str, value: u64) -> fmt::Result {
        self.counters(name, help_of(name), [(None, value)])
    }

    fn family<'v, M: EncodeMetric>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Label<'v>, M)>,
    ) -> fmt::Result {
        let mut values = values.into_iter().peekable();
        let Some((_, first)) = values.peek() else {
            return Ok(());
        };
        // The encoder adds the full stop.
        let help = help.trim().trim_end_matches('.');
        let mut family = self
            .0
            .encode_descriptor(name, help, None, first.metric_type())?;
        for (label, value) in values {
            match label {
                Some(label) => value.encode(family.encode_family(&[label])?)?,
                // A metric without labels is alone in its family.
                None => return value.encode(family),
            }
        }
        Ok(())
    }
}

fn transport(node: &Running, out: &mut Out<'_>) -> fmt::Result {
    for same_name in COUNTERS.chunk_by(|a, b| a.name == b.name) {
        let values = same_name.iter().map(|info| {
            let label = info.label.map(|(key, value)| (key, value.to_owned()));
            (label, total(node, info.counter))
        });
        out.counters(same_name[0].name, same_name[0].help, values)?;
    }
    for (family, reasons) in reasons(node) {
        let values = reasons
            .iter()
            .map(|(reason, n)| (Some(("reason", (*reason).to_owned())), *n));
        out.counters(family.name(), family.help(), values)?;
    }
    let shards = node.transport.status().shards();
    let connections = shards.iter().map(|shard| shard.connections as u64).sum();
    let handshakes = shards.iter().map(|shard| shard.handshakes as u64).sum();
    out.gauge("millrace_transport_connections_open", connections)?;
    out.gauge("millrace_transport_handshakes_open", handshakes)
}

fn shards(node: &Running, out: &mut Out<'_>) -> fmt::Result {
    let mut by_name: BTreeMap<&'static str, Vec<(Label<'_>, u64)>> = BTreeMap::new();
    for (index, stats) in node.transport.shard_stats().iter().enumerate() {
        for (name, value) in stats.snapshot().iter() {
            by_name
                .entry(name)
                .or_default()
                .push((Some(("shard", index.to_string())), value));
        }
    }
    for (name, values) in by_name {
        out.counters(&format!("millrace_shard_{name}"), &shard_help(name), values)?;
    }
    let pools = |value: fn(&millrace_shards::chunk::ChunkPool) -> usize| {
        let pools = (0..node.transport.shards()).filter_map(|shard| {
            let pool = node.transport.pool(shard)?;
            Some((Some(("shard", shard.to_string())), value(pool) as f64))
        });
        pools.collect::<Vec<_>>()
    };
    out.gauges(
        "millrace_chunks",
        help_of("millrace_chunks"),
        pools(|p| p.total_chunks()),
    )?;
    out.gauges(
        "millrace_chunks_free",
        help_of("millrace_chunks_free"),
        pools(|p| p.free_chunks()),
    )
}

fn registry(node: &Running, out: &mut Out<'_>) -> fmt::Result {
    let summary = node.versions.summary();
    out.gauge("millrace_registry_version", summary.newest)?;
    out.gauge("millrace_registry_records_skipped", summary.skipped)?;
    let refused = summary
        .refused
        .iter()
        .map(|(reason, n)| (Some(("reason", (*reason).to_owned())), *n));
    out.counters(
        "millrace_registry_versions_refused",
        help_of("millrace_registry_versions_refused"),
        refused,
    )?;
    let members = node.topology.members.load(Ordering::Relaxed);
    out.gauge("millrace_topology_members", members)
}

fn artifacts(node: &Running, out: &mut Out<'_>) -> fmt::Result {
    let usage = node.store.usage();
    out.gauge("millrace_artifacts_held", usage.artifacts)?;
    out.gauge("millrace_artifacts_bytes", usage.bytes)?;
    out.counter("millrace_artifacts_dropped", usage.dropped)
}

/// Of each peer's first connection.
fn paths(peers: &[PeerStatus], out: &mut Out<'_>) -> fmt::Result {
    let values: [(&str, OfPeer); 5] = [
        ("millrace_path_rtt_seconds", |peer| {
            peer.rtt.map(|rtt| rtt.as_secs_f64())
        }),
        ("millrace_path_congestion_window", |peer| {
            Some(peer.congestion_window_bytes as f64)
        }),
        ("millrace_path_sent_packets", |peer| {
            Some(peer.packets_sent as f64)
        }),
        ("millrace_path_lost_packets", |peer| {
            Some(peer.packets_lost as f64)
        }),
        ("millrace_path_probe_rtt_seconds", |peer| {
            peer.probe_rtt.map(|rtt| rtt.as_secs_f64())
        }),
    ];
    for (name, value) in values {
        out.gauges(name, help_of(name), reference::each_peer(peers, value))?;
    }
    Ok(())
}

fn help_of(name: &str) -> &'static str {
    OWN.iter()
        .find(|own| own.name == name)
        .map_or("", |own| own.help)
}

fn shard_help(name: &str) -> String {
    format!("Shard runtime: {}", name.replace('_', " "))
}

fn total(node: &Running, counter: Counter) -> u64 {
    node.transport
        .counters()
        .iter()
        .map(|counters| counters.get(counter))
        .sum()
}

/// Reasons of all shards, summed.
fn reasons(node: &Running) -> BTreeMap<Family, BTreeMap<&'static str, u64>> {
    let mut all: BTreeMap<Family, BTreeMap<&'static str, u64>> = BTreeMap::new();
    for counters in node.transport.counters() {
        for (family, reason, count) in counters.reasons() {
            *all.entry(family).or_default().entry(reason).or_default() += count;
        }
    }
    all
}
