//! What a node is told: plain values, with the defaults that `millrace config default` prints.
//!
//! Bounds and documentation of every field stand in [`crate::schema`].

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};

use millrace_protocol::address::NodeAddress;
use millrace_protocol::tls_keys::Validity;
use serde::{Deserialize, Serialize};

use crate::units::{ByteSize, Period};

/// A key whose value is one of a few words.
pub trait Choice: Copy + Sized + 'static {
    /// The words, in the order of the documentation.
    const WORDS: &'static [&'static str];

    /// The choice that a word names; none if no choice has this word.
    fn from_word(word: &str) -> Option<Self>;

    /// The word in configs and on the command line.
    fn word(self) -> &'static str;
}

/// A choice: an enum, and the word of each of its values. The first one is the default.
macro_rules! choice {
    (
        $(#[$doc:meta])*
        $name:ident { $(#[$first_doc:meta])* $first:ident = $first_word:literal,
            $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)* }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
        pub enum $name {
            $(#[$first_doc])*
            #[default]
            #[serde(rename = $first_word)]
            $first,
            $($(#[$variant_doc])*
            #[serde(rename = $word)]
            $variant,)*
        }

        impl Choice for $name {
            const WORDS: &'static [&'static str] = &[$first_word, $($word),*];

            fn from_word(word: &str) -> Option<Self> {
                match word {
                    $first_word => Some(Self::$first),
                    $($word => Some(Self::$variant),)*
                    _ => None,
                }
            }

            fn word(self) -> &'static str {
                match self {
                    Self::$first => $first_word,
                    $(Self::$variant => $word,)*
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }
    };
}

choice! {
    /// Use of 2 MiB pages for the chunk pool.
    HugePages {
        /// Where there are some, else ordinary pages.
        Auto = "auto",
        /// Ordinary pages.
        Never = "never",
        /// 2 MiB pages, or the node does not start.
        Require = "require",
    }
}

choice! {
    /// How the size of packets is found.
    Mtu {
        /// By probes, up to `udp_payload_bytes_max`.
        Discover = "discover",
        /// All packets have `udp_payload_bytes_max` from the start.
        Fixed = "fixed",
    }
}

choice! {
    /// What connections are tuned for.
    PathChoice {
        /// For the RTT of each peer.
        Auto = "auto",
        /// For short paths.
        Lan = "lan",
        /// For long paths.
        Wan = "wan",
    }
}

choice! {
    /// Whether the allocator of the program must count for `quic_heap_bytes_max`.
    HeapCount {
        /// The node does not start where it does not.
        Require = "require",
        /// The node starts, and nothing bounds what peers make QUIC hold.
        Optional = "optional",
    }
}

choice! {
    /// Where in the kernel the edge's program runs.
    XdpMode {
        /// In the driver where it can, else in the kernel's generic code.
        Auto = "auto",
        /// In the driver, or not at all.
        Native = "native",
        /// In the kernel's generic code.
        Generic = "generic",
    }
}

choice! {
    /// Whether the edge refuses.
    EdgeMode {
        /// It counts what it would refuse.
        Count = "count",
        /// It refuses.
        Enforce = "enforce",
    }
}

choice! {
    /// Which ports the edge decides about.
    EdgeScope {
        /// Those of this node.
        Ports = "ports",
        /// All ports of the host.
        Host = "host",
    }
}

choice! {
    /// What becomes of sources that no rule names.
    DefaultAction {
        /// Their packets are dropped.
        Deny = "deny",
        /// Their packets pass.
        Allow = "allow",
    }
}

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
    /// `[edge]`
    pub edge: EdgeSection,
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
    /// How long a certificate says that it is valid.
    pub certificate_lifetime: Period,
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
    /// Nodes to ask for versions while none is held.
    pub seeds: Vec<Seed>,
    /// How often the folder is read.
    pub poll_interval: Period,
    /// Longest time between two lookups of a name.
    pub resolve_interval: Period,
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

/// A node that is known before any registry version is: written `<public key>@<address>`, or
/// `<public key>/<TLS key>@<address>` for a node that has rotated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seed {
    /// Its identity key: 64 hexadecimal digits.
    pub public_key: String,
    /// Its TLS key, to which the connection is pinned like any other; none: the identity key.
    pub tls_key: Option<String>,
    /// Where it listens.
    pub address: NodeAddress,
}

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.public_key)?;
        if let Some(tls_key) = &self.tls_key {
            write!(f, "/{tls_key}")?;
        }
        write!(f, "@{}", self.address)
    }
}

