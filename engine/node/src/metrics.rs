//! `/metrics`: OpenMetrics text of the node's counts, under our names and, where the reference
//! has the same thing, under the reference's.
//!
//! Collected when asked: nothing is kept twice.
//!
//! 1. Every name is in a table: `docs/reference/metrics.md` is generated from the tables.

#[cfg(test)]
mod page;
mod reference;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use millrace_protocol::id::NodeId;
use millrace_protocol::score::AskOrder;
use millrace_protocol::tls_keys::Standing;
use millrace_transport::PeerStatus;
use millrace_transport::counters::{COUNTERS, Counter, Family};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::core::Core;
use crate::edge::{EdgeSample, Report};
use crate::peers::all;
use crate::status;
use reference::OfPeer;

/// A metric of ours that is not in the transport's or the shards' tables.
struct Own {
    name: &'static str,
    kind: Kind,
    label: Option<&'static str>,
    help: &'static str,
}

/// A metric's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Gauge,
    Counter,
}

const OWN: &[Own] = &[
    Own {
        name: "millrace_transport_connections_open",
        kind: Kind::Gauge,
        label: None,
        help: "Connections, handshakes included",
    },
    Own {
        name: "millrace_transport_handshakes_open",
        kind: Kind::Gauge,
        label: None,
        help: "Handshakes",
    },
    Own {
        name: "millrace_transport_quic_heap_bytes",
        kind: Kind::Gauge,
        label: None,
        help: "Heap bytes that QUIC holds for connections",
    },
    Own {
        name: "millrace_transport_queue_bytes",
        kind: Kind::Gauge,
        label: None,
        help: "Bytes that wait for peers on lanes, and of answers outside the chunk pool",
    },
    Own {
        name: "millrace_transport_unread_answer_bytes",
        kind: Kind::Gauge,
        label: None,
        help: "Bytes of the chunk pool that answers hold which their peers have not read",
    },
    Own {
        name: "millrace_chunks",
        kind: Kind::Gauge,
        label: Some("shard"),
        help: "Chunks of 1 MiB in the pool",
    },
    Own {
        name: "millrace_chunks_free",
        kind: Kind::Gauge,
        label: Some("shard"),
        help: "Whole chunks that are free",
    },
    Own {
        name: "millrace_chunks_free_bytes",
        kind: Kind::Gauge,
        label: Some("shard"),
        help: "Bytes of the pool that are free, also in chunks that smaller bodies share",
    },
    Own {
        name: "millrace_chunks_present_bytes",
        kind: Kind::Gauge,
        label: Some("shard"),
        help: "Bytes of the pool that have memory of the system",
    },
    Own {
        name: "millrace_registry_version",
        kind: Kind::Gauge,
        label: None,
        help: "Newest registry version held",
    },
    Own {
        name: "millrace_tls_key_is_newest",
        kind: Kind::Gauge,
        label: None,
        help: "1 if handshakes use the newest TLS key that the registry names for this node",
    },
    Own {
        name: "millrace_tls_connections_by_older_key",
        kind: Kind::Gauge,
        label: None,
        help: "Connections by another TLS key of this node than the newest; while there are any, the older key must not be retired",
    },
    Own {
        name: "millrace_tls_certificate_seconds_left",
        kind: Kind::Gauge,
        label: None,
        help: "Time until the certificate says that it ends; the node renews it before",
    },
    Own {
        name: "millrace_tls_certificates_made",
        kind: Kind::Counter,
        label: None,
        help: "Certificates made since the start, for a new key or because the one before ended",
    },
    Own {
        name: "millrace_registry_age_seconds",
        kind: Kind::Gauge,
        label: None,
        help: "Time since the node saw the newest version first, in this run or an earlier one; 0 before the first",
    },
    Own {
        name: "millrace_registry_writes_failed",
        kind: Kind::Counter,
        label: None,
        help: "Times that a newer version could not be written down; it is not in force until it is",
    },
    Own {
        name: "millrace_registry_folder_readable",
        kind: Kind::Gauge,
        label: None,
        help: "0 if the registry folder cannot be read; the node is not ready then",
    },
    Own {
        name: "millrace_registry_records_skipped",
        kind: Kind::Gauge,
        label: None,
        help: "Records of the newest version that cannot be used",
    },
    Own {
        name: "millrace_registry_versions_refused",
        kind: Kind::Counter,
        label: Some("reason"),
        help: "Registry versions that were refused",
    },
    Own {
        name: "millrace_registry_questions_failed",
        kind: Kind::Counter,
        label: Some("reason"),
        help: "Questions to peers for registry versions that failed; peers are asked in turn",
    },
    Own {
        name: "millrace_registry_names",
        kind: Kind::Gauge,
        label: None,
        help: "Names of hosts that are looked up",
    },
    Own {
        name: "millrace_registry_names_failing",
        kind: Kind::Gauge,
        label: None,
        help: "Names whose last lookup failed; the last known addresses stay in use",
    },
    Own {
        name: "millrace_registry_names_left_out",
        kind: Kind::Gauge,
        label: None,
        help: "Names beyond 4,096, which are not looked up",
    },
    Own {
        name: "millrace_topology_members",
        kind: Kind::Gauge,
        label: None,
        help: "Members of the subnet, this node included",
    },
    Own {
        name: "millrace_topology_members_left_out",
        kind: Kind::Gauge,
        label: None,
        help: "Members without a connection, because `connections_max` is too small for all",
    },
    Own {
        name: "millrace_artifacts_held",
        kind: Kind::Gauge,
        label: None,
        help: "Artifacts in the store",
    },
    Own {
        name: "millrace_artifacts_bytes",
        kind: Kind::Gauge,
        label: None,
        help: "Chunk memory they take",
    },
    Own {
        name: "millrace_artifacts_dropped",
        kind: Kind::Counter,
        label: Some("publisher"),
        help: "Artifacts dropped to make room for new ones, by the node that published them here; `other` beyond 4,096 nodes",
    },
    Own {
        name: "millrace_artifacts_asked",
        kind: Kind::Counter,
        label: Some("outcome"),
        help: "Exchanges with peers about artifacts that count for or against them: `served`, `slow` (another one was asked), `failed`, `stalled` (nothing before the deadline), `invalid` (other bytes)",
    },
    Own {
        name: "millrace_peers_asked_last",
        kind: Kind::Gauge,
        label: None,
        help: "Connected peers that are asked for artifacts after all others, because they lately did not serve",
    },
    Own {
        name: "millrace_peers_banned",
        kind: Kind::Gauge,
        label: None,
        help: "Connected peers that are not asked for artifacts, because they lately sent other bytes",
    },
    Own {
        name: "millrace_path_rtt_seconds",
        kind: Kind::Gauge,
        label: Some("peer"),
        help: "Smoothed round trip",
    },
    Own {
        name: "millrace_path_congestion_window",
        kind: Kind::Gauge,
        label: Some("peer"),
        help: "Congestion window in bytes",
    },
    Own {
        name: "millrace_path_udp_payload_bytes",
        kind: Kind::Gauge,
        label: Some("peer"),
        help: "UDP payload of the largest packets sent now",
    },
    Own {
        name: "millrace_path_sent_packets",
        kind: Kind::Gauge,
        label: Some("peer"),
        help: "Packets sent",
    },
    Own {
        name: "millrace_path_lost_packets",
        kind: Kind::Gauge,
        label: Some("peer"),
        help: "Packets lost",
    },
    Own {
        name: "millrace_path_probe_rtt_seconds",
        kind: Kind::Gauge,
        label: Some("peer"),
        help: "Smoothed round trip of health probes",
    },
    Own {
        name: "millrace_edge_in_kernel",
        kind: Kind::Gauge,
        label: None,
        help: "1 if the program refuses in the kernel, 0 if user space does by itself",
    },
    Own {
        name: "millrace_edge_stress",
        kind: Kind::Gauge,
        label: None,
        help: "0 normal, 1 addresses are validated first (Retry, SYN cookies), 2 registry peers only",
    },
    Own {
        name: "firewall_registry_version",
        kind: Kind::Gauge,
        label: None,
        help: "Registry version whose rules are in force (the reference's name)",
    },
    Own {
        name: "millrace_edge_rules_refused",
        kind: Kind::Counter,
        label: Some("reason"),
        help: "Times that the edge did not follow what it should: `lock`, `journal`, `rules`, `publish`, `table`; the last good set stayed in force",
    },
    Own {
        name: "millrace_edge_tables_restored",
        kind: Kind::Counter,
        label: None,
        help: "Times that others changed or removed the edge's table of nftables, and it was put back",
    },
    Own {
        name: "millrace_edge_interfaces_reattached",
        kind: Kind::Counter,
        label: None,
        help: "Interfaces that were made anew, and that the program was put on again",
    },
    Own {
        name: "millrace_edge_attach_failures",
        kind: Kind::Counter,
        label: None,
        help: "Times that the program could not be put on such an interface",
    },
    Own {
        name: "millrace_edge_interfaces_gone",
        kind: Kind::Gauge,
        label: None,
        help: "Interfaces that the program should be on and is not",
    },
    Own {
        name: "millrace_edge_packets",
        kind: Kind::Counter,
        label: Some("reason"),
        help: "Packets that the program passed, answered or dropped, by reason; see below",
    },
    Own {
        name: "millrace_edge_packets_counted",
        kind: Kind::Counter,
        label: Some("reason"),
        help: "Packets that mode `count` passed and mode `enforce` would not have",
    },
    Own {
        name: "millrace_edge_enforcing",
        kind: Kind::Gauge,
        label: None,
        help: "1 in mode `enforce`, 0 in mode `count`",
    },
    Own {
        name: "millrace_edge_set",
        kind: Kind::Gauge,
        label: None,
        help: "Number of the rule set in force",
    },
    Own {
        name: "millrace_edge_quic_sources",
        kind: Kind::Gauge,
        label: None,
        help: "Sources with QUIC connections, as the kernel is told",
    },
    Own {
        name: "millrace_edge_counts_missed",
        kind: Kind::Counter,
        label: None,
        help: "Changes of connection counts that the kernel could not be told",
    },
    Own {
        name: "millrace_edge_rule_hits",
        kind: Kind::Counter,
        label: Some("rule"),
        help: "Packets that a rule decided, since its set was published; `millrace xdp rules` shows the rules",
    },
];

