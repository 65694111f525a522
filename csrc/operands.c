/* Packing for the rungs: centring, scales, rounding and the layouts of kernels_narrow.h.
 *
 * Means and scales come from keys that some query may attend to; the others are packed as zeros, so that
 * nothing of them leaks. What a narrow format cannot hold marks the head unfit.
 */
#include "operands.h"

#include <math.h>
#include <string.h>

#include "cpu.h"
#include "memory.h"

#include "rows.h"
#include "sparse.h"
#include "visible.h"

#define LOG2E 1.4426950408889634
/* That a mean is taken from, evenly spaced: any vector would do, so a sample does. */
#define MEAN_ROWS 1024

static ada_operands operands_of(const ada_kernels *k, ada_rung rung, bool values) {
    const bool matrices = k->isa & ADA_ISA_AMX, words = matrices || k->isa & ADA_ISA_AVX512BF16;
    switch (rung) {
    case ADA_RUNG_BF16X6:
        if (matrices) return (ada_operands){ADA_WORDS_BF16, ADA_GRID_NONE, {3, 3, 3}};
        break;
    case ADA_RUNG_BF16X3:
        if (matrices) return (ada_operands){ADA_WORDS_BF16, ADA_GRID_NONE, {2, 2, 2}};
        return (ada_operands){ADA_FLOATS, ADA_GRID_BF16X2, {0, 0, 0}};
    case ADA_RUNG_FP16:
        /* Two parts hold a half exactly; three hold a weight. */
        if (matrices) return (ada_operands){ADA_WORDS_BF16, ADA_GRID_FP16, {values ? 3 : 2, 2, 3}};
        return (ada_operands){ADA_FLOATS, ADA_GRID_FP16, {0, 0, 0}};
    case ADA_RUNG_BF16:
        if (words) return (ada_operands){ADA_WORDS_BF16, ADA_GRID_NONE, {1, 1, 1}};
        return (ada_operands){ADA_FLOATS, ADA_GRID_BF16, {0, 0, 0}};
    case ADA_RUNG_INT16:
        return (ada_operands){ADA_WORDS_I16, ADA_GRID_NONE, {1, 1, 1}};
    case ADA_RUNG_INT8:
        return (ada_operands){ADA_WORDS_I8, ADA_GRID_NONE, {1, 1, 1}};
    default:
        break;
    }
    return (ada_operands){ADA_FLOATS, ADA_GRID_NONE, {0, 0, 0}};
}

static bool is_packed(const ada_operands *o) { return o->format != ADA_FLOATS || o->grid != ADA_GRID_NONE; }
static bool is_integer(const ada_operands *o) {
    return o->format == ADA_WORDS_I8 || o->format == ADA_WORDS_I16;
}

bool ada_store_needed(const ada_problem *p, const ada_kernels *k) {
    const ada_operands qk = operands_of(k, p->precision.qk, false);
    const ada_operands pv = operands_of(k, p->precision.pv, true);
    return !p->compute_f64 && (is_packed(&qk) || is_packed(&pv));
}

bool ada_may_stand_in(const ada_kernels *k, ada_choice choice) {
    const ada_operands qk = operands_of(k, choice.qk, false), pv = operands_of(k, choice.pv, true);
    if (qk.parts.a > 1 || pv.parts.a > 1) return false;
    if (pv.format == ADA_WORDS_I8) return qk.format == ADA_WORDS_I8 && k->weigh_i8_i8 && k->gauge_i8;
    if (pv.format == ADA_WORDS_I16) return qk.format == ADA_WORDS_I16 && k->weigh_i16_i16 && k->gauge_i16;
    if (pv.format != ADA_WORDS_BF16 || !k->gauge_bf16) return false;
    if (qk.format == ADA_WORDS_BF16) return k->weigh_bf16_bf16;
    return qk.format == ADA_WORDS_I8 && k->weigh_i8_bf16;
}

/* Whether keys lose their mean before rounding: not where the rung holds the array's own format exactly. */
static bool centred(const ada_store *s) {
    const ada_rung rung = s->p->precision.qk;
    return is_integer(&s->qk) || (rung == ADA_RUNG_BF16 && s->p->key.dtype != ADA_BF16);
}

