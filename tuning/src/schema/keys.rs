//! The rows. Order here is the order of the printed config.

use super::value::Setting;
use super::{Field, Kind, Presence, SHARDS_NAME, Section};
use crate::config::{
    Choice as _, CoreProfile, DefaultAction, EdgeMode, EdgeScope, HeapCount, HugePages, Mtu,
    NodeConfig, PathChoice, XdpMode,
};
use crate::units::{ByteSize, Period};

/// A row: `field!(NodeConfig, "name", path.to.the.field, kind, "doc")`, with `required` or
/// `optional` and an example before the doc where there is no default.
macro_rules! field {
    ($config:ty, $name:literal, $($path:ident).+, $kind:expr, $doc:literal) => {
        field!(@row $config, $name, $($path).+, $kind, Presence::Default, "", $doc)
    };
    ($config:ty, $name:literal, $($path:ident).+, $kind:expr, required $example:literal, $doc:literal) => {
        field!(@row $config, $name, $($path).+, $kind, Presence::Required, $example, $doc)
    };
    ($config:ty, $name:literal, $($path:ident).+, $kind:expr, optional $example:literal, $doc:literal) => {
        field!(@row $config, $name, $($path).+, $kind, Presence::Optional, $example, $doc)
    };
    (@row $config:ty, $name:literal, $($path:ident).+, $kind:expr, $presence:expr, $example:literal, $doc:literal) => {
        Field {
            name: $name,
            kind: $kind,
            presence: $presence,
            doc: $doc,
            example: $example,
            set: |config: &mut $config, value| {
                config.$($path).+ = Setting::from_value(value)?;
                Ok(())
            },
            get: |config: &$config| config.$($path).+.to_value(),
        }
    };
}

/// The keys of a [`crate::config::ShardProfile`], for `[shards]` and for `[[shards.core]]`, after
/// `$first`.
macro_rules! with_profile {
    ($config:ty, $($profile:ident).+, $first:expr) => {
        &[
            $first,
            field!($config, "spin", $($profile).+.spin, duration(Period::micros(0), Period::secs(3600)),
                "How long an idle shard looks for work before it sleeps. \"0s\" sleeps at once, \"1h\" never sleeps."),
            field!($config, "ring_entries", $($profile).+.ring_entries, integer(64, 32_768),
                "Entries of the shard's io_uring submission ring."),
            field!($config, "rx_slots", $($profile).+.rx_slots, integer(2, 4096),
                "Receive slots of 64 KiB at start. They grow to rx_slots_max when the kernel finds none."),
            field!($config, "rx_slots_max", $($profile).+.rx_slots_max, integer(2, 4096),
                "Receive slots the shard may grow to."),
            field!($config, "tx_slots", $($profile).+.tx_slots, integer(2, 4096),
                "Send slots of 64 KiB at start: packets wait here until the kernel has taken them."),
            field!($config, "tx_slots_max", $($profile).+.tx_slots_max, integer(2, 4096),
                "Send slots the shard may grow to."),
            field!($config, "receive_batch", $($profile).+.receive_batch, integer(1, 256),
                "Receive completions handled before the shard sends again."),
            field!($config, "mailbox_capacity", $($profile).+.mailbox_capacity, integer(64, 1 << 20),
                "Messages from other threads that may wait for the shard."),
            field!($config, "chunk_pool_bytes", $($profile).+.chunk_pool_bytes, bytes(ByteSize::mib(2), ByteSize::gib(512)),
                "Memory for bodies at most. What was needed once is not given back to the system."),
            field!($config, "chunk_pool_ahead_bytes", $($profile).+.chunk_pool_ahead_bytes, bytes(ByteSize::mib(1), ByteSize::gib(512)),
                "Memory of the pool that is there from the start, and kept free ahead of need while the pool grows. With chunk_pool_bytes here the pool has all its memory from the start."),
            field!($config, "huge_pages", $($profile).+.huge_pages, Kind::Choice(HugePages::WORDS),
                "2 MiB pages for the chunk pool. \"auto\" takes ordinary pages when there are none, \"require\" refuses to start."),
        ]
    };
}

