//! `/metrics`: OpenMetrics text of what the node counts, under our names and, where the reference has the same
//! thing, under the reference's.
//!
//! Collected when asked: nothing is kept twice.

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
        paths(&node.transport.status().peers(), &mut out)?;
        reference(node, &mut out)
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

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.gauges(name, help, [(None, value as f64)])
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.counters(name, help, [(None, value)])
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
    out.gauge(
        "millrace_transport_connections_open",
        "Connections, handshakes included",
        connections,
    )?;
    out.gauge(
        "millrace_transport_handshakes_open",
        "Handshakes",
        handshakes,
    )
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
        let help = format!("Shard runtime: {}", name.replace('_', " "));
        out.counters(&format!("millrace_shard_{name}"), &help, values)?;
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
        "Chunks of 1 MiB in the pool",
        pools(|p| p.total_chunks()),
    )?;
    out.gauges(
        "millrace_chunks_free",
        "Chunks that nobody holds",
        pools(|p| p.free_chunks()),
    )
}

fn registry(node: &Running, out: &mut Out<'_>) -> fmt::Result {
    let summary = node.versions.summary();
    out.gauge(
        "millrace_registry_version",
        "Newest registry version held",
        summary.newest,
    )?;
    out.gauge(
        "millrace_registry_records_skipped",
        "Records of the newest version that cannot be used",
        summary.skipped,
    )?;
    let refused = summary
        .refused
        .iter()
        .map(|(reason, n)| (Some(("reason", (*reason).to_owned())), *n));
    out.counters(
        "millrace_registry_versions_refused",
        "Registry versions that were refused",
        refused,
    )?;
    let members = node.topology.members.load(Ordering::Relaxed);
    out.gauge(
        "millrace_topology_members",
        "Members of the subnet, this node included",
        members,
    )
}

fn artifacts(node: &Running, out: &mut Out<'_>) -> fmt::Result {
    let usage = node.store.usage();
    out.gauge(
        "millrace_artifacts_held",
        "Artifacts in the store",
        usage.artifacts,
    )?;
    out.gauge(
        "millrace_artifacts_bytes",
        "Chunk memory they take",
        usage.bytes,
    )?;
    out.counter(
        "millrace_artifacts_dropped",
        "Artifacts dropped to make room for new ones",
        usage.dropped,
    )
}

/// Per connection; the names that begin with `quic_transport_quinn` are the reference's.
fn paths(peers: &[PeerStatus], out: &mut Out<'_>) -> fmt::Result {
    let label = |peer: &PeerStatus| Some(("peer", peer.node_id.to_string()));
    let each = |value: fn(&PeerStatus) -> Option<f64>| {
        // A peer may have one connection for each shard pair: the first speaks for it.
        let mut seen = std::collections::BTreeSet::new();
        let first = peers
            .iter()
            .filter(|peer| seen.insert(peer.node_id))
            .collect::<Vec<_>>();
        let values = first
            .into_iter()
            .filter_map(|peer| Some((label(peer), value(peer)?)));
        values.collect::<Vec<_>>()
    };
    let rtt = each(|peer| peer.rtt.map(|rtt| rtt.as_secs_f64()));
    let window = each(|peer| Some(peer.congestion_window_bytes as f64));
    let sent = each(|peer| Some(peer.packets_sent as f64));
    let lost = each(|peer| Some(peer.packets_lost as f64));
    for prefix in ["millrace_path", "quic_transport_quinn_path"] {
        out.gauges(
            &format!("{prefix}_rtt_seconds"),
            "Smoothed round trip",
            rtt.clone(),
        )?;
        let name = format!("{prefix}_congestion_window");
        out.gauges(&name, "Congestion window in bytes", window.clone())?;
        out.gauges(
            &format!("{prefix}_sent_packets"),
            "Packets sent",
            sent.clone(),
        )?;
        out.gauges(
            &format!("{prefix}_lost_packets"),
            "Packets lost",
            lost.clone(),
        )?;
    }
    let probes = each(|peer| peer.probe_rtt.map(|rtt| rtt.as_secs_f64()));
    out.gauges(
        "millrace_path_probe_rtt_seconds",
        "Smoothed round trip of health probes",
        probes,
    )
}

/// The reference's names for what we count too.
fn reference(node: &Running, out: &mut Out<'_>) -> fmt::Result {
    let shards = node.transport.status().shards();
    let peers = node.peers().len() as u64;
    let up: u64 = shards.iter().map(|shard| shard.peers.len() as u64).sum();
    let handshakes: u64 = shards.iter().map(|shard| shard.handshakes as u64).sum();
    let topology = &node.topology;
    let inbound = total(node, Counter::ConnectionsIn);
    let outbound = total(node, Counter::ConnectionsOut);
    let refused = reasons(node)
        .get(&Family::Refused)
        .map_or(0, |all| all.values().sum());
    let gauges = [
        ("active_connections", "Connections that are up", up),
        ("peer_map_size", "Peers that are connected", peers),
        // The reference spells it so.
        (
            "toplogy_size",
            "Members of the subnet",
            topology.members.load(Ordering::Relaxed),
        ),
        ("connecting_connections", "Handshakes", handshakes),
    ];
    for (name, help, value) in gauges {
        out.gauge(&format!("quic_transport_{name}"), help, value)?;
    }
    let counters = [
        (
            "topology_changes",
            "Topology changes",
            topology.changes.load(Ordering::Relaxed),
        ),
        (
            "peers_removed",
            "Peers removed",
            topology.removed.load(Ordering::Relaxed),
        ),
        (
            "inbound_connection",
            "Connections that peers opened",
            inbound,
        ),
        (
            "outbound_connection",
            "Connections that we opened",
            outbound,
        ),
        (
            "incoming_streams",
            "Streams opened by peers",
            total(node, Counter::StreamsIn),
        ),
        (
            "outgoing_streams",
            "Streams opened by us",
            total(node, Counter::StreamsOut),
        ),
    ];
    for (name, help, value) in counters {
        out.counter(&format!("quic_transport_{name}"), help, value)?;
    }
    out.counters(
        "quic_transport_connection_results",
        "Handshakes by result",
        [
            (Some(("status", "success".to_owned())), inbound + outbound),
            (Some(("status", "failed".to_owned())), refused),
        ],
    )?;
    let by_class = |counters: [Counter; 3]| {
        let classes = ["latency", "normal", "bulk"].into_iter().zip(counters);
        classes.map(|(class, counter)| (Some(("handler", class.to_owned())), total(node, counter)))
    };
    let sent = [
        Counter::SentBytesLatency,
        Counter::SentBytesNormal,
        Counter::SentBytesBulk,
    ];
    let received = [
        Counter::ReceivedBytesLatency,
        Counter::ReceivedBytesNormal,
        Counter::ReceivedBytesBulk,
    ];
    out.counters(
        "quic_transport_connection_handle_bytes_sent",
        "Body bytes sent, by class",
        by_class(sent),
    )?;
    out.counters(
        "quic_transport_connection_handle_bytes_received",
        "Body bytes received, by class",
        by_class(received),
    )
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
