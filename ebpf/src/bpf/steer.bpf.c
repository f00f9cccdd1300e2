/* Chooses the socket of a reuseport group by the datagram's destination connection ID: its first
 * byte, modulo the shards.
 *
 * The rule is that of the classic program in `shards/src/socket.rs`, under the same tests
 * (`engine/cli/tests/steering.rs`). It never drops: without a socket in the table, the kernel's own
 * hash chooses.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>

#include "abi.h"

char LICENSE[] SEC("license") = "GPL";

#define UDP_BYTES 8

const volatile struct edge_sizes sizes SEC(".rodata.sizes") = { .shards = 1 };

struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} sockets SEC(".maps");

static __always_inline __u32 byte_at(const struct sk_reuseport_md *datagram, __u32 offset, __u32 missing)
{
	__u8 byte;

	return bpf_skb_load_bytes(datagram, UDP_BYTES + offset, &byte, sizeof(byte)) ? missing : byte;
}

/* A datagram too short to hold an ID goes to shard 0, as does one with an empty ID. */
static __always_inline __u32 first_of_id(const struct sk_reuseport_md *datagram)
{
	if (!(byte_at(datagram, 0, 0) & 0x80))
		return byte_at(datagram, 1, 0);
	return byte_at(datagram, 5, 0) ? byte_at(datagram, 6, 0) : 0;
}

SEC("sk_reuseport")
int steer(struct sk_reuseport_md *datagram)
{
	__u32 shard = sizes.shards ? first_of_id(datagram) % sizes.shards : 0;

	bpf_sk_select_reuseport(datagram, &sockets, &shard, 0);
	return SK_PASS;
}
