/* The layouts, constants and order of reasons that programs and user space share.
 *
 * `ebpf/src/abi.rs` mirrors them; its test compares every size and offset with the object's BTF.
 * Times are CLOCK_MONOTONIC nanoseconds. Integers are little-endian (x86-64, aarch64), addresses
 * stay in network order.
 */
#ifndef MILLRACE_ABI_H
#define MILLRACE_ABI_H

#define EDGE_LAYOUT 4 /* changes with any change below; maps pinned under another are not adopted */

#define EDGE_GENERATIONS 2
#define EDGE_SERVICES_MAX 16
#define EDGE_LEVELS_MAX 3
#define EDGE_KEYS 4
#define EDGE_PORTS 65536
#define EDGE_EXTENSIONS_MAX 6 /* headers between IPv6 and UDP or TCP */
#define EDGE_EXTENSION_BYTES_MAX 1024 /* of all of them: more counts as options */
#define EDGE_MOCK_MSS 1460 /* `edge_test` puts it into SYN cookies */

#define EDGE_RULE_DEFAULT 0xffff
#define EDGE_LEAF 0x80000000u /* leaf: rule in bits 0..16, action in 16..18; else: a node's index */
#define EDGE_SPARSE 0x40000000u /* no leaf: bits 0..30 are the index of a sparse node */
#define EDGE_RUNS 12

enum edge_mode { EDGE_COUNT = 0, EDGE_ENFORCE = 1 };
enum edge_scope { EDGE_SCOPE_PORTS = 0, EDGE_SCOPE_HOST = 1 };
enum edge_kind { EDGE_KIND_QUIC = 1, EDGE_KIND_TCP = 2, EDGE_KIND_UDP = 3, EDGE_KIND_HOST = 4 };
enum edge_action { EDGE_ALLOW = 0, EDGE_DENY = 1, EDGE_REJECT = 2 };
enum edge_stress { EDGE_STRESS_NORMAL = 0, EDGE_STRESS_RETRY = 1, EDGE_STRESS_PEERS = 2 };
enum edge_stamp { EDGE_STAMP_MAGIC = 0x4d524745, EDGE_STAMP_PASS = 1, EDGE_STAMP_REJECT = 2 };
#define EDGE_STAMP_PASS_BYTES 8
#define EDGE_STAMP_REJECT_BYTES 12
enum edge_budget {
	EDGE_BUDGET_UNVALIDATED = 0,
	EDGE_BUDGET_SYN = 1,
	EDGE_BUDGET_VERSION = 2,
	EDGE_BUDGET_DIAL_REQUEST = 3,
	EDGE_BUDGET_REJECT = 4,
	EDGE_BUDGETS = 5,
};
enum edge_purpose {
	EDGE_PURPOSE_QUIC = 1,
	EDGE_PURPOSE_TCP = 2,
	EDGE_PURPOSE_PEER = 3,
	EDGE_PURPOSE_PROOF = 4,
	EDGE_PURPOSE_ID = 5,
};

/* The order is the index of the counter; `policy::Reason` has the same. */
enum edge_reason {
	/* passed */
	R_PASS_OTHER = 0,
	R_PASS_REPLY,
	R_PASS_HOST,
	R_PASS_UDP,
	R_PASS_REJECT,
	R_PASS_DIAL_REQUEST,
	R_PASS_QUIC,
	R_PASS_QUIC_PEER,
	R_PASS_QUIC_TOKEN,
	R_PASS_QUIC_INITIAL,
	R_PASS_QUIC_VERSION,
	R_PASS_TCP,
	R_PASS_TCP_SYN,
	/* transmitted */
	R_TX_RETRY,
	R_TX_SYN_COOKIE,
	/* dropped */
	R_MALFORMED_IP,
	R_MALFORMED_L4,
	R_MARTIAN,
	R_FRAGMENT,
	R_OPTIONS,
	R_TCP_FLAGS,
	R_QUIC_MALFORMED,
	R_QUIC_FIXED_BIT,
	R_QUIC_ID_LENGTH,
	R_QUIC_SHORT_INITIAL,
	R_QUIC_ZERO_RTT,
	R_FIREWALL_DENY,
	R_FIREWALL_DEFAULT,
	R_FIREWALL_REJECT_BUDGET,
	R_QUIC_DIAL_REQUEST_BUDGET,
	R_QUIC_VERSION_BUDGET,
	R_QUIC_UNKNOWN_ID,
	R_QUIC_EXPIRED_ID,
	R_QUIC_ID_BUDGET,
	R_QUIC_PROOF_REPLAYED,
	R_QUIC_PEER_BUDGET,
	R_QUIC_PEERS_ONLY,
	R_QUIC_BAD_TOKEN,
	R_QUIC_EXPIRED_TOKEN,
	R_QUIC_SOURCE_CAP,
	R_QUIC_SOURCE_RATE,
	R_QUIC_RETRY_FAILED,
	R_TCP_SOURCE_CAP,
	R_TCP_SOURCE_RATE,
	R_TCP_SYN_BUDGET,
	R_INTERNAL, /* a map that must be there is not: passed, and a defect */
	EDGE_REASONS,
};

struct edge_limit {
	__u64 interval_ns; /* 0: no limit */
	__u64 tolerance_ns;
};

struct edge_key {
	__u64 k0;
	__u64 k1;
};