/// The most shards of a node: their number fits the byte of a connection ID that steers a packet.
pub const SHARDS_MAX: usize = 255;

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
    pub rx_slots: u64,
    /// Receive slots it may grow to when starved.
    pub rx_slots_max: u64,
    /// Send slots (64 KiB each) at start.
    pub tx_slots: u64,
    /// Send slots it may grow to.
    pub tx_slots_max: u64,
    /// Receive completions handled per turn.
    pub receive_batch: u64,
    /// Messages from other threads that may wait.
    pub mailbox_capacity: u64,
    /// Memory for bodies at most.
    pub chunk_pool_bytes: ByteSize,
    /// Of it, what is there from the start, and kept free ahead of need.
    pub chunk_pool_ahead_bytes: ByteSize,
    /// Use of 2 MiB pages for the pool.
    pub huge_pages: HugePages,
}

/// QUIC connections, RPC and bodies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransportSection {
    /// Largest UDP payload sent.
    pub udp_payload_bytes_max: ByteSize,
    /// A PING is sent when a connection was silent this long.
    pub keep_alive: Period,
    /// How the size of packets is found.
    pub mtu: Mtu,
    /// Silence after which a connection is lost.
    pub idle_timeout: Period,
    /// Time a handshake and the peer's hello may take, on both sides.
    pub connect_timeout: Period,
    /// First delay before a failed peer is dialled again; doubles with jitter up to
    /// redial_delay_max.
    pub redial_delay_min: Period,
    /// Longest delay between dials.
    pub redial_delay_max: Period,
    /// How long a replaced or stopping connection may finish what it carries.
    pub drain_timeout: Period,
    /// Connections to each peer, spread over the shards.
    pub connections_per_peer: u64,
    /// What connections are tuned for.
    pub path: PathChoice,
    /// Peers whose connections are tuned for short paths, whatever `path` says.
    pub lan_peers: Vec<String>,
    /// Peers whose connections are tuned for long paths, whatever `path` says.
    pub wan_peers: Vec<String>,
    /// The longest round trip of a short path.
    pub lan_rtt_max: Period,
    /// Initial congestion window over a short path, in packets.
    pub lan_initial_window_packets: u64,
    /// Least initial congestion window over a long path, in packets.
    pub wan_initial_window_packets: u64,
    /// Bytes that a peer may have in flight to this node, unread, on a connection over a short
    /// path.
    pub lan_connection_window_bytes: ByteSize,
    /// Bytes that a peer may have in flight to this node, unread, on one stream over a short path.
    pub lan_stream_window_bytes: ByteSize,
    /// As `lan_connection_window_bytes`, over a long path.
    pub wan_connection_window_bytes: ByteSize,
    /// As `lan_stream_window_bytes`, over a long path.
    pub wan_stream_window_bytes: ByteSize,
    /// Packets of a hundred that may be lost on a long path before it counts as full.
    pub wan_loss_percent: u64,
    /// Unidirectional streams a peer may have open to us.
    pub streams_max: u64,
    /// Long-lived streams of small messages for the normal class.
    pub lanes: u64,
    /// Bytes of small messages of the latency class that may wait to be sent to a peer; the next
    /// one is refused.
    pub lane_queue_latency_bytes: ByteSize,
    /// Bytes of small messages of the normal class that may wait to be sent to a peer; the next one
    /// is refused.
    pub lane_queue_normal_bytes: ByteSize,
    /// Bytes of small messages of the bulk class that may wait to be sent to a peer; the next one
    /// is refused.
    pub lane_queue_bulk_bytes: ByteSize,
    /// Messages of the latency class with a stream of their own that may wait or be in flight to a
    /// peer.
    pub stream_queue_latency_max: u64,
    /// Messages of the normal class with a stream of their own that may wait or be in flight to a
    /// peer.
    pub stream_queue_normal_max: u64,
    /// Messages of the bulk class with a stream of their own that may wait or be in flight to a
    /// peer.
    pub stream_queue_bulk_max: u64,
    /// Bytes of answers with a stream of their own that may wait for a peer on a connection.
    pub answer_queue_bytes: ByteSize,
    /// Bytes that may wait for all peers of a shard together.
    pub queue_bytes_max: ByteSize,
    /// Message streams of one class that are fed at the same time.
    pub streams_active_max: u64,
    /// Our requests of the latency class in flight to a peer.
    pub requests_out_latency_max: u64,
    /// Our requests of the normal class in flight to a peer.
    pub requests_out_normal_max: u64,
    /// Our requests of the bulk class in flight to a peer.
    pub requests_out_bulk_max: u64,
    /// A peer's requests of the latency class in flight at us.
    pub requests_in_latency_max: u64,
    /// A peer's requests of the normal class in flight at us.
    pub requests_in_normal_max: u64,
    /// A peer's requests of the bulk class in flight at us.
    pub requests_in_bulk_max: u64,
    /// Chunk memory one peer may hold reserved on a shard for bodies that are arriving.
    pub receive_budget_peer_bytes: ByteSize,
    /// Chunk memory all peers together may hold reserved on a shard for bodies that are arriving.
    pub receive_budget_bytes: ByteSize,
    /// Bytes of small bodies beside the pool that all peers of a shard may make it hold.
    pub inline_bytes_max: ByteSize,
    /// What a message stream must bring in each stream_progress_interval, or be done; otherwise it
    /// is refused.
    pub stream_progress_bytes: ByteSize,
    /// How often the progress of a message stream is judged.
    pub stream_progress_interval: Period,
    /// How long a request with a long body or answer waits while nothing comes forward.
    pub body_patience: Period,
    /// The least rate that is expected of bodies, bytes in a second.
    pub body_bytes_per_second_min: ByteSize,
    /// Longest body on a lane; a longer one gets a stream of its own.
    pub lane_body_bytes_max: ByteSize,
    /// Longest body that is accepted.
    pub body_bytes_max: ByteSize,
    /// Interval of health probes to every peer.
    pub probe_interval: Period,
    /// Probes lost in a row before a connection is given up and the peer dialled again, if nothing
    /// else arrives meanwhile.
    pub probe_failures_max: u64,
    /// Connections one shard holds, handshakes included.
    pub connections_max: u64,
    /// Probes that a shard sends in a second to all its peers together.
    pub probes_per_second_max: u64,
    /// Dials of a shard under way that are not slow.
    pub dials_max: u64,
    /// Connections of these that have not finished their handshake.
    pub handshakes_max: u64,
    /// Heap bytes that QUIC may hold for all connections of a shard.
    pub quic_heap_bytes_max: ByteSize,
    /// Whether the allocator of the program must count for `quic_heap_bytes_max`.
    pub heap_count: HeapCount,
    /// Frames of a peer that a connection takes in a second.
    pub frames_per_second_max: u64,
    /// Packets one connection may send in a turn of the shard's loop.
    pub packets_per_turn: u64,
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
    /// Bodies held; the oldest of the publisher that holds most go first.
    pub store_bytes: ByteSize,
}

