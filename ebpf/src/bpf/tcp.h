/* TCP: limits for SYNs, and SYN cookies: section 5 of the specification. */
#ifndef MILLRACE_TCP_H
#define MILLRACE_TCP_H

#include "limit.h"
#include "reply.h"
#include "sources.h"

#define TCP_BYTES_MAX 60
#define TCP_MSS_OPTION 0x0204 /* kind 2, 4 bytes */
#define SYN_ACK_BYTES 24
/* 20 segments of 1,460 bytes: below what the kernel grants once the cookie comes back. */
#define SYN_ACK_WINDOW 29200

/* GO_ON: the source is within its rates and its cap. */
EDGE_INLINE int tcp_source_refused(struct edge_view *view, const struct edge_packet *packet, const enum edge_program program)
{
	__u32 cap = view->config->tcp_connections_max;
	struct sketch_ask ask;

	view_now(view, program);
	sketch_ask_source(&ask, view, packet->source, packet->ipv4, EDGE_PURPOSE_TCP);
	if (!sketch_look_source(&ask, view, program))
		return R_TCP_SOURCE_RATE;
	return cap && source_connections(packet->source, packet->ipv4) >= cap ? R_TCP_SOURCE_CAP : GO_ON;
}

/* The socket that takes the packet, to be released; or null. */
EDGE_INLINE struct bpf_sock *find_socket(struct xdp_md *ctx, const struct edge_packet *packet)
{
	struct bpf_sock_tuple tuple = {};

	if (packet->ipv4) {
		tuple.ipv4.saddr = packet->source[1] >> 32;
		tuple.ipv4.daddr = packet->destination[1] >> 32;
		tuple.ipv4.sport = bpf_htons(packet->source_port);
		tuple.ipv4.dport = bpf_htons(packet->port);
		return bpf_skc_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	store64(tuple.ipv6.saddr, packet->source[0]);
	store64(tuple.ipv6.saddr + 2, packet->source[1]);
	store64(tuple.ipv6.daddr, packet->destination[0]);
	store64(tuple.ipv6.daddr + 2, packet->destination[1]);
	tuple.ipv6.sport = bpf_htons(packet->source_port);
	tuple.ipv6.dport = bpf_htons(packet->port);
	return bpf_skc_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
}

/* Results of asking for a cookie other than a cookie. */
enum { COOKIE_NONE = -1, COOKIE_ROOM = -2 };

/* Why a listener gave no cookie. With `tcp_syncookies` = 1 it gives none while its request queue
 * has room: then SYNs may go to it, because it gives cookies once the queue is full. With 0 it
 * never gives any. A listener whose accept queue is full drops every SYN. */
EDGE_INLINE bool listener_has_room(struct bpf_sock *listener)
{
	const struct sock *sk = (const void *)bpf_skc_to_tcp_sock(listener);

	return sk && sk->__sk_common.skc_net.net->ipv4.sysctl_tcp_syncookies == 1 &&
	       sk->sk_ack_backlog <= sk->sk_max_ack_backlog;
}

/* Sequence number in the low half, largest segment in the high half, as the kernel returns it;
 * or COOKIE_NONE or COOKIE_ROOM. */
__noinline __s64 cookie_ask_kernel(struct xdp_md *ctx, const struct edge_packet *packet)
{
	struct edge_scratch *room = reply_scratch();
	struct bpf_sock *listener;
	__u32 header_bytes;
	__s64 cookie = COOKIE_NONE;

	if (!packet || !room)
		return COOKIE_NONE;
	if (bpf_xdp_load_bytes(ctx, packet->network, room->bytes, IPV4_BYTES) ||
	    (!packet->ipv4 && bpf_xdp_load_bytes(ctx, packet->network, room->bytes, IPV6_BYTES)) ||
	    bpf_xdp_load_bytes(ctx, packet->transport, room->bytes + 64, TCP_BYTES))
		return COOKIE_NONE;
	header_bytes = (room->bytes[64 + 12] >> 4) * 4;
	if (header_bytes < TCP_BYTES || header_bytes > TCP_BYTES_MAX)
		return COOKIE_NONE;
	if (bpf_xdp_load_bytes(ctx, packet->transport, room->bytes + 64, header_bytes))
		return COOKIE_NONE;
	listener = find_socket(ctx, packet);
	if (!listener)
		return COOKIE_NONE;
	if (listener->state == TCP_LISTEN) {
		cookie = bpf_tcp_gen_syncookie(listener, room->bytes, reply_network_bytes(packet),
					       (void *)room->bytes + 64, header_bytes);
		if (cookie < 0)
			cookie = listener_has_room(listener) ? COOKIE_ROOM : COOKIE_NONE;
	}
	bpf_sk_release(listener);
	return cookie;
}

EDGE_INLINE __s64 cookie_ask(struct xdp_md *ctx, const struct edge_view *view, const struct edge_packet *packet,
			     const enum edge_program program)
{
	if (program != EDGE_TEST)
		return cookie_ask_kernel(ctx, packet);
	if (view->mock->cookie)
		return (__u64)EDGE_MOCK_MSS << 32 | view->mock->cookie;
	return view->mock->listener_room ? COOKIE_ROOM : COOKIE_NONE;
}

/* Turns the SYN into the SYN-ACK that answers it. */
__noinline int cookie_send(struct xdp_md *ctx, const struct edge_packet *packet, __s64 cookie)
{
	__u32 network_bytes, words[6];
	__u8 *link, *ip, *tcp;
	__u64 sum;

	if (!packet)
		return false;
	network_bytes = reply_network_bytes(packet);
	tcp = frame_at(ctx, packet->transport, TCP_BYTES);
	if (!tcp)
		return false;
	words[0] = bpf_htonl((__u32)packet->port << 16 | packet->source_port);
	words[1] = bpf_htonl((__u32)cookie);
	words[2] = bpf_htonl(bpf_ntohl(load32(tcp + 4)) + 1);
	words[3] = bpf_htonl((SYN_ACK_BYTES / 4) << 28 | (TCP_SYN | TCP_ACK) << 16 | SYN_ACK_WINDOW);
	words[4] = 0;
	words[5] = bpf_htonl(TCP_MSS_OPTION << 16 | (__u16)(cookie >> 32));
	sum = reply_pseudo_sum(packet, SYN_ACK_BYTES);
#pragma unroll
	for (int i = 0; i < 6; i++)
		sum += words[i];
	words[4] = sum_finish(sum);

	if (!reply_resize(ctx, packet->network + network_bytes + SYN_ACK_BYTES))
		return false;
	link = frame_at(ctx, 0, ETHERNET_BYTES);
	ip = frame_at(ctx, packet->network, IPV6_BYTES);
	tcp = frame_at(ctx, packet->network + network_bytes, SYN_ACK_BYTES);
	if (!link || !ip || !tcp)
		return false;
	reply_ethernet(link);
	reply_network(ip, packet, SYN_ACK_BYTES);
#pragma unroll
	for (int i = 0; i < 6; i++)
		store32(tcp + 4 * i, words[i]);
	return true;
}

/* Whether no connection takes the segment, but a listener does: then it can only end a handshake
 * by a cookie. */
__noinline int meets_listener_kernel(struct xdp_md *ctx, const struct edge_packet *packet)
{
	struct bpf_sock *socket;
	bool is_listener;

	if (!packet)
		return false;
	socket = find_socket(ctx, packet);
	if (!socket)
		return false;
	is_listener = socket->state == TCP_LISTEN;
	bpf_sk_release(socket);
	return is_listener;
}

EDGE_INLINE bool meets_listener(struct xdp_md *ctx, const struct edge_view *view, const struct edge_packet *packet,
				const enum edge_program program)
{
	return program == EDGE_TEST ? view->mock->meets_listener : meets_listener_kernel(ctx, packet);
}

/* Section 5, step 1. A client can take up a cookie without a SYN, and again while the cookie
 * lasts. Segments of established connections pay for this check only while some client does. */
EDGE_INLINE int tcp_go_on(struct xdp_md *ctx, struct edge_view *view, const struct edge_packet *packet,
			  const enum edge_program program)
{
	__u64 until_ns = view->control->cookies_watched_until_ns;
	int reason;

	if (!until_ns || (packet->tcp_flags & (TCP_SYN | TCP_RST | TCP_ACK)) != TCP_ACK || view_now(view, program) >= until_ns)
		return R_PASS_TCP;
	reason = tcp_source_refused(view, packet, program);
	return reason != GO_ON && meets_listener(ctx, view, packet, program) ? reason : R_PASS_TCP;
}

/* Section 5. With R_TX_SYN_COOKIE, `cookie` is what to send. `without`: the reason of the SYN if
 * the cookie cannot be sent. */
EDGE_INLINE int tcp_admit(struct xdp_md *ctx, struct edge_view *view, const struct edge_packet *packet,
			  const enum edge_program program, __s64 *cookie, int *without)
{
	bool within;
	int reason;

	if ((packet->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return tcp_go_on(ctx, view, packet, program);
	reason = tcp_source_refused(view, packet, program);
	if (reason != GO_ON)
		return reason;
	within = budget_charge(view, EDGE_BUDGET_SYN);
	if (within && view_stress(view, program) == EDGE_STRESS_NORMAL)
		return R_PASS_TCP_SYN;
	*without = within ? R_PASS_TCP_SYN : R_TCP_SYN_BUDGET;
	if (packet_is_martian(ctx, packet))
		return R_MARTIAN;
	*cookie = cookie_ask(ctx, view, packet, program);
	if (*cookie == COOKIE_ROOM)
		return R_PASS_TCP_SYN;
	return *cookie == COOKIE_NONE ? *without : R_TX_SYN_COOKIE;
}

#endif
