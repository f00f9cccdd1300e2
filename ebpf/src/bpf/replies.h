/* What this host has sent, for scope `host`: `learn` writes on the way out, `edge` knows the answer by it. */
#ifndef MILLRACE_REPLIES_H
#define MILLRACE_REPLIES_H

#include "world.h"

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct edge_flow);
	__type(value, __u32);
} replies SEC(".maps");

EDGE_INLINE struct edge_flow reply_flow(const __u64 remote[2], __u16 remote_port, __u16 port, __u8 protocol)
{
	struct edge_flow flow = { .remote_port = remote_port, .port = port, .protocol = protocol };

	store64(flow.remote.address, remote[0]);
	store64(flow.remote.address + 8, remote[1]);
	return flow;
}

EDGE_INLINE bool reply_known(const __u64 remote[2], __u16 remote_port, __u16 port, __u8 protocol)
{
	struct edge_flow flow = reply_flow(remote, remote_port, port, protocol);

	return bpf_map_lookup_elem(&replies, &flow);
}

/* A flow that is known moves to the young end of the table by being looked up. */
EDGE_INLINE void reply_learn(const __u64 remote[2], __u16 remote_port, __u16 port, __u8 protocol)
{
	struct edge_flow flow = reply_flow(remote, remote_port, port, protocol);
	__u32 known = 1;

	if (!bpf_map_lookup_elem(&replies, &flow))
		bpf_map_update_elem(&replies, &flow, &known, BPF_ANY);
}

#endif
