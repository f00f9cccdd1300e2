/* QUIC: first packets (RFC 9000), the node's connection IDs, tokens and proofs: sections 2 and 4
 * of the specification. */
#ifndef MILLRACE_QUIC_H
#define MILLRACE_QUIC_H

#include "limit.h"
#include "parse.h"
#include "siphash.h"

#define QUIC_INITIAL_BYTES_MIN 1200
#define QUIC_ID_BYTES_MAX 20
#define QUIC_ID_BYTES_MIN 8 /* that a client may choose for its first packet */
#define DIAL_REQUEST_BYTES 80
#define LOCAL_ID_BYTES 16
#define PROOF_BYTES 20
#define TOKEN_BYTES 32
#define TOKEN_FIRST 0x4d
#define TOKEN_ID_AT 3 /* of the original ID */
#define HANDSHAKE_EPOCH_SHIFT 34
#define ROAMING_EPOCH_SHIFT 42
#define PROOF_EPOCH_SHIFT 36
#define RETRY_ID_FACTOR 0x9e3779b97f4a7c15ull

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32); /* node tag */
	__type(value, struct edge_key);
} peers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct edge_source);
	__type(value, struct edge_count);
} quic_sources SEC(".maps");

enum quic_class { QUIC_DIAL_REQUEST, QUIC_KNOWN, QUIC_VERSION, QUIC_INITIAL };

/* Offsets count from the start of the payload. */
struct quic_header {
	__u32 class; /* enum quic_class */
	__u32 id; /* of the destination ID */
	__u32 id_bytes;
	__u32 source_id_bytes;
};

/* `bytes` of the payload at `offset`, or null. */
EDGE_INLINE const __u8 *quic_at(const struct xdp_md *ctx, const struct edge_packet *packet, __u32 offset,
				const __u32 bytes)
{
	return frame_at(ctx, packet->transport + UDP_BYTES + offset, bytes);
}

EDGE_INLINE __u32 quic_source_id(const struct quic_header *header)
{
	return 7 + header->id_bytes;
}

EDGE_INLINE int quic_classify_long(struct xdp_md *ctx, const struct edge_packet *packet, struct quic_header *header)
{
	const __u8 *payload = quic_at(ctx, packet, 0, 7), *source_id;
	__u32 bytes = packet->payload_bytes, version;
	__u8 first;

	if (bytes < 7 || !payload)
		return R_QUIC_MALFORMED;
	first = payload[0];
	version = load32(payload + 1);
	header->id = 6;
	header->id_bytes = payload[5];
	if (header->id_bytes > QUIC_ID_BYTES_MAX)
		return R_QUIC_ID_LENGTH;
	if (quic_source_id(header) > bytes)
		return R_QUIC_MALFORMED;
	source_id = quic_at(ctx, packet, quic_source_id(header) - 1, 1);
	if (!source_id)
		return R_QUIC_MALFORMED;
	header->source_id_bytes = source_id[0];
	if (header->source_id_bytes > QUIC_ID_BYTES_MAX)
		return R_QUIC_ID_LENGTH;
	if (quic_source_id(header) + header->source_id_bytes > bytes)
		return R_QUIC_MALFORMED;
	header->class = QUIC_KNOWN;
	if (!version)
		return GO_ON;
	if (version != bpf_htonl(1)) {
		header->class = QUIC_VERSION;
		return bytes < QUIC_INITIAL_BYTES_MIN ? R_QUIC_SHORT_INITIAL : GO_ON;
	}
	if (!(first & 0x40))
		return R_QUIC_FIXED_BIT;
	switch (first >> 4 & 3) {
	case 0:
		header->class = QUIC_INITIAL;
		return GO_ON;
	case 1:
		return R_QUIC_ZERO_RTT;
	}
	return GO_ON;
}

EDGE_INLINE int quic_classify(struct xdp_md *ctx, const struct edge_packet *packet, struct quic_header *header)
{
	const __u8 *payload = quic_at(ctx, packet, 0, 1), *dial_request;
	__u32 bytes = packet->payload_bytes;

	if (!bytes || !payload)
		return R_QUIC_MALFORMED;
	if (payload[0] == 0x0d) {
		header->class = QUIC_DIAL_REQUEST;
		dial_request = quic_at(ctx, packet, 2, 4);
		if (bytes != DIAL_REQUEST_BYTES || !dial_request)
			return R_QUIC_FIXED_BIT;
		return load32(dial_request) == bpf_htonl(0x6469616c) ? GO_ON : R_QUIC_FIXED_BIT; /* "dial" */
	}
	if (payload[0] & 0x80)
		return quic_classify_long(ctx, packet, header);
	if (!(payload[0] & 0x40))
		return R_QUIC_FIXED_BIT;
	header->class = QUIC_KNOWN;
	header->id = 1;
	header->id_bytes = LOCAL_ID_BYTES;
	return bytes < 1 + LOCAL_ID_BYTES ? R_QUIC_MALFORMED : GO_ON;
}

