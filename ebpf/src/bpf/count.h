/* The traces that a packet leaves: one counter, a rule's hit, a sampled event, a stamp. */
#ifndef MILLRACE_COUNT_H
#define MILLRACE_COUNT_H

#include "limit.h"
#include "parse.h"

#define EVENTS_BYTES (256 << 10)

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct edge_counters);
} counters SEC(".maps");

/* [generation * rules_max + rule] */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, EDGE_GENERATIONS);
	__type(key, __u32);
	__type(value, __u64);
} hits SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct edge_sampling);
} sampling SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENTS_BYTES);
} events SEC(".maps");

/* No map has events as values. This constant brings their type into the object's BTF, where user
 * space compares layouts. */
const struct edge_event event_layout = {};

EDGE_INLINE bool reason_passes(int reason)
{
	return reason < R_TX_RETRY || reason == R_INTERNAL;
}

EDGE_INLINE bool reason_transmits(int reason)
{
	return reason == R_TX_RETRY || reason == R_TX_SYN_COOKIE;
}

EDGE_INLINE void count_hit(const struct edge_view *view, __u32 rule)
{
	__u32 index = view->generation * sizes.rules_max + rule;
	__u64 *hit;

	if (rule >= sizes.rules_max)
		return;
	hit = bpf_map_lookup_elem(&hits, &index);
	if (hit)
		*hit += 1;
}

EDGE_INLINE void count_event(struct xdp_md *ctx, struct edge_view *view, const struct edge_packet *packet, int reason,
			     __u32 rule, const enum edge_program program)
{
	struct edge_event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);

	if (!event)
		return; /* the reader is too slow: the program loses the event, never the packet */
	__builtin_memset(event, 0, sizeof(*event));
	event->now_ns = view_now(view, program);
	event->reason = reason;
	event->rule = rule;
	store64(event->source.address, packet->source[0]);
	store64(event->source.address + 8, packet->source[1]);
	event->source_port = packet->source_port;
	event->port = packet->port;
	event->protocol = packet->protocol;
	event->ifindex = ctx->ingress_ifindex;
	event->length = bpf_xdp_get_buff_len(ctx);
	bpf_ringbuf_submit(event, 0);
}

EDGE_INLINE void count_packet(struct xdp_md *ctx, struct edge_view *view, const struct edge_packet *packet, __u32 reason,
			      __u32 rule, bool acted, const enum edge_program program)
{
	__u32 zero = 0;
	struct edge_counters *mine = bpf_map_lookup_elem(&counters, &zero);
	const struct edge_sampling *sample;

	if (!mine || reason >= EDGE_REASONS)
		return;
	if (acted)
		mine->acted[reason] += 1;
	else
		mine->counted[reason] += 1;
	if (reason_passes(reason) || reason_transmits(reason))
		return;
	sample = bpf_map_lookup_elem(&sampling, &zero);
	if (sample && sample->every && ++mine->sampled >= sample->every) {
		mine->sampled = 0;
		count_event(ctx, view, packet, reason, rule, program);
	}
}

/* Writes the stamp in front of the frame, over an earlier one if there is one: `test_run`
 * repeats on one frame.
 *
 * A stamp that refuses is longer than one that passes: `stamp.bpf.c` tells them apart by their
 * length where it cannot read them. */
EDGE_INLINE bool stamp_write(struct xdp_md *ctx, __u32 kind)
{
	__u32 *stamp = (void *)(long)ctx->data_meta;
	void *data = frame_start(ctx);

	if ((void *)(stamp + 2) > data || stamp[0] != EDGE_STAMP_MAGIC) {
		if (bpf_xdp_adjust_meta(ctx, kind == EDGE_STAMP_REJECT ? -EDGE_STAMP_REJECT_BYTES : -EDGE_STAMP_PASS_BYTES))
			return false;
		stamp = (void *)(long)ctx->data_meta;
		data = frame_start(ctx);
		if ((void *)(stamp + 2) > data)
			return false;
	}
	stamp[0] = EDGE_STAMP_MAGIC;
	stamp[1] = kind;
	return true;
}

#endif
