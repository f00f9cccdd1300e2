/* What the limiter must not be: a load, a decision and a store, without a compare-and-swap. A
 * control for `limiter.rs`. */
#include "kernel.h"
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "GPL";

/* Order is known to `limiter.rs`. */
struct {
	__u64 interval_ns;
	__u64 tolerance_ns;
	__u64 now_ns;
	__u64 paid_until_ns;
	__u64 admitted;
} state;

SEC("xdp")
int naive(struct xdp_md *ctx)
{
	volatile __u64 *word = &state.paid_until_ns;
	__u64 from = *word > state.now_ns ? *word : state.now_ns;

	if (from - state.now_ns > state.tolerance_ns)
		return XDP_DROP;
	bpf_ktime_get_ns(); /* as long as a packet's way is */
	*word = from + state.interval_ns;
	__sync_fetch_and_add(&state.admitted, 1);
	return XDP_PASS;
}
