//! The types and numbers that programs and user space share, as `bpf/abi.h` defines them.
//!
//! A test compares every size, every offset and the order of the reasons with the BTF of the
//! objects. No type has padding or invalid bit patterns, so any memory of a map is a value of its
//! type (`maps.rs`).

use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::siphash::Key as SipKey;
use millrace_edge_policy::trie;

/// Number of this layout. A binary adopts no maps that were pinned under another.
pub const LAYOUT: u32 = 4;
/// Number of generations, of the operator's settings and of the sketch.
pub const GENERATIONS: usize = 2;
/// The most services that can be declared.
pub const SERVICES_MAX: usize = 16;
/// The most levels of a source.
pub const LEVELS_MAX: usize = 3;
/// Number of keys that can be valid at a time.
pub const KEYS: usize = 4;
/// Number of ports of a protocol.
pub const PORTS: usize = 65_536;
/// Number of global budgets.
pub const BUDGETS: usize = 5;
/// Number of reasons, and so of counters.
pub const REASONS: usize = millrace_edge_policy::reason::Reason::ALL.len();
/// Rule number of a packet that the default decided.
pub const RULE_DEFAULT: u32 = 0xffff;
/// Set in an entry of a trie that is a leaf.
pub const LEAF: u32 = trie::LEAF;
/// Set in an entry that is no leaf, if its index is that of a sparse node.
pub const SPARSE: u32 = trie::SPARSE;
/// Service number of a packet that is for no service.
pub const SERVICE_NONE: u32 = u32::MAX;
/// Bits of a value of the map `tcp_sources` that count connections.
pub const TCP_CONNECTIONS: u64 = 0xffff_ffff;
/// Bit of a value of `tcp_sources` that no program counts in any more.
pub const TCP_DEAD: u64 = 1 << 63;
/// Largest segment in the SYN cookies of `edge_test`, in bytes.
pub const MOCK_MSS: u16 = 1460;
/// First word of a stamp; the second is [`STAMP_PASS`] or [`STAMP_REJECT`].
pub const STAMP_MAGIC: u32 = 0x4d52_4745;
/// The table lets the packet in.
pub const STAMP_PASS: u32 = 1;
/// The table answers the packet with a refusal.
pub const STAMP_REJECT: u32 = 2;
/// Bytes of a stamp that passes.
pub const STAMP_PASS_BYTES: usize = 8;
/// Bytes of a stamp that refuses.
pub const STAMP_REJECT_BYTES: usize = 12;

/// `edge_config::mode`: the program counts what it would drop, and passes it.
pub const MODE_COUNT: u32 = 0;
/// `edge_config::mode`: the program drops what the rules and limits refuse.
pub const MODE_ENFORCE: u32 = 1;
/// `edge_config::scope`: the edge owns the declared ports.
pub const SCOPE_PORTS: u32 = 0;
/// `edge_config::scope`: the edge owns all of UDP and TCP.
pub const SCOPE_HOST: u32 = 1;

/// `edge_limit`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeLimit {
    /// Nanoseconds that each admission costs; 0: no limit.
    pub interval_ns: u64,
    /// How many nanoseconds the word may be ahead of now and still admit.
    pub tolerance_ns: u64,
}

impl From<Limit> for EdgeLimit {
    fn from(limit: Limit) -> Self {
        Self {
            interval_ns: limit.interval_ns,
            tolerance_ns: limit.tolerance_ns,
        }
    }
}

impl From<EdgeLimit> for Limit {
    fn from(limit: EdgeLimit) -> Self {
        Self {
            interval_ns: limit.interval_ns,
            tolerance_ns: limit.tolerance_ns,
        }
    }
}

/// `edge_key`.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeKey {
    /// First half.
    pub k0: u64,
    /// Second half.
    pub k1: u64,
}

impl From<SipKey> for EdgeKey {
    fn from(key: SipKey) -> Self {
        Self {
            k0: key.k0,
            k1: key.k1,
        }
    }
}

