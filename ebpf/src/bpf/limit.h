/* Limits: global budgets, and the sketch of sources, peers and IDs. Each is a GCRA, charged by one
 * compare-and-swap.
 *
 * 1. Admissions never exceed burst + rate * time, on any number of CPUs: only a compare-and-swap
 *    moves a time forward, and two slots for one key never both count (`sketch_step`).
 * 2. A CPU that loses the race four times refuses: each time another CPU admitted a packet.
 * 3. With `read_only` the programs look at limits and do not charge them.
 */
#ifndef MILLRACE_LIMIT_H
#define MILLRACE_LIMIT_H

#include "view.h"

#define LIMIT_TRIES 4
#define BUCKET_SLOTS 8
#define TIME_BITS 48
#define TIME_MASK ((1ull << TIME_BITS) - 1)
#define AHEAD_BITS 46 /* a time more than 2^46 ahead lies in the past */
#define SLOT_INDEX 7
#define TICK_NS_MAX 10000000 /* of the coarse clock, at 100 Hz */
#define CLOCK_SLACK_NS 60000000000ull /* a thread may be stopped after it read the clock */
#define MIX_KIND 0x9e3779b97f4a7c15ull
#define MIX_FIRST 0xbf58476d1ce4e5b9ull
#define MIX_SECOND 0x94d049bb133111ebull

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, EDGE_GENERATIONS);
	__type(key, __u32);
	__type(value, struct edge_bucket);
} limiter SEC(".maps");

/* One bucket each, so that CPUs do not contend for neighbours. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, EDGE_BUDGETS);
	__type(key, __u32);
	__type(value, struct edge_bucket);
} budgets SEC(".maps");

EDGE_INLINE __u64 read_once(const __u64 *word)
{
	return *(const volatile __u64 *)word;
}

EDGE_INLINE bool swap_once(__u64 *word, __u64 old, __u64 new)
{
	return __sync_val_compare_and_swap(word, old, new) == old;
}

/* How far a word is ahead, as far as this limit can have put it there. A word that is further
 * ahead was written under an earlier limit, or its clock has gone round (2^48 ns are 78 hours):
 * it counts as a spent burst. */
EDGE_INLINE __u64 limit_ahead(const struct edge_limit *limit, __u64 ahead)
{
	if (ahead > limit->tolerance_ns && ahead - limit->tolerance_ns > limit->interval_ns + CLOCK_SLACK_NS)
		return limit->tolerance_ns;
	return ahead;
}

/* Takes one from a global budget. */
EDGE_INLINE bool budget_charge(const struct edge_view *view, __u32 budget)
{
	const struct edge_limit limit = view->config->budget[budget];
	struct edge_bucket *bucket;

	if (!limit.interval_ns)
		return true;
	bucket = bpf_map_lookup_elem(&budgets, &budget);
	if (!bucket)
		return false;
	for (int try = 0; try < LIMIT_TRIES; try++) {
		__u64 old = read_once(&bucket->word[0]);
		__u64 ahead = limit_ahead(&limit, old > view->now_ns ? old - view->now_ns : 0);

		if (ahead > limit.tolerance_ns)
			return false;
		if (view->read_only || swap_once(&bucket->word[0], old, view->now_ns + ahead + limit.interval_ns))
			return true;
	}
	return false;
}

EDGE_INLINE __u64 sketch_tag(__u64 hash)
{
	return hash >> TIME_BITS ? hash >> TIME_BITS : 1;
}

EDGE_INLINE struct edge_bucket *sketch_bucket(__u64 hash, __u32 generation)
{
	__u32 index = (generation & 1) * sizes.limiter_buckets + (hash & (sizes.limiter_buckets - 1));

	return bpf_map_lookup_elem(&limiter, &index);
}

/* How far the time of a word lies ahead; 0 if it is idle. */
EDGE_INLINE __u64 sketch_ahead(__u64 word, __u64 now_ns)
{
	__u64 ahead = (word - now_ns) & TIME_MASK;

	return word && ahead <= 1ull << AHEAD_BITS ? ahead : 0;
}

/* Eight bits, one for each slot of a bucket. */
typedef __u32 sketch_slots;

/* 1 if the value is zero, else 0; the value is below 2^63. It has no branches: random sources
 * would mispredict all of them, and the verifier would follow eight slots through every
 * combination. */
EDGE_INLINE __u32 is_zero(__u64 value)
{
	return (value - 1) >> 63;
}

