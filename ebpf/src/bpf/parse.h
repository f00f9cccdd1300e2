/* From a frame to addresses, ports and lengths: section 1 of the specification.
 *
 * The verifier checks functions that are not inline once, by themselves. What they leave in a
 * packet is just numbers to their callers, so that the paths through the program add up instead of
 * multiplying.
 *
 * 1. Offsets count from the start of the frame. Each step takes pointers into the frame afresh: a
 *    pull invalidates them.
 * 2. Lengths are checked against the whole frame, its fragments included. What is read lies in the
 *    linear part, where `frame_gather` has brought it.
 */
#ifndef MILLRACE_PARSE_H
#define MILLRACE_PARSE_H

#include "view.h"

#define GO_ON (-1) /* no reason yet */

#define ETHERNET_BYTES 14
#define VLAN_BYTES 4
#define IPV4_BYTES 20
#define IPV6_BYTES 40
#define UDP_BYTES 8
#define TCP_BYTES 20
#define LINK_BYTES_MAX (ETHERNET_BYTES + 2 * VLAN_BYTES)
#define NETWORK_END_MAX (LINK_BYTES_MAX + IPV6_BYTES)
/* Bytes that are read of a transport header and behind it: UDP, a long QUIC header with its IDs,
 * a token. */
#define TRANSPORT_BYTES 128
/* Last offset at which the program reads a transport header: past it, there are too many
 * extension headers. */
#define TRANSPORT_MAX (NETWORK_END_MAX + EDGE_EXTENSION_BYTES_MAX)
#define PULL_BYTES 256
/* An offset past all headers that are read; the verifier wants a bound. */
#define FRAME_OFFSET_MAX 0x7ff

enum ether_type { ETHER_IPV4 = 0x0800, ETHER_IPV6 = 0x86dd, ETHER_VLAN = 0x8100, ETHER_SERVICE_VLAN = 0x88a8 };
enum extension { EXT_HOP = 0, EXT_ROUTING = 43, EXT_FRAGMENT = 44, EXT_DESTINATION = 60 };
enum tcp_flag { TCP_FIN = 0x01, TCP_SYN = 0x02, TCP_RST = 0x04, TCP_ACK = 0x10 };

struct edge_packet {
	__u64 source[2]; /* IPv4 as v4-mapped */
	__u64 destination[2];
	__u32 network; /* offset of the IP header */
	__u32 transport;
	__u32 end; /* of the IP packet */
	__u32 payload_bytes; /* UDP: behind its header */
	__u16 source_port;
	__u16 port;
	__u8 protocol;
	__u8 tcp_flags;
	__u8 ipv4;
	__u8 fragment;
	__u8 options;
	__u8 pad[3];
};

/* Linux 6.18 and later. */
extern int bpf_xdp_pull_data(struct xdp_md *ctx, __u32 length) __ksym __weak;

EDGE_INLINE void *frame_start(const struct xdp_md *ctx)
{
	return (void *)(long)ctx->data;
}

EDGE_INLINE void *frame_end(const struct xdp_md *ctx)
{
	return (void *)(long)ctx->data_end;
}

/* `bytes` of the linear part at `offset`, or null. */
EDGE_INLINE __u8 *frame_at(const struct xdp_md *ctx, __u32 offset, const __u32 bytes)
{
	__u8 *at = frame_start(ctx) + offset;

	if (offset > FRAME_OFFSET_MAX)
		return NULL;
	OPAQUE(at);
	return (void *)at + bytes <= frame_end(ctx) ? at : NULL;
}

EDGE_INLINE __u32 frame_linear(const struct xdp_md *ctx)
{
	return ctx->data_end - ctx->data;
}

/* Brings the first `bytes` of a frame into its linear part, if the frame has that many. */
EDGE_INLINE bool frame_gather(struct xdp_md *ctx, __u32 bytes)
{
	if (frame_linear(ctx) >= bytes)
		return true;
	return bpf_ksym_exists(bpf_xdp_pull_data) && bpf_xdp_pull_data(ctx, bytes) == 0;
}

/* The ordinary case comes first: a frame whose linear part holds the link and network headers
 * needs no call. */
EDGE_INLINE void frame_gather_headers(struct xdp_md *ctx)
{
	__u64 bytes;

	if (frame_linear(ctx) >= NETWORK_END_MAX)
		return;
	bytes = bpf_xdp_get_buff_len(ctx);
	frame_gather(ctx, bytes < PULL_BYTES ? bytes : PULL_BYTES);
}

/* Whether the frame reaches `end`. If it does, the headers in front of it are linear. */
EDGE_INLINE bool frame_reaches(struct xdp_md *ctx, __u32 end)
{
	if (end <= frame_linear(ctx))
		return true;
	if (end > bpf_xdp_get_buff_len(ctx))
		return false;
	frame_gather(ctx, end < PULL_BYTES ? end : PULL_BYTES);
	return true;
}