static int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static int64_t query_head(const int64_t *heads, int64_t i) { return heads ? heads[i] : i; }
static int64_t value_rows(const ada_store *s) { return up_to(s->p->E, 16); }

static ada_head_store head_store(const ada_store *s, ada_carver *c) {
    const ada_problem *p = s->p;
    const int64_t keys = s->blocks * ADA_BLOCK;
    ada_head_store h = {.k_part = keys * s->DW};
    h.seen = ada_carve(c, s->blocks * (int64_t)sizeof *h.seen);
    h.mean = ada_carve(c, p->D * (int64_t)sizeof *h.mean);
    h.scale = ada_carve(c, s->blocks * (int64_t)sizeof *h.scale);
    if (s->qk.format == ADA_WORDS_I8) h.start = ada_carve(c, keys * (int64_t)sizeof *h.start);
    if (s->qk.format != ADA_FLOATS)
        h.k = ada_carve(c, s->qk.parts.b * h.k_part * 4);
    else if (is_packed(&s->qk))
        h.k = ada_carve(c, keys * p->D * 4);
    h.v_unit = ada_carve(c, 2 * p->E * (int64_t)sizeof *h.v_unit);
    if (s->pv.format != ADA_FLOATS) {
        h.v_part = s->strips * value_rows(s) * (ADA_STRIP / ada_elements(s->pv.format));
        h.v = ada_carve(c, s->pv.parts.b * h.v_part * 4);
    } else { /* also where they are read as they are: what nobody sees is zero here */
        h.v = ada_carve(c, keys * p->E * 4);
    }
    if (p->sparse) {
        h.v_mean = ada_carve(c, s->blocks * p->E * (int64_t)sizeof *h.v_mean);
        h.reach = ada_carve(c, s->blocks * (int64_t)sizeof *h.reach);
        h.v_most = ada_carve(c, s->blocks * (int64_t)sizeof *h.v_most);
        h.k_mean = ada_carve(c, (s->blocks + ADA_KEY_STEP) * p->D * (int64_t)sizeof *h.k_mean);
        h.k_reach = ada_carve(c, s->blocks * (int64_t)sizeof *h.k_reach);
    }
    return h;
}

int64_t ada_store_plan(ada_store *s, const ada_problem *p, const ada_kernels *k, const int64_t *heads,
                       int64_t n_heads, int threads) {
    const ada_array *mask = &p->attn_mask;
    const bool apart = mask->data && mask->stride[1];
    *s = (ada_store){.p = p, .k = k, .per_head = apart ? 1 : p->H / p->G, .n_slots = n_heads};
    s->qk = operands_of(k, p->precision.qk, false), s->pv = operands_of(k, p->precision.pv, true);
    for (int64_t i = 0; i < n_heads; i++)
        s->heads += i == 0 || query_head(heads, i) / s->per_head != query_head(heads, i - 1) / s->per_head;
    /* Several workers share the last heads out in tiles, so that they end together. */
    if (ada_stays_cached(p))
        s->whole = threads == 1 ? s->heads : s->heads >= threads ? (s->heads / threads - 1) * threads : 0;
    s->workers = s->whole ? threads : 0;
    s->blocks = ada_block_count(p);
    s->strips = (p->S + ADA_STRIP - 1) / ADA_STRIP;
    const int elements = ada_elements(s->qk.format);
    /* A matrix unit takes 64 bytes of a key at once. */
    const bool matrices = k->isa & ADA_ISA_AMX;
    s->DW = (int)up_to((p->D + elements - 1) / elements, matrices ? 16 : 1);
    ada_carver size = {NULL, 0};
    head_store(s, &size);
    s->head_bytes = size.used;
    return (s->workers + s->heads - s->whole) * s->head_bytes +
           (3 * s->heads + 1 + n_heads) * (int64_t)sizeof *s->slots +
           up_to(s->heads * (int64_t)sizeof *s->unfit, 64);
}

