/* Counts the TCP connections that each source holds, by the kernel's own state.
 *
 * 1. It counts only passive sockets on local ports that are declared as TCP, in the node's network
 *    namespace. A socket is counted once, when it is established, and given back once, when it
 *    closes; the socket's storage records which. So two of these programs, as during a reload,
 *    count like one. A walk over all files (`conn_walk`) counts sockets that were established
 *    before their port was declared or before this program was attached; it may run any number of
 *    times.
 * 2. Counts are exact on any number of CPUs. A CPU marks a word that falls to zero as dead, by
 *    compare-and-swap, before it deletes the slot; a CPU that finds a dead word looks the source up
 *    again. A slot of the hash table may meanwhile serve another source: half of the word is a mark
 *    of the source, so that a swap meant for one source never hits another.
 * 3. TIME_WAIT does not count: the socket is gone by then.
 * 4. The tracepoint runs under the socket's lock. The walk does not; an open file keeps its socket
 *    alive. A socket in a file has been established, so only its closing can interfere. The side
 *    that swaps the count out of the storage gives it back; and the walk, once it has counted,
 *    looks again whether the socket is there. The kernel unhashes a socket before it reports
 *    `TCP_CLOSE`, so either the tracepoint finds the storage or the walk finds the closed socket.
 *    Two walks never run at a time.
 * 5. The walk goes over files because `iter/tcp` is not safe beside traffic: the kernel takes
 *    references to requests that have none yet, and locks sockets that a closing listener then
 *    resets nevertheless (seen with Linux 6.18).
 */
#include "limit.h"
#include "sources.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "GPL";

/* A dead word is visible for as long as a few instructions of another CPU take. */
#define COUNT_TRIES 64
#define MARK_SHIFT 32
#define MARK_MASK 0x7fffffffull /* 31 bits, below the one that says dead */

/* The kernel refuses a cookie that is older than two periods of a minute. */
#define COOKIE_LIFE_NS 120000000000ull

/* In the second word of a storage while its count is given back: no source ends so. */
#define GIVEN_BACK (~0ull)

/* `SOCK_BINDPORT_LOCK` of the kernel: the application chose the port by `bind`. */
#define BOUND_TO_PORT 8

/* The source that a socket is counted for. A socket without it is not counted. */
struct counted {
	union {
		struct edge_source source;
		__u64 word[2];
	};
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct counted);
} connections SEC(".maps");

EDGE_INLINE __u64 count_mark(const struct edge_source *source)
{
	__u64 mixed = (load64(source->address) ^ load64(source->address + 8) * 0x9e3779b97f4a7c15ull) *
		      0xff51afd7ed558ccdull;

	return (mixed >> 33 & MARK_MASK) << MARK_SHIFT;
}

EDGE_INLINE bool count_matches(__u64 word, __u64 mark)
{
	return (word & ~EDGE_TCP_CONNECTIONS) == mark; /* dead ones do not */
}

EDGE_INLINE bool count_add(const struct edge_source *source)
{
	__u64 mark = count_mark(source), first = mark | 1;

	for (int try = 0; try < COUNT_TRIES; try++) {
		__u64 *word = bpf_map_lookup_elem(&tcp_sources, source), old;

		if (!word) {
			if (!bpf_map_update_elem(&tcp_sources, source, &first, BPF_NOEXIST))
				return true;
			continue;
		}
		old = read_once(word);
		if (count_matches(old, mark) && swap_once(word, old, old + 1))
			return true;
	}
	return false;
}

EDGE_INLINE void count_remove(const struct edge_source *source)
{
	__u64 mark = count_mark(source);

	for (int try = 0; try < COUNT_TRIES; try++) {
		__u64 *word = bpf_map_lookup_elem(&tcp_sources, source), old;
		bool last;

		if (!word)
			return;
		old = read_once(word);
		if (!count_matches(old, mark))
			continue;
		last = (old & EDGE_TCP_CONNECTIONS) <= 1;
		if (!swap_once(word, old, last ? mark | EDGE_TCP_DEAD : old - 1))
			continue;
		if (last)
			bpf_map_delete_elem(&tcp_sources, source);
		return;
	}
}

/* Whether the socket is the passive end of a connection to a declared port. */
EDGE_INLINE bool is_ours(const struct edge_view *view, const struct sock *sk)
{
	__u32 service = edge_service_of(view->generation, true, sk->__sk_common.skc_num);
	__u64 namespace = view->control->netns_cookie;

	if (!service || service > EDGE_SERVICES_MAX)
		return false;
	if (view->config->service[(service - 1) & (EDGE_SERVICES_MAX - 1)].kind != EDGE_KIND_TCP)
		return false;
	return !namespace || namespace == sk->__sk_common.skc_net.net->net_cookie;
}

/* The remote address as words; true if it is IPv4, also as a v4-mapped one of a dual-stack
 * socket. */
