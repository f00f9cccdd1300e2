/* SipHash-2-4 over whole 64-bit words: tags and MACs. */
#ifndef MILLRACE_SIPHASH_H
#define MILLRACE_SIPHASH_H

#include "view.h"

struct siphash {
	__u64 v0, v1, v2, v3;
};

#define ROTATE(x, bits) (((x) << (bits)) | ((x) >> (64 - (bits))))

EDGE_INLINE void siphash_round(struct siphash *s)
{
	s->v0 += s->v1;
	s->v2 += s->v3;
	s->v1 = ROTATE(s->v1, 13) ^ s->v0;
	s->v3 = ROTATE(s->v3, 16) ^ s->v2;
	s->v0 = ROTATE(s->v0, 32);
	s->v2 += s->v1;
	s->v0 += s->v3;
	s->v1 = ROTATE(s->v1, 17) ^ s->v2;
	s->v3 = ROTATE(s->v3, 21) ^ s->v0;
	s->v2 = ROTATE(s->v2, 32);
}

EDGE_INLINE void siphash_word(struct siphash *s, __u64 word)
{
	s->v3 ^= word;
	siphash_round(s);
	siphash_round(s);
	s->v0 ^= word;
}

/* `count` is a constant. */
EDGE_INLINE __u64 siphash24(const struct edge_key *key, const __u64 *words, const int count)
{
	struct siphash s = {
		.v0 = key->k0 ^ 0x736f6d6570736575ull,
		.v1 = key->k1 ^ 0x646f72616e646f6dull,
		.v2 = key->k0 ^ 0x6c7967656e657261ull,
		.v3 = key->k1 ^ 0x7465646279746573ull,
	};

#pragma unroll
	for (int i = 0; i < count; i++)
		siphash_word(&s, words[i]);
	siphash_word(&s, (__u64)(count * 8) << 56);
	s.v2 ^= 0xff;
#pragma unroll
	for (int round = 0; round < 4; round++)
		siphash_round(&s);
	return s.v0 ^ s.v1 ^ s.v2 ^ s.v3;
}

#endif