EDGE_INLINE int parse_ipv4(struct xdp_md *ctx, struct edge_packet *packet)
{
	const __u8 *ip = frame_at(ctx, packet->network, IPV4_BYTES);
	__u32 header_bytes, total_bytes, fragment;

	if (!ip)
		return R_MALFORMED_IP;
	header_bytes = (ip[0] & 0x0f) * 4;
	total_bytes = load16be(ip + 2);
	fragment = load16be(ip + 6);
	if (ip[0] >> 4 != 4 || header_bytes < IPV4_BYTES || total_bytes < header_bytes)
		return R_MALFORMED_IP;
	packet->ipv4 = true;
	packet->protocol = ip[9];
	packet->source[0] = packet->destination[0] = 0;
	packet->source[1] = (__u64)load32(ip + 12) << 32 | V4_MAPPED;
	packet->destination[1] = (__u64)load32(ip + 16) << 32 | V4_MAPPED;
	packet->transport = packet->network + header_bytes;
	packet->end = packet->network + total_bytes;
	packet->fragment = (fragment & 0x2000) != 0;
	packet->options = header_bytes > IPV4_BYTES;
	if (!frame_reaches(ctx, packet->end))
		return R_MALFORMED_IP;
	return fragment & 0x1fff ? R_PASS_OTHER : GO_ON;
}

/* Walks to the transport header. Extension headers are rare and may lie past the linear part, so
 * they are copied. */
EDGE_INLINE int parse_extensions(struct xdp_md *ctx, struct edge_packet *packet, __u8 next)
{
	__u32 at = packet->transport;

	for (int i = 0; i <= EDGE_EXTENSIONS_MAX; i++) {
		__u8 header[8];
		__u32 bytes;

		if (next == IPPROTO_UDP || next == IPPROTO_TCP)
			break;
		if (next != EXT_HOP && next != EXT_ROUTING && next != EXT_FRAGMENT && next != EXT_DESTINATION)
			return R_PASS_OTHER;
		if (i == EDGE_EXTENSIONS_MAX)
			return R_PASS_OTHER;
		if (at + sizeof(header) > packet->end || bpf_xdp_load_bytes(ctx, at, header, sizeof(header)))
			return R_MALFORMED_IP;
		bytes = next == EXT_FRAGMENT ? sizeof(header) : (header[1] + 1u) * 8;
		if (at + bytes > packet->end)
			return R_MALFORMED_IP;
		if (next == EXT_ROUTING && header[2] == 0)
			packet->options = true;
		if (next == EXT_FRAGMENT) {
			if (load16be(header + 2) >> 3)
				return R_PASS_OTHER;
			if (header[3] & 1)
				packet->fragment = true;
		}
		at += bytes;
		next = header[0];
	}
	if (at - packet->transport > EDGE_EXTENSION_BYTES_MAX)
		packet->options = true;
	packet->transport = at;
	packet->protocol = next;
	return GO_ON;
}

EDGE_INLINE int parse_ipv6(struct xdp_md *ctx, struct edge_packet *packet)
{
	const __u8 *ip = frame_at(ctx, packet->network, IPV6_BYTES);
	__u32 payload_bytes;
	__u8 next;

	if (!ip || ip[0] >> 4 != 6)
		return R_MALFORMED_IP;
	payload_bytes = load16be(ip + 4);
	next = ip[6];
	packet->ipv4 = false;
	packet->source[0] = load64(ip + 8);
	packet->source[1] = load64(ip + 16);
	packet->destination[0] = load64(ip + 24);
	packet->destination[1] = load64(ip + 32);
	packet->transport = packet->network + IPV6_BYTES;
	packet->end = packet->transport + payload_bytes;
	packet->fragment = packet->options = false;
	/* IPv4 in IPv6, which the host drops too: no packet may have the words of an IPv4 source
	 * and the trie of IPv6. */
	if (!packet->source[0] && (__u32)packet->source[1] == V4_MAPPED)
		return R_MALFORMED_IP;
	if (!frame_reaches(ctx, packet->end))
		return R_MALFORMED_IP;
	if (!payload_bytes)
		return R_PASS_OTHER;
	return parse_extensions(ctx, packet, next);
}

EDGE_INLINE int parse_network(struct xdp_md *ctx, struct edge_packet *packet)
{
	const __u8 *link;
	__u32 at = ETHERNET_BYTES;
	__u16 type;
	int reason;

	frame_gather_headers(ctx);
	link = frame_at(ctx, 0, ETHERNET_BYTES);
	if (!link)
		return R_PASS_OTHER;
	type = load16be(link + 12);
#pragma unroll
	for (int tag = 0; tag < 2; tag++) {
		if (type != ETHER_VLAN && type != ETHER_SERVICE_VLAN)
			break;
		link = frame_at(ctx, at, VLAN_BYTES);
		if (!link)
			return R_PASS_OTHER;
		type = load16be(link + 2);
		at += VLAN_BYTES;
	}
	packet->network = at;
	if (type == ETHER_IPV4)
		reason = parse_ipv4(ctx, packet);
	else if (type == ETHER_IPV6)
		reason = parse_ipv6(ctx, packet);
	else
		return R_PASS_OTHER;
	if (reason != GO_ON)
		return reason;
	return packet->protocol == IPPROTO_UDP || packet->protocol == IPPROTO_TCP ? GO_ON : R_PASS_OTHER;
}

