//! The reference's names for what we count too, and which of its names we leave out.
//!
//! Its error labels name the outcome of an operation of its QUIC library; ours are counted once for
//! each connection or stream, so the label `quinn_api` is not there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::Ordering;

use millrace_transport::PeerStatus;
use millrace_transport::counters::{Counter, Family};

use super::{Label, Out, reasons, total};
use crate::core::Core;
use crate::peers::all;

/// One of the reference's metrics.
pub(super) struct Row {
    /// Name after `quic_transport_`; a counter's `_total` is added by the encoder.
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    /// What it is computed from.
    #[cfg_attr(not(test), expect(dead_code, reason = "for the reference page"))]
    pub(super) from: &'static str,
    pub(super) read: Read,
}

/// What a peer's connection shows.
pub(super) type OfPeer = fn(&PeerStatus) -> Option<f64>;

/// How its values are had, and thereby its type.
pub(super) enum Read {
    Gauge(fn(&Core) -> u64),
    Counter(fn(&Core) -> u64),
    Counters(fn(&Core) -> Vec<(Label<'static>, u64)>),
    /// One value for each peer.
    Path(OfPeer),
}

/// Names of the reference that are left out, and why: no metric gets a value that was not counted.
#[cfg(test)]
pub(super) const ABSENT: &[(&str, &str)] = &[
    (
        "delay_queue_size",
        "peers that wait to be dialled again: they are members without a connection, `millrace_topology_members` less \
         this node and `quic_transport_peer_map_size`",
    ),
    (
        "request_handle_bytes_received, request_handle_bytes_sent",
        "body bytes are counted by class and direction, not by request and answer; both are in \
         `quic_transport_connection_handle_bytes_*`",
    ),
    (
        "request_handle_requests_duration_seconds, connection_handle_duration_seconds",
        "requests are not timed one by one; `millrace_path_probe_rtt_seconds` is a round trip through both shards",
    ),
];

/// How a connection ended: our reason, the reference's label.
const ENDED: &[(&str, &str)] = &[
    ("timed_out", "timed_out_conn"),
    ("peer_done", "app_closed_conn"),
    ("peer_replaced", "app_closed_conn"),
    ("peer_closed", "app_closed_conn"),
    ("peer_transport_error", "transport_error_conn"),
    ("transport_error", "transport_error_conn"),
    ("done", "locally_closed_conn"),
    ("closed", "locally_closed_conn"),
    ("excessive_load", "locally_closed_conn"),
    ("flood_frames", "locally_closed_conn"),
    ("flood_answers", "locally_closed_conn"),
    ("flood_cancellations", "locally_closed_conn"),
    ("flood_unfinished_messages", "locally_closed_conn"),
    ("flood_stalled_messages", "locally_closed_conn"),
    ("flood_probes", "locally_closed_conn"),
    ("flood_packets", "locally_closed_conn"),
    ("flood_path_challenges", "locally_closed_conn"),
    ("flood_retired_ids", "locally_closed_conn"),
];

/// What became of a stream of a peer: our reason, the reference's label.
const REFUSED: &[(&str, &str)] = &[("peer_reset", "reset_stream")];

pub(super) const TABLE: &[Row] = &[
    Row {
        name: "active_connections",
        help: "Connections that are up",
        from: "`/status`, `peers`",
        read: Read::Gauge(|core| {
            let shards = core.transport.status().shards();
            shards.iter().map(|shard| shard.peers.len() as u64).sum()
        }),
    },
    Row {
        name: "peer_map_size",
        help: "Peers that are connected",
        from: "`/status`, different `node_id`s of `peers`",
        read: Read::Gauge(|core| all(&core.transport).len() as u64),
    },
    // The reference spells it so.
    Row {
        name: "toplogy_size",
        help: "Members of the subnet",
        from: "`millrace_topology_members`",
        read: Read::Gauge(|core| core.topology.members.load(Ordering::Relaxed)),
    },
    Row {
        name: "connecting_connections",
        help: "Handshakes",
        from: "`millrace_transport_handshakes_open`",
        read: Read::Gauge(|core| {
            let shards = core.transport.status().shards();
            shards.iter().map(|shard| shard.handshakes as u64).sum()
        }),
    },
    Row {
        name: "topology_changes",
        help: "Topology changes",
        from: "topologies that differ from the one before",
        read: Read::Counter(|core| core.topology.changes.load(Ordering::Relaxed)),
    },
    Row {
        name: "peers_removed",
        help: "Peers removed",
        from: "members that a topology change took away",
        read: Read::Counter(|core| core.topology.removed.load(Ordering::Relaxed)),
    },
    Row {
        name: "inbound_connection",
        help: "Connections that peers opened",
        from: "`millrace_transport_connections{direction=\"in\"}`",
        read: Read::Counter(|core| total(core, Counter::ConnectionsIn)),
    },
    Row {
        name: "outbound_connection",
        help: "Connections that we opened",
        from: "`millrace_transport_connections{direction=\"out\"}`",
        read: Read::Counter(|core| total(core, Counter::ConnectionsOut)),
    },
    Row {
        name: "connection_results",
        help: "Handshakes by result",
        from: "`status=\"success\"`: `millrace_transport_connections`; `status=\"failed\"`: \
               `millrace_transport_connections_refused`",
        read: Read::Counters(|core| {
            let succeeded =
                total(core, Counter::ConnectionsIn) + total(core, Counter::ConnectionsOut);
            let failed = sum(core, Family::Refused);
            [("success", succeeded), ("failed", failed)]
                .map(|(status, count)| (Some(("status", status.to_owned())), count))
                .to_vec()
        }),
    },
    Row {
        name: "closed_request_handler",
        help: "Connections whose requests are no longer answered",
        from: "`millrace_transport_connections_closed`, all reasons",
        read: Read::Counter(|core| sum(core, Family::Closed)),
    },
    Row {
        name: "connection_handle_errors",
        help: "Connections by how they ended",
        from: "`millrace_transport_connections_closed`, by `reason`",
        read: Read::Counters(|core| labelled(core, Family::Closed, ENDED)),
    },
    Row {
        name: "request_handle_errors",
        help: "Streams of peers that ended early",
        from: "`millrace_transport_messages_rejected{reason=\"peer_reset\"}`; answers on streams are in it",
        read: Read::Counters(|core| labelled(core, Family::Rejected, REFUSED)),
    },
    Row {
        name: "connection_handle_bytes_sent",
        help: "Body bytes sent, by class",
        from: "`millrace_transport_body_bytes_sent`; `handler` is the class, answers are in it",
        read: Read::Counters(|core| {
            let counters = [
                Counter::SentBytesLatency,
                Counter::SentBytesNormal,
                Counter::SentBytesBulk,
            ];
            by_class(core, counters)
        }),
    },
    Row {
        name: "connection_handle_bytes_received",
        help: "Body bytes received, by class",
        from: "`millrace_transport_body_bytes_received`; `handler` is the class, requests are in it",
        read: Read::Counters(|core| {
            let counters = [
                Counter::ReceivedBytesLatency,
                Counter::ReceivedBytesNormal,
                Counter::ReceivedBytesBulk,
            ];
            by_class(core, counters)
        }),
    },
    Row {
        name: "incoming_streams",
        help: "Streams opened by peers",
        from: "`millrace_transport_streams{direction=\"in\"}`",
        read: Read::Counter(|core| total(core, Counter::StreamsIn)),
    },
    Row {
        name: "outgoing_streams",
        help: "Streams opened by us",
        from: "`millrace_transport_streams{direction=\"out\"}`",
        read: Read::Counter(|core| total(core, Counter::StreamsOut)),
    },
    Row {
        name: "quinn_path_rtt_seconds",
        help: "Smoothed round trip",
        from: "`millrace_path_rtt_seconds`",
        read: Read::Path(|peer| peer.rtt.map(|rtt| rtt.as_secs_f64())),
    },
    Row {
        name: "quinn_path_congestion_window",
        help: "Congestion window in bytes",
        from: "`millrace_path_congestion_window`",
        read: Read::Path(|peer| Some(peer.congestion_window_bytes as f64)),
    },
    Row {
        name: "quinn_path_sent_packets",
        help: "Packets sent",
        from: "`millrace_path_sent_packets`",
        read: Read::Path(|peer| Some(peer.packets_sent as f64)),
    },
    Row {
        name: "quinn_path_lost_packets",
        help: "Packets lost",
        from: "`millrace_path_lost_packets`",
        read: Read::Path(|peer| Some(peer.packets_lost as f64)),
    },
];

pub(super) fn write(core: &Core, peers: &[PeerStatus], out: &mut Out<'_>) -> fmt::Result {
    for row in TABLE {
        let name = format!("quic_transport_{}", row.name);
        match row.read {
            Read::Gauge(value) => out.gauges(&name, row.help, [(None, value(core) as f64)])?,
            Read::Counter(value) => out.counters(&name, row.help, [(None, value(core))])?,
            Read::Counters(values) => out.counters(&name, row.help, values(core))?,
            Read::Path(value) => out.gauges(&name, row.help, each_peer(peers, value))?,
        }
    }
    Ok(())
}

/// One value for each peer: it may have several connections, and the first speaks for it.
pub(super) fn each_peer(peers: &[PeerStatus], value: OfPeer) -> Vec<(Label<'static>, f64)> {
    let mut seen = BTreeSet::new();
    peers
        .iter()
        .filter(|peer| seen.insert(peer.node_id))
        .filter_map(|peer| Some((Some(("peer", peer.node_id.to_string())), value(peer)?)))
        .collect()
}

fn by_class(core: &Core, counters: [Counter; 3]) -> Vec<(Label<'static>, u64)> {
    let classes = ["latency", "normal", "bulk"].into_iter().zip(counters);
    classes
        .map(|(class, counter)| (Some(("handler", class.to_owned())), total(core, counter)))
        .collect()
}

fn sum(core: &Core, family: Family) -> u64 {
    reasons(core)
        .get(&family)
        .map_or(0, |all| all.values().sum())
}

/// The reasons of a family under the reference's labels, those that have none left out.
fn labelled(
    core: &Core,
    family: Family,
    labels: &[(&str, &'static str)],
) -> Vec<(Label<'static>, u64)> {
    let all = reasons(core).remove(&family).unwrap_or_default();
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for (reason, label) in labels {
        *counts.entry(label).or_default() += all.get(reason).copied().unwrap_or(0);
    }
    counts
        .into_iter()
        .map(|(label, count)| (Some(("error", label.to_owned())), count))
        .collect()
}