pub(super) static CORE: &[Field<CoreProfile>] = with_profile!(
    CoreProfile,
    profile,
    field!(CoreProfile, "cpu", cpu, integer(0, 4095), required "1", "The core these values are for.")
);

pub(super) static SECTIONS: &[Section] = &[
    Section {
        name: "node",
        doc: "The node's identity, and its folders.",
        fields: &[
            field!(
                NodeConfig,
                "state_dir",
                node.state_dir,
                Kind::Path,
                "Folder of everything the node writes. A relative path starts at the config file's folder."
            ),
            field!(
                NodeConfig,
                "key_file",
                node.key_file,
                Kind::Path,
                "The node's secret identity key, made by `millrace keygen`; its TLS keys lie beside it. A relative path starts at state_dir."
            ),
            field!(
                NodeConfig,
                "subnet",
                node.subnet,
                Kind::Name,
                optional "\"<subnet id>\"",
                "Subnet to join. When absent: the first subnet of the registry that lists this node."
            ),
            field!(
                NodeConfig,
                "certificate_lifetime",
                node.certificate_lifetime,
                duration(Period::secs(3), Period::secs(366 * 86_400)),
                "How long a TLS certificate says that it is valid. The node makes a new one after two thirds of that. Peers check keys, not dates: this is for programs that check dates."
            ),
        ],
    },
    Section {
        name: "listen",
        doc: "The UDP socket of the transport.",
        fields: &[
            field!(
                NodeConfig,
                "address",
                listen.address,
                Kind::Address,
                "Address and port on which all shards receive. With `0.0.0.0` or `[::]` a node answers from the address that its peer asked."
            ),
            field!(
                NodeConfig,
                "receive_buffer_bytes",
                listen.receive_buffer_bytes,
                bytes(ByteSize::kib(64), ByteSize::gib(1)),
                "Receive buffer of each shard's socket. Above net.core.rmem_max only root gets it."
            ),
            field!(
                NodeConfig,
                "send_buffer_bytes",
                listen.send_buffer_bytes,
                bytes(ByteSize::kib(64), ByteSize::gib(1)),
                "Send buffer of each shard's socket. Above net.core.wmem_max only root gets it."
            ),
        ],
    },
    Section {
        name: "registry",
        doc: "Sources of signed registry versions.",
        fields: &[
            field!(
                NodeConfig,
                "dir",
                registry.dir,
                Kind::Path,
                "Folder of signed versions, kept by `millrace registry`. A relative path starts at state_dir."
            ),
            field!(
                NodeConfig,
                "public_key",
                registry.public_key,
                Kind::PublicKey,
                required "\"<64 hexadecimal digits printed by `millrace registry init`>\"",
                "The key that signs registry versions. A version that it did not sign is refused."
            ),
            field!(
                NodeConfig,
                "seeds",
                registry.seeds,
                Kind::Seeds,
                "Nodes to ask for registry versions while none is held: \"<public key>@<host>:<port>\" each, the host by its IP address or name; \"<public key>/<TLS key>@<host>:<port>\" for a node whose TLS key was rotated."
            ),
            field!(
                NodeConfig,
                "poll_interval",
                registry.poll_interval,
                duration(Period::millis(50), Period::secs(3600)),
                "How often the folder is read for new versions."
            ),
            field!(
                NodeConfig,
                "resolve_interval",
                registry.resolve_interval,
                duration(Period::secs(5), Period::secs(86_400)),
                "How long a host's name stands for the addresses of its last lookup. It is looked up every 5 s while a node of it is not connected, or the lookup fails; then the last known addresses stay in use."
            ),
            field!(
                NodeConfig,
                "versions_max",
                registry.versions_max,
                integer(2, 65_536),
                "Versions held in memory at once."
            ),
        ],
    },
    Section {
        name: SHARDS_NAME,
        doc: "Cores that run a shard each, and the resources of a shard. `[[shards.core]]` overrides them for one core.",
        fields: with_profile!(
            NodeConfig,
            shards.defaults,
            field!(
                NodeConfig,
                "cores",
                shards.cores,
                Kind::Cores,
                "Cores that run a shard each: \"auto\" is every core the process may run on."
            )
        ),
    },
    Section {
        name: "transport",
        doc: "QUIC connections, requests and bodies.",
        fields: &[
            field!(
                NodeConfig,
                "udp_payload_bytes_max",
                transport.udp_payload_bytes_max,
                bytes(ByteSize(1200), ByteSize(16_383)),
                "Largest UDP payload sent. 1452B fits an Ethernet path, 8972B one with jumbo frames end to end."
            ),
            field!(
                NodeConfig,
                "mtu",
                transport.mtu,
                Kind::Choice(Mtu::WORDS),
                "Whether a path's MTU is discovered from 1200 up to udp_payload_bytes_max (RFC 8899), or taken as given."
            ),
            field!(
                NodeConfig,
                "keep_alive",
                transport.keep_alive,
                duration(Period::millis(10), Period::secs(60)),
                "A PING is sent when a connection was silent this long."
            ),
            field!(
                NodeConfig,
                "idle_timeout",
                transport.idle_timeout,
                duration(Period::millis(50), Period::secs(600)),
                "Silence after which a connection is lost. The default holds on a round trip of 619 ms with 13 % loss."
            ),
            field!(
                NodeConfig,
                "connect_timeout",
                transport.connect_timeout,
                duration(Period::millis(50), Period::secs(600)),
                "Time a handshake and the peer's hello may take, on both sides."
            ),
            field!(
                NodeConfig,
                "redial_delay_min",
                transport.redial_delay_min,
                duration(Period::millis(1), Period::secs(60)),
                "First delay before a failed peer is dialled again; doubles with jitter up to redial_delay_max."
            ),
            field!(
                NodeConfig,
                "redial_delay_max",
                transport.redial_delay_max,
                duration(Period::millis(1), Period::secs(3600)),
                "Longest delay between dials."
            ),
            field!(
                NodeConfig,
                "drain_timeout",
                transport.drain_timeout,
                duration(Period::millis(1), Period::secs(60)),
                "How long a replaced or stopping connection may go on with messages that it has begun."
            ),
            field!(
                NodeConfig,
                "connections_per_peer",
                transport.connections_per_peer,
                integer(1, 8),
                "Connections to each peer, spread over the shards."
            ),
            field!(
                NodeConfig,
                "path",
                transport.path,
                Kind::Choice(PathChoice::WORDS),
                "What connections are tuned for: \"lan\" is CUBIC with small windows, \"wan\" is paced BBR with large ones, \"auto\" chooses for each peer by the round trip that is remembered of it. An unknown peer counts as far, and is dialled again when it turns out to be near."
            ),
            field!(
                NodeConfig,
                "lan_peers",
                transport.lan_peers,
                Kind::Nodes,
                "Peers whose connections are tuned for short paths, whatever path says."
            ),
            field!(
                NodeConfig,
                "wan_peers",
                transport.wan_peers,
                Kind::Nodes,
                "Peers whose connections are tuned for long paths, whatever path says."
            ),
            field!(
                NodeConfig,
                "lan_rtt_max",
                transport.lan_rtt_max,
                duration(Period::micros(100), Period::secs(1)),
                "Longest round trip that \"auto\" counts as a short path."
            ),
            field!(
                NodeConfig,
                "lan_initial_window_packets",
                transport.lan_initial_window_packets,
                integer(2, 4096),
                "Initial congestion window over a short path, in packets."
            ),
            field!(
                NodeConfig,
                "wan_initial_window_packets",
                transport.wan_initial_window_packets,
                integer(2, 4096),
                "Initial congestion window over a long path, in packets; a larger one where more bandwidth is remembered. They leave within one round trip. Lower it to 128 where a path carries less than 20 Mbit/s."
            ),
            field!(
                NodeConfig,
                "lan_connection_window_bytes",
                transport.lan_connection_window_bytes,
                bytes(ByteSize::kib(64), ByteSize::gib(1)),
                "Bytes that a peer may have in flight to this node, unread, on a connection over a short path. 4MiB suit Ethernet, 8MiB jumbo frames."
            ),
            field!(
                NodeConfig,
                "lan_stream_window_bytes",
                transport.lan_stream_window_bytes,
                bytes(ByteSize::kib(64), ByteSize::gib(1)),
                "Bytes that a peer may have in flight to this node, unread, on one stream over a short path; they delay later packets. 1MiB suits Ethernet, 4MiB jumbo frames."
            ),
            field!(
                NodeConfig,
                "wan_connection_window_bytes",
                transport.wan_connection_window_bytes,
                bytes(ByteSize::kib(64), ByteSize::gib(1)),
                "As lan_connection_window_bytes, over a long path."
            ),
            field!(
                NodeConfig,
                "wan_stream_window_bytes",
                transport.wan_stream_window_bytes,
                bytes(ByteSize::kib(64), ByteSize::gib(1)),
                "As lan_stream_window_bytes, over a long path: a body comes at most at this divided by the round trip. 16MiB are 895 Mbit/s at 150 ms."
            ),
            field!(
                NodeConfig,
                "wan_loss_percent",
                transport.wan_loss_percent,
                integer(1, 50),
                "Packets of a hundred that a long path may lose before the node takes it for full and sends less. It must be above the loss that the path has by itself. A lower value starts to send less sooner on a link that is full."
            ),
            field!(
                NodeConfig,
                "streams_max",
                transport.streams_max,
                integer(8, 65_536),
                "Unidirectional streams that a peer may have open to this node."
            ),
            field!(
                NodeConfig,
                "lanes",
                transport.lanes,
                integer(1, 16),
                "Long-lived streams of small messages for the normal class."
            ),
            field!(
                NodeConfig,
                "lane_queue_latency_bytes",
                transport.lane_queue_latency_bytes,
                bytes(ByteSize::kib(64), ByteSize::gib(1)),
                "Bytes of small messages of the latency class that may wait to be sent to a peer; the next one is refused."
            ),
            field!(
                NodeConfig,
                "lane_queue_normal_bytes",
                transport.lane_queue_normal_bytes,
                bytes(ByteSize::kib(64), ByteSize::gib(1)),
                "Bytes of small messages of the normal class that may wait to be sent to a peer; the next one is refused."
            ),
            field!(
                NodeConfig,
                "lane_queue_bulk_bytes",
                transport.lane_queue_bulk_bytes,
                bytes(ByteSize::kib(64), ByteSize::gib(1)),
                "Bytes of small messages of the bulk class that may wait to be sent to a peer; the next one is refused."
            ),
            field!(
                NodeConfig,
                "stream_queue_latency_max",
                transport.stream_queue_latency_max,
                integer(1, 65_536),
                "Messages of the latency class with a stream of their own that may wait or be in flight to a peer."
            ),
            field!(
                NodeConfig,
                "stream_queue_normal_max",
                transport.stream_queue_normal_max,
                integer(1, 65_536),
                "Messages of the normal class with a stream of their own that may wait or be in flight to a peer."
            ),
            field!(
                NodeConfig,
                "stream_queue_bulk_max",
                transport.stream_queue_bulk_max,
                integer(1, 65_536),
                "Messages of the bulk class with a stream of their own that may wait or be in flight to a peer."
            ),
            field!(
                NodeConfig,
                "answer_queue_bytes",
                transport.answer_queue_bytes,
                bytes(ByteSize::kib(64), ByteSize::gib(1)),
                "Bytes of answers with a stream of their own that may wait for a peer on a connection; the next one is refused as Busy, and one that is longer as TooLarge. Those that lie in chunks, as artifacts do, are counted apart: see receive_budget_peer_bytes."
            ),
            field!(
                NodeConfig,
                "queue_bytes_max",
                transport.queue_bytes_max,
                bytes(ByteSize::mib(1), ByteSize::gib(64)),
                "Bytes that may wait for all peers of a shard together: on lanes, and answers that do not lie in chunks. A peer for which some wait gets more only while no more than what stays free would wait for it."
            ),
            field!(
                NodeConfig,
                "streams_active_max",
                transport.streams_active_max,
                integer(1, 1024),
                "Message streams of one class that are fed at the same time."
            ),
            field!(
                NodeConfig,
                "requests_out_latency_max",
                transport.requests_out_latency_max,
                integer(1, 65_536),
                "Requests of this node, latency class, in flight to a peer."
            ),
            field!(
                NodeConfig,
                "requests_out_normal_max",
                transport.requests_out_normal_max,
                integer(1, 65_536),
                "Requests of this node, normal class, in flight to a peer."
            ),
            field!(
                NodeConfig,
                "requests_out_bulk_max",
                transport.requests_out_bulk_max,
                integer(1, 65_536),
                "Requests of this node, bulk class, in flight to a peer."
            ),
            field!(
                NodeConfig,
                "requests_in_latency_max",
                transport.requests_in_latency_max,
                integer(1, 65_536),
                "Requests of a peer, latency class, that this node serves at a time."
            ),
            field!(
                NodeConfig,
                "requests_in_normal_max",
                transport.requests_in_normal_max,
                integer(1, 65_536),
                "Requests of a peer, normal class, that this node serves at a time."
            ),
            field!(
                NodeConfig,
                "requests_in_bulk_max",
                transport.requests_in_bulk_max,
                integer(1, 65_536),
                "Requests of a peer, bulk class, that this node serves at a time."
            ),
            field!(
                NodeConfig,
                "receive_budget_peer_bytes",
                transport.receive_budget_peer_bytes,
                bytes(ByteSize::mib(1), ByteSize::gib(512)),
                "Chunk memory that bodies of one peer may take on a shard, arriving or kept. Counted apart, the bodies of answers that peers have not read may take as much on a shard, each body once, at most half of receive_budget_bytes; one peer alone reaches half of that, and the next answer is refused as Busy. One answer of any length may wait alone."
            ),
            field!(
                NodeConfig,
                "receive_budget_bytes",
                transport.receive_budget_bytes,
                bytes(ByteSize::mib(1), ByteSize::gib(512)),
                "Chunk memory that bodies of all peers together may take on a shard, arriving or kept; one peer alone reaches half of it."
            ),
            field!(
                NodeConfig,
                "inline_bytes_max",
                transport.inline_bytes_max,
                bytes(ByteSize::mib(1), ByteSize::gib(64)),
                "Bytes of bodies up to 64 KiB that all peers together may make a shard hold beside the chunk pool, each of them at most 1 MiB; further ones lie in the pool."
            ),
            field!(
                NodeConfig,
                "stream_progress_bytes",
                transport.stream_progress_bytes,
                bytes(ByteSize(1), ByteSize::mib(128)),
                "Bytes that a message stream must bring in each stream_progress_interval unless it ends; otherwise it is refused. As many of an answer must be taken by its peer, or it is cut."
            ),
            field!(
                NodeConfig,
                "stream_progress_interval",
                transport.stream_progress_interval,
                duration(Period::millis(100), Period::secs(600)),
                "How often the progress of a message stream is judged; 20 round trips where that is longer, up to a minute."
            ),
            field!(
                NodeConfig,
                "body_patience",
                transport.body_patience,
                duration(Period::millis(100), Period::secs(3600)),
                "How long a request with a long body or answer waits for its turn or its answer while nothing comes forward; also the time of a peer to store a body before it answers."
            ),
            field!(
                NodeConfig,
                "body_bytes_per_second_min",
                transport.body_bytes_per_second_min,
                bytes(ByteSize(1_000), ByteSize::gib(1)),
                "Least rate that is expected of bodies. Peers are told a deadline of body_patience and the length at this rate, 18 minutes for 128MiB; a replaced connection may go on for as long. A body that comes forward may be slower."
            ),
            field!(
                NodeConfig,
                "lane_body_bytes_max",
                transport.lane_body_bytes_max,
                bytes(ByteSize::kib(1), ByteSize::kib(64)),
                "Longest body on a lane; a longer one gets a stream of its own."
            ),
            field!(
                NodeConfig,
                "body_bytes_max",
                transport.body_bytes_max,
                bytes(ByteSize::mib(1), ByteSize::mib(128)),
                "Longest body that is accepted."
            ),
            field!(
                NodeConfig,
                "probe_interval",
                transport.probe_interval,
                duration(Period::millis(10), Period::secs(60)),
                "Interval of health probes to every peer."
            ),
            field!(
                NodeConfig,
                "probe_failures_max",
                transport.probe_failures_max,
                integer(1, 64),
                "Probes lost in a row before a connection is given up and the peer dialled again, if no other packet arrives meanwhile."
            ),
            field!(
                NodeConfig,
                "connections_max",
                transport.connections_max,
                integer(2, 65_536),
                "Connections one shard holds, handshakes included: three for each of its peers (in use, replacing, draining), which are kept for peers, and 16 for others, at the least. `check` says what the registry's members need."
            ),
            field!(
                NodeConfig,
                "probes_per_second_max",
                transport.probes_per_second_max,
                integer(1, 1_000_000),
                "Probes that a shard sends in a second to all its peers together. With more peers each is probed, and kept alive, less often, down to four times in idle_timeout."
            ),
            field!(
                NodeConfig,
                "dials_max",
                transport.dials_max,
                integer(1, 65_535),
                "Dials of a shard under way, but for those that have taken two seconds; further peers wait for their turn."
            ),
            field!(
                NodeConfig,
                "handshakes_max",
                transport.handshakes_max,
                integer(1, 65_535),
                "Connections of these that others began and that have not finished their handshake; the last sixteenth is for registry peers that prove themselves. The memory budget counts the others, connections_max less this, in full."
            ),
            field!(
                NodeConfig,
                "quic_heap_bytes_max",
                transport.quic_heap_bytes_max,
                bytes(ByteSize::mib(16), ByteSize::gib(64)),
                "Heap bytes that QUIC may hold for all connections of a shard: what came and cannot be read yet, its own state, and a quarter more for what the allocator rounds up. Above it, the connection that holds most is closed; and each one above twice its window and 1 MiB."
            ),
            field!(
                NodeConfig,
                "heap_count",
                transport.heap_count,
                Kind::Choice(HeapCount::WORDS),
                "For programs that embed a node: whether their allocator must count what QUIC holds, as that of millrace does. With \"optional\" a node starts where it does not, and quic_heap_bytes_max bounds nothing."
            ),
            field!(
                NodeConfig,
                "frames_per_second_max",
                transport.frames_per_second_max,
                integer(100_000, 1_000_000_000),
                "Frames of a peer that a connection takes in a second, where each stream counts as 8. Above it they are read later, and a connection that stays above it is closed within some 10 s. 650,000 requests in a second were measured on one connection."
            ),
            field!(
                NodeConfig,
                "packets_per_turn",
                transport.packets_per_turn,
                integer(1, 4096),
                "Packets one connection may send in a turn of the shard's loop."
            ),
        ],
    },
    Section {
        name: "admin",
        doc: "The admin socket: metrics, health, status and artifacts over HTTP on a Unix socket.",
        fields: &[
            field!(
                NodeConfig,
                "socket",
                admin.socket,
                Kind::Path,
                "The Unix socket. A relative path starts at state_dir."
            ),
            field!(
                NodeConfig,
                "connections_max",
                admin.connections_max,
                integer(1, 1024),
                "Clients at once; the next one waits."
            ),
            field!(
                NodeConfig,
                "header_timeout",
                admin.header_timeout,
                duration(Period::millis(100), Period::secs(600)),
                "Time the header of a request may take."
            ),
            field!(
                NodeConfig,
                "body_timeout",
                admin.body_timeout,
                duration(Period::millis(100), Period::secs(600)),
                "Time the body of a request may stand still."
            ),
        ],
    },
    Section {
        name: "artifacts",
        doc: "The store of the reference application.",
        fields: &[field!(
            NodeConfig,
            "store_bytes",
            artifacts.store_bytes,
            bytes(ByteSize::mib(1), ByteSize::gib(512)),
            "Bodies held in chunks of the pool; for new ones, the oldest of the publisher that holds most are dropped."
        )],
    },
    Section {
        name: "edge",
        doc: "Firewall, rates and caps that the kernel enforces before a packet reaches a socket. See docs/operating/edge.md.",
        fields: &[
            field!(
                NodeConfig,
                "interfaces",
                edge.interfaces,
                Kind::Names,
                "Interfaces that carry the program. None: no program, and user space enforces the limits alone."
            ),
            field!(
                NodeConfig,
                "xdp",
                edge.xdp,
                Kind::Choice(XdpMode::WORDS),
                "Where the program runs: in the driver (\"native\"), behind it (\"generic\"), or \"auto\": native where the driver can."
            ),
            field!(
                NodeConfig,
                "mode",
                edge.mode,
                Kind::Choice(EdgeMode::WORDS),
                "\"count\" passes everything and counts what would have been refused, while the node itself holds caps and rates, as without a program; \"enforce\" refuses it."
            ),
            field!(
                NodeConfig,
                "scope",
                edge.scope,
                Kind::Choice(EdgeScope::WORDS),
                "\"ports\" owns this node's ports and leaves all other traffic to the host; \"host\" owns all of it, but for answers to what the host sent."
            ),
            field!(
                NodeConfig,
                "pins",
                edge.pins,
                Kind::Path,
                "Folder of pinned programs, maps and links, which stay in force after the node has ended."
            ),
            field!(
                NodeConfig,
                "default_action",
                edge.default_action,
                Kind::Choice(DefaultAction::WORDS),
                "Action for sources that no rule of the registry names. Registry members are allowed by a rule of their own."
            ),
            field!(
                NodeConfig,
                "roles",
                edge.roles,
                Kind::Names,
                "Roles of this node: rules of the scope `role:NAME` apply to it."
            ),
            field!(
                NodeConfig,
                "tcp_ports",
                edge.tcp_ports,
                Kind::Ports,
                "TCP ports of this node, under the limits below."
            ),
            field!(
                NodeConfig,
                "udp_ports",
                edge.udp_ports,
                Kind::Ports,
                "UDP ports of this node besides the transport's; only the firewall applies to them."
            ),
            field!(
                NodeConfig,
                "quic_per_minute",
                edge.quic_per_minute,
                integer(1, 60_000_000),
                "New QUIC connections of one source (IPv4 address, IPv6 /64) per minute; four times that for its /24 or /56, sixteen times for its /48."
            ),
            field!(
                NodeConfig,
                "quic_burst",
                edge.quic_burst,
                integer(1, 1_000_000),
                "New QUIC connections that one source may open at once."
            ),
            field!(
                NodeConfig,
                "quic_connections_max",
                edge.quic_connections_max,
                integer(1, 1_000_000),
                "QUIC connections of one source at a time."
            ),
            field!(
                NodeConfig,
                "quic_half_open_max",
                edge.quic_half_open_max,
                integer(2, 65_536),
                "Half-open QUIC handshakes of one source (IPv4 address, IPv6 /64), on all shards together; twice that for its /24 or /56, four times for its /48. At most half of each without a token: more are answered by a Retry. With a token, more are dropped. transport.connect_timeout ends them."
            ),
            field!(
                NodeConfig,
                "peer_half_open_max",
                edge.peer_half_open_max,
                integer(8, 65_536),
                "Half-open QUIC handshakes of one registry peer that proved itself, from all addresses together; no source counts them."
            ),
            field!(
                NodeConfig,
                "tcp_per_minute",
                edge.tcp_per_minute,
                integer(1, 60_000_000),
                "New TCP connections of one source per minute, and of its prefixes as with quic_per_minute."
            ),
            field!(
                NodeConfig,
                "tcp_burst",
                edge.tcp_burst,
                integer(1, 1_000_000),
                "New TCP connections that one source may open at once."
            ),
            field!(
                NodeConfig,
                "tcp_connections_max",
                edge.tcp_connections_max,
                integer(1, 1_000_000),
                "TCP connections of one source at a time."
            ),
            field!(
                NodeConfig,
                "unvalidated_per_second",
                edge.unvalidated_per_second,
                integer(1, 10_000_000),
                "Handshakes of all sources whose address is not validated; more are answered by a Retry."
            ),
            field!(
                NodeConfig,
                "syn_per_second",
                edge.syn_per_second,
                integer(1, 10_000_000),
                "SYNs of all sources; more go to the listener until its queue is full (net.ipv4.tcp_syncookies 1), are answered by SYN cookies (then, and with 2), or dropped (0)."
            ),
            field!(
                NodeConfig,
                "peer_per_second",
                edge.peer_per_second,
                integer(1, 1_000_000),
                "First packets of one registry peer that proved itself."
            ),
            field!(
                NodeConfig,
                "id_packets_per_second",
                edge.id_packets_per_second,
                integer(1_000, 100_000_000),
                "Packets under one connection ID, while there is stress."
            ),
            field!(
                NodeConfig,
                "rules_max",
                edge.rules_max,
                integer(1, 65_534),
                "Rules of one set; a larger set is refused as a whole."
            ),
            field!(
                NodeConfig,
                "trie_nodes_max",
                edge.trie_nodes_max,
                integer(64, 1 << 20),
                "Dense trie nodes of one set for each family, 1 KiB each, and a quarter of that for sparse ones; two sets at a time. A larger set is refused as a whole."
            ),
            field!(
                NodeConfig,
                "limiter_buckets",
                edge.limiter_buckets,
                integer(1_024, 1 << 20),
                "Buckets of one generation of the limiter: 64 bytes for eight sources, two generations. A power of two."
            ),
            field!(
                NodeConfig,
                "sources_max",
                edge.sources_max,
                integer(1_024, 1 << 22),
                "Sources with connections that are counted at a time."
            ),
            field!(
                NodeConfig,
                "peers_max",
                edge.peers_max,
                integer(16, 65_536),
                "Registry peers whose proofs are known."
            ),
            field!(
                NodeConfig,
                "lease",
                edge.lease,
                duration(Period::millis(200), Period::secs(60)),
                "How long counts and stress hold after the node wrote them last, so that those of a dead node end."
            ),
            field!(
                NodeConfig,
                "sample_every",
                edge.sample_every,
                integer(0, 1 << 30),
                "Every Nth drop of a core is reported as an event. 0 reports none."
            ),
        ],
    },
];

const fn integer(min: u64, max: u64) -> Kind {
    Kind::Integer { min, max }
}

const fn bytes(min: ByteSize, max: ByteSize) -> Kind {
    Kind::Bytes { min, max }
}

const fn duration(min: Period, max: Period) -> Kind {
    Kind::Duration { min, max }
}
