/* Companions of `edge` in tcx: `stamp` turns the stamp of `edge` into a mark that nftables can
 * read, `learn` remembers the flows that this host sends. */
#include "replies.h"

char LICENSE[] SEC("license") = "GPL";

#define MARK_MASK 0xff000000u
#define MARK_PASS 0x4d000000u
#define MARK_REJECT 0x4e000000u
#define TCP_FLAGS_AT 13

/* The kind of stamp that the program left; 0: none.
 *
 * Generic XDP on Linux 6.9 and later may move a packet to new memory and forget how long its
 * link header is. Then `data` is the network header, and in front of it stands the link header,
 * not the stamp; but the length of the metadata is there, and tells the kind. */
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

/* Ingress. A mark of the edge comes from a stamp only: one that the frame already had is
 * removed. */
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

/* An outgoing packet, seen from its answer. */
struct sent {
	__u64 remote[2];
	__u64 local[2];
	__u32 transport;
	__u8 protocol;
	bool ipv4;
};

/* Whether a socket of this host listens there: then another host opened the connection. */
EDGE_INLINE bool is_served(struct __sk_buff *skb, const struct sent *sent, __be16 port)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *socket;
	bool listens;

	if (sent->ipv4) {
		tuple.ipv4.daddr = sent->local[1] >> 32;
		tuple.ipv4.dport = port;
		socket = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		store64(tuple.ipv6.daddr, sent->local[0]);
		store64(tuple.ipv6.daddr + 2, sent->local[1]);
		tuple.ipv6.dport = port;
		socket = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!socket)
		return false;
	listens = socket->state == TCP_LISTEN;
	bpf_sk_release(socket);
	return listens;
}

/* Answers of this host are not remembered: no packet would look them up, and clients could push
 * out the flows that are needed. Connections that are older than the scope are learned from
 * their next segment, unless they belong to a listener. A reset ends a flow. The firewall may
 * also refuse with a reset: remembered, that would let the sender's next packet in. */
EDGE_INLINE void learn_flow(struct __sk_buff *skb, struct edge_view *view, const struct sent *sent)
{
	bool tcp = sent->protocol == IPPROTO_TCP;
	struct edge_flow flow;
	__u64 now_ns;
	__be16 pair[2];
	__u8 flags = 0;

	if ((!tcp && sent->protocol != IPPROTO_UDP) || bpf_skb_load_bytes(skb, sent->transport, pair, sizeof(pair)))
		return;
	if (edge_service_of(view->generation, tcp, bpf_ntohs(pair[0])))
		return;
	if (tcp && bpf_skb_load_bytes(skb, sent->transport + TCP_FLAGS_AT, &flags, sizeof(flags)))
		return;
	flow = reply_flow(sent->remote, bpf_ntohs(pair[1]), bpf_ntohs(pair[0]), sent->protocol);
	if (flags & TCP_RST) {
		bpf_map_delete_elem(&replies, &flow);
		return;
	}
	if ((flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK))
		return;
	now_ns = view_now(view, EDGE_LIVE);
	if (reply_renew(&flow, now_ns))
		return;
	if (tcp && !(flags & TCP_SYN) && is_served(skb, sent, pair[0]))
		return;
	bpf_map_update_elem(&replies, &flow, &now_ns, BPF_ANY);
}

EDGE_INLINE void learn_ipv4(struct __sk_buff *skb, struct edge_view *view)
{
	struct sent sent = { .ipv4 = true };
	__u8 ip[IPV4_BYTES];

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, ip, sizeof(ip)) || load16be(ip + 6) & 0x1fff)
		return;
	sent.local[1] = (__u64)load32(ip + 12) << 32 | V4_MAPPED;
	sent.remote[1] = (__u64)load32(ip + 16) << 32 | V4_MAPPED;
	sent.transport = ETHERNET_BYTES + (ip[0] & 0x0f) * 4;
	sent.protocol = ip[9];
	learn_flow(skb, view, &sent);
}

/* This host sends no extension headers in front of UDP and TCP that an answer would repeat. */
EDGE_INLINE void learn_ipv6(struct __sk_buff *skb, struct edge_view *view)
{
	struct sent sent = { .transport = ETHERNET_BYTES + IPV6_BYTES };
	__u8 ip[IPV6_BYTES];

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, ip, sizeof(ip)))
		return;
	sent.local[0] = load64(ip + 8);
	sent.local[1] = load64(ip + 16);
	sent.remote[0] = load64(ip + 24);
	sent.remote[1] = load64(ip + 32);
	sent.protocol = ip[6];
	learn_flow(skb, view, &sent);
}

/* Egress. Does nothing unless the set in force owns the whole host. */
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
		learn_ipv4(skb, &view);
	else if (skb->protocol == bpf_htons(ETHER_IPV6))
		learn_ipv6(skb, &view);
	return TCX_NEXT;
}