/// All metrics of a node.
pub(crate) fn render(core: &Arc<Core>) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(CoreCollector(Arc::clone(core))));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

struct CoreCollector(Arc<Core>);

impl fmt::Debug for CoreCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CoreCollector")
    }
}

impl Collector for CoreCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Out(encoder);
        let core = &self.0;
        transport(core, &mut out)?;
        shards(core, &mut out)?;
        registry(core, &mut out)?;
        artifacts(core, &mut out)?;
        if let Some(report) = &core.edge {
            edge(report, &mut out)?;
        }
        let peers = core.transport.status().peers();
        paths(&peers, &mut out)?;
        reference::write(core, &peers, &mut out)
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

fn transport(core: &Core, out: &mut Out<'_>) -> fmt::Result {
    for same_name in COUNTERS.chunk_by(|a, b| a.name == b.name) {
        let values = same_name.iter().map(|info| {
            let label = info.label.map(|(key, value)| (key, value.to_owned()));
            (label, total(core, info.counter))
        });
        out.counters(same_name[0].name, same_name[0].help, values)?;
    }
    for (family, reasons) in reasons(core) {
        let values = reasons
            .iter()
            .map(|(reason, n)| (Some(("reason", (*reason).to_owned())), *n));
        out.counters(family.name(), family.help(), values)?;
    }
    let shards = core.transport.status().shards();
    let connections = shards.iter().map(|shard| shard.connections as u64).sum();
    let handshakes = shards.iter().map(|shard| shard.handshakes as u64).sum();
    out.gauge("millrace_transport_connections_open", connections)?;
    out.gauge("millrace_transport_handshakes_open", handshakes)?;
    let heap_bytes = shards.iter().map(|shard| shard.quic_heap_bytes).sum();
    let queue_bytes = shards.iter().map(|shard| shard.queue_bytes).sum();
    out.gauge("millrace_transport_queue_bytes", queue_bytes)?;
    let unread_bytes = shards.iter().map(|shard| shard.unread_answer_bytes).sum();
    out.gauge("millrace_transport_unread_answer_bytes", unread_bytes)?;
    out.gauge("millrace_transport_quic_heap_bytes", heap_bytes)
}