void ada_store_attach(ada_store *s, const int64_t *heads, char *memory) {
    s->memory = memory;
    s->slots = (int64_t *)(memory + (s->workers + s->heads - s->whole) * s->head_bytes);
    s->key_head = s->slots + s->n_slots;
    s->place = s->key_head + s->heads;
    s->first = s->place + s->heads;
    s->unfit = (atomic_bool *)(s->first + s->heads + 1);
    int64_t slot = -1;
    for (int64_t i = 0; i < s->n_slots; i++) {
        const int64_t key_head = query_head(heads, i) / s->per_head;
        if (slot < 0 || s->key_head[slot] != key_head) s->key_head[++slot] = key_head, s->first[slot] = i;
        s->slots[i] = slot;
    }
    s->first[s->heads] = s->n_slots;
    for (int64_t i = 0; i < s->heads; i++) {
        s->place[i] = s->workers + i - s->whole;
        atomic_init(&s->unfit[i], false);
    }
}

ada_head_store ada_head_store_at(const ada_store *s, int64_t head) {
    ada_carver carver = {s->memory + s->place[head] * s->head_bytes, 0};
    return head_store(s, &carver);
}

/* ---- rows of floats ---- */

typedef struct {
    float *rows;   /* [ADA_BLOCK][width up to 64] */
    float *factor; /* [width] */
    float *spare;  /* [width] */
    char *words;   /* [ADA_STRIP][width up to 64] elements of up to 2 bytes, of all parts */
} pack_scratch;

static pack_scratch pack_scratch_of(const ada_store *s, ada_carver *c) {
    const int64_t width = up_to(s->p->D > s->p->E ? s->p->D : s->p->E, 64);
    pack_scratch x;
    x.rows = ada_carve(c, ADA_BLOCK * width * 4);
    x.factor = ada_carve(c, width * 4);
    x.spare = ada_carve(c, width * 4);
    x.words = ada_carve(c, ADA_STRIP * width * 2 * 3);
    return x;
}

int64_t ada_store_scratch_bytes(const ada_store *s) {
    ada_carver size = {NULL, 0};
    pack_scratch_of(s, &size);
    return size.used;
}

static void key_head(const ada_store *s, int64_t slot, int64_t *b, int64_t *h, int64_t *g) {
    const int64_t per_batch = s->p->H / s->per_head, head = s->key_head[slot];
    *b = head / per_batch, *h = head % per_batch * s->per_head;
    *g = *h / (s->p->H / s->p->G);
}

/* ADA_BLOCK rows of keys or values, in copy where they are to be changed; those that nobody sees and those
 * behind the end are other's, or zero. */
static const float *block_rows(const ada_store *s, const ada_array *a, bool change, int64_t b, int64_t g,
                               int64_t block, uint64_t seen, const float *other, float *copy, ptrdiff_t *ld) {
    const int n = ada_keys_of_block(s->p, block), width = (int)a->shape[3];
    const bool direct = a->dtype == ADA_F32 && a->stride[3] == 4 && !change;
    if (direct && seen == UINT64_MAX) {
        *ld = a->stride[2] / 4;
        return (const float *)ada_row_at(a, b, g, block * ADA_BLOCK);
    }
    *ld = width;
    ada_load_rows_f32(s->k, copy, width, a, b, g, block * ADA_BLOCK, n, width);
    for (int j = 0; j < ADA_BLOCK; j++)
        for (int c = 0; !(seen >> j & 1) && c < width; c++) copy[j * width + c] = other ? other[c] : 0;
    return copy;
}

void ada_round_to_grid(const ada_kernels *k, ada_grid grid, float *x, int64_t n) {
    enum { CHUNK = 256 };
    uint16_t half[CHUNK];
    float high[CHUNK];
    if (grid == ADA_GRID_NONE) return;
    for (; n > 0; x += CHUNK, n -= CHUNK) {
        const int m = n < CHUNK ? (int)n : CHUNK;
        (grid == ADA_GRID_FP16 ? k->store_f16 : k->store_bf16)(half, x, m);
        (grid == ADA_GRID_FP16 ? k->load_f16 : k->load_bf16)(high, half, m);
        if (grid == ADA_GRID_BF16X2) {
            float low[CHUNK];
            for (int i = 0; i < m; i++) low[i] = x[i] - high[i];
            k->store_bf16(half, low, m);
            k->load_bf16(low, half, m);
            for (int i = 0; i < m; i++) high[i] += low[i];
        }
        memcpy(x, high, (size_t)m * sizeof *x);
    }
}

/* Whether a product can hold numbers of which this is the largest. Below fp16's normal numbers there are
 * steps of 2^-24; beside 2^-12 they are its usual rounding. */