enum id_state { ID_UNKNOWN, ID_EXPIRED, ID_VALID };

/* The epoch in which an ID or a token was made, provided that its tag is right. */
struct quic_made {
	__u64 epoch; /* the last one up to the present that ends in its five bits: what its tag is over */
	__u32 age; /* in epochs: holds up to 1 */
};

/* User space issues by the exact clock, which is up to a tick ahead of the coarse one. An ID or
 * a token that seems to be of the next epoch is checked with the exact clock. */
EDGE_INLINE struct quic_made quic_made_when(struct edge_view *view, const __u32 shift, __u32 low_bits,
					    const enum edge_program program)
{
	__u64 present = view_now(view, program) >> shift;
	struct quic_made made;

	if (((low_bits - present) & 31) == 1)
		present = view_now_exact(view, program) >> shift;
	made.age = (present - low_bits) & 31;
	made.epoch = present - made.age;
	return made;
}

/* Checks an ID of 16 bytes, given as words: whether this node issued it to this address, and
 * whether it has expired. */
EDGE_INLINE enum id_state id_check(struct edge_view *view, const struct edge_packet *packet, const __u64 id[2],
				   const enum edge_program program)
{
	__u32 form = id[0] >> 40 & 0xff;
	const struct edge_key *key = &view->control->keys[form >> 5 & 3];
	bool roaming = form >> 7;
	__u32 shift = roaming ? ROAMING_EPOCH_SHIFT : HANDSHAKE_EPOCH_SHIFT;
	struct quic_made made = quic_made_when(view, shift, form & 31, program);
	__u64 tag;

	if (roaming) {
		const __u64 words[2] = { id[0], made.epoch };

		tag = siphash24(key, words, 2);
	} else {
		const __u64 words[5] = { id[0], packet->source[0], packet->source[1], packet->source_port, made.epoch };

		tag = siphash24(key, words, 5);
	}
	if (tag != id[1])
		return ID_UNKNOWN;
	return made.age <= 1 ? ID_VALID : ID_EXPIRED;
}

/* A token of 32 bytes, as words: three that are signed, then the tag. It is read in place: the
 * stack has no room for it. */
struct quic_token {
	__u64 words[4];
};

EDGE_INLINE __u64 token_tag(const struct edge_control *control, const struct edge_packet *packet,
			    const struct quic_token *token, __u64 epoch)
{
	const __u64 words[7] = { token->words[0],   token->words[1],	 token->words[2], packet->source[0],
				 packet->source[1], packet->source_port, epoch };

	return siphash24(&control->keys[token->words[0] >> 13 & 3], words, 7);
}

/* Whether the tag is right. It is a function of its own, because the stack of the program has no
 * room for its rounds. */
static __noinline bool token_signed(const struct edge_control *control, const struct edge_packet *packet,
				    const struct quic_token *token, __u64 epoch)
{
	return token_tag(control, packet, token, epoch) == token->words[3];
}

EDGE_INLINE __u32 token_epoch(const struct quic_token *token)
{
	return token->words[0] >> 8 & 31;
}

/* Whether the bytes behind the original ID are zero. */
EDGE_INLINE bool token_padded(const struct quic_token *token, __u32 id_bytes)
{
	__u32 used_bits = (TOKEN_ID_AT + id_bytes) * 8 - 64; /* of words 1 and 2 */

	if (used_bits < 64)
		return token->words[1] >> used_bits == 0 && token->words[2] == 0;
	return token->words[2] >> ((used_bits - 64) & 63) == 0;
}

/* The ID that a Retry with this token gives to the client. */
EDGE_INLINE void token_retry_id(const struct quic_token *token, __u64 id[2])
{
	__u64 tag = token->words[3];

	id[0] = (token->words[0] >> (8 * TOKEN_ID_AT) & 0xff) | tag << 8;
	id[1] = tag >> 56 | (tag * RETRY_ID_FACTOR) << 8;
}