impl std::fmt::Debug for EdgeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EdgeKey(..)")
    }
}

/// `edge_service`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeService {
    /// Local port.
    pub port: u16,
    /// 17 or 6.
    pub protocol: u8,
    /// `enum edge_kind`.
    pub kind: u8,
    /// Root of the IPv4 trie: index of a node, absolute.
    pub root4: u32,
    /// Root of the IPv6 trie.
    pub root6: u32,
    /// Zero.
    pub pad: u32,
}

/// `edge_config`: one generation of the settings and rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeConfig {
    /// [`MODE_COUNT`] or [`MODE_ENFORCE`].
    pub mode: u32,
    /// [`SCOPE_PORTS`] or [`SCOPE_HOST`].
    pub scope: u32,
    /// Services in use.
    pub services: u32,
    /// Number of the compiled rule set.
    pub set: u32,
    /// The services.
    pub service: [EdgeService; SERVICES_MAX],
    /// The service of undeclared ports, with [`SCOPE_HOST`].
    pub host: EdgeService,
    /// Global budgets, by `enum edge_budget`.
    pub budget: [EdgeLimit; BUDGETS],
    /// QUIC connections of a source, by level.
    pub source_quic: [EdgeLimit; LEVELS_MAX],
    /// TCP connections of a source, by level.
    pub source_tcp: [EdgeLimit; LEVELS_MAX],
    /// Connections of a proven peer.
    pub peer: EdgeLimit,
    /// Uses of one proof.
    pub proof: EdgeLimit,
    /// Packets of one connection ID, under stress.
    pub id: EdgeLimit,
    /// Established QUIC connections per source; 0: no cap.
    pub quic_connections_max: u32,
    /// TCP connections per source; 0: no cap.
    pub tcp_connections_max: u32,
}

/// `edge_control`: the one value of the map `control`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeControl {
    /// [`LAYOUT`].
    pub layout: u32,
    /// Generation in force.
    pub active: u32,
    /// When the other generation comes into force again, in nanoseconds of CLOCK_MONOTONIC; 0:
    /// never.
    pub revert_at_ns: u64,
    /// Until when stress and QUIC counts are valid, in nanoseconds of CLOCK_MONOTONIC.
    pub lease_until_ns: u64,
    /// Level of stress: 0, 1 or 2.
    pub stress: u32,
    /// Run of the node. Counts that another run wrote are not valid.
    pub run: u32,
    /// Wall time less CLOCK_MONOTONIC, in nanoseconds.
    pub wall_offset_ns: u64,
    /// Seeds of the sketch, by its generation.
    pub seed: [EdgeKey; GENERATIONS],
    /// Generation of the sketch that is charged.
    pub limiter_active: u32,
    /// Key that signs tokens.
    pub key_active: u32,
    /// Until when the other generation of the sketch counts as well.
    pub limiter_old_until_ns: u64,
    /// Keys of connection IDs and tokens.
    pub keys: [EdgeKey; KEYS],
    /// Cookie of the network namespace whose TCP connections are counted; 0: those of all.
    pub netns_cookie: u64,
    /// Written by the programs: a source opened connections beyond its rate or cap, so `edge`
    /// checks segments that may end a handshake by a cookie until this time.
    pub cookies_watched_until_ns: u64,
    /// Both generations of the settings and rules.
    pub config: [EdgeConfig; GENERATIONS],
}

/// `edge_count`: QUIC connections of a source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeCount {
    /// Run of the node that wrote it.
    pub run: u32,
    /// Established connections.
    pub connections: u32,
}

/// `edge_sizes`: sizes of the maps, as the loader tells the programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeSizes {
    /// Buckets of one generation of the sketch.
    pub limiter_buckets: u32,
    /// Rules of one generation.
    pub rules_max: u32,
    /// Sockets of a reuseport group.
    pub shards: u32,
    /// Zero.
    pub pad: u32,
}

