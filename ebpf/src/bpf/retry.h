/* A Retry (RFC 9000 section 17.2.5), made in place of the Initial that it answers. The program
 * keeps no state: all of it is in the token.
 *
 * The integrity tag is AES-128-GCM over associated data alone, under a key and a nonce that RFC
 * 9001 prints (section 5.8). So `build.rs` runs the block cipher once; what remains is GHASH, a
 * product in GF(2^128) for each 16 bytes, by tables.
 */
#ifndef MILLRACE_RETRY_H
#define MILLRACE_RETRY_H

#include "ghash.h" /* made by build.rs: GHASH_TABLE, RETRY_PAD_FIRST, RETRY_PAD_SECOND */
#include "quic.h"
#include "reply.h"

#define BLOCK_BYTES 16
#define RETRY_FIRST 0xf0
#define RETRY_FIXED_BYTES 71 /* without the client's ID */
#define RETRY_BYTES_MAX 96 /* rounded up */
/* Offset in the scratch memory. The original ID ends where the Retry begins, which is the order
 * in which both are signed. */
#define RETRY_AT 24
#define SIGNED_BLOCKS_MAX 6 /* 1 + 20 + 55 + 20 bytes */

struct ghash_entry {
	__u64 first;
	__u64 second;
};

/* [position of a byte][its value]: the product of H and a block that is zero except for this
 * byte. */
static const struct ghash_entry ghash_table[BLOCK_BYTES][256] = GHASH_TABLE;

EDGE_INLINE void ghash_multiply(__u64 block[2])
{
	__u64 first = 0, second = 0;

#pragma unroll
	for (int i = 0; i < BLOCK_BYTES; i++) {
		const struct ghash_entry *entry = &ghash_table[i][block[i / 8] >> (8 * (i % 8)) & 0xff];

		first ^= entry->first;
		second ^= entry->second;
	}
	block[0] = first;
	block[1] = second;
}

/* Signs the `bytes` of the scratch memory that end with the Retry, and puts the tag behind them;
 * the rest is zero. */
EDGE_INLINE bool retry_sign(__u32 start, __u32 bytes)
{
	struct edge_scratch *room = reply_scratch();
	__u64 block[2] = {};
	__u8 *at;

	if (!room || start > RETRY_AT || bytes > SIGNED_BLOCKS_MAX * BLOCK_BYTES)
		return false;
	for (__u32 i = 0; i < SIGNED_BLOCKS_MAX; i++) {
		if (i * BLOCK_BYTES >= bytes)
			break;
		at = room->bytes + start + i * BLOCK_BYTES;
		block[0] ^= load64(at);
		block[1] ^= load64(at + 8);
		ghash_multiply(block);
	}
	block[0] ^= bpf_cpu_to_be64(bytes * 8);
	ghash_multiply(block);
	at = room->bytes + start + bytes;
	store64(at, block[0] ^ RETRY_PAD_FIRST);
	store64(at + 8, block[1] ^ RETRY_PAD_SECOND);
	return true;
}

EDGE_INLINE void retry_mint(const struct edge_control *control, const struct edge_packet *packet, const __u64 id[3],
			    __u32 id_bytes, __u64 now_ns, struct quic_token *token)
{
	__u32 key = control->key_active & 3;
	__u64 epoch = now_ns >> HANDSHAKE_EPOCH_SHIFT;

	token->words[0] = TOKEN_FIRST | (key << 5 | (epoch & 31)) << 8 | id_bytes << 16 | id[0] << 24;
	token->words[1] = id[0] >> 40 | id[1] << 24;
	token->words[2] = id[1] >> 40 | id[2] << 24;
	token->words[3] = token_tag(control, packet, token, epoch);
}

