/* Limits: global budgets, and the sketch of sources, peers and IDs. GCRA by one compare-and-swap.
 *
 * 1. Nothing is admitted beyond burst + rate * time, on however many CPUs: a time is moved forward by compare-and-swap only, and two
 *    slots for one key never both count (`sketch_step`).
 * 2. Whoever loses the race four times is refused: somebody else was admitted each time.
 * 3. `read_only` looks where it would charge.
 */
#ifndef MILLRACE_LIMIT_H
#define MILLRACE_LIMIT_H

#include "siphash.h"

#define LIMIT_TRIES 4
#define LINE_SLOTS 8
#define TIME_BITS 48
#define TIME_MASK ((1ull << TIME_BITS) - 1)
#define AHEAD_MAX (1ull << 46) /* a time further ahead lies in the past */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, EDGE_GENERATIONS);
	__type(key, __u32);
	__type(value, struct edge_line);
} limiter SEC(".maps");

/* One line each, so that CPUs do not fight over neighbours. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, EDGE_BUDGETS);
	__type(key, __u32);
	__type(value, struct edge_line);
} budgets SEC(".maps");

EDGE_INLINE __u64 read_once(const __u64 *word)
{
	return *(const volatile __u64 *)word;
}

EDGE_INLINE bool swap_once(__u64 *word, __u64 old, __u64 new)
{
	return __sync_val_compare_and_swap(word, old, new) == old;
}

/* Takes one from a global budget. */
EDGE_INLINE bool budget_charge(const struct edge_view *view, __u32 budget)
{
	const struct edge_limit limit = view->config->budget[budget];
	struct edge_line *line;

	if (!limit.interval_ns)
		return true;
	line = bpf_map_lookup_elem(&budgets, &budget);
	if (!line)
		return false;
	for (int try = 0; try < LIMIT_TRIES; try++) {
		__u64 old = read_once(&line->word[0]);
		__u64 from = old > view->now_ns ? old : view->now_ns;

		if (from - view->now_ns > limit.tolerance_ns)
			return false;
		if (view->read_only || swap_once(&line->word[0], old, from + limit.interval_ns))
			return true;
	}
	return false;
}

EDGE_INLINE __u64 sketch_tag(__u64 hash)
{
	return hash >> TIME_BITS ? hash >> TIME_BITS : 1;
}

EDGE_INLINE struct edge_line *sketch_line(__u64 hash, __u32 generation)
{
	__u32 index = (generation & 1) * sizes.limiter_lines + (hash & (sizes.limiter_lines - 1));

	return bpf_map_lookup_elem(&limiter, &index);
}

/* How far the time of a word lies ahead; 0 if it is idle. */
EDGE_INLINE __u64 sketch_ahead(__u64 word, __u64 now_ns)
{
	__u64 ahead = (word - now_ns) & TIME_MASK;

	return word && ahead <= AHEAD_MAX ? ahead : 0;
}

enum sketch_slot { SLOT_INDEX = 7, SLOT_TAGGED = 8, SLOT_IDLE = 16, SLOT_NONE = 0 };

/* The slot with the hash's tag, else the first idle one, else none (SLOT_NONE: the line is full of others).
 *
 * A function of its own: the verifier looks at its eight exits once, and its callers see a number. */
__noinline __u32 sketch_find(__u64 hash, __u32 generation, __u64 now_ns)
{
	const struct edge_line *line = sketch_line(hash, generation);
	__u64 tag = sketch_tag(hash);
	__u32 start = hash >> 40;
	__u32 idle = SLOT_NONE;

	if (!line)
		return SLOT_NONE;
#pragma unroll
	for (int i = 0; i < LINE_SLOTS; i++) {
		__u32 slot = (start + i) & SLOT_INDEX;
		__u64 word = read_once(&line->word[slot]);

		if (word >> TIME_BITS == tag)
			return SLOT_TAGGED | slot;
		if (!idle && !sketch_ahead(word, now_ns))
			idle = SLOT_IDLE | slot;
	}
	return idle;
}

/* Whether another slot of the line than `own` has its tag. */
__noinline __u32 sketch_twin(__u64 hash, __u32 generation, __u32 own)
{
	const struct edge_line *line = sketch_line(hash, generation);
	__u64 tag = sketch_tag(hash);
	__u32 twins = 0;

	if (!line)
		return 0;
#pragma unroll
	for (__u32 i = 0; i < LINE_SLOTS; i++)
		twins += i != own && read_once(&line->word[i]) >> TIME_BITS == tag;
	return twins;
}

/* What is asked of the sketch. Numbers only: `sketch_take` is verified by itself, and cannot follow pointers. */
struct sketch_ask {
	__u64 words[3]; /* key, then purpose and level */
	struct edge_limit limit;
	__u64 now_ns;
	__u32 charge; /* else look */
	__u32 pad;
};