fn shards(core: &Core, out: &mut Out<'_>) -> fmt::Result {
    let mut by_name: BTreeMap<&'static str, Vec<(Label<'_>, u64)>> = BTreeMap::new();
    for (index, stats) in core.transport.shard_stats().iter().enumerate() {
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
    let pools = |value: fn(&millrace_shards::chunk::ChunkPool) -> u64| {
        let pools = (0..core.transport.shards()).filter_map(|shard| {
            let pool = core.transport.pool(shard)?;
            Some((Some(("shard", shard.to_string())), value(pool) as f64))
        });
        pools.collect::<Vec<_>>()
    };
    out.gauges(
        "millrace_chunks",
        help_of("millrace_chunks"),
        pools(|p| p.total_chunks() as u64),
    )?;
    out.gauges(
        "millrace_chunks_free",
        help_of("millrace_chunks_free"),
        pools(|p| p.free_chunks() as u64),
    )?;
    out.gauges(
        "millrace_chunks_free_bytes",
        help_of("millrace_chunks_free_bytes"),
        pools(|p| p.free_bytes()),
    )?;
    out.gauges(
        "millrace_chunks_present_bytes",
        help_of("millrace_chunks_present_bytes"),
        pools(|p| p.present_bytes()),
    )
}

fn tls(core: &Core, out: &mut Out<'_>) -> fmt::Result {
    let tls = status::tls(core);
    let is_newest = tls.standing == Standing::Newest.label();
    out.gauge("millrace_tls_key_is_newest", is_newest.into())?;
    let by_older = tls.connections_by_older_key as u64;
    out.gauge("millrace_tls_connections_by_older_key", by_older)?;
    let left_s = tls.certificate_seconds_left;
    out.gauge("millrace_tls_certificate_seconds_left", left_s)?;
    out.counter("millrace_tls_certificates_made", tls.certificates_made)
}

