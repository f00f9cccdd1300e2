/* The edge: one decision, three entry points. `docs/reference/edge.md` is the specification;
 * comments name its sections. */
#include "count.h"
#include "quic.h"
#include "replies.h"
#include "reply.h"
#include "retry.h"
#include "rules.h"
#include "tcp.h"

char LICENSE[] SEC("license") = "GPL";

#define NO_SERVICE 0xffffffffu

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct edge_decision);
} decision SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct edge_mock);
} mock SEC(".maps");

/* The state of the packet when its reason is known. */
struct edge_verdict {
	int reason;
	__u32 rule;
	__u32 service;
	bool ours;
};

/* Section 1, step 5. Null with R_PASS_OTHER; else the packet is for a declared port. */
EDGE_INLINE const struct edge_service *find_service(const struct edge_view *view, const struct edge_packet *packet,
						    struct edge_verdict *verdict)
{
	__u32 found = edge_service_of(view->generation, packet->protocol == IPPROTO_TCP, packet->port);

	verdict->reason = R_PASS_OTHER;
	if (found && found <= EDGE_SERVICES_MAX) {
		verdict->service = found - 1;
		return &view->config->service[(found - 1) & (EDGE_SERVICES_MAX - 1)];
	}
	return view->config->scope == EDGE_SCOPE_HOST ? &view->config->host : NULL;
}

/* Section 3. GO_ON: allowed. */
EDGE_INLINE int pass_firewall(struct edge_view *view, const struct edge_packet *packet,
			      const struct edge_service *service, struct edge_verdict *verdict,
			      const enum edge_program program)
{
	__u32 entry = rules_find(service, packet->source, packet->ipv4);

	if (entry == ENTRY_NONE)
		return R_INTERNAL;
	verdict->rule = entry_rule(entry);
	switch (entry_action(entry)) {
	case EDGE_ALLOW:
		return GO_ON;
	case EDGE_REJECT:
		view_now(view, program);
		return budget_charge(view, EDGE_BUDGET_REJECT) ? R_PASS_REJECT : R_FIREWALL_REJECT_BUDGET;
	default:
		return verdict->rule == EDGE_RULE_DEFAULT ? R_FIREWALL_DEFAULT : R_FIREWALL_DENY;
	}
}

/* Decides on a packet for `service`. Transmits the answer if one is due. */
EDGE_INLINE int decide_ours(struct xdp_md *ctx, struct edge_view *view, struct edge_packet *packet,
			    const struct edge_service *service, struct edge_verdict *verdict,
			    const enum edge_program program)
{
	bool transmit = program != EDGE_TRACE && view->config->mode == EDGE_ENFORCE;
	struct quic_header header = {};
	__u32 kind = service->kind;
	int reason, without = R_PASS_TCP_SYN;
	__s64 cookie = COOKIE_NONE;

	if (kind == EDGE_KIND_HOST) {
		if ((packet->fragment || packet->options) && !reply_known(packet, view_now(view, program)))
			return packet->fragment ? R_FRAGMENT : R_OPTIONS;
	} else {
		reason = parse_transport(ctx, packet);
		if (reason != GO_ON)
			return reason;
	}
	if (kind == EDGE_KIND_QUIC) {
		reason = quic_classify(ctx, packet, &header);
		if (reason != GO_ON)
			return reason;
	}
	reason = pass_firewall(view, packet, service, verdict, program);
	/* A rule that denies stops a flow that is under way; only the default lets answers in. */
	if (reason == R_FIREWALL_DEFAULT && kind == EDGE_KIND_HOST && reply_known(packet, view_now(view, program))) {
		verdict->ours = false;
		return R_PASS_REPLY;
	}
	if (reason != GO_ON)
		return reason;
	switch (kind) {
	case EDGE_KIND_QUIC:
		reason = quic_admit(ctx, view, packet, &header, program);
		if (reason == R_TX_RETRY && transmit && !retry_send(ctx, packet, &header, view->now_ns))
			return R_QUIC_RETRY_FAILED;
		return reason;
	case EDGE_KIND_TCP:
		reason = tcp_admit(ctx, view, packet, program, &cookie, &without);
		if (reason == R_TX_SYN_COOKIE && transmit && !cookie_send(ctx, packet, cookie))
			return without;
		return reason;
	case EDGE_KIND_UDP:
		return R_PASS_UDP;
	default:
		return R_PASS_HOST;
	}
}

