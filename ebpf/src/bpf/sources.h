/* TCP connections of each source: `conn_state.bpf.c` counts, `edge.bpf.c` reads. */
#ifndef MILLRACE_SOURCES_H
#define MILLRACE_SOURCES_H

#include "limit.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct edge_source);
	__type(value, __u64);
} tcp_sources SEC(".maps");

/* Connections that a source holds. */
EDGE_INLINE __u32 source_connections(const __u64 address[2], bool ipv4)
{
	struct edge_source source = source_cap_key(address, ipv4);
	const __u64 *count = bpf_map_lookup_elem(&tcp_sources, &source);
	__u64 word = count ? read_once(count) : 0;

	return word & EDGE_TCP_DEAD ? 0 : word & EDGE_TCP_CONNECTIONS;
}

#endif
