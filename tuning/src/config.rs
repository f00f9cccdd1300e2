//! What a node is told: plain values, with the defaults that `millrace config default` prints.
//!
//! Bounds and documentation of every field stand in [`crate::schema`].

use std::net::{Ipv4Addr, SocketAddr};

use crate::units::{ByteSize, Period};

/// A whole config file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeConfig {
    /// `[node]`
    pub node: NodeSection,
    /// `[listen]`
    pub listen: ListenSection,
    /// `[registry]`
    pub registry: RegistrySection,
    /// `[shards]` and `[[shards.core]]`
    pub shards: ShardsSection,
    /// `[transport]`
    pub transport: TransportSection,
    /// `[admin]`
    pub admin: AdminSection,
    /// `[artifacts]`
    pub artifacts: ArtifactsSection,
}

/// Who the node is and where it keeps what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSection {
    /// Folder of everything the node writes.
    pub state_dir: String,
    /// Ed25519 seed, relative to `state_dir`.
    pub key_file: String,
    /// Subnet to join; absent: the first one in the registry that lists the node.
    pub subnet: Option<String>,
}

/// The UDP socket of the transport.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenSection {
    /// Address all shards listen on.
    pub address: SocketAddr,
    /// Receive buffer per socket.
    pub receive_buffer_bytes: ByteSize,
    /// Send buffer per socket.
    pub send_buffer_bytes: ByteSize,
}

/// Where signed registry versions come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistrySection {
    /// Folder of signed versions, relative to `state_dir`.
    pub dir: String,
    /// Key that signs the versions: 64 hexadecimal digits.
    pub public_key: String,
    /// Nodes to ask for newer versions.
    pub seeds: Vec<SocketAddr>,
    /// How often the folder is read.
    pub poll_interval: Period,
    /// Versions held at once.
    pub versions_max: u64,
}

/// Which cores run shards, and how.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ShardsSection {
    /// The cores.
    pub cores: Cores,
    /// Values for every core.
    pub defaults: ShardProfile,
    /// Cores with values of their own.
    pub core: Vec<CoreProfile>,
}

/// Cores that run a shard each.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Cores {
    /// Every core the process may run on.
    #[default]
    Auto,
    /// These.
    List(Vec<u64>),
}

/// One `[[shards.core]]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CoreProfile {
    /// The core it is about.
    pub cpu: u64,
    /// Values of this core, those of `[shards]` where not written.
    pub profile: ShardProfile,
}

/// What one shard may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardProfile {
    /// How long an idle shard looks for work before it sleeps.
    pub spin: Period,
    /// Entries of the submission ring.
    pub ring_entries: u64,
    /// Receive slots (64 KiB each) at start.
    pub receive_slots: u64,
    /// Receive slots it may grow to when starved.
    pub receive_slots_max: u64,
    /// Send slots (64 KiB each) at start.
    pub send_slots: u64,
    /// Send slots it may grow to.
    pub send_slots_max: u64,
    /// Receive completions handled per turn.
    pub receive_batch: u64,
    /// Messages from other threads that may wait.
    pub mailbox_capacity: u64,
    /// Memory for bodies.
    pub chunk_pool_bytes: ByteSize,
    /// Use of 2 MiB pages for the pool: `auto`, `never`, `require`.
    pub huge_pages: String,
}

/// QUIC connections, RPC and bodies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransportSection {
    /// Interval of keep-alives.
    pub keep_alive: Period,
    /// Silence after which a connection is lost.
    pub idle_timeout: Period,
    /// Time a handshake may take.
    pub connect_timeout: Period,
    /// First wait before a redial.
    pub redial_min: Period,
    /// Longest wait before a redial.
    pub redial_max: Period,
    /// UDP payload offered to the path.
    pub max_udp_payload_bytes: ByteSize,
    /// Congestion control: `cubic` or `bbr2`.
    pub congestion_control: String,
    /// Bytes a peer may have in flight to us on one connection.
    pub connection_window_bytes: ByteSize,
    /// Bytes a peer may have in flight to us on one stream.
    pub stream_window_bytes: ByteSize,
    /// Streams a peer may have open.
    pub streams_max: u64,
    /// Long-lived streams for small messages.
    pub lanes: u64,
    /// Connections held at once.
    pub connections_max: u64,
    /// Messages that may wait for one peer.
    pub send_queue_messages: u64,
    /// Bytes that may wait for one peer.
    pub send_queue_bytes: ByteSize,
    /// Latency requests in flight to a peer, and from it.
    pub rpc_latency_max: u64,
    /// Normal requests in flight to a peer, and from it.
    pub rpc_normal_max: u64,
    /// Bulk requests in flight to a peer, and from it.
    pub rpc_bulk_max: u64,
    /// Longest body.
    pub body_bytes_max: ByteSize,
    /// Chunks one peer may reserve for bodies.
    pub receive_budget_peer_bytes: ByteSize,
    /// Chunks all peers together may reserve.
    pub receive_budget_total_bytes: ByteSize,
    /// Time a body may stand still.
    pub body_stall_timeout: Period,
    /// Interval of health probes.
    pub probe_interval: Period,
    /// Probes missed in a row before a peer is redialled.
    pub probes_missed_max: u64,
}

