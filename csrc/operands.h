/* Keys and values as the products of a rung read them: packed once per key head for all its queries. */
#ifndef ADA_OPERANDS_H
#define ADA_OPERANDS_H

#include <stdatomic.h>

#include "adaattn.h"
#include "kernels.h"

typedef enum { ADA_FLOATS, ADA_WORDS_BF16, ADA_WORDS_I16, ADA_WORDS_I8 } ada_format;

/* Where the unit of a rung is missing, floats stand on the grid of its numbers. */
typedef enum { ADA_GRID_NONE, ADA_GRID_FP16, ADA_GRID_BF16, ADA_GRID_BF16X2 } ada_grid;

/* How one product of a rung is computed on this machine. */
typedef struct {
    ada_format format;
    ada_grid grid;
    ada_parts parts; /* bf16 words */
} ada_operands;

/* The largest magnitude of queries, keys or values must lie between these (or be 0), so that products
 * neither overflow nor lose small numbers; other heads go up to fp32. */
#define ADA_NARROW_LEAST 0x1p-80f
#define ADA_NARROW_MOST 0x1p50f
/* Rows in 16 bits have their squared norms in floats. */
#define ADA_LEAST_NORM2 0x1p-120f

typedef struct {
    const ada_problem *p;
    const ada_kernels *k;
    ada_operands qk, pv;
    int DW; /* words of a key */
    int64_t
        per_head;   /* query heads that share packed keys: H / G, or 1 where the mask differs between them */
    int64_t heads;  /* packed ones: slots */
    int64_t whole;  /* the first of them are packed and computed by one worker each */
    int64_t *slots; /* [query heads of the run] */
    int64_t *first; /* [heads + 1] query heads of the run: those of a slot lie side by side */
    int64_t *place; /* [heads] in memory: what one worker packs and computes lies at its own */
    int64_t *key_head; /* [heads] of all B * H / per_head ones */
    int64_t n_slots;   /* query heads of the run */
    int64_t workers;   /* that have a place */
    int64_t blocks, strips;
    char *memory;
    int64_t head_bytes;
    atomic_bool *unfit; /* [heads] beyond what the rung can hold */
} ada_store;

/* One head's part of the store. */
typedef struct {
    uint64_t *seen; /* [blocks] bit per key: some query may attend to it */
    void *k;        /* floats [keys][D], or words [parts][keys][DW], whole blocks of keys */
    float *scale;   /* [blocks] of integer keys */
    int32_t *start; /* [keys] of 8-bit keys */
    float *mean;    /* [D] subtracted from the keys; zeros where they are not centred */
    void *v;        /* floats [keys][E], or words [parts][strips][E up to 16][ADA_STRIP in words] */
    float *v_unit;  /* [E] what a one of an integer channel is worth */
    float *v_mean;  /* [blocks][E] where blocks may stand in: their mean values, in units of v_unit */
    float *reach;   /* [blocks] the largest distance of a value from that */
    float *v_most;  /* [blocks] likewise: the largest norm of a value, of blocks that are seen */
    float *k_mean, *k_reach;  /* [blocks][D] and [blocks] as v_mean and reach, of the keys of whole blocks */
    ptrdiff_t k_part, v_part; /* words from part to part */
} ada_head_store;

/* Whether the keys and values of a head stay in a core's cache from the first tile to the last. */
static inline bool ada_stays_cached(const ada_problem *p) {
    return p->S * (p->D + p->E) * (int64_t)sizeof(float) <= 1 << 19;
}
/* Whether blocks of keys may stand in on a pair of rungs. */
bool ada_may_stand_in(const ada_kernels *k, ada_choice choice);
/* Whether some product of the problem's rungs needs packed operands. */
bool ada_store_needed(const ada_problem *p, const ada_kernels *k);
/* For the listed query heads (ascending; NULL: all). Fills in all that needs no memory; returns the bytes
 * that ada_store_attach wants. */
int64_t ada_store_plan(ada_store *store, const ada_problem *p, const ada_kernels *k, const int64_t *heads,
                       int64_t n_heads, int threads);
void ada_store_attach(ada_store *store, const int64_t *heads, char *memory);
ada_head_store ada_head_store_at(const ada_store *store, int64_t head);
/* First for each slot, then for each head and strip; scratch of ada_store_scratch_bytes. */
int64_t ada_store_scratch_bytes(const ada_store *store);
void ada_store_survey(const ada_store *store, int64_t head, char *scratch);
void ada_store_pack(const ada_store *store, int64_t head, int64_t strip, char *scratch);

/* n queries of a tile, rows of floats (width D), packed into t->q, unit and offset. False when the rung
 * cannot hold one of them. copy: [ADA_LANES][D up to 64] floats, words: as many bytes. */
bool ada_pack_queries(const ada_store *store, const ada_head_store *head, const ada_narrow_tile *t,
                      const float *rows, ptrdiff_t ld, int n, float *copy, void *words);

/* Whether there is a mask that tells which keys rows see; one in a GPU's memory is not looked at. */
static inline bool ada_mask_is_read(const ada_problem *p) { return p->attn_mask.data && !p->on_gpu; }
/* Whether a query may attend to some key. block: where to look first and, afterwards, where it sees one;
 * neighbours see alike. rows: [64] floats of scratch. */
bool ada_row_sees(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, int64_t i, int64_t *block,
                  float *rows);
/* Bit per key j ... j + nk - 1 (nk <= 64): the mask, which is read, and the spans leave it to some of queries
 * i ... i + n - 1 (n <= 64) of one head. rows: [64][64] floats. */
uint64_t ada_keys_seen(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, int64_t i, int n,
                       int64_t j, int nk, float *rows);
/* Bit per key of a block: some query of heads h ... h + heads - 1 may attend to it. rows: [64][64] floats. */
uint64_t ada_block_seen(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, int64_t heads,
                        int64_t block, float *rows);

/* The mean of a head's rows that are seen (bit per row), of a sample: added to zeros. rows:
 * [ADA_BLOCK][width] and largest: [width] of scratch. */
void ada_mean_of_rows(const ada_kernels *k, const ada_array *a, int64_t b, int64_t h, const uint64_t *seen,
                      float *rows, float *largest, float *mean);
/* What brings rows within an integer format, by their largest number and squared norm. */
float ada_integer_factor(ada_format format, float largest, float norm2);

/* x[0 ... n - 1] rounded to the grid. */
void ada_round_to_grid(const ada_kernels *k, ada_grid grid, float *x, int64_t n);

/* Words of v's strip from key j on, a multiple of ADA_BLOCK. */
static inline int ada_elements(ada_format format) { return format == ADA_WORDS_I8 ? 4 : 2; }

#endif