fn registry(core: &Core, out: &mut Out<'_>) -> fmt::Result {
    tls(core, out)?;
    let summary = core.versions.summary();
    out.gauge("millrace_registry_version", summary.newest)?;
    out.gauge(
        "millrace_registry_age_seconds",
        summary.age.map_or(0, |age| age.as_secs()),
    )?;
    out.counter("millrace_registry_writes_failed", summary.writes_failed)?;
    let is_readable = summary.folder_failure.is_none();
    out.gauge("millrace_registry_folder_readable", is_readable.into())?;
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
    let failed = summary
        .questions_failed
        .iter()
        .map(|(reason, n)| (Some(("reason", (*reason).to_owned())), *n));
    out.counters(
        "millrace_registry_questions_failed",
        help_of("millrace_registry_questions_failed"),
        failed,
    )?;
    let failing = summary.names.iter().filter(|name| name.failure.is_some());
    let failing = failing.count() as u64;
    out.gauge("millrace_registry_names", summary.names.len() as u64)?;
    out.gauge("millrace_registry_names_failing", failing)?;
    out.gauge("millrace_registry_names_left_out", summary.names_left_out)?;
    let members = core.topology.members.load(Ordering::Relaxed);
    out.gauge("millrace_topology_members", members)?;
    let left_out = core.topology.left_out.load(Ordering::Relaxed);
    out.gauge("millrace_topology_members_left_out", left_out)
}