/* Whether it has the form of a token of a node. */
EDGE_INLINE bool token_formed(const struct quic_token *token)
{
	__u32 original_bytes = token->words[0] >> 16 & 0xff;

	return (token->words[0] & 0xff) == TOKEN_FIRST && original_bytes >= QUIC_ID_BYTES_MIN &&
	       original_bytes <= QUIC_ID_BYTES_MAX && token_padded(token, original_bytes);
}

/* GO_ON if this node made the token, for this client and this destination ID, and it has not
 * expired. */
EDGE_INLINE int token_check(struct edge_view *view, const struct edge_packet *packet, const struct quic_token *token,
			    const __u64 id[2], __u32 id_bytes, const enum edge_program program)
{
	struct quic_made made;
	__u64 expected[2];

	made = quic_made_when(view, HANDSHAKE_EPOCH_SHIFT, token_epoch(token), program);
	if (!token_signed(view->control, packet, token, made.epoch))
		return R_QUIC_BAD_TOKEN;
	token_retry_id(token, expected);
	if (id_bytes != LOCAL_ID_BYTES || id[0] != expected[0] || id[1] != expected[1])
		return R_QUIC_BAD_TOKEN;
	return made.age <= 1 ? GO_ON : R_QUIC_EXPIRED_TOKEN;
}

/* Whether a destination ID of 20 bytes is the proof of a registry peer, made for this address
 * and in these minutes. Gives the tag of its node. */
EDGE_INLINE bool proof_check(struct edge_view *view, const struct edge_packet *packet, const __u8 *id,
			     const enum edge_program program, __u32 *node)
{
	__u64 words[5] = { load64(id), load32(id + 8), packet->source[0], packet->source[1] };
	__u64 next = ((view_now(view, program) + view->control->wall_offset_ns) >> PROOF_EPOCH_SHIFT) + 1;
	__u64 age = (next - (words[0] >> 8)) & 0xff; /* before the next epoch */
	const struct edge_key *key;

	if (age > 2)
		return false;
	words[4] = next - age;
	*node = words[0] >> 16;
	key = bpf_map_lookup_elem(&peers, node);
	return key && siphash24(key, words, 5) == load64(id + 12);
}

/* Whether the source has reached its cap of connections, as counted by a node whose lease holds. */
EDGE_INLINE bool quic_source_full(struct edge_view *view, const struct edge_packet *packet, const enum edge_program program)
{
	struct edge_source source = source_cap_key(packet->source, packet->ipv4);
	__u32 cap = view->config->quic_connections_max;
	const struct edge_count *count;

	if (!cap || view_now(view, program) >= view->control->lease_until_ns)
		return false;
	count = bpf_map_lookup_elem(&quic_sources, &source);
	return count && count->run == view->control->run && count->connections >= cap;
}

/* Finds the token of an Initial: its offset and length. */
EDGE_INLINE int quic_find_token(struct xdp_md *ctx, const struct edge_packet *packet, const struct quic_header *header,
				__u32 *at, __u64 *bytes)
{
	__u32 varint = quic_source_id(header) + header->source_id_bytes;
	const __u8 *found = quic_at(ctx, packet, varint, 8);
	__u64 value;

	if (!found)
		return R_QUIC_MALFORMED;
	value = load64(found);
	switch (value >> 6 & 3) {
	case 0:
		*bytes = value & 0x3f;
		*at = varint + 1;
		break;
	case 1:
		*bytes = bpf_ntohs(value) & 0x3fff;
		*at = varint + 2;
		break;
	case 2:
		*bytes = bpf_ntohl(value) & 0x3fffffff;
		*at = varint + 4;
		break;
	default:
		*bytes = bpf_be64_to_cpu(value) & 0x3fffffffffffffffull;
		*at = varint + 8;
	}
	return *bytes > packet->payload_bytes - *at ? R_QUIC_MALFORMED : GO_ON;
}

/* A destination ID of 20 bytes that may be a proof. GO_ON: it is none. */
EDGE_INLINE int quic_admit_peer(struct xdp_md *ctx, struct edge_view *view, const struct edge_packet *packet,
				const enum edge_program program)
{
	const __u8 *id = quic_at(ctx, packet, 6, PROOF_BYTES);
	__u64 words[2];
	__u32 node;

	if (!id)
		return R_QUIC_MALFORMED;
	words[0] = load64(id);
	words[1] = load64(id + 8);
	if (!proof_check(view, packet, id, program, &node))
		return GO_ON;
	if (!sketch_take(view, words[0], words[1], EDGE_PURPOSE_PROOF))
		return R_QUIC_PROOF_REPLAYED;
	if (!sketch_take(view, node, 0, EDGE_PURPOSE_PEER))
		return R_QUIC_PEER_BUDGET;
	return R_PASS_QUIC_PEER;
}