static bool fits(const ada_operands *o, ada_dtype dtype, float largest) {
    const bool halves = o->grid == ADA_GRID_FP16 && dtype != ADA_F16;
    const float least = halves ? 0x1p-12f : ADA_NARROW_LEAST, most = halves ? 65504.0f : ADA_NARROW_MOST;
    return largest == 0 || (largest >= least && largest <= most);
}

/* The same of rows of queries or keys, of which this is the largest squared norm. */
static bool rows_fit(const ada_operands *o, ada_dtype dtype, float largest, float norm2) {
    return fits(o, dtype, largest) &&
           (o->format != ADA_WORDS_I16 || largest == 0 || norm2 >= ADA_LEAST_NORM2);
}

/* ---- which keys count ---- */

uint64_t ada_keys_seen(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, int64_t i, int n,
                       int64_t j, int nk, float *rows) {
    const ada_patch patch = {b, h, i, j, n, nk};
    const uint64_t all = nk == 64 ? UINT64_MAX : ((uint64_t)1 << nk) - 1;
    uint64_t bits[64], seen = 0;
    const ada_sight sight = ada_visible_rows(p, &patch, bits);
    if (sight == ADA_HIDDEN) return 0;
    for (int r = 0; sight == ADA_PLAIN && r < n; r++) bits[r] = all;
    if (p->attn_mask.dtype != ADA_BOOL) {
        ada_array mask = p->attn_mask;
        mask.data = (char *)mask.data + j * mask.stride[3];
        ada_load_rows_f32(k, rows, 64, &mask, b, h, i, n, nk);
        for (int r = 0; r < n; r++)
            for (int c = 0; c < nk; c++)
                if (rows[r * 64 + c] == -INFINITY) bits[r] &= ~((uint64_t)1 << c);
    }
    for (int r = 0; r < n; r++) seen |= bits[r];
    return seen & all;
}

bool ada_row_sees(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, int64_t i, int64_t *block,
                  float *rows) {
    const ada_span span = ada_visible_span(p, b, i);
    if (span.end <= span.first || !ada_mask_is_read(p)) return span.end > span.first;
    const int64_t first = span.first / ADA_BLOCK, count = (span.end + ADA_BLOCK - 1) / ADA_BLOCK - first;
    for (int64_t n = 0, at = *block - first; n < count; n++, at++) {
        if (at < 0 || at >= count) at = 0;
        const int64_t j = (first + at) * ADA_BLOCK;
        if (!ada_keys_seen(p, k, b, h, i, 1, j, ada_keys_of_block(p, first + at), rows)) continue;
        *block = first + at;
        return true;
    }
    return false;
}

uint64_t ada_block_seen(const ada_problem *p, const ada_kernels *k, int64_t b, int64_t h, int64_t heads,
                        int64_t block, float *rows) {
    const int64_t j = block * ADA_BLOCK, T = p->T;
    const int nk = ada_keys_of_block(p, block);
    const int64_t first = ada_visible_span(p, b, 0).first - j, end = ada_visible_span(p, b, T - 1).end - j;
    uint64_t span = end >= 64 ? UINT64_MAX : end <= 0 ? 0 : ((uint64_t)1 << end) - 1, seen = 0;
    span &= first >= 64 ? 0 : first <= 0 ? UINT64_MAX : UINT64_MAX << first;
    if (nk < 64) span &= ((uint64_t)1 << nk) - 1;
    if (!p->attn_mask.data) return span;
    for (int64_t x = h; x < h + (p->attn_mask.stride[1] ? heads : 1); x++)
        for (int64_t i = 0; i < T && seen != span; i += ADA_LANES)
            seen |= ada_keys_seen(p, k, b, x, i, (int)(T - i < ADA_LANES ? T - i : ADA_LANES), j, nk, rows);
    return seen;
}

