/* TCP connections of each source: `conn_state.bpf.c` counts, `edge.bpf.c` reads. */
#ifndef MILLRACE_SOURCES_H
#define MILLRACE_SOURCES_H

#include "world.h"

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct edge_source);
	__type(value, __u64);
} tcp_sources SEC(".maps");

#endif