struct edge_service {
	__u16 port;
	__u8 protocol; /* 17 or 6 */
	__u8 kind;
	__u32 root4; /* index of a dense trie node, absolute */
	__u32 root6;
	__u32 pad;
};

/* One generation of the settings and rules. */
struct edge_config {
	__u32 mode;
	__u32 scope;
	__u32 services;
	__u32 set; /* number of the compiled rule set, for people */
	struct edge_service service[EDGE_SERVICES_MAX];
	struct edge_service host; /* used with EDGE_SCOPE_HOST */
	struct edge_limit budget[EDGE_BUDGETS];
	struct edge_limit source_quic[EDGE_LEVELS_MAX];
	struct edge_limit source_tcp[EDGE_LEVELS_MAX];
	struct edge_limit peer;
	struct edge_limit proof;
	struct edge_limit id;
	__u32 quic_connections_max; /* per source; 0: none */
	__u32 tcp_connections_max;
};

/* The one value of the map `control`. User space writes it, the programs read it. */
struct edge_control {
	__u32 layout;
	__u32 active; /* generation in force */
	__u64 revert_at_ns; /* 0, or from when the other generation is in force again */
	__u64 lease_until_ns; /* stress and QUIC counts hold until then */
	__u32 stress;
	__u32 run; /* counts written by another run of the node do not hold */
	__u64 wall_offset_ns;
	struct edge_key seed[EDGE_GENERATIONS]; /* of the sketch */
	__u32 limiter_active;
	__u32 key_active; /* key that signs tokens */
	__u64 limiter_old_until_ns;
	struct edge_key keys[EDGE_KEYS];
	__u64 netns_cookie; /* connections of other namespaces are not counted; 0: all are */
	__u64 cookies_watched_until_ns; /* written by the programs */
	struct edge_config config[EDGE_GENERATIONS];
};

struct edge_bucket {
	__u64 word[8];
};

struct edge_node {
	__u32 entry[256];
};

/* A trie node whose entries form few runs: one cache line. `start` ascends from 0; unused runs
 * start at 255 and repeat the last entry. So the run of a byte is the number of starts, without
 * the first, that are not above the byte. */
struct edge_sparse {
	__u32 entry[EDGE_RUNS];
	__u8 start[EDGE_RUNS];
	__u32 pad;
};

struct edge_ports {
	__u8 service[EDGE_GENERATIONS][2][EDGE_PORTS]; /* 0: none, else index + 1 */
};

struct edge_source {
	__u8 address[16];
};

/* QUIC connections of a source. */
struct edge_count {
	__u32 run;
	__u32 connections;
};

/* Sizes that the loader sets and the programs take for constants, in section `.rodata.sizes` of
 * each object. */
struct edge_sizes {
	__u32 limiter_buckets; /* of one generation, a power of two */
	__u32 rules_max; /* of one generation */
	__u32 shards;
	__u32 pad;
};

/* The one value of `counters`, for each CPU. `counted`: packets that passed in mode `count` and
 * would not have in mode `enforce`. */
struct edge_counters {
	__u64 acted[EDGE_REASONS];
	__u64 counted[EDGE_REASONS];
	__u64 sampled; /* drops since the programs were loaded, for `sampling` */
};

/* The one value of `sampling`. */
struct edge_sampling {
	__u32 every; /* each so manieth drop of a CPU becomes an event; 0: none */
	__u32 pad;
};

/* A value of `tcp_sources`. The low half counts connections. The high half holds a mark that
 * tells a reused slot of the hash table from the slot that was looked up, and a bit for a slot
 * that is about to be deleted. Readers take the low half and ignore dead words. */
#define EDGE_TCP_CONNECTIONS 0xffffffffull
#define EDGE_TCP_DEAD (1ull << 63)

/* How long an answer may come after this host has sent. For TCP it is that of RFC 5382: longer
 * than the two hours after which the host itself probes the other end. */
#define EDGE_REPLY_UDP_NS (180 * 1000000000ull)
#define EDGE_REPLY_TCP_NS (7440 * 1000000000ull)

/* A flow that this host sent, seen from the answer: key of `replies` (scope `host`). The value
 * is the time of the last packet. Ports are in host order. */
struct edge_flow {
	struct edge_source remote;
	__u16 remote_port;
	__u16 port;
	__u8 protocol;
	__u8 pad[3];
};

/* The decision of `edge_trace` or `edge_test` on the last packet. */
struct edge_decision {
	enum edge_reason reason;
	__u32 action; /* enum xdp_action of the packet in enforce mode */
	__u32 rule;
	__u32 service; /* index, or 0xffffffff */
	__u32 stress; /* as it holds now: 0 if the lease has ended */
	__u32 generation;
	__u64 now_ns;
};

/* The environment of `edge_test`. */
struct edge_mock {
	__u64 now_ns;
	__u32 cookie; /* 0: the kernel gives none; else the sequence number of a cookie */
	__u32 read_only; /* no charges, as in `edge_trace` */
	__u32 listener_room; /* without a cookie: the listener takes the SYN instead */
	__u32 meets_listener; /* no connection takes the segment, but a listener */
};

/* One sampled drop, in the ring buffer `events`. */
struct edge_event {
	__u64 now_ns;
	enum edge_reason reason;
	__u32 rule;
	struct edge_source source;
	__u16 source_port;
	__u16 port;
	__u8 protocol;
	__u8 pad[3];
	__u32 ifindex;
	__u32 length;
};

#endif