void ada_mean_of_rows(const ada_kernels *k, const ada_array *a, int64_t b, int64_t h, const uint64_t *seen,
                      float *rows, float *largest, float *mean) {
    const int width = (int)a->shape[3];
    const int64_t step = (a->shape[2] + MEAN_ROWS - 1) / MEAN_ROWS, drawn = (a->shape[2] + step - 1) / step;
    int64_t count = 0;
    for (int64_t first = 0; first < drawn; first += ADA_BLOCK) {
        const int n = (int)(drawn - first < ADA_BLOCK ? drawn - first : ADA_BLOCK);
        uint64_t see = 0;
        for (int i = 0; i < n; i++) {
            const int64_t row = (first + i) * step;
            see |= (seen[row / ADA_BLOCK] >> row % ADA_BLOCK & 1) << i;
        }
        ADA_FOR_RUNS(see, i, run) {
            ada_array every = *a;
            every.stride[2] *= step;
            count += run;
            if (a->dtype == ADA_F32 && a->stride[3] == 4) {
                k->columns(mean, largest, (const float *)ada_row_at(&every, b, h, first + i),
                           every.stride[2] / 4, run, width);
                continue;
            }
            for (int c = 0; a->pages && c < run; c++) /* these do not lie evenly */
                ada_load_rows_f32(k, rows + c * width, width, a, b, h, (first + i + c) * step, 1, width);
            if (!a->pages) ada_load_rows_f32(k, rows, width, &every, b, h, first + i, run, width);
            k->columns(mean, largest, rows, width, run, width);
        }
    }
    for (int c = 0; count && c < width; c++) mean[c] /= (float)count;
}

/* What one of each channel is worth, and its inverse, from the largest values; false when they do not fit. */
static bool scale_values(const ada_store *s, const ada_head_store *to, int64_t b, int64_t g,
                         pack_scratch *x) {
    const int E = (int)s->p->E;
    const float most = s->pv.format == ADA_WORDS_I8 ? ADA_I8_MAX : ADA_I16_VALUE_MAX;
    float *largest = to->v_unit, *inverse = to->v_unit + E;
    for (int64_t block = 0; block < s->blocks; block++) {
        ptrdiff_t ld;
        if (!to->seen[block]) continue;
        const float *rows =
            block_rows(s, &s->p->value, false, b, g, block, to->seen[block], NULL, x->rows, &ld);
        s->k->columns(x->factor, largest, rows, ld, ADA_BLOCK, E);
    }
    if (!fits(&s->pv, s->p->value.dtype, s->k->reach(largest, E, 1, E, NULL, NULL))) return false;
    for (int e = 0; e < E; e++) {
        inverse[e] = largest[e] > 0x1p-100f ? most / largest[e] : 0;
        largest[e] /= most;
    }
    return true;
}

void ada_store_survey(const ada_store *s, int64_t head, char *scratch) {
    const ada_head_store to = ada_head_store_at(s, head);
    ada_carver carver = {scratch, 0};
    pack_scratch x = pack_scratch_of(s, &carver);
    int64_t b, h, g;
    key_head(s, head, &b, &h, &g);
    for (int64_t block = 0; block < s->blocks; block++)
        to.seen[block] = ada_block_seen(s->p, s->k, b, h, s->per_head, block, x.rows);
    memset(to.mean, 0, (size_t)s->p->D * sizeof *to.mean);
    memset(to.v_unit, 0, 2 * (size_t)s->p->E * sizeof *to.v_unit);
    memset(x.factor, 0, (size_t)up_to(s->p->D > s->p->E ? s->p->D : s->p->E, 64) * sizeof *x.factor);
    if (centred(s)) ada_mean_of_rows(s->k, &s->p->key, b, g, to.seen, x.rows, x.factor, to.mean);
    if (is_integer(&s->pv) && !scale_values(s, &to, b, g, &x))
        atomic_store_explicit(&s->unfit[head], true, memory_order_relaxed);
}

/* ---- packing ---- */

static void fill(float *x, int n, float value) {
    for (int i = 0; i < n; i++) x[i] = value;
}

float ada_integer_factor(ada_format format, float largest, float norm2) {
    if (largest == 0) return 0;
    if (format == ADA_WORDS_I8) return ADA_I8_MAX / largest;
    return fminf(ADA_I16_MAX / largest, ADA_I16_NORM / sqrtf(norm2));
}

/* In parts that 16 bits hold, of which a vector has more. */
static int32_t sum_of_bytes(const int8_t *x, int n) {
    int32_t sum = 0;
    for (; n > 0; x += 256, n -= 256) {
        int16_t part = 0;
        for (int i = 0; i < (n < 256 ? n : 256); i++) part = (int16_t)(part + x[i]);
        sum += part;
    }
    return sum;
}

