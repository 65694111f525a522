/* Who may attend to what: causal, window, lengths, boolean masks and dropout, as bits. Every option ends
 * here; what comes after sees bits (and, for float masks and ALiBi, a bias). */
#ifndef ADA_VISIBLE_H
#define ADA_VISIBLE_H

#include "adaattn.h"
#include "kernels.h"

/* Keys first ... end - 1; empty when end <= first. */
typedef struct {
    int64_t first, end;
} ada_span;

/* Queries i ... i + n - 1 of (b, h) against keys j ... j + nk - 1; n <= ADA_LANES, nk <= ADA_BLOCK. */
typedef struct {
    int64_t b, h, i, j;
    int n, nk;
} ada_patch;

/* Keys of sequence b. */
int64_t ada_key_count(const ada_problem *p, int64_t b);

/* Position of query i of sequence b on the axis of the keys. */
int64_t ada_position(const ada_problem *p, int64_t b, int64_t i);

/* The blocks that the keys make, and the keys of one of them. */
static inline int64_t ada_block_count(const ada_problem *p) { return (p->S + ADA_BLOCK - 1) / ADA_BLOCK; }
static inline int ada_keys_of_block(const ada_problem *p, int64_t block) {
    const int64_t left = p->S - block * ADA_BLOCK;
    return left < ADA_BLOCK ? (int)left : ADA_BLOCK;
}

/* The lowest n bits. */
static inline uint64_t ada_first_bits(int64_t n) {
    return n >= 64 ? UINT64_MAX : n <= 0 ? 0 : ((uint64_t)1 << n) - 1;
}

/* Runs of ones in a word: n bits from first on. */
#define ADA_FOR_RUNS(word, first, n)                                                                         \
    for (int first = 0, n = ada_next_run(word, &first); n; first += n, n = ada_next_run(word, &first))

static inline int ada_next_run(uint64_t word, int *first) {
    if (*first >= 64 || !(word >> *first)) return 0;
    *first += __builtin_ctzll(word >> *first);
    const uint64_t rest = ~(word >> *first);
    return rest ? __builtin_ctzll(rest) : 64;
}

/* What causal, window and kv_lengths leave to query i. Both ends never decrease with i. */
ada_span ada_visible_span(const ada_problem *p, int64_t b, int64_t i);
/* Rows start ... end - 1 are those whose span is not empty: spans are monotonic, so they lie together. */
void ada_seeing_rows(const ada_problem *p, int64_t b, int64_t *start, int64_t *end);
static inline bool ada_sees_keys(const ada_problem *p, int64_t b, int64_t i) {
    const ada_span span = ada_visible_span(p, b, i);
    return span.end > span.first;
}

typedef enum { ADA_HIDDEN, ADA_MIXED, ADA_PLAIN } ada_sight;

/* Bit c of rows[r] (r < n): query i + r may attend to key j + c, by the spans and a boolean mask. rows is
 * filled only where the patch is mixed; plain: all may, hidden: none. */
ada_sight ada_visible_rows(const ada_problem *p, const ada_patch *patch, uint64_t *rows);

/* Bit c of rows[r]: dropout keeps key j + c for query i + r. */
void ada_kept_rows(const ada_problem *p, const ada_kernels *k, const ada_patch *patch, uint64_t *rows);

/* rows[r] bit c <-> rows[c] bit r. */
void ada_transpose_bits(uint64_t rows[64]);

#endif
