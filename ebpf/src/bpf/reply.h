/* Answers made in place: the part that a Retry and a SYN cookie have in common. */
#ifndef MILLRACE_REPLY_H
#define MILLRACE_REPLY_H

#include "parse.h"

#define HOP_LIMIT 64
#define IPV4_DONT_FRAGMENT 0x4000

/* Memory that the stack of 512 bytes has no room for: the packet's view, and an answer while it
 * is made. XDP runs to its end on one CPU, so nothing else uses it meanwhile. */
struct edge_scratch {
	struct edge_packet packet;
	__u8 bytes[256];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct edge_scratch);
} scratch SEC(".maps");

EDGE_INLINE struct edge_scratch *reply_scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

/* Internet checksums (RFC 1071) are summed as 32-bit words in the order of memory. */
EDGE_INLINE __u64 sum64(__u64 sum, __u64 word)
{
	return sum + (__u32)word + (word >> 32);
}

EDGE_INLINE __u16 sum_finish(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* The sum of a pseudo header. The constant bytes of a v4-mapped address add 0xffff each, which
 * is a zero of this arithmetic. */
EDGE_INLINE __u64 reply_pseudo_sum(const struct edge_packet *packet, __u16 transport_bytes)
{
	__u64 sum = bpf_htonl(packet->protocol) + bpf_htonl(transport_bytes);

	sum = sum64(sum, packet->source[0]);
	sum = sum64(sum, packet->source[1]);
	sum = sum64(sum, packet->destination[0]);
	return sum64(sum, packet->destination[1]);
}

EDGE_INLINE __u32 reply_network_bytes(const struct edge_packet *packet)
{
	return packet->ipv4 ? IPV4_BYTES : IPV6_BYTES;
}

EDGE_INLINE void reply_ethernet(__u8 *frame)
{
	__u32 first = load32(frame), second = load32(frame + 4), third = load32(frame + 8);

	/* d0 d1 d2 d3 | d4 d5 s0 s1 | s2 s3 s4 s5 */
	store32(frame, second >> 16 | third << 16);
	store32(frame + 4, third >> 16 | first << 16);
	store32(frame + 8, first >> 16 | second << 16);
}

/* Writes the IP header of an answer with `transport_bytes` behind it. The caller has checked the
 * bounds. */
EDGE_INLINE void reply_network(__u8 *ip, const struct edge_packet *packet, __u16 transport_bytes)
{
	__u32 words[5];
	__u64 sum = 0;

	if (!packet->ipv4) {
		store32(ip, bpf_htonl(0x60000000));
		store16be(ip + 4, transport_bytes);
		ip[6] = packet->protocol;
		ip[7] = HOP_LIMIT;
		store64(ip + 8, packet->destination[0]);
		store64(ip + 16, packet->destination[1]);
		store64(ip + 24, packet->source[0]);
		store64(ip + 32, packet->source[1]);
		return;
	}
	words[0] = bpf_htonl(0x45000000 | (IPV4_BYTES + transport_bytes));
	words[1] = bpf_htonl(IPV4_DONT_FRAGMENT);
	words[2] = bpf_htonl(HOP_LIMIT << 24 | packet->protocol << 16);
	words[3] = packet->destination[1] >> 32;
	words[4] = packet->source[1] >> 32;
#pragma unroll
	for (int i = 0; i < 5; i++)
		sum += words[i];
	words[2] |= (__u32)sum_finish(sum) << 16;
#pragma unroll
	for (int i = 0; i < 5; i++)
		store32(ip + 4 * i, words[i]);
}

/* Cuts or grows the frame so that it ends with the answer, which then is linear. A frame of
 * several buffers grows in its last one. If its first is shorter than the answer, the frame is
 * cut down to the first before: the bytes that go lie behind the IP packet, all of whose headers
 * are linear (`parse_transport`). */
EDGE_INLINE bool reply_resize(struct xdp_md *ctx, __u32 bytes)
{
	__u32 whole = bpf_xdp_get_buff_len(ctx), linear = frame_linear(ctx);

	if (linear < bytes && linear < whole) {
		if (bpf_xdp_adjust_tail(ctx, (int)linear - (int)whole))
			return false;
		whole = linear;
	}
	return bpf_xdp_adjust_tail(ctx, (int)bytes - (int)whole) == 0;
}

#endif