static bool pack_keys(const ada_store *s, const ada_head_store *to, int64_t b, int64_t g, int64_t block,
                      pack_scratch *x) {
    const int D = (int)s->p->D;
    const ada_kernels *k = s->k;
    const int64_t key = block * ADA_BLOCK;
    ptrdiff_t ld;
    const ada_grid grid = s->qk.grid;
    const float *less = centred(s) ? to->mean : NULL;
    const bool change = grid != ADA_GRID_NONE && s->qk.format != ADA_FLOATS;
    const float *rows = block_rows(s, &s->p->key, change, b, g, block, to->seen[block], less, x->rows, &ld);
    float norm2 = 0;
    const float largest =
        k->reach(rows, ld, ADA_BLOCK, D, less, s->qk.format == ADA_WORDS_I16 ? &norm2 : NULL);
    if (!rows_fit(&s->qk, s->p->key.dtype, largest, norm2)) return false;
    if (to->k_mean && to->seen[block] == UINT64_MAX)
        to->k_reach[block] = ada_value_reach(k, rows, ld, D, to->k_mean + block * D, x->spare);
    if (s->qk.format == ADA_FLOATS) {
        float *at = (float *)to->k + key * D;
        for (int j = 0; j < ADA_BLOCK; j++)
            for (int d = 0; d < D; d++) at[j * D + d] = rows[j * ld + d] - to->mean[d];
        ada_round_to_grid(k, grid, at, (int64_t)ADA_BLOCK * D);
        return true;
    }
    if (change) ada_round_to_grid(k, grid, x->rows, (int64_t)ADA_BLOCK * D);
    uint32_t *words = (uint32_t *)to->k + key * s->DW;
    const int row = s->DW * ada_elements(s->qk.format);
    for (int part = 0; row > D && part < s->qk.parts.b; part++)
        memset(words + part * to->k_part, 0, ADA_BLOCK * (size_t)s->DW * 4);
    const float factor =
        s->qk.format == ADA_WORDS_BF16 ? 1 : ada_integer_factor(s->qk.format, largest, norm2);
    fill(x->factor, ADA_BLOCK, factor);
    to->scale[block] = factor != 0 ? 1 / factor : 0;
    if (s->qk.format == ADA_WORDS_BF16) {
        k->encode_bf16((uint16_t *)words, row, 2 * to->k_part, s->qk.parts.b, rows, ld, ADA_BLOCK, D, less,
                       x->factor, true);
    } else if (s->qk.format == ADA_WORDS_I16) {
        k->encode_i16((int16_t *)words, row, rows, ld, ADA_BLOCK, D, less, x->factor, true);
    } else {
        int8_t *at = (int8_t *)words;
        k->encode_i8(at, row, rows, ld, ADA_BLOCK, D, less, x->factor, true);
        for (int j = 0; j < ADA_BLOCK; j++, at += row) to->start[key + j] = -128 * sum_of_bytes(at, D);
    }
    return true;
}

