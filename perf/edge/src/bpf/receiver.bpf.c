/* The programs at the ends of the veth where the edge is not: some pass or drop all, one is the
 * attacker's end. */
#include "xdp.h"

#define RETRY_BYTES 124

/* Order is known to `receiver.rs`. */
enum count { PASSED, DROPPED, RETRIES, ANSWERS, COUNTS };

/* In network order: honest clients share the attacker's end. */
const volatile __u32 client_address;
const volatile __u32 client_mask;

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTS);
	__type(key, __u32);
	__type(value, __u64);
} counts SEC(".maps");

static __always_inline void count(__u32 what)
{
	__u64 *word = bpf_map_lookup_elem(&counts, &what);

	if (word)
		(*word)++;
}

SEC("xdp")
int pass_all(struct xdp_md *ctx)
{
	count(PASSED);
	return XDP_PASS;
}

SEC("xdp")
int drop_all(struct xdp_md *ctx)
{
	count(DROPPED);
	return XDP_DROP;
}

/* For test runs: what the loop around a program costs. */
SEC("xdp.frags")
int nothing(struct xdp_md *ctx)
{
	return XDP_DROP;
}

/* The same for a program that leaves a Retry's length behind. */
SEC("xdp.frags")
int shorten(struct xdp_md *ctx)
{
	int length = ctx->data_end - ctx->data;

	bpf_xdp_adjust_tail(ctx, RETRY_BYTES - length);
	return XDP_TX;
}

/* The attacker's end: answers to addresses that the attacker made up are counted and dropped;
 * the rest goes to the client. */
SEC("xdp")
int attacker(struct xdp_md *ctx)
{
	__u8 *data = (__u8 *)(long)ctx->data;
	__u8 *end = (__u8 *)(long)ctx->data_end;

	if (data + 43 > end || *(__u16 *)(data + 12) != __builtin_bswap16(0x0800))
		return XDP_PASS;
	if ((*(__u32 *)(data + 30) & client_mask) == client_address)
		return XDP_PASS;
	/* A Retry is a long header of type 3. */
	if (data[23] == 17 && (data[42] & 0xf0) == 0xf0)
		count(RETRIES);
	else
		count(ANSWERS);
	return XDP_DROP;
}

char LICENSE[] SEC("license") = "GPL";