EDGE_INLINE sketch_slots sketch_tagged(const struct edge_bucket *bucket, __u64 tag)
{
	sketch_slots tagged = 0;

#pragma unroll
	for (int slot = 0; slot < BUCKET_SLOTS; slot++)
		tagged |= is_zero(read_once(&bucket->word[slot]) >> TIME_BITS ^ tag) << slot;
	return tagged;
}

EDGE_INLINE sketch_slots sketch_idle(const struct edge_bucket *bucket, __u64 now_ns)
{
	sketch_slots idle = 0;

#pragma unroll
	for (int slot = 0; slot < BUCKET_SLOTS; slot++) {
		__u64 word = read_once(&bucket->word[slot]), time = word & TIME_MASK, ahead = (word - now_ns) & TIME_MASK;
		__u32 past = is_zero((ahead - 1) >> AHEAD_BITS) ^ 1; /* 0 included */

		idle |= (past | is_zero(word >> TIME_BITS | time)) << slot;
	}
	return idle;
}

/* The first of the slots, in the order in which a key visits them; `slots` is not empty. */
EDGE_INLINE __u32 sketch_first(sketch_slots slots, __u64 hash)
{
	__u32 start = hash >> 40 & SLOT_INDEX;
	__u32 visited = (slots | slots << BUCKET_SLOTS) >> start & 0xff;
	__u32 lowest = visited & -visited;
	/* The index of a single bit of eight, by a de Bruijn sequence: its nibbles hold the
	 * indices. */
	__u32 steps = 0x34572610u >> (((lowest * 0x1d & 0xff) >> 5) * 4) & SLOT_INDEX;

	return (start + steps) & SLOT_INDEX;
}

/* A question to the sketch: a key, and the limits of a generation of the settings. It holds
 * numbers only, because functions that are verified by themselves cannot follow pointers. */
struct sketch_ask {
	__u64 words[2];
	__u64 now_ns;
	__u32 generation;
	__u32 purpose;
	__u32 ipv4; /* of a source */
	__u32 pad;
	__u64 beyond_ns; /* after a refusal: time until this limit would admit; all bits: unknown */
};

/* The number of levels of a source: IPv4 /32 and /24, IPv6 /64, /56 and /48. Any other key has
 * one. */
EDGE_INLINE __u32 sketch_levels(const struct sketch_ask *ask)
{
	if (ask->purpose != EDGE_PURPOSE_QUIC && ask->purpose != EDGE_PURPOSE_TCP)
		return 1;
	return ask->ipv4 ? 2 : EDGE_LEVELS_MAX;
}

/* The hash of the sketch: products and shifts that mix every bit of a key into every bit of the
 * hash. The seed makes it secret. Keys with the same `a`, as all of IPv4 have, never collide in
 * all 64 bits. */
EDGE_INLINE __u64 sketch_mix(const struct edge_key *seed, __u64 a, __u64 b, __u64 kind)
{
	__u64 mixed = (a ^ seed->k0) * MIX_SECOND;

	mixed = (mixed ^ mixed >> 32 ^ seed->k1 ^ b) + kind * MIX_KIND;
	mixed = (mixed ^ mixed >> 30) * MIX_FIRST;
	mixed = (mixed ^ mixed >> 27) * MIX_SECOND;
	return mixed ^ mixed >> 31;
}

/* Hash of one level. Words of addresses are in network order: their first bytes are the low
 * ones. */
EDGE_INLINE __u64 sketch_hash(const struct edge_control *control, const struct sketch_ask *ask, __u32 generation,
			      __u32 level)
{
	bool ipv6 = sketch_levels(ask) == EDGE_LEVELS_MAX;
	__u64 kept = ~0ull >> (8 * level);

	return sketch_mix(&control->seed[generation & 1], ipv6 ? ask->words[0] & kept : ask->words[0],
			  ipv6 ? 0 : ask->words[1] & kept, ask->purpose << 8 | level);
}

/* How far ahead the other generation has the key; 0 if that generation no longer counts or does
 * not have the key. `known`: it has the key. */