EDGE_INLINE int parse_ports(struct xdp_md *ctx, struct edge_packet *packet)
{
	const __u8 *transport;
	__be16 pair[2];

	if (packet->transport + sizeof(pair) > packet->end)
		return packet->fragment ? R_FRAGMENT : R_MALFORMED_L4;
	transport = packet->transport <= TRANSPORT_MAX ? frame_at(ctx, packet->transport, sizeof(pair)) : NULL;
	if (transport) {
		packet->source_port = load16be(transport);
		packet->port = load16be(transport + 2);
		return GO_ON;
	}
	if (bpf_xdp_load_bytes(ctx, packet->transport, pair, sizeof(pair)))
		return R_MALFORMED_L4;
	packet->source_port = bpf_ntohs(pair[0]);
	packet->port = bpf_ntohs(pair[1]);
	return GO_ON;
}

/* Steps 1 to 4. GO_ON: addresses, ports and offsets are known. */
__noinline int parse_frame(struct xdp_md *ctx, struct edge_packet *packet)
{
	int reason;

	if (!packet)
		return R_INTERNAL;
	reason = parse_network(ctx, packet);
	return reason == GO_ON ? parse_ports(ctx, packet) : reason;
}

/* Whether no unicast packet of another host has this address. */
EDGE_INLINE bool address_is_martian(const __u64 address[2], bool ipv4)
{
	__u32 word = address[1] >> 32, first = word & 0xff;

	if (ipv4)
		return first == 0 || first == 127 || (first & 0xf0) == 0xe0 || word == 0xffffffff;
	if ((address[0] & 0xff) == 0xff)
		return true;
	return !address[0] && (!address[1] || address[1] == 1ull << 56);
}

/* Whether the host would never answer the packet. Then the program must not answer it either: an
 * answer swaps the addresses, of link and network. */
EDGE_INLINE bool packet_is_martian(const struct xdp_md *ctx, const struct edge_packet *packet)
{
	const __u8 *link = frame_at(ctx, 0, ETHERNET_BYTES);

	if (!link || (link[0] | link[6]) & 1)
		return true;
	return address_is_martian(packet->source, packet->ipv4) ||
	       address_is_martian(packet->destination, packet->ipv4) ||
	       (packet->source[0] == packet->destination[0] && packet->source[1] == packet->destination[1]);
}

/* Steps 6 and 7. Afterwards `TRANSPORT_BYTES` of the packet from its transport header on are
 * linear, or all if there are fewer. */
EDGE_INLINE int parse_transport(struct xdp_md *ctx, struct edge_packet *packet)
{
	__u32 held_bytes, header_bytes, wanted;
	const __u8 *transport;

	held_bytes = packet->end - packet->transport;
	if (packet->fragment)
		return R_FRAGMENT;
	if (packet->options || packet->transport > TRANSPORT_MAX)
		return R_OPTIONS;
	wanted = packet->transport + (held_bytes < TRANSPORT_BYTES ? held_bytes : TRANSPORT_BYTES);
	if (!frame_gather(ctx, wanted))
		return R_MALFORMED_L4;
	if (packet->protocol == IPPROTO_UDP) {
		transport = frame_at(ctx, packet->transport, UDP_BYTES);
		if (held_bytes < UDP_BYTES || !transport)
			return R_MALFORMED_L4;
		header_bytes = load16be(transport + 4);
		if (header_bytes < UDP_BYTES || header_bytes > held_bytes)
			return R_MALFORMED_L4;
		packet->payload_bytes = header_bytes - UDP_BYTES;
		return GO_ON;
	}
	transport = frame_at(ctx, packet->transport, TCP_BYTES);
	if (held_bytes < TCP_BYTES || !transport)
		return R_MALFORMED_L4;
	header_bytes = (transport[12] >> 4) * 4;
	if (header_bytes < TCP_BYTES || header_bytes > held_bytes)
		return R_MALFORMED_L4;
	packet->tcp_flags = transport[13];
	switch (packet->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)) {
	case TCP_SYN | TCP_FIN:
	case TCP_SYN | TCP_RST:
	case TCP_FIN | TCP_RST:
	case TCP_SYN | TCP_FIN | TCP_RST:
		return R_TCP_FLAGS;
	}
	return packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST) ? GO_ON : R_TCP_FLAGS;
}

#endif
