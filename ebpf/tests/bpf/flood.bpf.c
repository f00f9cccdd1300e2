/* A flood of first packets from made-up sources, and the far end of the wire that it goes over.
 *
 * `generate` runs as live frames (BPF_F_TEST_XDP_LIVE_FRAMES). The kernel reuses their pages, and
 * edits of a receiver stay in them, as those of a Retry written in place: so `generate` writes
 * every packet's headers anew. The length that the receiver left stays as well, unless the program
 * changes it: so it cuts every packet from a template that is longer.
 */
#include "kernel.h"
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "GPL";

#define HEADER 64
#define SHAPES 2
#define ETHER_IPV4 0x0800

/* A frame's first bytes, with source address, source port and checksums 0. */
struct shape {
	__u8 header[HEADER];
	__u32 ip_sum; /* of the IP header as it stands */
	__u32 tcp_sum; /* of the TCP header and its pseudo header; 0: UDP, whose checksum is left out */
	__u32 bytes; /* of the frame; fewer than the template that the run is given has */
};

/* Order is known to `common/flood.rs`, here and in `state`. */
const volatile struct {
	struct shape shape[SHAPES];
	__u32 interface; /* where packets are sent */
	__be32 host; /* the far end's own address */
} setup;

/* One CPU generates. */
struct {
	__u64 random;
	__u64 sent;
	__u64 answers;
} state;

/* xorshift64*: each source comes up as often as any other. */
static __always_inline __u64 draw(void)
{
	__u64 x = state.random;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	state.random = x;
	return x * 0x2545f4914f6cdd1dull;
}

/* Any unicast address: others the stack refuses before any limit could. */
static __always_inline __be32 pick_source(__u32 random)
{
	__u32 first = random >> 24;

	if (first == 0 || first == 127 || first >= 224)
		random = (random & 0x00ffffff) | 0x0b000000;
	return bpf_htonl(random);
}

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

SEC("xdp")
int generate(struct xdp_md *ctx)
{
	__u64 random = draw();
	const volatile struct shape *shape = &setup.shape[random >> 63];
	__s32 template = ctx->data_end - ctx->data;
	__u8 *data, *end;
	__be32 source = pick_source(random >> 16);
	__be16 port = bpf_htons(1024 + (random & 0x7fff));
	__u32 addresses = (source & 0xffff) + (source >> 16);

	if (bpf_xdp_adjust_tail(ctx, (__s32)shape->bytes - template))
		return XDP_ABORTED;
	data = (__u8 *)(long)ctx->data;
	end = (__u8 *)(long)ctx->data_end;
	if (data + HEADER > end)
		return XDP_ABORTED;
#pragma unroll
	for (int i = 0; i < HEADER; i += 8)
		*(__u64 *)(data + i) = *(const volatile __u64 *)(shape->header + i);
	*(__u16 *)(data + 24) = fold(shape->ip_sum + addresses);
	*(__u32 *)(data + 26) = source;
	*(__u16 *)(data + 34) = port;
	if (shape->tcp_sum)
		*(__u16 *)(data + 50) = fold(shape->tcp_sum + addresses + port);
	else
		*(__u64 *)(data + 48) = random; /* the client's choice of an ID */
	state.sent++;
	return bpf_redirect(setup.interface, 0);
}

/* Takes what is for this host; swallows, and counts, answers to sources that were made up.
 * Native XDP here is also what lets XDP_TX through at the other end. */
SEC("xdp.frags")
int far_end(struct xdp_md *ctx)
{
	__u8 *data = (__u8 *)(long)ctx->data;
	__u8 *end = (__u8 *)(long)ctx->data_end;

	if (data + 34 > end || *(__be16 *)(data + 12) != bpf_htons(ETHER_IPV4) || *(__be32 *)(data + 30) == setup.host)
		return XDP_PASS;
	__sync_fetch_and_add(&state.answers, 1);
	return XDP_DROP;
}