static bool pack_values(const ada_store *s, const ada_head_store *to, int64_t b, int64_t g, int64_t strip,
                        pack_scratch *x) {
    const int E = (int)s->p->E, elements = ada_elements(s->pv.format), ldx = (int)up_to(E, 64);
    const ada_kernels *k = s->k;
    const bool floats = s->pv.format == ADA_FLOATS;
    const ptrdiff_t part = (ptrdiff_t)ADA_STRIP * ldx;
    const int rows_v = (int)value_rows(s); /* those behind E are zero */
    const size_t words = (size_t)rows_v * (size_t)(ADA_STRIP / elements);
    const int64_t first = strip * (ADA_STRIP / ADA_BLOCK);
    const int blocks =
        (int)(s->blocks - first < ADA_STRIP / ADA_BLOCK ? s->blocks - first : ADA_STRIP / ADA_BLOCK);
    bool whole = rows_v == E; /* nothing stays unwritten */
    for (int i = 0; i < blocks; i++) whole &= to->seen[first + i] != 0;
    if (!floats && !whole) memset(x->words, 0, (size_t)part * 2 * (size_t)s->pv.parts.b);
    if (s->pv.format == ADA_WORDS_BF16) fill(x->factor, ADA_BLOCK, 1);
    for (int i = 0; i < blocks; i++) {
        const int64_t block = first + i;
        ptrdiff_t ld;
        if (!to->seen[block] && !floats) continue;
        const bool change = s->pv.grid != ADA_GRID_NONE;
        const float *rows =
            block_rows(s, &s->p->value, change, b, g, block, to->seen[block], NULL, x->rows, &ld);
        if (!is_integer(&s->pv) &&
            !fits(&s->pv, s->p->value.dtype, k->reach(rows, ld, ADA_BLOCK, E, NULL, NULL)))
            return false;
        if (change) ada_round_to_grid(k, s->pv.grid, x->rows, (int64_t)ADA_BLOCK * E);
        if (to->v_most) {
            k->reach(rows, ld, ADA_BLOCK, E, NULL, &to->v_most[block]);
            to->v_most[block] = sqrtf(to->v_most[block]);
        }
        if (to->v_mean && to->seen[block] == UINT64_MAX) { /* others never stand in */
            float *mean = to->v_mean + block * E;
            to->reach[block] = ada_value_reach(k, rows, ld, E, mean, x->spare);
            for (int e = 0; is_integer(&s->pv) && e < E; e++) mean[e] *= to->v_unit[E + e];
        }
        const ptrdiff_t at = (ptrdiff_t)i * ADA_BLOCK * ldx;
        if (floats)
            for (int j = 0; j < ADA_BLOCK; j++)
                memcpy((float *)to->v + (block * ADA_BLOCK + j) * E, rows + j * ld, (size_t)E * 4);
        else if (s->pv.format == ADA_WORDS_BF16)
            k->encode_bf16((uint16_t *)x->words + at, ldx, part, s->pv.parts.b, rows, ld, ADA_BLOCK, E, NULL,
                           x->factor, true);
        else if (s->pv.format == ADA_WORDS_I16)
            k->encode_i16((int16_t *)x->words + at, ldx, rows, ld, ADA_BLOCK, E, NULL, to->v_unit + E, false);
        else
            k->encode_i8((int8_t *)x->words + at, ldx, rows, ld, ADA_BLOCK, E, NULL, to->v_unit + E, false);
    }
    for (int a = 0; !floats && a < s->pv.parts.b; a++) {
        uint32_t *v = (uint32_t *)to->v + a * to->v_part + strip * (ptrdiff_t)words;
        if (elements == 4)
            k->turn_8(v, ADA_STRIP, x->words, ldx, blocks * ADA_BLOCK, rows_v);
        else
            k->turn_16(v, ADA_STRIP, (uint16_t *)x->words + a * part, ldx, blocks * ADA_BLOCK, rows_v);
    }
    return true;
}

void ada_store_pack(const ada_store *s, int64_t head, int64_t strip, char *scratch) {
    const ada_head_store to = ada_head_store_at(s, head);
    ada_carver carver = {scratch, 0};
    pack_scratch x = pack_scratch_of(s, &carver);
    int64_t b, h, g;
    bool good = !s->unfit[head];
    key_head(s, head, &b, &h, &g);
    const int64_t first = strip * (ADA_STRIP / ADA_BLOCK);
    for (int64_t block = first; block < first + ADA_STRIP / ADA_BLOCK && block < s->blocks; block++)
        if (good && is_packed(&s->qk)) good = pack_keys(s, &to, b, g, block, &x);
    if (good) good = pack_values(s, &to, b, g, strip, &x);
    if (!good) atomic_store_explicit(&s->unfit[head], true, memory_order_relaxed);
}

/* factor[i] as of ada_integer_factor, unit[i] = scale / factor[i], of rows of zeros both 0; in loops that
 * compilers vectorise. */
static void row_units(ada_format format, int n, const float *largest, const float *norm2, float scale,
                      float *restrict factor, float *restrict unit) {
    if (format == ADA_WORDS_I8)
        for (int i = 0; i < n; i++) {
            const float inverse = ADA_I8_MAX / largest[i];
            factor[i] = largest[i] != 0 ? inverse : 0;
        }
    else
        for (int i = 0; i < n; i++) factor[i] = ada_integer_factor(format, largest[i], norm2[i]);
    for (int i = 0; i < n; i++) {
        const float one = scale / factor[i];
        unit[i] = factor[i] != 0 ? one : 0;
    }
}

