//! What the programs and user space share, as `bpf/abi.h` has it.
//!
//! A test compares every size, every offset and the order of the reasons with the BTF of the objects. No type has padding or bits that
//! mean nothing: a map's memory is any of them (`maps.rs`).

use millrace_edge_policy::limiter::Limit;
use millrace_edge_policy::siphash::Key as SipKey;
use millrace_edge_policy::trie;

/// Number of this layout: pinned maps of another are not adopted.
pub const LAYOUT: u32 = 4;
/// Generations of what an operator sets, and of the sketch.
pub const GENERATIONS: usize = 2;
/// Services that can be declared.
pub const SERVICES_MAX: usize = 16;
/// Levels of a source.
pub const LEVELS_MAX: usize = 3;
/// Keys that can be valid at a time.
pub const KEYS: usize = 4;
/// Ports that there are.
pub const PORTS: usize = 65_536;
/// Global budgets.
pub const BUDGETS: usize = 5;
/// Reasons, and so counters.
pub const REASONS: usize = millrace_edge_policy::reason::Reason::ALL.len();
/// Rule of a packet that none decided.
pub const RULE_DEFAULT: u32 = 0xffff;
/// Set in an entry of a trie that is a leaf.
pub const LEAF: u32 = trie::LEAF;
/// Set in an entry that is no leaf, if its index is that of a sparse node.
pub const SPARSE: u32 = trie::SPARSE;
/// Service of a packet that is for none.
pub const SERVICE_NONE: u32 = u32::MAX;
/// Connections in a value of the map `tcp_sources`.
pub const TCP_CONNECTIONS: u64 = 0xffff_ffff;
/// Set in a value of `tcp_sources` that counts no longer.
pub const TCP_DEAD: u64 = 1 << 63;
/// Largest segment in the SYN cookies of `edge_test`, in bytes.
pub const MOCK_MSS: u16 = 1460;
/// First word of a stamp; the second is [`STAMP_PASS`] or [`STAMP_REJECT`].
pub const STAMP_MAGIC: u32 = 0x4d52_4745;
/// The packet may go on.
pub const STAMP_PASS: u32 = 1;
/// The packet is to be answered with a refusal.
pub const STAMP_REJECT: u32 = 2;
/// Bytes of a stamp that passes.
pub const STAMP_PASS_BYTES: usize = 8;
/// Bytes of a stamp that refuses.
pub const STAMP_REJECT_BYTES: usize = 12;

/// `edge_config::mode`: what would be dropped is counted.
pub const MODE_COUNT: u32 = 0;
/// `edge_config::mode`: what should be dropped is.
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
    /// How far ahead of now the word may be and still admit.
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

/// `edge_config`: one generation of what an operator or the registry says.
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
    /// What belongs to none, with [`SCOPE_HOST`].
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
    /// 0, or from when the other generation is in force again.
    pub revert_at_ns: u64,
    /// Stress and QUIC counts hold until then.
    pub lease_until_ns: u64,
    /// 0, 1 or 2.
    pub stress: u32,
    /// Counts that another run of the node wrote do not hold.
    pub run: u32,
    /// Wall time less CLOCK_MONOTONIC, in nanoseconds.
    pub wall_offset_ns: u64,
    /// Seeds of the sketch, by its generation.
    pub seed: [EdgeKey; GENERATIONS],
    /// Generation of the sketch that is charged.
    pub limiter_active: u32,
    /// Key that signs tokens.
    pub key_active: u32,
    /// Until when the other generation of the sketch counts.
    pub limiter_old_until_ns: u64,
    /// Keys of connection IDs and tokens.
    pub keys: [EdgeKey; KEYS],
    /// Whose TCP connections are counted; 0: those of all namespaces.
    pub netns_cookie: u64,
    /// Written by the programs: somebody was established beyond rate or cap, and cookies are looked at until then.
    pub cookies_watched_until_ns: u64,
    /// Both generations of what was set.
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

/// `edge_sizes`: what the loader tells the programs of the maps' sizes.
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
    /// By reason: passed, answered or dropped for it.
    pub acted: [u64; REASONS],
    /// By reason: mode `enforce` would not have passed it.
    pub counted: [u64; REASONS],
    /// Drops since the last sample.
    pub sampled: u64,
}

/// `edge_sampling`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeSampling {
    /// Each so manieth drop of a CPU becomes an event; 0: none.
    pub every: u32,
    /// Zero.
    pub pad: u32,
}

/// `edge_flow`: key of the map `replies`, whose value is when this host last sent, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeFlow {
    /// Who was written to.
    pub remote: [u8; 16],
    /// Its port.
    pub remote_port: u16,
    /// Our port.
    pub port: u16,
    /// 17 or 6.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// `edge_decision`: what `edge_trace` and `edge_test` say of the last packet.
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
    /// Stress as it held.
    pub stress: u32,
    /// Generation in force.
    pub generation: u32,
    /// The clock.
    pub now_ns: u64,
}

/// `edge_mock`: what `edge_test` takes for its environment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeMock {
    /// The clock, also the exact one.
    pub now_ns: u64,
    /// 0: the kernel gives no cookie; else its sequence number.
    pub cookie: u32,
    /// 1: nothing is charged.
    pub read_only: u32,
    /// 1: a listener that gives no cookie takes the SYN instead.
    pub listener_room: u32,
    /// 1: no connection takes a segment, but a listener.
    pub meets_listener: u32,
}

/// `edge_event`: one sampled drop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeEvent {
    /// The clock.
    pub now_ns: u64,
    /// `Reason::index`.
    pub reason: u32,
    /// Rule that decided, or [`RULE_DEFAULT`].
    pub rule: u32,
    /// Sender, IPv4 as v4-mapped.
    pub source: [u8; 16],
    /// Its port.
    pub source_port: u16,
    /// Port of ours.
    pub port: u16,
    /// 17 or 6.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
    /// Interface.
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
    /// By the next byte of the address: a leaf ([`LEAF`]), or the index of a node ([`SPARSE`]: of a sparse one).
    pub entry: [u32; 256],
}

/// `edge_sparse`: one sparse node of a trie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct EdgeSparse {
    /// By run, as in [`EdgeNode`].
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

/// `edge_ports`: which service a local port belongs to. Too large to be copied about: see `Maps::set_port`.
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
