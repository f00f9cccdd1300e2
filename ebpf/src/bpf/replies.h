/* What this host has sent, for scope `host`: `learn` writes on the way out, `edge` knows the answer by it. */
#ifndef MILLRACE_REPLIES_H
#define MILLRACE_REPLIES_H

#include "parse.h"

/* A flow's time is written again once it is that old: not for each packet. */
#define REPLY_STEP_NS 1000000000ull

/* When this host last sent on the flow, to a second. */
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

/* Signed: who sent may have read a later clock than a packet that is on its way. */
EDGE_INLINE bool reply_lives(const struct edge_flow *flow, __u64 sent_ns, __u64 now_ns)
{
	__s64 age_ns = now_ns - sent_ns;

	return age_ns <= (__s64)(flow->protocol == IPPROTO_TCP ? EDGE_REPLY_TCP_NS : EDGE_REPLY_UDP_NS);
}

/* Whether the packet answers what this host has sent. */
EDGE_INLINE bool reply_known(const struct edge_packet *packet, __u64 now_ns)
{
	struct edge_flow flow = reply_flow(packet->source, packet->source_port, packet->port, packet->protocol);
	const __u64 *sent_ns = bpf_map_lookup_elem(&replies, &flow);

	return sent_ns && reply_lives(&flow, *sent_ns, now_ns);
}

/* Keeps a flow that lives; false if it does not. It moves to the young end of the table by being looked up. Should the table
 * give its place to another flow meanwhile, that one is as young. */
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
