//! What a node says of itself: `/status`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::Instant;

use millrace_protocol::id::{ArtifactId, NodeId};
use millrace_protocol::names::NameStatus;
use millrace_protocol::score::AskOrder;
use serde::{Deserialize, Serialize};

use crate::core::Core;
use crate::edge::{EdgeStatus, Report};
use crate::host;
use crate::reference::Delivery;
use crate::tls_keys::wall_s;

/// The whole document.
#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    /// The node's id.
    pub node_id: String,
    /// Where the node listens.
    pub address: String,
    /// The program's version.
    pub version: String,
    /// Seconds since the start.
    pub uptime_seconds: f64,
    /// Whether the node can do its work.
    pub ready: bool,
    /// Why not.
    pub not_ready_because: Option<String>,
    /// Registry.
    pub registry: RegistryStatus,
    /// The TLS key and its certificate.
    #[serde(default)]
    pub tls: TlsStatus,
    /// Connections that are up.
    pub peers: Vec<Peer>,
    /// Shards.
    pub shards: Vec<Shard>,
    /// Artifacts.
    pub artifacts: Artifacts,
    /// The edge; none for a node without one.
    pub edge: Option<EdgeStatus>,
    /// Largest resident set of the process so far, bytes.
    pub rss_bytes_max: u64,
}

/// The registry, as the node sees it.
#[derive(Debug, Serialize, Deserialize)]
pub struct RegistryStatus {
    /// Newest version held; 0 before the first.
    pub newest_version: u64,
    /// Seconds since the node saw the newest version first, in this run or an earlier one; none
    /// before the first.
    pub age_seconds: Option<f64>,
    /// Why the newest version is not kept for the next run, or that of an earlier run cannot be
    /// read. A version that could not be written is not in force, and is tried again.
    pub kept_failure: Option<String>,
    /// Why the registry folder cannot be read.
    pub folder_failure: Option<String>,
    /// Members of the subnet, this node included.
    pub members: u64,
    /// Those that this node has no connection to, because `connections_max` is too small.
    pub members_left_out: u64,
    /// Records of the newest version that cannot be used.
    pub skipped_records: u64,
    /// How many versions were refused, by reason.
    pub refused_versions: BTreeMap<String, u64>,
    /// Names of hosts that are looked up.
    pub names: u64,
    /// Those whose last lookup failed.
    pub failing_names: Vec<FailingName>,
    /// Names beyond the bound, which are not looked up.
    pub names_left_out: u64,
}

/// The TLS key in use, and its certificate.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct TlsStatus {
    /// The public key of handshakes to come.
    pub key: String,
    /// How it stands to the keys that the registry names for this node: `newest`; `older`, and the
    /// newest is taken up soon; `newest_missing`, because its file is not here; `refused`, because
    /// none of them is here.
    pub standing: String,
    /// The newest key of the registry, if its file is not here.
    pub missing: Option<String>,
    /// Why a key or a certificate cannot be used.
    pub failure: Option<String>,
    /// Connections that were made with another key of this node than the newest of the registry.
    /// While there are any, the older key must not be retired.
    pub connections_by_older_key: usize,
    /// Seconds until the certificate says that it ends; it is renewed before.
    pub certificate_seconds_left: u64,
    /// Certificates made since the start.
    pub certificates_made: u64,
}

/// A name whose last lookup failed.
#[derive(Debug, Serialize, Deserialize)]
pub struct FailingName {
    /// The name.
    pub host: String,
    /// Why.
    pub reason: String,
    /// The last known addresses, which stay in use.
    pub addresses: Vec<IpAddr>,
}

