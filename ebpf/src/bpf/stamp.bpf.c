/* Companions of `edge` in tcx: `stamp` turns its stamp into a mark that nftables can see, `learn` remembers what this
 * host sends. */
#include "parse.h"
#include "replies.h"

char LICENSE[] SEC("license") = "GPL";

#define MARK_MASK 0xff000000u
#define MARK_PASS 0x4d000000u
#define MARK_REJECT 0x4e000000u
#define TCP_FLAGS_AT 13

/* The kind of stamp that the program left; 0: none.
 *
 * Generic XDP on Linux 6.9 and later may move a packet to new memory and forget how long its link header is. Then
 * `data` is the network header, and what stands in front of it is the link header, not the stamp; but the length that
 * XDP gave the stamp is there, and says which it is. */
EDGE_INLINE __u32 stamp_kind(const struct __sk_buff *skb)
{
	const void *start = (void *)(long)skb->data_meta, *end = (void *)(long)skb->data;
	const __u32 *words = start;
	const __u16 *halves = start;

	if (start + EDGE_STAMP_PASS_BYTES > end)
		return 0;
	if (words[0] == EDGE_STAMP_MAGIC)
		return words[1];
	if (start + EDGE_STAMP_PASS_BYTES == end)
		return halves[EDGE_STAMP_PASS_BYTES / 2 - 1] == skb->protocol ? EDGE_STAMP_PASS : 0;
	if (start + EDGE_STAMP_REJECT_BYTES > end)
		return 0;
	return halves[EDGE_STAMP_REJECT_BYTES / 2 - 1] == skb->protocol ? EDGE_STAMP_REJECT : 0;
}

/* Ingress. A mark of ours comes from a stamp only: one that the frame already had is taken away. */
SEC("tcx/ingress")
int stamp(struct __sk_buff *skb)
{
	__u32 mark = skb->mark, present = mark & MARK_MASK, kind = stamp_kind(skb);

	if (present == MARK_PASS || present == MARK_REJECT)
		mark &= ~MARK_MASK;
	if (kind)
		mark = (mark & ~MARK_MASK) | (kind == EDGE_STAMP_REJECT ? MARK_REJECT : MARK_PASS);
	if (mark != skb->mark)
		skb->mark = mark;
	return TCX_NEXT;
}

/* What this host only answers is not remembered. For its declared ports it would never be asked for, and would push out what is, at the
 * pace of whoever connects. And a reset may be how the firewall refuses: remembered, it would let the next packet of that sender in. */
EDGE_INLINE void learn_flow(struct __sk_buff *skb, __u32 generation, const __u64 remote[2], __u32 transport,
			    __u8 protocol)
{
	bool tcp = protocol == IPPROTO_TCP;
	__be16 pair[2];
	__u8 flags;

	if ((!tcp && protocol != IPPROTO_UDP) || bpf_skb_load_bytes(skb, transport, pair, sizeof(pair)))
		return;
	if (edge_service_of(generation, tcp, bpf_ntohs(pair[0])))
		return;
	if (tcp) {
		if (bpf_skb_load_bytes(skb, transport + TCP_FLAGS_AT, &flags, sizeof(flags)))
			return;
		if (flags & TCP_RST || (flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK))
			return;
	}
	reply_learn(remote, bpf_ntohs(pair[1]), bpf_ntohs(pair[0]), protocol);
}

EDGE_INLINE void learn_ipv4(struct __sk_buff *skb, __u32 generation)
{
	__u8 ip[IPV4_BYTES];
	__u64 remote[2] = {};

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, ip, sizeof(ip)) || load16be(ip + 6) & 0x1fff)
		return;
	remote[1] = (__u64)load32(ip + 16) << 32 | V4_MAPPED;
	learn_flow(skb, generation, remote, ETHERNET_BYTES + (ip[0] & 0x0f) * 4, ip[9]);
}

/* This host sends no extension headers in front of UDP and TCP that an answer would have to follow. */
EDGE_INLINE void learn_ipv6(struct __sk_buff *skb, __u32 generation)
{
	__u8 ip[IPV6_BYTES];
	__u64 remote[2];

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, ip, sizeof(ip)))
		return;
	remote[0] = load64(ip + 24);
	remote[1] = load64(ip + 32);
	learn_flow(skb, generation, remote, ETHERNET_BYTES + IPV6_BYTES, ip[6]);
}

/* Egress. Idle unless the set in force owns the whole host. */
SEC("tcx/egress")
int learn(struct __sk_buff *skb)
{
	struct edge_view view = { .control = edge_control_value() };

	if (!view.control)
		return TCX_NEXT;
	view_choose_generation(&view, EDGE_LIVE);
	if (view.config->scope != EDGE_SCOPE_HOST)
		return TCX_NEXT;
	if (skb->protocol == bpf_htons(ETHER_IPV4))
		learn_ipv4(skb, view.generation);
	else if (skb->protocol == bpf_htons(ETHER_IPV6))
		learn_ipv6(skb, view.generation);
	return TCX_NEXT;
}