/* An Initial without an ID of this node. R_TX_RETRY: a Retry is due. */
EDGE_INLINE int quic_admit_initial(struct xdp_md *ctx, struct edge_view *view, const struct edge_packet *packet,
				   const struct quic_header *header, const __u64 id[2], __u32 stress,
				   const enum edge_program program)
{
	const struct quic_token *token;
	struct sketch_ask ask;
	__u64 token_bytes;
	__u32 token_at;
	bool validated;
	int reason;

	if (packet->payload_bytes < QUIC_INITIAL_BYTES_MIN)
		return R_QUIC_SHORT_INITIAL;
	if (header->id_bytes < QUIC_ID_BYTES_MIN)
		return R_QUIC_ID_LENGTH;
	reason = quic_find_token(ctx, packet, header, &token_at, &token_bytes);
	if (reason != GO_ON)
		return reason;
	if (header->id_bytes == PROOF_BYTES) {
		reason = quic_admit_peer(ctx, view, packet, program);
		if (reason != GO_ON)
			return reason;
	}
	if (stress == EDGE_STRESS_PEERS)
		return R_QUIC_PEERS_ONLY;
	/* A token that is none of a node counts as no token (RFC 9000, 8.1.3). */
	validated = false;
	if (token_bytes == TOKEN_BYTES) {
		token = (const void *)quic_at(ctx, packet, token_at, TOKEN_BYTES);
		if (!token)
			return R_QUIC_MALFORMED;
		validated = token_formed(token);
		if (validated) {
			reason = token_check(view, packet, token, id, header->id_bytes, program);
			if (reason != GO_ON)
				return reason;
		}
	}
	sketch_ask_source(&ask, view, packet->source, packet->ipv4, EDGE_PURPOSE_QUIC);
	if (!sketch_look_source(&ask, view, program))
		return R_QUIC_SOURCE_RATE;
	/* A client that gets a Retry is checked against its cap when it comes back. */
	if (!validated && (stress != EDGE_STRESS_NORMAL || !budget_charge(view, EDGE_BUDGET_UNVALIDATED)))
		return packet_is_martian(ctx, packet) ? R_MARTIAN : R_TX_RETRY;
	if (quic_source_full(view, packet, program))
		return R_QUIC_SOURCE_CAP;
	if (!validated)
		return R_PASS_QUIC_INITIAL;
	return sketch_take_source(&ask, view) ? R_PASS_QUIC_TOKEN : R_QUIC_SOURCE_RATE;
}

/* Section 4. */
EDGE_INLINE int quic_admit(struct xdp_md *ctx, struct edge_view *view, const struct edge_packet *packet,
			   const struct quic_header *header, const enum edge_program program)
{
	enum id_state state = ID_UNKNOWN;
	__u64 id[2] = {};
	const __u8 *at;
	__u32 stress = view_stress(view, program);

	if (header->class == QUIC_DIAL_REQUEST)
		return budget_charge(view, EDGE_BUDGET_DIAL_REQUEST) ? R_PASS_DIAL_REQUEST : R_QUIC_DIAL_REQUEST_BUDGET;
	if (header->class == QUIC_VERSION)
		return budget_charge(view, EDGE_BUDGET_VERSION) ? R_PASS_QUIC_VERSION : R_QUIC_VERSION_BUDGET;
	if (header->id_bytes == LOCAL_ID_BYTES) {
		at = quic_at(ctx, packet, header->id, LOCAL_ID_BYTES);
		if (!at)
			return R_QUIC_MALFORMED;
		id[0] = load64(at);
		id[1] = load64(at + 8);
		state = id_check(view, packet, id, program);
	}
	if (state == ID_VALID) {
		if (stress != EDGE_STRESS_NORMAL && !sketch_take(view, id[0], id[1], EDGE_PURPOSE_ID))
			return R_QUIC_ID_BUDGET;
		return R_PASS_QUIC;
	}
	if (header->class == QUIC_KNOWN)
		return state == ID_EXPIRED ? R_QUIC_EXPIRED_ID : R_QUIC_UNKNOWN_ID;
	return quic_admit_initial(ctx, view, packet, header, id, stress, program);
}

#endif