fn artifacts(core: &Core, out: &mut Out<'_>) -> fmt::Result {
    let usage = core.artifacts.usage();
    out.gauge("millrace_artifacts_held", usage.artifacts)?;
    out.gauge("millrace_artifacts_bytes", usage.bytes)?;
    let own = core.transport.node_id();
    let of_all: u64 = usage.dropped_of.values().sum();
    let others = (usage.dropped > of_all).then(|| ("other".to_owned(), usage.dropped - of_all));
    let dropped = usage.dropped_of.iter();
    let dropped = dropped.map(|(of, n)| (of.unwrap_or(own).to_string(), *n));
    let dropped = dropped.chain(others);
    out.counters(
        "millrace_artifacts_dropped",
        help_of("millrace_artifacts_dropped"),
        dropped.map(|(of, n)| (Some(("publisher", of)), n)),
    )?;
    let outcomes = core.artifacts.candidates.outcomes();
    let outcomes = outcomes.into_iter();
    out.counters(
        "millrace_artifacts_asked",
        help_of("millrace_artifacts_asked"),
        outcomes.map(|(label, n)| (Some(("outcome", label.to_owned())), n)),
    )?;
    let now = Instant::now();
    let ask_order = |peer: &NodeId| core.artifacts.candidates.ask_order(peer, now);
    let ask_orders: Vec<_> = all(&core.transport).iter().map(ask_order).collect();
    let count = |of| ask_orders.iter().filter(|one| **one == of).count() as u64;
    out.gauge("millrace_peers_asked_last", count(AskOrder::Last))?;
    out.gauge("millrace_peers_banned", count(AskOrder::Banned))
}

fn edge(report: &Report, out: &mut Out<'_>) -> fmt::Result {
    let samples = report.samples();
    for same_name in samples.chunk_by(|a, b| a.name == b.name) {
        let Some(own) = OWN.iter().find(|own| own.name == same_name[0].name) else {
            continue;
        };
        let label = |sample: &EdgeSample| Some((own.label?, sample.label.clone()?));
        let values = same_name.iter();
        match own.kind {
            Kind::Gauge => {
                let values = values.map(|sample| (label(sample), sample.value as f64));
                out.gauges(own.name, own.help, values)?;
            }
            Kind::Counter => {
                let values = values.map(|sample| (label(sample), sample.value));
                out.counters(own.name, own.help, values)?;
            }
        }
    }
    Ok(())
}

/// Those of each peer's first connection.
fn paths(peers: &[PeerStatus], out: &mut Out<'_>) -> fmt::Result {
    let values: [(&str, OfPeer); 6] = [
        ("millrace_path_rtt_seconds", |peer| {
            peer.rtt.map(|rtt| rtt.as_secs_f64())
        }),
        ("millrace_path_congestion_window", |peer| {
            Some(peer.congestion_window_bytes as f64)
        }),
        ("millrace_path_udp_payload_bytes", |peer| {
            Some(peer.udp_payload_bytes as f64)
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

fn total(core: &Core, counter: Counter) -> u64 {
    core.transport
        .counters()
        .iter()
        .map(|counters| counters.get(counter))
        .sum()
}

/// Reasons of all shards, summed.
fn reasons(core: &Core) -> BTreeMap<Family, BTreeMap<&'static str, u64>> {
    let mut all: BTreeMap<Family, BTreeMap<&'static str, u64>> = BTreeMap::new();
    for counters in core.transport.counters() {
        for (family, reason, count) in counters.reasons() {
            *all.entry(family).or_default().entry(reason).or_default() += count;
        }
    }
    all
}