/// `edge_counters`: the one value of the map `counters`, for each CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeCounters {
    /// By reason: packets passed, answered or dropped for it.
    pub acted: [u64; REASONS],
    /// By reason: packets that passed in mode `count` and would not have in mode `enforce`.
    pub counted: [u64; REASONS],
    /// Drops since the last sample.
    pub sampled: u64,
}

/// `edge_sampling`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeSampling {
    /// One in this many drops of a CPU becomes an event; 0: none.
    pub every: u32,
    /// Zero.
    pub pad: u32,
}

/// `edge_flow`: key of the map `replies`. The value is the time of the host's last packet, in
/// nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeFlow {
    /// Address of the remote host.
    pub remote: [u8; 16],
    /// Its port.
    pub remote_port: u16,
    /// Port of this host.
    pub port: u16,
    /// 17 or 6.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// `edge_decision`: the decision of `edge_trace` or `edge_test` on the last packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeDecision {
    /// `Reason::index`.
    pub reason: u32,
    /// `enum xdp_action` in mode `enforce`.
    pub action: u32,
    /// Rule that decided, or [`RULE_DEFAULT`].
    pub rule: u32,
    /// Index of the service, or [`SERVICE_NONE`].
    pub service: u32,
    /// Level of stress at that moment.
    pub stress: u32,
    /// Generation in force.
    pub generation: u32,
    /// Value of the clock.
    pub now_ns: u64,
}

/// `edge_mock`: the environment of `edge_test`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeMock {
    /// Value of both clocks, the coarse and the exact one.
    pub now_ns: u64,
    /// Sequence number of the SYN cookie; 0: the kernel gives none.
    pub cookie: u32,
    /// 1: nothing is charged.
    pub read_only: u32,
    /// 1: a listener that gives no cookie takes the SYN instead.
    pub listener_room: u32,
    /// 1: no connection takes the segment, but a listener does.
    pub meets_listener: u32,
}

/// `edge_event`: one sampled drop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeEvent {
    /// Value of the clock.
    pub now_ns: u64,
    /// `Reason::index`.
    pub reason: u32,
    /// Rule that decided, or [`RULE_DEFAULT`].
    pub rule: u32,
    /// Sender, IPv4 as v4-mapped.
    pub source: [u8; 16],
    /// Its port.
    pub source_port: u16,
    /// Port of this host.
    pub port: u16,
    /// 17 or 6.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
    /// Index of the interface.
    pub ifindex: u32,
    /// Bytes of the frame.
    pub length: u32,
}

/// `edge_bucket`: eight words of the sketch, or one global budget in the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeBucket {
    /// The words.
    pub word: [u64; 8],
}

/// `edge_node`: one dense node of a trie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeNode {
    /// By the next byte of the address: a leaf ([`LEAF`]), or the index of a node (of a sparse one
    /// with [`SPARSE`]).
    pub entry: [u32; 256],
}

/// `edge_sparse`: one sparse node of a trie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeSparse {
    /// The entry of each run, as in [`EdgeNode`].
    pub entry: [u32; trie::RUNS],
    /// First byte of each run.
    pub start: [u8; trie::RUNS],
    /// Zero.
    pub pad: u32,
}

impl From<trie::Sparse> for EdgeSparse {
    fn from(sparse: trie::Sparse) -> Self {
        Self {
            entry: sparse.entries,
            start: sparse.starts,
            pad: 0,
        }
    }
}

/// `edge_ports`: the service of each local port. It is too large to be copied: see
/// `Maps::set_port`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct EdgePorts {
    /// By generation, UDP 0 or TCP 1, port: 0, or index of the service + 1.
    pub service: [[[u8; PORTS]; 2]; GENERATIONS],
}

impl std::fmt::Debug for EdgePorts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EdgePorts(..)")
    }
}

#[cfg(test)]
mod tests;
