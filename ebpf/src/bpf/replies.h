/* Flows that this host has sent, for scope `host`: `learn` writes them on the way out, `edge`
 * recognises answers by them. */
#ifndef MILLRACE_REPLIES_H
#define MILLRACE_REPLIES_H

#include "parse.h"

/* The age at which the time of a flow is written again, so that not every packet writes it. */
#define REPLY_STEP_NS 1000000000ull

/* The time of the last packet that this host sent on the flow, to a second. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct edge_flow);
	__type(value, __u64);
} replies SEC(".maps");

EDGE_INLINE struct edge_flow reply_flow(const __u64 remote[2], __u16 remote_port, __u16 port, __u8 protocol)
{
	struct edge_flow flow = { .remote_port = remote_port, .port = port, .protocol = protocol };

	store64(flow.remote.address, remote[0]);
	store64(flow.remote.address + 8, remote[1]);
	return flow;
}

/* Signed: the sender may have read a later clock than a packet that is under way. */
EDGE_INLINE bool reply_lives(const struct edge_flow *flow, __u64 sent_ns, __u64 now_ns)
{
	__s64 age_ns = now_ns - sent_ns;

	return age_ns <= (__s64)(flow->protocol == IPPROTO_TCP ? EDGE_REPLY_TCP_NS : EDGE_REPLY_UDP_NS);
}

/* Whether the packet answers one that this host has sent. */
EDGE_INLINE bool reply_known(const struct edge_packet *packet, __u64 now_ns)
{
	struct edge_flow flow = reply_flow(packet->source, packet->source_port, packet->port, packet->protocol);
	const __u64 *sent_ns = bpf_map_lookup_elem(&replies, &flow);

	return sent_ns && reply_lives(&flow, *sent_ns, now_ns);
}

/* Keeps a flow that lives; false if it does not live. The lookup moves it to the young end of
 * the table. If the table gives its place to another flow meanwhile, that flow is as young. */
EDGE_INLINE bool reply_renew(const struct edge_flow *flow, __u64 now_ns)
{
	__u64 *sent_ns = bpf_map_lookup_elem(&replies, flow);

	if (!sent_ns || !reply_lives(flow, *sent_ns, now_ns))
		return false;
	if (now_ns - *sent_ns >= REPLY_STEP_NS)
		*sent_ns = now_ns;
	return true;
}

#endif