/// The admin socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminSection {
    /// Unix socket, relative to `state_dir`.
    pub socket: String,
    /// Clients at once.
    pub connections_max: u64,
    /// Time a request's header may take.
    pub header_timeout: Period,
    /// Time a request's body may stand still.
    pub body_timeout: Period,
}

/// The store of the reference application.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArtifactsSection {
    /// Bodies held; the oldest go first.
    pub store_bytes: ByteSize,
}

impl Default for NodeSection {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/millrace".into(),
            key_file: "node.key".into(),
            subnet: None,
        }
    }
}

impl Default for ListenSection {
    fn default() -> Self {
        Self {
            // The reference's port, so that firewalls need no new rule.
            address: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 4100)),
            receive_buffer_bytes: ByteSize::mib(8),
            send_buffer_bytes: ByteSize::mib(8),
        }
    }
}

impl Default for RegistrySection {
    fn default() -> Self {
        Self {
            dir: "registry".into(),
            public_key: String::new(),
            seeds: Vec::new(),
            poll_interval: Period::secs(3),
            versions_max: 256,
        }
    }
}

impl Default for ShardProfile {
    fn default() -> Self {
        Self {
            spin: Period::micros(20),
            ring_entries: 512,
            receive_slots: 8,
            receive_slots_max: 256,
            send_slots: 32,
            send_slots_max: 256,
            receive_batch: 8,
            mailbox_capacity: 4096,
            chunk_pool_bytes: ByteSize::mib(512),
            huge_pages: "auto".into(),
        }
    }
}

impl Default for TransportSection {
    fn default() -> Self {
        Self {
            keep_alive: Period::secs(1),
            idle_timeout: Period::secs(3),
            connect_timeout: Period::secs(10),
            redial_min: Period::millis(50),
            redial_max: Period::secs(10),
            max_udp_payload_bytes: ByteSize(1452),
            congestion_control: "cubic".into(),
            connection_window_bytes: ByteSize::mib(16),
            stream_window_bytes: ByteSize::mib(16),
            streams_max: 1024,
            lanes: 4,
            connections_max: 1024,
            send_queue_messages: 8192,
            send_queue_bytes: ByteSize::mib(4),
            rpc_latency_max: 1024,
            rpc_normal_max: 4096,
            rpc_bulk_max: 16,
            body_bytes_max: ByteSize::mib(128),
            receive_budget_peer_bytes: ByteSize::mib(256),
            receive_budget_total_bytes: ByteSize::mib(384),
            body_stall_timeout: Period::secs(10),
            probe_interval: Period::secs(1),
            probes_missed_max: 3,
        }
    }
}

impl Default for AdminSection {
    fn default() -> Self {
        Self {
            socket: "admin.sock".into(),
            connections_max: 32,
            header_timeout: Period::secs(5),
            body_timeout: Period::secs(30),
        }
    }
}

impl Default for ArtifactsSection {
    fn default() -> Self {
        Self {
            store_bytes: ByteSize::mib(256),
        }
    }
}

impl ShardsSection {
    /// The profile of one core: its own `[[shards.core]]`, or the values of `[shards]`.
    pub fn profile_of(&self, cpu: u64) -> &ShardProfile {
        self.core
            .iter()
            .find(|core| core.cpu == cpu)
            .map_or(&self.defaults, |core| &core.profile)
    }

    /// The cores that run a shard, given those the process may run on.
    pub fn cpus(&self, usable: &[u64]) -> Vec<u64> {
        match &self.cores {
            Cores::Auto => usable.to_vec(),
            Cores::List(list) => list.clone(),
        }
    }
}
