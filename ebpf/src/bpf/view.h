/* The inputs of a decision: the state that user space has set, the clock, and which of the entry
 * points is running.
 *
 * `edge` decides on real packets. `edge_trace` looks at one and changes nothing. `edge_test` takes
 * clock and cookie from the map `mock`. The argument `program` is a constant after inlining: each
 * entry point carries only its own branches.
 */
#ifndef MILLRACE_VIEW_H
#define MILLRACE_VIEW_H

#include "kernel.h"
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"

#define EDGE_INLINE static __always_inline

/* Makes the compiler take a value as it stands here. Otherwise it would rearrange a sum so that
 * the verifier loses its bounds, or compute a pointer twice, of which the verifier has seen one
 * checked. */
#define OPAQUE(value) asm volatile("" : "+r"(value))

/* Bytes 8 to 12 of a v4-mapped address, as they are loaded. */
#define V4_MAPPED 0xffff0000u

const volatile struct edge_sizes sizes SEC(".rodata.sizes") = { .limiter_buckets = 1, .rules_max = 1, .shards = 1 };

enum edge_program { EDGE_LIVE, EDGE_TRACE, EDGE_TEST, EDGE_TRACEPOINT };

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct edge_control);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct edge_ports);
} ports SEC(".maps");

/* The state that user space has set, as one packet sees it: read once. */
struct edge_view {
	const struct edge_control *control;
	const struct edge_config *config;
	const struct edge_mock *mock; /* `edge_test` only */
	__u64 now_ns; /* 0: not read yet */
	__u32 generation;
	bool read_only;
};

/* Unaligned loads and stores in one instruction; the compiler would go byte by byte. */
EDGE_INLINE __u64 load64(const void *at)
{
	return *(const __u64 *)at;
}

EDGE_INLINE __u32 load32(const void *at)
{
	return *(const __u32 *)at;
}

EDGE_INLINE __u16 load16be(const void *at)
{
	return bpf_ntohs(*(const __u16 *)at);
}

EDGE_INLINE void store64(void *at, __u64 value)
{
	*(__u64 *)at = value;
}

EDGE_INLINE void store32(void *at, __u32 value)
{
	*(__u32 *)at = value;
}

EDGE_INLINE void store16be(void *at, __u16 value)
{
	*(__u16 *)at = bpf_htons(value);
}

/* A step of the coarse clock is a tick (4 ms at 250 Hz). It costs 14 ns, the exact clock 33 ns.
 * Limits lose nothing by it: a clock that stands still refuses too much, never too little, and
 * bursts hold many ticks. Only IDs that user space has just issued need the exact clock
 * (`quic.h`). */
EDGE_INLINE __u64 view_now(struct edge_view *view, const enum edge_program program)
{
	if (view->now_ns)
		return view->now_ns;
	if (program == EDGE_TEST)
		view->now_ns = view->mock->now_ns;
	else if (program == EDGE_TRACEPOINT)
		view->now_ns = bpf_ktime_get_ns(); /* tracepoints have no other */
	else
		view->now_ns = bpf_ktime_get_coarse_ns();
	return view->now_ns;
}

EDGE_INLINE __u64 view_now_exact(const struct edge_view *view, const enum edge_program program)
{
	return program == EDGE_TEST ? view->mock->now_ns : bpf_ktime_get_ns();
}

EDGE_INLINE __u32 view_stress(struct edge_view *view, const enum edge_program program)
{
	return view_now(view, program) < view->control->lease_until_ns ? view->control->stress : EDGE_STRESS_NORMAL;
}

/* A set that no operator confirms in time ends by the clock, whether or not a process
 * lives to take it back. */
EDGE_INLINE void view_choose_generation(struct edge_view *view, const enum edge_program program)
{
	__u64 revert_at_ns = view->control->revert_at_ns;
	__u32 generation = view->control->active & 1;

	if (revert_at_ns && view_now(view, program) >= revert_at_ns)
		generation ^= 1;
	view->generation = generation;
	view->config = &view->control->config[generation];
}

EDGE_INLINE struct edge_control *edge_control_value(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

/* The service of a local port: its index + 1, 0 for none. */
EDGE_INLINE __u32 edge_service_of(__u32 generation, bool tcp, __u16 port)
{
	__u32 zero = 0;
	const struct edge_ports *table = bpf_map_lookup_elem(&ports, &zero);

	return table ? table->service[generation & 1][tcp][port] : 0;
}

#endif