/// What the kernel refuses before it reaches a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeSection {
    /// Interfaces that carry the program; none: user space enforces the limits alone.
    pub interfaces: Vec<String>,
    /// Where in the kernel the program runs.
    pub xdp: XdpMode,
    /// Whether the program refuses.
    pub mode: EdgeMode,
    /// Which ports the program decides about.
    pub scope: EdgeScope,
    /// Folder of pinned programs, maps and links.
    pub pins: String,
    /// What becomes of sources that no rule names.
    pub default_action: DefaultAction,
    /// Roles of this node, for rules of the scope `role:NAME`.
    pub roles: Vec<String>,
    /// TCP ports of this node.
    pub tcp_ports: Vec<u64>,
    /// UDP ports of this node besides the transport's.
    pub udp_ports: Vec<u64>,
    /// New QUIC connections of one source per minute.
    pub quic_per_minute: u64,
    /// New QUIC connections of one source at once.
    pub quic_burst: u64,
    /// QUIC connections of one source.
    pub quic_connections_max: u64,
    /// Half-open QUIC handshakes of one source.
    pub quic_half_open_max: u64,
    /// Half-open QUIC handshakes of one registry peer.
    pub peer_half_open_max: u64,
    /// New TCP connections of one source per minute.
    pub tcp_per_minute: u64,
    /// New TCP connections of one source at once.
    pub tcp_burst: u64,
    /// TCP connections of one source.
    pub tcp_connections_max: u64,
    /// Unvalidated handshakes of all sources per second.
    pub unvalidated_per_second: u64,
    /// SYNs of all sources per second.
    pub syn_per_second: u64,
    /// Handshakes of one registry peer per second.
    pub peer_per_second: u64,
    /// Packets under one connection ID per second, under stress.
    pub id_packets_per_second: u64,
    /// Rules of one set.
    pub rules_max: u64,
    /// Dense trie nodes (1 KiB, and a quarter of that for sparse ones) of one set, for each family.
    pub trie_nodes_max: u64,
    /// Buckets (64 bytes, eight sources) of one generation of the limiter.
    pub limiter_buckets: u64,
    /// Sources with connections.
    pub sources_max: u64,
    /// Registry peers with a proof.
    pub peers_max: u64,
    /// How long counts and stress hold after the node wrote them last.
    pub lease: Period,
    /// Every Nth drop of a core is reported as an event; 0: none.
    pub sample_every: u64,
}