EDGE_INLINE void decide(struct xdp_md *ctx, struct edge_view *view, struct edge_packet *packet,
			struct edge_verdict *verdict, const enum edge_program program)
{
	const struct edge_service *service;

	verdict->rule = EDGE_RULE_DEFAULT;
	verdict->service = NO_SERVICE;
	verdict->ours = false;
	verdict->reason = parse_frame(ctx, packet);
	if (verdict->reason != GO_ON)
		return;
	service = find_service(view, packet, verdict);
	if (!service)
		return;
	verdict->ours = true;
	verdict->reason = decide_ours(ctx, view, packet, service, verdict, program);
}

EDGE_INLINE enum xdp_action action_of(int reason)
{
	if (reason_passes(reason))
		return XDP_PASS;
	return reason_transmits(reason) ? XDP_TX : XDP_DROP;
}

/* `edge_trace` and `edge_test` leave their decision in a map. */
EDGE_INLINE void leave_decision(struct edge_view *view, const struct edge_verdict *verdict, const enum edge_program program)
{
	__u32 zero = 0;
	struct edge_decision *left = bpf_map_lookup_elem(&decision, &zero);

	if (!left)
		return;
	left->reason = verdict->reason;
	left->action = action_of(verdict->reason);
	left->rule = verdict->rule;
	left->service = verdict->service;
	left->stress = view_stress(view, program);
	left->generation = view->generation;
	left->now_ns = view->now_ns;
}

/* Section 6. */
EDGE_INLINE int act(struct xdp_md *ctx, struct edge_view *view, const struct edge_packet *packet,
		    struct edge_verdict *verdict, const enum edge_program program)
{
	bool enforce = view->config->mode == EDGE_ENFORCE;
	bool acted = enforce || (reason_passes(verdict->reason) && verdict->reason != R_PASS_REJECT);
	enum xdp_action action = enforce ? action_of(verdict->reason) : XDP_PASS;
	__u32 stamp = enforce && verdict->reason == R_PASS_REJECT ? EDGE_STAMP_REJECT : EDGE_STAMP_PASS;

	if (program != EDGE_LIVE)
		leave_decision(view, verdict, program);
	if (program == EDGE_TRACE)
		return action;
	if (action == XDP_PASS && verdict->ours && !stamp_write(ctx, stamp)) {
		verdict->reason = R_INTERNAL; /* unstamped, the packet will not get past the table below */
		acted = true;
	}
	if (verdict->rule != EDGE_RULE_DEFAULT)
		count_hit(view, verdict->rule);
	count_packet(ctx, view, packet, verdict->reason, verdict->rule, acted, program);
	return action;
}

EDGE_INLINE int run(struct xdp_md *ctx, const enum edge_program program)
{
	struct edge_view view = { .read_only = program == EDGE_TRACE };
	struct edge_scratch *room = reply_scratch();
	struct edge_verdict verdict;
	__u32 zero = 0;

	view.control = edge_control_value();
	if (!view.control || !room)
		return XDP_PASS;
	if (program == EDGE_TEST) {
		view.mock = bpf_map_lookup_elem(&mock, &zero);
		if (!view.mock)
			return XDP_PASS;
		view.read_only = view.mock->read_only;
	}
	view_choose_generation(&view, program);
	room->packet = (struct edge_packet){};
	decide(ctx, &view, &room->packet, &verdict, program);
	return act(ctx, &view, &room->packet, &verdict, program);
}

/* The entry point that is attached. */
SEC("xdp.frags")
int edge(struct xdp_md *ctx)
{
	return run(ctx, EDGE_LIVE);
}

/* Returns the decision of `edge`, and changes nothing. */
SEC("xdp.frags")
int edge_trace(struct xdp_md *ctx)
{
	return run(ctx, EDGE_TRACE);
}

/* Decides as `edge` does, at a time and with a cookie that the caller sets. */
SEC("xdp.frags")
int edge_test(struct xdp_md *ctx)
{
	return run(ctx, EDGE_TEST);
}
