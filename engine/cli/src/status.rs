//! What a node says of itself: `/status`, and `millrace status` which prints it.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use millrace_edge::state::Refused;
use millrace_protocol::id::{ArtifactId, NodeId};
use serde::{Deserialize, Serialize};

use crate::admin::client;
use crate::cli::StatusArgs;
use crate::edge::keeper::{EdgeView, held};
use crate::exit::{Exit, Failure};
use crate::host_facts;
use crate::output;
use crate::running::{Delivery, Running};

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) node_id: String,
    pub(crate) address: String,
    pub(crate) version: String,
    pub(crate) uptime_seconds: f64,
    pub(crate) ready: bool,
    pub(crate) not_ready_because: Option<String>,
    pub(crate) registry: RegistryStatus,
    pub(crate) peers: Vec<Peer>,
    pub(crate) shards: Vec<Shard>,
    pub(crate) artifacts: Artifacts,
    pub(crate) edge: Option<EdgeStatus>,
    pub(crate) rss_bytes_max: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RegistryStatus {
    pub(crate) newest_version: u64,
    pub(crate) members: u64,
    pub(crate) skipped_records: u64,
    pub(crate) refused_versions: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Peer {
    pub(crate) node_id: String,
    pub(crate) connection: u64,
    pub(crate) address: Option<String>,
    pub(crate) shard: usize,
    pub(crate) rtt_us: Option<u64>,
    pub(crate) probe_rtt_us: Option<u64>,
    pub(crate) congestion_window_bytes: u64,
    pub(crate) packets_sent: u64,
    pub(crate) packets_lost: u64,
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Shard {
    pub(crate) connections: usize,
    pub(crate) handshakes: usize,
    pub(crate) chunks: usize,
    pub(crate) chunks_free: usize,
    pub(crate) pages: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Artifacts {
    pub(crate) held: u64,
    pub(crate) bytes: u64,
    pub(crate) bytes_max: u64,
    pub(crate) dropped: u64,
}

/// Who refuses at the node's edge; `millrace xdp status` says more.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct EdgeStatus {
    /// `kernel`, or `user_space`: caps and rates alone, behind the socket.
    pub(crate) place: String,
    /// How packets find their shard: `ebpf`, `classic`, `none`.
    pub(crate) steering: String,
    pub(crate) stress: u32,
    /// Of the rules in force.
    pub(crate) registry_version: u64,
    /// A newer version whose rules are refused, and why.
    pub(crate) refused: Option<Refused>,
    /// Interfaces that were removed; the program is put on them again when they are back.
    pub(crate) interfaces_gone: Vec<String>,
}

impl EdgeStatus {
    fn of(view: &EdgeView) -> Self {
        Self {
            place: view.place().to_owned(),
            steering: view.steering.to_owned(),
            stress: view.stress.load(Ordering::Relaxed),
            registry_version: view.registry_version.load(Ordering::Relaxed),
            refused: held(&view.refused_now).clone(),
            interfaces_gone: held(&view.gone).clone(),
        }
    }
}

/// The report of a `put`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Published {
    pub(crate) id: String,
    pub(crate) bytes: u64,
    pub(crate) peers: Vec<PublishedPeer>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PublishedPeer {
    pub(crate) node_id: String,
    /// Whether the peer holds the artifact now.
    pub(crate) there: bool,
    pub(crate) outcome: String,
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

pub(crate) fn of(node: &Running) -> Status {
    let summary = node.versions.summary();
    let readiness = node.readiness();
    let usage = node.store.usage();
    Status {
        node_id: node.node_id().to_string(),
        address: node.address().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_seconds: node.started.elapsed().as_secs_f64(),
        ready: readiness.is_ok(),
        not_ready_because: readiness.err().map(str::to_owned),
        registry: RegistryStatus {
            newest_version: summary.newest,
            members: node.topology.members.load(Ordering::Relaxed),
            skipped_records: summary.skipped,
            refused_versions: summary
                .refused
                .into_iter()
                .map(|(reason, count)| (reason.to_owned(), count))
                .collect(),
        },
        peers: peers(node),
        shards: shards(node),
        artifacts: Artifacts {
            held: usage.artifacts,
            bytes: usage.bytes,
            bytes_max: usage.bytes_max,
            dropped: usage.dropped,
        },
        edge: node.edge.as_deref().map(EdgeStatus::of),
        rss_bytes_max: host_facts::peak_rss().map_or(0, |size| size.0),
    }
}

fn peers(node: &Running) -> Vec<Peer> {
    let micros = |duration: std::time::Duration| u64::try_from(duration.as_micros()).unwrap_or(0);
    let peers = node
        .transport
        .status()
        .peers()
        .into_iter()
        .map(|peer| Peer {
            node_id: peer.node_id.to_string(),
            connection: peer.connection.0,
            address: peer.address.map(|address| address.to_string()),
            shard: peer.shard,
            rtt_us: peer.rtt.map(micros),
            probe_rtt_us: peer.probe_rtt.map(micros),
            congestion_window_bytes: peer.congestion_window_bytes,
            packets_sent: peer.packets_sent,
            packets_lost: peer.packets_lost,
            bytes_sent: peer.bytes_sent,
            bytes_received: peer.bytes_received,
        });
    peers.collect()
}

fn shards(node: &Running) -> Vec<Shard> {
    let shards = node.transport.status().shards().into_iter().enumerate();
    shards
        .map(|(index, shard)| {
            let pool = node.transport.pool(index);
            Shard {
                connections: shard.connections,
                handshakes: shard.handshakes,
                chunks: pool.map_or(0, |pool| pool.total_chunks()),
                chunks_free: pool.map_or(0, |pool| pool.free_chunks()),
                pages: pool.map_or_else(String::new, |pool| format!("{:?}", pool.page_kind())),
            }
        })
        .collect()
}

/// `millrace status`
pub(crate) fn run(args: &StatusArgs) -> Result<Exit, Failure> {
    let socket = client::socket_of(&args.admin)?;
    let document = client::get_text(&socket, "/status")?;
    let status: Status = serde_json::from_str(&document)
        .map_err(|error| Failure::new(Exit::Failed, format!("the node's status: {error}")))?;
    if args.json {
        output::json(&status)?;
        return Ok(Exit::Ok);
    }
    print(&status)?;
    Ok(Exit::Ok)
}

fn print(status: &Status) -> Result<(), Failure> {
    let ready = status.not_ready_because.as_deref().unwrap_or("ready");
    output::data(format_args!("node       {}", status.node_id))?;
    output::data(format_args!("address    {}", status.address))?;
    output::data(format_args!(
        "state      {ready}, up {:.0} s",
        status.uptime_seconds
    ))?;
    output::data(format_args!(
        "registry   version {}, {} members",
        status.registry.newest_version, status.registry.members
    ))?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    output::data(format_args!(
        "artifacts  {} held, {:.1} of {:.1} MiB",
        status.artifacts.held,
        mib(status.artifacts.bytes),
        mib(status.artifacts.bytes_max)
    ))?;
    if let Some(edge) = &status.edge {
        output::data(format_args!(
            "edge       {}, stress {}, rules of registry version {}, steering {}",
            match edge.place.as_str() {
                "kernel" => "in the kernel",
                _ => "user space only: caps and rates, no firewall",
            },
            edge.stress,
            edge.registry_version,
            edge.steering
        ))?;
        if let Some(refused) = &edge.refused {
            output::data(format_args!(
                "           registry version {} is refused: {}",
                refused.registry_version, refused.message
            ))?;
        }
        if !edge.interfaces_gone.is_empty() {
            let gone = edge.interfaces_gone.join(", ");
            output::data(format_args!("           not on {gone}, which is gone"))?;
        }
    }
    for (index, shard) in status.shards.iter().enumerate() {
        output::data(format_args!(
            "shard {index}    {} connections, {} of {} chunks free",
            shard.connections, shard.chunks_free, shard.chunks
        ))?;
    }
    for peer in &status.peers {
        output::data(format_args!(
            "peer       {}  {}  connection {}  rtt {} us  sent {:.1} MiB  received {:.1} MiB",
            peer.node_id,
            peer.address.as_deref().unwrap_or("-"),
            peer.connection,
            peer.rtt_us
                .map_or_else(|| "-".to_owned(), |rtt| rtt.to_string()),
            mib(peer.bytes_sent),
            mib(peer.bytes_received),
        ))?;
    }
    Ok(())
}
