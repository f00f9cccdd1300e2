/* Hostile packets. `generate` runs as live frames (BPF_F_TEST_XDP_LIVE_FRAMES) and sends each to
 * the veth; `repeat` runs as an ordinary test run and hands each to another program, whose cost is
 * measured.
 *
 * The kernel reuses the pages of live frames, and a receiver's edits (a Retry written in place)
 * stay in them. So every packet is written anew up to `written`. Constants are set before loading:
 * the verifier folds them.
 */
#include "xdp.h"

#define HEADER 128
#define IPV4_PORT 34

const volatile __u8 header[HEADER]; /* with source address, source port and checksums 0 */
const volatile __u32 frame_bytes;
const volatile __u32 spare_bytes; /* more than that are in the buffer; cut off here */
const volatile __u32 written; /* 64 or 128 bytes of it */
const volatile __u32 port_at; /* offset of the source port: IPV4_PORT, or behind an IPv6 header */
const volatile __u32 source_base;
const volatile __u32 source_mask; /* base + (random & mask); all ones: any unicast address */
const volatile __u32 ip_sum; /* of the IP header as in `header` */
const volatile __u32 tcp_sum; /* of the TCP header and its pseudo header; 0: not TCP */
const volatile __u32 random_at; /* offset of 8 random bytes in each packet (an ID); 0: none */
const volatile __u32 interface;
const volatile __u32 interval_ns; /* between packets; 0: as fast as they go */

/* One CPU runs this, so nothing here is atomic. Order is known to `generator.rs`. */
struct {
	__u64 random;
	__u64 sent;
	__u64 next_ns; /* when the next packet is due */
	__u64 first_ns; /* when the first one went */
} state;

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} next SEC(".maps");

static __always_inline __u64 draw(void)
{
	/* xorshift64*: two nanoseconds, where bpf_get_prandom_u32 takes fifteen. */
	__u64 x = state.random;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	state.random = x;
	return x * 0x2545f4914f6cdd1dULL;
}

static __always_inline __u32 pick_source(__u32 random)
{
	__u32 source = source_base + (random & source_mask);

	if (source_mask == 0xffffffff) {
		__u32 first = source >> 24;

		/* Others the stack refuses before any input chain sees them. */
		if (first == 0 || first == 127 || first >= 224)
			source = (source & 0x00ffffff) | 0x0b000000;
	}
	return source;
}

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

static __always_inline int rewrite(struct xdp_md *ctx)
{
	__u8 *data = (__u8 *)(long)ctx->data;
	__u8 *end = (__u8 *)(long)ctx->data_end;
	__u64 random = draw();
	__u32 source = __builtin_bswap32(pick_source(random >> 32));
	__u16 port = __builtin_bswap16(1024 + (random & 0x7fff));
	__u32 addresses = (source & 0xffff) + (source >> 16);

	if (data + 64 > end)
		return 0;
#pragma unroll
	for (int i = 0; i < 64; i += 8)
		*(__u64 *)(data + i) = *(const volatile __u64 *)(header + i);
	if (written == HEADER) {
		if (data + HEADER > end)
			return 0;
#pragma unroll
		for (int i = 64; i < HEADER; i += 8)
			*(__u64 *)(data + i) = *(const volatile __u64 *)(header + i);
	}
	if (port_at == IPV4_PORT)
		*(__u16 *)(data + 24) = fold(ip_sum + addresses);
	*(__u32 *)(data + 26) = source; /* of IPv6, its bytes 4..8 */
	if (port_at <= 62)
		*(__u16 *)(data + port_at) = port;
	if (tcp_sum) {
		__u32 sequence = random >> 16;

		*(__u32 *)(data + 38) = sequence;
		*(__u16 *)(data + 50) =
			fold(tcp_sum + addresses + port + (sequence & 0xffff) + (sequence >> 16));
	}
	if (random_at && random_at <= written - 8)
		*(__u64 *)(data + random_at) = random;
	return 1;
}

static long not_yet(__u32 round, void *nothing)
{
	return bpf_ktime_get_ns() >= state.next_ns;
}

/* Waits for the packet's time. What is late by more than a batch is not made up for: no bursts. */
static __always_inline void pace(void)
{
	__u64 now = bpf_ktime_get_ns();

	if (!state.first_ns)
		state.first_ns = now;
	if (state.next_ns + 64 * (__u64)interval_ns < now)
		state.next_ns = now;
	bpf_loop(1 << 20, not_yet, 0, 0);
	state.next_ns += interval_ns;
}

SEC("xdp")
int generate(struct xdp_md *ctx)
{
	if (!rewrite(ctx))
		return XDP_ABORTED;
	if (interval_ns)
		pace();
	/* A receiver that answers in place leaves its length in the frame, and the kernel does
	 * not notice. It takes the length anew when this program changes it. */
	if (spare_bytes)
		bpf_xdp_adjust_tail(ctx, -(int)spare_bytes);
	state.sent++;
	return bpf_redirect(interface, 0);
}

SEC("xdp.frags")
int repeat(struct xdp_md *ctx)
{
	/* The one before this in the test run may have left a stamp in front. */
	__s32 stamp = ctx->data - ctx->data_meta;

	if (stamp > 0)
		bpf_xdp_adjust_meta(ctx, stamp);
	/* ... or a shorter frame. */
	__s32 missing = frame_bytes - (ctx->data_end - ctx->data);

	if (missing > 0)
		bpf_xdp_adjust_tail(ctx, missing);
	if (!rewrite(ctx))
		return XDP_ABORTED;
	bpf_tail_call(ctx, &next, 0);
	return XDP_ABORTED;
}

char LICENSE[] SEC("license") = "GPL";
