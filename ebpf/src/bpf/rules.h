/* The firewall: one walk through a trie, eight bits a step, finds the rule that decides, or the
 * service's default. */
#ifndef MILLRACE_RULES_H
#define MILLRACE_RULES_H

#include "view.h"

#define ENTRY_NONE (EDGE_LEAF | EDGE_SPARSE) /* ends a walk as a leaf does, but is none */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct edge_node);
} trie4 SEC(".maps"), trie6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct edge_sparse);
} sparse4 SEC(".maps"), sparse6 SEC(".maps");

/* The entry of a byte: counts the starts that are not above it, without a branch. */
EDGE_INLINE __u32 sparse_entry(const struct edge_sparse *node, __u32 byte)
{
	__u32 run = 0;

#pragma unroll
	for (int i = 1; i < EDGE_RUNS; i++)
		run += (0x100 + byte - node->start[i]) >> 8;
	return node->entry[run];
}

/* One step down; ENTRY_NONE if there is no such node. */
EDGE_INLINE __u32 trie_step(void *dense, void *sparse, __u32 entry, __u32 byte)
{
	__u32 index = entry & ~EDGE_SPARSE;

	if (entry & EDGE_SPARSE) {
		const struct edge_sparse *node = bpf_map_lookup_elem(sparse, &index);

		return node ? sparse_entry(node, byte) : ENTRY_NONE;
	}
	const struct edge_node *node = bpf_map_lookup_elem(dense, &index);

	return node ? node->entry[byte] : ENTRY_NONE;
}

/* The leaf of an IPv4 address in network order; ENTRY_NONE if the trie has none. */
EDGE_INLINE __u32 trie4_find(__u32 root, __u32 address)
{
	__u32 entry = root;

#pragma unroll
	for (int i = 0; i < 4; i++) {
		entry = trie_step(&trie4, &sparse4, entry, address & 0xff);
		if (entry & EDGE_LEAF)
			return entry;
		address >>= 8;
	}
	return ENTRY_NONE;
}

/* The leaf of an IPv6 address, given as words. Sixteen steps have many exits, so the verifier
 * checks this function by itself. */
__noinline __u32 trie6_find(__u32 root, __u64 first, __u64 second)
{
	__u32 entry = root;

	for (int i = 0; i < 16; i++) {
		entry = trie_step(&trie6, &sparse6, entry, first & 0xff);
		if (entry & EDGE_LEAF)
			return entry;
		first = first >> 8;
		if (i == 7)
			first = second;
	}
	return ENTRY_NONE;
}

EDGE_INLINE __u32 rules_find(const struct edge_service *service, const __u64 source[2], bool ipv4)
{
	return ipv4 ? trie4_find(service->root4, source[1] >> 32) : trie6_find(service->root6, source[0], source[1]);
}

EDGE_INLINE __u32 entry_rule(__u32 entry)
{
	return entry & 0xffff;
}

EDGE_INLINE __u32 entry_action(__u32 entry)
{
	return entry >> 16 & 3;
}

#endif