impl Default for EdgeSection {
    fn default() -> Self {
        Self {
            interfaces: Vec::new(),
            xdp: XdpMode::Auto,
            mode: EdgeMode::Count,
            scope: EdgeScope::Ports,
            pins: "/run/millrace/edge".into(),
            default_action: DefaultAction::Deny,
            roles: Vec::new(),
            tcp_ports: Vec::new(),
            udp_ports: Vec::new(),
            // The reference's figures for a source.
            quic_per_minute: 1_000,
            quic_burst: 500,
            quic_connections_max: 100,
            // A sixty-fourth of a shard's handshakes, and two restarts of a peer with all its
            // connections.
            quic_half_open_max: 16,
            peer_half_open_max: 16,
            tcp_per_minute: 1_000,
            tcp_burst: 500,
            tcp_connections_max: 1_000,
            unvalidated_per_second: 2_000,
            syn_per_second: 2_000,
            peer_per_second: 50,
            id_packets_per_second: 2_000_000,
            rules_max: 4_096,
            trie_nodes_max: 16_384,
            limiter_buckets: 65_536,
            sources_max: 65_536,
            peers_max: 4_096,
            lease: Period::secs(2),
            sample_every: 0,
        }
    }
}

impl Default for NodeSection {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/millrace".into(),
            key_file: "node.key".into(),
            subnet: None,
            certificate_lifetime: Period::secs(Validity::LIFETIME_DEFAULT.as_secs()),
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
            resolve_interval: Period::secs(60),
            versions_max: 32,
        }
    }
}

impl Default for ShardProfile {
    fn default() -> Self {
        Self {
            spin: Period::micros(20),
            ring_entries: 512,
            rx_slots: 8,
            rx_slots_max: 256,
            tx_slots: 32,
            tx_slots_max: 256,
            receive_batch: 8,
            mailbox_capacity: 4096,
            chunk_pool_bytes: ByteSize::mib(768),
            chunk_pool_ahead_bytes: ByteSize::mib(32),
            huge_pages: HugePages::Auto,
        }
    }
}

impl Default for TransportSection {
    fn default() -> Self {
        Self {
            udp_payload_bytes_max: ByteSize(1452),
            mtu: Mtu::Discover,
            keep_alive: Period::secs(1),
            idle_timeout: Period::secs(15),
            connect_timeout: Period::secs(20),
            redial_delay_min: Period::millis(50),
            redial_delay_max: Period::secs(10),
            drain_timeout: Period::secs(2),
            connections_per_peer: 1,
            path: PathChoice::Auto,
            lan_peers: Vec::new(),
            wan_peers: Vec::new(),
            lan_rtt_max: Period::millis(5),
            lan_initial_window_packets: 128,
            wan_initial_window_packets: 512,
            lan_connection_window_bytes: ByteSize::mib(4),
            lan_stream_window_bytes: ByteSize::mib(1),
            wan_connection_window_bytes: ByteSize::mib(32),
            wan_stream_window_bytes: ByteSize::mib(16),
            wan_loss_percent: 5,
            streams_max: 1024,
            lanes: 4,
            lane_queue_latency_bytes: ByteSize::mib(1),
            lane_queue_normal_bytes: ByteSize::mib(4),
            lane_queue_bulk_bytes: ByteSize::mib(4),
            stream_queue_latency_max: 1024,
            stream_queue_normal_max: 1024,
            stream_queue_bulk_max: 256,
            answer_queue_bytes: ByteSize::mib(8),
            queue_bytes_max: ByteSize::mib(128),
            streams_active_max: 8,
            requests_out_latency_max: 4096,
            requests_out_normal_max: 4096,
            requests_out_bulk_max: 256,
            requests_in_latency_max: 4096,
            requests_in_normal_max: 4096,
            requests_in_bulk_max: 256,
            receive_budget_peer_bytes: ByteSize::mib(256),
            receive_budget_bytes: ByteSize::mib(512),
            inline_bytes_max: ByteSize::mib(32),
            stream_progress_bytes: ByteSize::kib(64),
            stream_progress_interval: Period::secs(5),
            body_patience: Period::secs(30),
            body_bytes_per_second_min: ByteSize(125_000),
            lane_body_bytes_max: ByteSize::kib(16),
            body_bytes_max: ByteSize::mib(128),
            probe_interval: Period::secs(1),
            probe_failures_max: 10,
            // 128 whole connections beside the handshakes: three of the largest subnets.
            connections_max: 1152,
            probes_per_second_max: 64,
            dials_max: 32,
            handshakes_max: 1024,
            quic_heap_bytes_max: ByteSize::mib(512),
            heap_count: HeapCount::Require,
            frames_per_second_max: 4_000_000,
            packets_per_turn: 180,
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
