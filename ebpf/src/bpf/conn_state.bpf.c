/* TCP connections that each source holds, in the kernel's own truth.
 *
 * 1. Only passive sockets on local ports that are declared as TCP, in the daemon's network namespace; a socket is
 *    counted once, when it is established, and given back once, when it closes: its storage says which. So two of
 *    these programs, as at a reload, count like one.
 * 2. Counts are exact on any number of CPUs. A word that falls to zero is marked dead by compare-and-swap before its
 *    slot is deleted; who finds a dead word looks again. A slot of the hash table may meanwhile serve another source:
 *    half of the word is a mark of the source, so that a swap meant for one never hits the other.
 * 3. TIME_WAIT does not count: no socket is left then.
 */
#include "limit.h"
#include "sources.h"
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "GPL";

/* The window in which a dead word is seen is a few instructions of another CPU. */
#define COUNT_TRIES 64
#define MARK_SHIFT 32
#define MARK_MASK 0x7fffffffull /* 31 bits, below the one that says dead */

/* Whose count a socket is in; a socket without it is in none. */
struct counted {
	struct edge_source source;
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

/* Whether the socket is the passive end of a connection to a port that is ours. */
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

/* The remote address as words; true if it is IPv4, also as a v4-mapped one of a dual-stack socket. */
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

/* The source has answered the handshake: now its limits are charged, and its count goes up. */
EDGE_INLINE void established(struct sock *sk)
{
	struct edge_view view = { .control = edge_control_value() };
	struct edge_source source;
	struct counted *counted;
	struct sketch_ask ask;
	__u64 address[2];
	bool ipv4;

	if (!view.control)
		return;
	view_choose_generation(&view, EDGE_TRACEPOINT);
	if (!is_ours(&view, sk))
		return;
	/* While one program takes the other's place, both see the socket. */
	if (bpf_sk_storage_get(&connections, sk, NULL, 0))
		return;
	ipv4 = remote_address(sk, address);
	view_now(&view, EDGE_TRACEPOINT);
	sketch_ask_source(&ask, &view, address, ipv4, EDGE_PURPOSE_TCP);
	sketch_take_source(&ask, &view);
	source = source_cap_key(address, ipv4);
	counted = bpf_sk_storage_get(&connections, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!counted)
		return;
	if (count_add(&source))
		counted->source = source;
	else
		bpf_sk_storage_delete(&connections, sk);
}

EDGE_INLINE void closed(struct sock *sk)
{
	struct counted *counted = bpf_sk_storage_get(&connections, sk, NULL, 0);
	struct edge_source source;

	if (!counted)
		return;
	source = counted->source;
	bpf_sk_storage_delete(&connections, sk);
	count_remove(&source);
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