EDGE_INLINE __u64 sketch_old_ahead(const struct edge_control *control, const struct sketch_ask *ask, __u32 level,
				   bool *known)
{
	__u32 generation = (control->limiter_active & 1) ^ 1;
	const struct edge_bucket *bucket;
	sketch_slots tagged;
	__u64 hash, word;

	*known = false;
	if (ask->now_ns >= control->limiter_old_until_ns)
		return 0;
	hash = sketch_hash(control, ask, generation, level);
	bucket = sketch_bucket(hash, generation);
	if (!bucket)
		return 0;
	tagged = sketch_tagged(bucket, sketch_tag(hash));
	if (!tagged)
		return 0;
	word = read_once(&bucket->word[sketch_first(tagged, hash)]);
	*known = word >> TIME_BITS == sketch_tag(hash);
	return *known ? sketch_ahead(word, ask->now_ns) : 0;
}

/* Looks at one level. A word that changed hands between two reads counts as admitted: a look
 * takes nothing. */
EDGE_INLINE bool sketch_admits(const struct edge_control *control, struct sketch_ask *ask, __u32 level,
			       const struct edge_limit *limit, const struct edge_bucket *bucket, __u64 hash)
{
	__u64 tag = sketch_tag(hash), word, ahead;
	sketch_slots tagged = sketch_tagged(bucket, tag);
	bool known;

	if (tagged) {
		word = read_once(&bucket->word[sketch_first(tagged, hash)]);
		if (word >> TIME_BITS != tag)
			return true;
		ahead = sketch_ahead(word, ask->now_ns);
	} else {
		ahead = sketch_old_ahead(control, ask, level, &known);
		if (!known && !sketch_idle(bucket, ask->now_ns)) {
			ask->beyond_ns = ~0ull;
			return false;
		}
	}
	ahead = limit_ahead(limit, ahead);
	if (ahead <= limit->tolerance_ns)
		return true;
	ask->beyond_ns = ahead - limit->tolerance_ns;
	return false;
}

enum sketch_step { STEP_REFUSED, STEP_ADMITTED, STEP_AGAIN };

/* Takes one at one level; STEP_AGAIN after a lost race. */
EDGE_INLINE enum sketch_step sketch_step(const struct edge_control *control, const struct sketch_ask *ask, __u32 level,
					 const struct edge_limit *limit, struct edge_bucket *bucket, __u64 hash)
{
	__u64 now_ns = ask->now_ns, tag = sketch_tag(hash), ahead, old, new;
	sketch_slots tagged = sketch_tagged(bucket, tag), slots = tagged ? tagged : sketch_idle(bucket, now_ns);
	bool known;
	__u64 *word;

	if (!slots)
		return STEP_REFUSED;
	word = &bucket->word[sketch_first(slots, hash)];
	old = read_once(word);
	if (tagged) {
		if (old >> TIME_BITS != tag)
			return STEP_AGAIN; /* another key's since it was found */
		ahead = sketch_ahead(old, now_ns);
	} else {
		if (sketch_ahead(old, now_ns))
			return STEP_AGAIN;
		ahead = sketch_old_ahead(control, ask, level, &known);
	}
	ahead = limit_ahead(limit, ahead);
	if (ahead > limit->tolerance_ns)
		return STEP_REFUSED;
	new = tag << TIME_BITS | ((now_ns + ahead + limit->interval_ns) & TIME_MASK);
	if (!swap_once(word, old, new))
		return STEP_AGAIN;
	if (tagged)
		return STEP_ADMITTED;
	tagged = sketch_tagged(bucket, tag);
	if (!(tagged & (tagged - 1)))
		return STEP_ADMITTED;
	/* Another CPU placed the same key elsewhere in the bucket: one of the two slots must not
	 * count. */
	swap_once(word, new, 0);
	return STEP_AGAIN;
}

/* The limit of a purpose. Purposes of a source have a limit for each level. `level` is below
 * EDGE_LEVELS_MAX. */
EDGE_INLINE const struct edge_limit *sketch_limit(const struct edge_config *config, __u32 purpose, __u32 level)
{
	switch (purpose) {
	case EDGE_PURPOSE_QUIC:
		return &config->source_quic[level];
	case EDGE_PURPOSE_TCP:
		return &config->source_tcp[level];
	case EDGE_PURPOSE_PEER:
		return &config->peer;
	case EDGE_PURPOSE_PROOF:
		return &config->proof;
	default:
		return &config->id;
	}
}

/* Whether the limits would admit the key at all its levels. It touches all their buckets first,
 * so that they come from memory at the same time and not one after the other: with random
 * sources, that is the greater part of the cost. */