/// A connection that is up.
#[derive(Debug, Serialize, Deserialize)]
pub struct Peer {
    /// The node's id.
    pub node_id: String,
    /// Number of the connection; larger is later.
    pub connection: u64,
    /// Where the peer is.
    pub address: Option<String>,
    /// The shard that owns the connection.
    pub shard: usize,
    /// Smoothed round trip of the path, microseconds.
    pub rtt_us: Option<u64>,
    /// What the connection is tuned for: `lan` or `wan`.
    pub path: String,
    /// The bandwidth of the path, as the node remembers it; absent while no body has filled it.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// Smoothed round trip of the health probes, microseconds.
    pub probe_rtt_us: Option<u64>,
    /// Congestion window, bytes.
    pub congestion_window_bytes: u64,
    /// UDP payload bytes of the largest packets sent now.
    pub udp_payload_bytes: usize,
    /// How often frames of the peer were read later, because they came faster than
    /// `frames_per_second_max`.
    #[serde(default)]
    pub frames_held: u64,
    /// Packets sent.
    pub packets_sent: u64,
    /// Packets lost.
    pub packets_lost: u64,
    /// Bytes sent.
    pub bytes_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
    /// Connections that were refused because another node has this one's key; 0 while no other
    /// comes.
    #[serde(default)]
    pub duplicates_refused: u64,
    /// How the peer served when it was asked for artifacts: 1 for each that it gave, less for what
    /// came late, not at all, or was something else. It halves every minute.
    #[serde(default)]
    pub score: f64,
    /// The peer is asked for artifacts after all others: it lately did not serve.
    #[serde(default)]
    pub is_asked_last: bool,
    /// The peer is not asked for artifacts: it lately sent other bytes than it was asked for.
    #[serde(default)]
    pub is_banned: bool,
}

/// A shard.
#[derive(Debug, Serialize, Deserialize)]
pub struct Shard {
    /// Connections, handshakes included.
    pub connections: usize,
    /// Handshakes.
    pub handshakes: usize,
    /// Heap bytes that QUIC holds for its connections.
    #[serde(default)]
    pub quic_heap_bytes: u64,
    /// Connections that were closed because their peers flooded them.
    #[serde(default)]
    pub floods_cut: u64,
    /// Bytes of the chunk pool that answers hold which their peers have not read.
    #[serde(default)]
    pub unread_answer_bytes: u64,
    /// Chunks of 1 MiB in the pool.
    pub chunks: usize,
    /// Chunks that are free.
    pub chunks_free: usize,
    /// Pages that the pool lies on.
    pub pages: String,
}

/// The store of the reference application.
#[derive(Debug, Serialize, Deserialize)]
pub struct Artifacts {
    /// Artifacts held.
    pub held: u64,
    /// Bytes.
    pub bytes: u64,
    /// Bytes that the store may hold.
    pub bytes_max: u64,
    /// Artifacts dropped to make room for new ones.
    pub dropped: u64,
    /// Of them, those of each publisher, by its node id; this node is one. Of the first 4,096 that
    /// lose one.
    #[serde(default)]
    pub dropped_of: BTreeMap<String, u64>,
}

/// The report of a `put`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Published {
    /// The artifact's id.
    pub id: String,
    /// Bytes.
    pub bytes: u64,
    /// What became of it at each peer.
    pub peers: Vec<PublishedPeer>,
}

/// What became of a `put` at one peer.
#[derive(Debug, Serialize, Deserialize)]
pub struct PublishedPeer {
    /// The node's id.
    pub node_id: String,
    /// Whether the peer holds the artifact now.
    pub there: bool,
    /// The outcome as a label.
    pub outcome: String,
}

impl Published {
    pub(crate) fn of(id: ArtifactId, bytes: u64, deliveries: &[(NodeId, Delivery)]) -> Self {
        let peers = deliveries.iter().map(|(peer, delivery)| PublishedPeer {
            node_id: peer.to_string(),
            there: delivery.is_there(),
            outcome: delivery.reason().to_owned(),
        });
        Self {
            id: id.to_string(),
            bytes,
            peers: peers.collect(),
        }
    }
}