bool ada_pack_queries(const ada_store *s, const ada_head_store *head, const ada_narrow_tile *t,
                      const float *rows, ptrdiff_t ld, int n, float *copy, void *words) {
    const int D = (int)s->p->D, lanes = t->f32.lanes, row = s->DW * ada_elements(s->qk.format);
    const float factor = (float)(s->p->scale * LOG2E);
    const ptrdiff_t part = (ptrdiff_t)ADA_LANES * row;
    const bool integers = is_integer(&s->qk);
    float factors[ADA_LANES], shift[ADA_LANES] = {0}, largest[ADA_LANES], norm2[ADA_LANES];
    if (centred(s)) s->k->row_scores_f32(shift, head->mean, 1, rows, ld, n, D);
    if (integers)
        s->k->row_reach(largest, norm2, rows, ld, n, D, NULL);
    else /* that of the tile will do */
        largest[0] = s->k->reach(rows, ld, n, D, NULL, NULL), norm2[0] = 0;
    for (int i = 0; i < (integers ? n : 1); i++)
        if (!rows_fit(&s->qk, s->p->query.dtype, largest[i], norm2[i]) ||
            !(largest[i] * factor <= ADA_NARROW_MOST))
            return false;
    for (int i = 0; i < n; i++) t->offset[i] = shift[i] * factor;
    if (!integers)
        fill(factors, n, 1), fill(t->unit, n, factor);
    else
        row_units(s->qk.format, n, largest, norm2, factor, factors, t->unit);
    for (int i = n; i < ADA_LANES; i++)
        t->offset[i] = t->offset[n - 1], t->unit[i] = t->unit[n - 1], factors[i] = factors[n - 1];
    if (s->qk.grid != ADA_GRID_NONE) {
        for (int i = 0; i < n; i++) memcpy(copy + i * D, rows + i * ld, (size_t)D * sizeof *copy);
        ada_round_to_grid(s->k, s->qk.grid, copy, (int64_t)n * D);
        rows = copy, ld = D;
    }
    if (s->qk.format == ADA_FLOATS) {
        s->k->pack_f32(t->f32.q, rows, ld, n, D, lanes, factor);
        return true;
    }
    /* bf16 takes the scale before it is rounded, in steps of its weights' exponents. */
    const bool scaled = s->qk.format == ADA_WORDS_BF16 && s->qk.grid == ADA_GRID_NONE;
    if (scaled) fill(t->unit, ADA_LANES, 1.0f / ADA_BF16_STEPS);
    if (scaled) fill(factors, n, factor * ADA_BF16_STEPS);
    if (row > D)
        memset(words, 0, (size_t)part * (size_t)s->qk.parts.a * (s->qk.format == ADA_WORDS_I8 ? 1 : 2));
    if (s->qk.format == ADA_WORDS_BF16)
        s->k->encode_bf16(words, row, part, s->qk.parts.a, rows, ld, n, D, NULL, factors, true);
    else if (s->qk.format == ADA_WORDS_I16)
        s->k->encode_i16(words, row, rows, ld, n, D, NULL, factors, true);
    else
        s->k->encode_i8(words, row, rows, ld, n, D, NULL, factors, true);
    const size_t row_bytes = (size_t)s->DW * 4;
    for (int a = 0; a < s->qk.parts.a; a++) /* lanes that nobody computes are like the last row */
        for (int i = n; i < ADA_LANES; i++)
            memcpy((uint32_t *)words + (a * ADA_LANES + i) * s->DW,
                   (uint32_t *)words + (a * ADA_LANES + n - 1) * s->DW, row_bytes);
    uint32_t *word = words; /* signed to unsigned */
    const ptrdiff_t bytes = s->qk.format == ADA_WORDS_I8 ? part : 0;
    for (ptrdiff_t i = 0; i < bytes / 4; i++) word[i] ^= 0x80808080;
    for (int a = 0; a < s->qk.parts.a; a++)
        s->k->turn_32(t->q + (ptrdiff_t)a * s->DW * ADA_LANES, ADA_LANES,
                      (uint32_t *)words + a * (part * s->DW / row), s->DW, ADA_LANES, s->DW);
    return true;
}