/* What the generation before says of the key; 0 when it is retired or does not know the key. `known`: it does. */
EDGE_INLINE __u64 sketch_old_ahead(const struct edge_control *world, const struct sketch_ask *ask, bool *known)
{
	__u32 generation = (world->limiter_active & 1) ^ 1;
	struct edge_line *line;
	__u64 hash, word;
	__u32 slot;

	*known = false;
	if (ask->now_ns >= world->limiter_old_until_ns)
		return 0;
	hash = siphash13(&world->seed[generation], ask->words, 3);
	slot = sketch_find(hash, generation, ask->now_ns);
	line = sketch_line(hash, generation);
	if (!line || !(slot & SLOT_TAGGED))
		return 0;
	word = read_once(&line->word[slot & SLOT_INDEX]);
	*known = word >> TIME_BITS == sketch_tag(hash);
	return *known ? sketch_ahead(word, ask->now_ns) : 0;
}

enum sketch_step { STEP_REFUSED, STEP_ADMITTED, STEP_AGAIN };

/* Looks, and with `charge` writes; STEP_AGAIN after a lost race. */
EDGE_INLINE enum sketch_step sketch_step(const struct edge_control *world, const struct sketch_ask *ask, __u64 hash)
{
	__u32 generation = world->limiter_active & 1;
	__u32 found = sketch_find(hash, generation, ask->now_ns);
	struct edge_line *line = sketch_line(hash, generation);
	__u64 tag = sketch_tag(hash), ahead, old, new;
	bool known = true;
	__u64 *word;

	if (!line)
		return STEP_REFUSED;
	word = &line->word[found & SLOT_INDEX];
	old = read_once(word);
	if (found & SLOT_TAGGED) {
		if (old >> TIME_BITS != tag)
			return STEP_AGAIN; /* another key's since it was found */
		ahead = sketch_ahead(old, ask->now_ns);
	} else {
		ahead = sketch_old_ahead(world, ask, &known);
	}
	if (ahead > ask->limit.tolerance_ns || (found == SLOT_NONE && !known))
		return STEP_REFUSED;
	if (!ask->charge)
		return STEP_ADMITTED;
	if (found == SLOT_NONE)
		return STEP_REFUSED;
	if (found & SLOT_IDLE && sketch_ahead(old, ask->now_ns))
		return STEP_AGAIN;
	new = tag << TIME_BITS | ((ask->now_ns + ahead + ask->limit.interval_ns) & TIME_MASK);
	if (!swap_once(word, old, new))
		return STEP_AGAIN;
	if (found & SLOT_IDLE && sketch_twin(hash, generation, found & SLOT_INDEX)) {
		/* Another CPU began the same key elsewhere in the line: one of the two slots must not count. */
		swap_once(word, new, 0);
		return STEP_AGAIN;
	}
	return STEP_ADMITTED;
}

/* Whether the limit admits the key; with `charge`, takes one from it. */
__noinline int sketch_take(struct sketch_ask *ask)
{
	const struct edge_control *world = edge_control_value();
	__u64 hash;

	if (!ask || !world)
		return false;
	hash = siphash13(&world->seed[world->limiter_active & 1], ask->words, 3);
	for (int try = 0; try < LIMIT_TRIES; try++) {
		enum sketch_step step = sketch_step(world, ask, hash);

		if (step != STEP_AGAIN)
			return step == STEP_ADMITTED;
	}
	return false;
}

EDGE_INLINE bool sketch_ask(const struct edge_limit *limit, __u64 a, __u64 b, __u32 purpose, __u32 level, __u64 now_ns,
			    bool charge)
{
	struct sketch_ask ask = {
		.words = { a, b, purpose << 8 | level },
		.limit = *limit,
		.now_ns = now_ns,
		.charge = charge,
	};

	return !limit->interval_ns || sketch_take(&ask);
}

/* Asks all levels of a source, the narrowest first: IPv4 /32 and /24, IPv6 /64, /56 and /48. The first refusal ends it. The words are
 * addresses in network order: their first bytes are the low ones. */
EDGE_INLINE bool sketch_ask_source(const struct edge_limit limits[EDGE_LEVELS_MAX], const __u64 address[2], bool ipv4,
				   __u32 purpose, __u64 now_ns, bool charge)
{
	if (ipv4)
		return sketch_ask(&limits[0], address[0], address[1], purpose, 0, now_ns, charge) &&
		       sketch_ask(&limits[1], address[0], address[1] & 0x00ffffffffffffffull, purpose, 1, now_ns,
				  charge);
	return sketch_ask(&limits[0], address[0], 0, purpose, 0, now_ns, charge) &&
	       sketch_ask(&limits[1], address[0] & 0x00ffffffffffffffull, 0, purpose, 1, now_ns, charge) &&
	       sketch_ask(&limits[2], address[0] & 0x0000ffffffffffffull, 0, purpose, 2, now_ns, charge);
}

/* The key that caps count by: IPv4 /32, IPv6 /64. */
EDGE_INLINE struct edge_source source_cap_key(const __u64 address[2], bool ipv4)
{
	struct edge_source key;

	store64(key.address, address[0]);
	store64(key.address + 8, ipv4 ? address[1] : 0);
	return key;
}

#endif