/* Builds the Retry in the scratch memory, at RETRY_AT. Returns its length, or 0. */
EDGE_INLINE __u32 retry_make(struct xdp_md *ctx, const struct edge_packet *packet, const struct quic_header *header,
			     __u64 now_ns)
{
	const struct edge_control *control = edge_control_value();
	__u32 id_bytes = header->id_bytes, source_id_bytes = header->source_id_bytes, start;
	struct edge_scratch *room = reply_scratch();
	const __u8 *original = quic_at(ctx, packet, 6, QUIC_ID_BYTES_MAX);
	const __u8 *source_id = quic_at(ctx, packet, quic_source_id(header), QUIC_ID_BYTES_MAX);
	struct quic_token token;
	__u64 id[3], retry_id[2];
	__u8 *at;

	if (!control || !room || !original || !source_id || id_bytes < QUIC_ID_BYTES_MIN || id_bytes > QUIC_ID_BYTES_MAX ||
	    source_id_bytes > QUIC_ID_BYTES_MAX)
		return 0;
#pragma unroll
	for (int i = 0; i < RETRY_AT + RETRY_BYTES_MAX; i += 8)
		store64(room->bytes + i, 0);

	id[0] = load64(original);
	id[1] = load64(original + 8);
	id[2] = load32(original + 16);
	start = RETRY_AT - 1 - id_bytes;
	OPAQUE(start);
	at = room->bytes + start;
	at[0] = id_bytes;
	store64(at + 1, id[0]);
	store64(at + 9, id[1]);
	store32(at + 17, id[2]); /* what is too much lies where the Retry goes now */

	at = room->bytes + RETRY_AT;
	at[0] = RETRY_FIRST;
	store32(at + 1, bpf_htonl(1));
	at[5] = source_id_bytes;
	store64(at + 6, load64(source_id));
	store64(at + 14, load64(source_id + 8));
	store32(at + 22, load32(source_id + 16)); /* likewise, under the ID and the token */

	if (id_bytes < 16) {
		id[1] &= (1ull << (8 * (id_bytes - 8))) - 1;
		id[2] = 0;
	} else {
		id[2] &= (1ull << (8 * (id_bytes - 16))) - 1;
	}
	retry_mint(control, packet, id, id_bytes, now_ns, &token);
	token_retry_id(&token, retry_id);
	at += 6 + source_id_bytes;
	at[0] = LOCAL_ID_BYTES;
	store64(at + 1, retry_id[0]);
	store64(at + 9, retry_id[1]);
#pragma unroll
	for (int i = 0; i < 4; i++)
		store64(at + 17 + 8 * i, token.words[i]);
	if (!retry_sign(start, 1 + id_bytes + RETRY_FIXED_BYTES + source_id_bytes - BLOCK_BYTES))
		return 0;
	return RETRY_FIXED_BYTES + source_id_bytes;
}

EDGE_INLINE void retry_udp(__u8 *udp, const struct edge_packet *packet, const struct edge_scratch *room, __u16 bytes)
{
	__u16 udp_bytes = UDP_BYTES + bytes, checksum;
	__u32 head = bpf_htonl((__u32)packet->port << 16 | packet->source_port);
	__u64 sum = reply_pseudo_sum(packet, udp_bytes) + head + bpf_htons(udp_bytes), word;

	store32(udp, head);
	store16be(udp + 4, udp_bytes);
#pragma unroll
	for (int i = 0; i < RETRY_BYTES_MAX; i += 8) {
		word = load64(room->bytes + RETRY_AT + i);
		sum = sum64(sum, word);
		store64(udp + UDP_BYTES + i, word);
	}
	checksum = sum_finish(sum);
	*(__u16 *)(udp + 6) = checksum ? checksum : 0xffff;
}

/* Turns the Initial into the Retry that answers it. */
__noinline int retry_send(struct xdp_md *ctx, const struct edge_packet *packet, const struct quic_header *header,
			  __u64 now_ns)
{
	struct edge_scratch *room = reply_scratch();
	__u8 *link, *ip, *udp;
	__u32 bytes, network_bytes;

	if (!packet || !header || !room)
		return false;
	bytes = retry_make(ctx, packet, header, now_ns);
	network_bytes = reply_network_bytes(packet);
	link = frame_at(ctx, 0, ETHERNET_BYTES);
	ip = frame_at(ctx, packet->network, IPV6_BYTES);
	udp = frame_at(ctx, packet->network + network_bytes, UDP_BYTES + RETRY_BYTES_MAX);
	if (!bytes || !link || !ip || !udp)
		return false;
	reply_ethernet(link);
	reply_network(ip, packet, UDP_BYTES + bytes);
	retry_udp(udp, packet, room, bytes);
	return reply_resize(ctx, packet->network + network_bytes + UDP_BYTES + bytes);
}

#endif