__noinline int sketch_look(struct sketch_ask *ask)
{
	const struct edge_control *control = edge_control_value();
	struct edge_bucket *bucket[EDGE_LEVELS_MAX] = {};
	__u64 hash[EDGE_LEVELS_MAX] = {};
	const struct edge_config *config;
	const struct edge_limit *limit;
	__u32 levels;

	if (!ask || !control)
		return false;
	config = &control->config[ask->generation & 1];
	levels = sketch_levels(ask);
#pragma unroll
	for (__u32 level = 0; level < EDGE_LEVELS_MAX; level++) {
		if (level >= levels)
			break;
		hash[level] = sketch_hash(control, ask, control->limiter_active, level);
		bucket[level] = sketch_bucket(hash[level], control->limiter_active);
		if (!bucket[level])
			return false;
		read_once(&bucket[level]->word[0]);
	}
#pragma unroll
	for (__u32 level = 0; level < EDGE_LEVELS_MAX; level++) {
		if (level >= levels || !bucket[level])
			break;
		limit = sketch_limit(config, ask->purpose, level);
		if (limit->interval_ns && !sketch_admits(control, ask, level, limit, bucket[level], hash[level]))
			return false;
	}
	return true;
}

/* Takes one from the limit of one level. */
__noinline int sketch_charge(struct sketch_ask *ask, __u32 level)
{
	const struct edge_control *control = edge_control_value();
	const struct edge_limit *limit;
	struct edge_bucket *bucket;
	__u64 hash;

	if (!ask || !control || level >= EDGE_LEVELS_MAX)
		return false;
	limit = sketch_limit(&control->config[ask->generation & 1], ask->purpose, level);
	if (!limit->interval_ns)
		return true;
	hash = sketch_hash(control, ask, control->limiter_active, level);
	bucket = sketch_bucket(hash, control->limiter_active);
	if (!bucket)
		return false;
	for (int try = 0; try < LIMIT_TRIES; try++) {
		enum sketch_step step = sketch_step(control, ask, level, limit, bucket, hash);

		if (step != STEP_AGAIN)
			return step == STEP_ADMITTED;
	}
	return false;
}

EDGE_INLINE void sketch_ask(struct sketch_ask *ask, const struct edge_view *view, __u64 a, __u64 b, __u32 purpose)
{
	*ask = (struct sketch_ask){
		.words = { a, b },
		.now_ns = view->now_ns,
		.generation = view->generation,
		.purpose = purpose,
	};
}

/* Takes one from the limit of a peer, a proof or an ID. */
EDGE_INLINE bool sketch_take(const struct edge_view *view, __u64 a, __u64 b, __u32 purpose)
{
	struct sketch_ask ask;

	sketch_ask(&ask, view, a, b, purpose);
	return view->read_only ? sketch_look(&ask) : sketch_charge(&ask, 0);
}

EDGE_INLINE void sketch_ask_source(struct sketch_ask *ask, const struct edge_view *view, const __u64 address[2],
				   bool ipv4, __u32 purpose)
{
	sketch_ask(ask, view, address[0], address[1], purpose);
	ask->ipv4 = ipv4;
}

/* Looks at all levels of a source. Connections are charged by the exact clock, and the coarse
 * clock is behind it: within a tick, the last packet of a burst would seem to come before the
 * first, and be refused. So a source that is refused by less than a tick is looked at by the
 * exact clock; for all others that costs one comparison. */
EDGE_INLINE bool sketch_look_source(struct sketch_ask *ask, const struct edge_view *view, const enum edge_program program)
{
	if (sketch_look(ask))
		return true;
	if (ask->beyond_ns > TICK_NS_MAX)
		return false;
	ask->now_ns = view_now_exact(view, program);
	return sketch_look(ask);
}

/* Takes one from the limit of a source at each level, the narrowest first; the first refusal
 * ends it. */
EDGE_INLINE bool sketch_take_source(struct sketch_ask *ask, const struct edge_view *view)
{
	if (view->read_only)
		return sketch_look(ask);
	return sketch_charge(ask, 0) && sketch_charge(ask, 1) && (ask->ipv4 || sketch_charge(ask, 2));
}

/* The key under which caps count: IPv4 /32, IPv6 /64. */
EDGE_INLINE struct edge_source source_cap_key(const __u64 address[2], bool ipv4)
{
	struct edge_source key;

	store64(key.address, address[0]);
	store64(key.address + 8, ipv4 ? address[1] : 0);
	return key;
}

#endif