pub(crate) fn of(core: &Core) -> Status {
    let summary = core.versions.summary();
    let readiness = core.readiness();
    let usage = core.artifacts.usage();
    let node_id = core.transport.node_id();
    Status {
        node_id: node_id.to_string(),
        address: core.transport.local_addr().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_seconds: core.started.elapsed().as_secs_f64(),
        ready: readiness.is_ok(),
        not_ready_because: readiness.err().map(|why| why.to_string()),
        registry: RegistryStatus {
            newest_version: summary.newest,
            age_seconds: summary.age.map(|age| age.as_secs_f64()),
            kept_failure: summary.kept_failure,
            folder_failure: summary.folder_failure,
            members: core.topology.members.load(Ordering::Relaxed),
            members_left_out: core.topology.left_out.load(Ordering::Relaxed),
            skipped_records: summary.skipped,
            refused_versions: summary
                .refused
                .into_iter()
                .map(|(reason, count)| (reason.to_owned(), count))
                .collect(),
            names: summary.names.len() as u64,
            failing_names: summary.names.into_iter().filter_map(failing).collect(),
            names_left_out: summary.names_left_out,
        },
        tls: tls(core),
        peers: peers(core),
        shards: shards(core),
        artifacts: Artifacts {
            held: usage.artifacts,
            bytes: usage.bytes,
            bytes_max: usage.bytes_max,
            dropped: usage.dropped,
            dropped_of: usage
                .dropped_of
                .into_iter()
                .map(|(of, count)| (of.unwrap_or(node_id).to_string(), count))
                .collect(),
        },
        edge: core.edge.as_ref().map(Report::status),
        rss_bytes_max: host::peak_rss().map_or(0, |size| size.0),
    }
}

pub(crate) fn tls(core: &Core) -> TlsStatus {
    let state = core.tls.state();
    let shards = core.transport.status().shards();
    TlsStatus {
        key: state.key.to_string(),
        standing: state.standing.label().to_owned(),
        missing: state.missing.map(|key| key.to_string()),
        failure: state.failure,
        connections_by_older_key: shards.iter().map(|shard| shard.by_older_key).sum(),
        certificate_seconds_left: state.validity.not_after_s().saturating_sub(wall_s()),
        certificates_made: state.certificates_made,
    }
}

fn failing(name: NameStatus) -> Option<FailingName> {
    Some(FailingName {
        reason: name.failure?,
        host: name.host.to_string(),
        addresses: name.addresses,
    })
}

fn peers(core: &Core) -> Vec<Peer> {
    let candidates = &core.artifacts.candidates;
    let now = Instant::now();
    let micros = |duration: std::time::Duration| u64::try_from(duration.as_micros()).unwrap_or(0);
    let peers = core
        .transport
        .status()
        .peers()
        .into_iter()
        .map(|peer| (candidates.ask_order(&peer.node_id, now), peer))
        .map(|(ask_order, peer)| Peer {
            score: candidates.points(&peer.node_id, now),
            is_asked_last: ask_order == AskOrder::Last,
            is_banned: ask_order == AskOrder::Banned,
            node_id: peer.node_id.to_string(),
            connection: peer.connection.0,
            address: peer.address.map(|address| address.to_string()),
            shard: peer.shard,
            rtt_us: peer.rtt.map(micros),
            path: peer.profile.label().to_owned(),
            bandwidth_bytes_per_s: peer.remembered.and_then(|path| path.bandwidth_bytes_per_s),
            probe_rtt_us: peer.probe_rtt.map(micros),
            congestion_window_bytes: peer.congestion_window_bytes,
            udp_payload_bytes: peer.udp_payload_bytes,
            frames_held: peer.frames_held,
            packets_sent: peer.packets_sent,
            packets_lost: peer.packets_lost,
            bytes_sent: peer.bytes_sent,
            bytes_received: peer.bytes_received,
            duplicates_refused: peer.duplicates_refused,
        });
    peers.collect()
}

fn shards(core: &Core) -> Vec<Shard> {
    let shards = core.transport.status().shards().into_iter().enumerate();
    shards
        .map(|(index, shard)| {
            let pool = core.transport.pool(index);
            Shard {
                connections: shard.connections,
                handshakes: shard.handshakes,
                quic_heap_bytes: shard.quic_heap_bytes,
                floods_cut: shard.floods_cut,
                unread_answer_bytes: shard.unread_answer_bytes,
                chunks: pool.map_or(0, |pool| pool.total_chunks()),
                chunks_free: pool.map_or(0, |pool| pool.free_chunks()),
                pages: pool.map_or_else(String::new, |pool| format!("{:?}", pool.page_kind())),
            }
        })
        .collect()
}