EDGE_INLINE bool remote_address(const struct sock *sk, __u64 address[2])
{
	const struct sock_common *common = &sk->__sk_common;

	if (common->skc_family == AF_INET) {
		address[0] = 0;
		address[1] = (__u64)common->skc_daddr << 32 | V4_MAPPED;
		return true;
	}
	address[0] = common->skc_v6_daddr.in6_u.u6_addr32[0] | (__u64)common->skc_v6_daddr.in6_u.u6_addr32[1] << 32;
	address[1] = common->skc_v6_daddr.in6_u.u6_addr32[2] | (__u64)common->skc_v6_daddr.in6_u.u6_addr32[3] << 32;
	return !address[0] && (__u32)address[1] == V4_MAPPED;
}

/* Counts a connection of the source. `counted` records it for as long as the connection is open. */
EDGE_INLINE void count_connection(struct sock *sk, const __u64 address[2], bool ipv4)
{
	struct counted counted = { .source = source_cap_key(address, ipv4) };

	/* A storage without a count would be given back, so the storage comes second, and whole. */
	if (!count_add(&counted.source))
		return;
	if (!bpf_sk_storage_get(&connections, sk, &counted, BPF_SK_STORAGE_GET_F_CREATE))
		count_remove(&counted.source);
}

EDGE_INLINE bool is_counted(struct sock *sk)
{
	return bpf_sk_storage_get(&connections, sk, NULL, 0);
}

/* The source has answered the handshake: its limits are charged now, and its count goes up. */
EDGE_INLINE void established(struct sock *sk)
{
	struct edge_control *control = edge_control_value();
	struct edge_view view = { .control = control };
	struct sketch_ask ask;
	__u64 address[2];
	bool ipv4, within;
	__u32 cap;

	if (!control)
		return;
	view_choose_generation(&view, EDGE_TRACEPOINT);
	if (!is_ours(&view, sk))
		return;
	/* While one program replaces another, both see the socket. */
	if (is_counted(sk))
		return;
	ipv4 = remote_address(sk, address);
	view_now(&view, EDGE_TRACEPOINT);
	sketch_ask_source(&ask, &view, address, ipv4, EDGE_PURPOSE_TCP);
	within = sketch_take_source(&ask, &view);
	count_connection(sk, address, ipv4);
	cap = view.config->tcp_connections_max;
	if (!within || (cap && source_connections(address, ipv4) > cap))
		control->cookies_watched_until_ns = view.now_ns + COOKIE_LIFE_NS;
}

EDGE_INLINE void closed(struct sock *sk)
{
	struct counted *counted = bpf_sk_storage_get(&connections, sk, NULL, 0), given_back;

	if (!counted)
		return;
	given_back.word[0] = counted->word[0];
	given_back.word[1] = read_once(&counted->word[1]);
	if (given_back.word[1] == GIVEN_BACK || !swap_once(&counted->word[1], given_back.word[1], GIVEN_BACK))
		return;
	bpf_sk_storage_delete(&connections, sk);
	count_remove(&given_back.source);
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(conn_state, struct sock *sk, int from, int to)
{
	if (from == TCP_SYN_RECV && to == TCP_ESTABLISHED)
		established(sk);
	else if (to == TCP_CLOSE)
		closed(sk);
	return 0;
}

/* Whether the tracepoint has seen the connection open, or would have, and has not seen it close
 * yet. */
EDGE_INLINE bool is_open(__u8 state)
{
	const __u32 open = 1 << TCP_ESTABLISHED | 1 << TCP_FIN_WAIT1 | 1 << TCP_FIN_WAIT2 | 1 << TCP_CLOSE_WAIT |
			   1 << TCP_LAST_ACK | 1 << TCP_CLOSING;

	return state < 32 && (open >> state & 1);
}

/* Whether the socket is passive. An application that connects from a declared port has bound its
 * socket; the children of a listener are not bound themselves. (When the kernel chooses a port,
 * it skips those that a socket is bound to.) */
EDGE_INLINE bool is_passive(const struct sock *sk)
{
	return !(BPF_CORE_READ_BITFIELD(sk, sk_userlocks) & BOUND_TO_PORT);
}

/* Counts the connections that applications hold already. It charges no rate: the kernel does not
 * know when they were opened. */
SEC("iter/task_file")
int conn_walk(struct bpf_iter__task_file *ctx)
{
	struct edge_view view = { .control = edge_control_value() };
	struct file *file = ctx->file;
	struct socket *socket;
	struct sock *sk;
	__u64 address[2];
	bool ipv4;

	if (!file || !view.control)
		return 0;
	socket = bpf_sock_from_file(file);
	if (!socket)
		return 0;
	sk = (struct sock *)bpf_skc_to_tcp_sock(socket->sk);
	if (!sk || !is_open(sk->__sk_common.skc_state))
		return 0;
	view_choose_generation(&view, EDGE_TRACEPOINT);
	if (!is_passive(sk) || !is_ours(&view, sk) || is_counted(sk))
		return 0;
	ipv4 = remote_address(sk, address);
	count_connection(sk, address, ipv4);
	if (!sk->__sk_common.skc_node.pprev)
		closed(sk);
	return 0;
}
