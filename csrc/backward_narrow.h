/* The products of the gradient on a cheaper rung: scores and gradients of weights from 16-bit integers, the
 * sums over queries and keys from bf16. Included by backward.c, whose float instance does all between.
 *
 * A tile's keys and values are the lanes, its queries and grad_out the rows; dV, dK and dQ are summed as
 * [width][64] of a block or tile, in floats. Operands are packed once for all tiles that meet. Keys and
 * values lose their means first: a shift of a row's scores does not change its weights, nor one of the
 * weights' gradients those of the scores.
 */
#define STRIP_TILES (ADA_STRIP / ADA_LANES)
#define STRIP_WORDS (ADA_STRIP / 2) /* of bf16, from one coordinate to the next */

/* Rows of a head in tiles of 64. */
typedef struct {
    uint32_t *words;  /* 16 bits: [tiles][64][DW], or as lanes [tiles][DW up to 16][64] */
    uint32_t *turned; /* bf16: [strips][width up to 16][STRIP_WORDS] */
    float *unit;      /* [tiles][64] what a one of a row is worth; of those that are not lanes all alike */
    int DW, width;
    int64_t tile_words, strip_words;
    bool lanes;
} narrow_side;

/* Of a key head, and of each query head that shares it. */
typedef struct {
    narrow_side key, value;
    uint64_t *seen; /* [blocks] bit per key: some query may attend to it; the others are no part */
    float *key_mean, *value_mean; /* zeros where they stay as they are */
    float *dk, *dv;               /* [blocks][width up to 16][64] */
} narrow_keys;

typedef struct {
    narrow_side q, go;
    float *shift, *less; /* [T] what the means took of scores, log2 units, and of gradients of weights */
    float *dq;           /* [tiles][D up to 16][64] */
} narrow_queries;

typedef struct {
    scratch_f32 base;
    ada_narrow_tile t;
    uint32_t *weights, *gradients, *turned; /* [32][64] pairs of queries by keys; pairs of keys by queries */
    uint16_t *halves;                       /* [64][64] */
    float *zeros, *ones;                    /* [64], [max(D, E)] */
    float *factor;                          /* [max(D, E, 64)] */
    char *words;                            /* [64][max(D, E) up to 64] of 2 bytes */
} narrow_scratch;

static int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static int64_t lane_floats(int64_t width) { return up_to(width, 16) * ADA_LANES; }
static int64_t wider(const ada_problem *p) { return p->D > p->E ? p->D : p->E; }

static narrow_side side_of(ada_carver *c, int64_t tiles, int64_t width, bool lanes, bool turned) {
    const int64_t strips = (tiles + STRIP_TILES - 1) / STRIP_TILES;
    narrow_side s = {.DW = (int)((width + 1) / 2), .width = (int)width, .lanes = lanes};
    s.tile_words = ADA_LANES * (lanes ? up_to(s.DW, 16) : s.DW);
    s.strip_words = up_to(width, 16) * STRIP_WORDS;
    s.words = ada_carve(c, tiles * s.tile_words * 4);
    s.turned = ada_carve(c, turned ? strips * s.strip_words * 4 : 0);
    s.unit = ada_carve(c, tiles * ADA_LANES * (int64_t)sizeof(float));
    return s;
}

static narrow_keys carve_narrow_keys(const back_run *r, ada_carver *c) {
    const ada_problem *p = r->p;
    narrow_keys n;
    n.key = side_of(c, r->blocks, p->D, true, true), n.value = side_of(c, r->blocks, p->E, true, false);
    n.seen = ada_carve(c, r->blocks * (int64_t)sizeof *n.seen);
    n.key_mean = ada_carve(c, p->D * (int64_t)sizeof(float));
    n.value_mean = ada_carve(c, p->E * (int64_t)sizeof(float));
    n.dk = ada_carve(c, r->blocks * lane_floats(p->D) * (int64_t)sizeof(float));
    n.dv = ada_carve(c, r->blocks * lane_floats(p->E) * (int64_t)sizeof(float));
    return n;
}

static narrow_queries carve_narrow_queries(const back_run *r, ada_carver *c) {
    const ada_problem *p = r->p;
    narrow_queries n;
    n.q = side_of(c, r->tiles, p->D, false, true), n.go = side_of(c, r->tiles, p->E, false, true);
    n.shift = ada_carve(c, p->T * (int64_t)sizeof(float));
    n.less = ada_carve(c, p->T * (int64_t)sizeof(float));
    n.dq = ada_carve(c, r->tiles * lane_floats(p->D) * (int64_t)sizeof(float));
    return n;
}

/* The operands and sums of a key head, and those of query head x of them. */
static int64_t narrow_key_bytes(const back_run *r) {
    ada_carver c = {NULL, 0};
    carve_narrow_keys(r, &c);
    return c.used;
}
static int64_t narrow_query_bytes(const back_run *r) {
    ada_carver c = {NULL, 0};
    carve_narrow_queries(r, &c);
    return c.used;
}
static int64_t narrow_bytes(const back_run *r) {
    return narrow_key_bytes(r) + r->p->H / r->p->G * narrow_query_bytes(r);
}
static narrow_keys narrow_keys_at(const back_run *r, int64_t group) {
    ada_carver c = {r->narrow + (group - r->first) * narrow_bytes(r), 0};
    return carve_narrow_keys(r, &c);
}
static narrow_queries narrow_queries_at(const back_run *r, int64_t group, int64_t x) {
    ada_carver c = {r->narrow + (group - r->first) * narrow_bytes(r) + narrow_key_bytes(r) +
                        x * narrow_query_bytes(r),
                    0};
    return carve_narrow_queries(r, &c);
}

static narrow_scratch narrow_scratch_of(const ada_problem *p, ada_carver *c) {
    const int64_t width = up_to(wider(p), 64), lanes = ADA_LANES * sizeof(float);
    narrow_scratch s = {.base = scratch_of_f32(p, c)};
    s.weights = ada_carve(c, ADA_BLOCK / 2 * lanes), s.gradients = ada_carve(c, ADA_BLOCK / 2 * lanes);
    s.turned = ada_carve(c, ADA_BLOCK / 2 * lanes), s.halves = ada_carve(c, ADA_LANES * ADA_BLOCK * 2);
    s.zeros = ada_carve(c, lanes), s.ones = ada_carve(c, width * (int64_t)sizeof(float));
    s.factor = ada_carve(c, width * (int64_t)sizeof(float));
    s.words = ada_carve(c, ADA_STRIP * width * 2);
    s.t = (ada_narrow_tile){.offset = s.zeros, .qk = {1, 1, 1}, .pv = {1, 1, 1}};
    s.t.f32.lanes = ADA_LANES;
    for (int i = 0; c->base && i < ADA_LANES; i++) s.zeros[i] = 0;
    for (int64_t i = 0; c->base && i < width; i++) s.ones[i] = 1;
    return s;
}

/* ---- packing ---- */

/* Rows of tile `tile` to 16-bit words. Lanes have a unit each, other rows share one. False when they are
 * beyond what is safe. */
static bool pack_words(const back_run *r, const narrow_side *side, int64_t tile, const float *rows,
                       ptrdiff_t ld, int n, const float *less, const narrow_scratch *s) {
    const int width = side->width, step = side->lanes ? 1 : n, ldw = 2 * side->DW;
    uint32_t *to = side->words + tile * side->tile_words;
    int16_t *words = side->lanes ? (int16_t *)s->words : (int16_t *)to;
    float *unit = side->unit + tile * ADA_LANES;
    memset(words, 0, ADA_LANES * (size_t)ldw * sizeof *words);
    for (int i = 0; i < ADA_LANES; i++) unit[i] = 0;
    for (int i = 0; i < n; i += step) {
        float norm2;
        const float largest = r->k->reach(rows + i * ld, ld, step, width, less, &norm2);
        if (largest != 0 && !(norm2 >= ADA_LEAST_NORM2 && largest <= ADA_NARROW_MOST)) return false;
        const float factor = largest == 0 ? 0 : fminf(ADA_I16_MAX / largest, ADA_I16_NORM / sqrtf(norm2));
        for (int c = 0; c < width; c++) s->factor[c] = factor;
        for (int x = i; x < i + step; x++) unit[x] = factor == 0 ? 0 : 1 / factor;
        r->k->encode_i16(words + i * ldw, ldw, rows + i * ld, ld, step, width, less, s->factor);
    }
    if (side->lanes) r->k->turn_32(to, ADA_LANES, words, side->DW, ADA_LANES, side->DW);
    return true;
}

/* A tile's part of what is summed over: bf16, by coordinates. */
static void pack_turned(const back_run *r, const narrow_side *side, int64_t tile, const float *rows,
                        ptrdiff_t ld, int n, const float *less, const narrow_scratch *s) {
    const int ldw = (int)up_to(side->width, 16);
    uint16_t *words = (uint16_t *)s->words;
    memset(words, 0, ADA_LANES * (size_t)ldw * sizeof *words);
    r->k->encode_bf16(words, ldw, 0, 1, rows, ld, n, side->width, less, s->ones);
    r->k->turn_16(side->turned + tile / STRIP_TILES * side->strip_words +
                      tile % STRIP_TILES * (ADA_LANES / 2),
                  ADA_STRIP, words, ldw, ADA_LANES, ldw);
}

/* The mean of the rows of a head that are seen, of a sample. */
static void mean_of_rows(const back_run *r, const ada_array *a, int64_t b, int64_t g, const uint64_t *seen,
                         const narrow_scratch *s, float *mean) {
    enum { SAMPLE = 1024 };
    const int width = (int)a->shape[3];
    const int64_t rows = a->shape[2], step = (rows + SAMPLE - 1) / SAMPLE;
    float *largest = s->factor, count = 0;
    memset(largest, 0, (size_t)width * sizeof *largest);
    for (int64_t j = 0; j < rows; j += step) {
        ptrdiff_t ld;
        if (!(seen[j / ADA_BLOCK] >> j % ADA_BLOCK & 1)) continue;
        const float *row = rows_at_f32(r->k, a, b, g, j, 1, s->base.rows, &ld);
        r->k->columns(mean, largest, row, ld, 1, width);
        count++;
    }
    for (int c = 0; count > 0 && c < width; c++) mean[c] /= count;
}

/* n rows of a head; other's (NULL: zeros) in place of those that are not seen. */
static const float *seen_rows(const back_run *r, const ada_array *a, int64_t b, int64_t h, int64_t i, int n,
                              uint64_t seen, const float *other, float *copy, ptrdiff_t *ld) {
    const size_t width = (size_t)a->shape[3];
    const float *rows = rows_at_f32(r->k, a, b, h, i, n, copy, ld);
    if ((seen & ada_first_bits(n)) == ada_first_bits(n)) return rows;
    for (int x = 0; x < n; x++) {
        float *to = copy + (size_t)x * width;
        if (!(seen >> x & 1) && !other)
            memset(to, 0, width * sizeof *to);
        else if (!(seen >> x & 1))
            memcpy(to, other, width * sizeof *to);
        else if (rows != copy)
            memcpy(to, rows + x * *ld, width * sizeof *to);
    }
    *ld = (ptrdiff_t)width;
    return copy;
}

static void set_raised(const back_run *r, int64_t group) {
    atomic_store_explicit(&r->raised[group], true, memory_order_relaxed);
}

/* Means of the keys and values of a key head, and zeros where sums begin. */
static void narrow_start_task(void *context, ada_job *job, int64_t task, int worker) {
    const back_run *r = context;
    const ada_problem *p = r->p;
    const int64_t group = r->first + task, b = group / p->G, g = group % p->G, per_group = p->H / p->G;
    if (r->way[group] != WAY_NARROW || ada_job_cancelled(job, worker)) return;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const narrow_scratch s = narrow_scratch_of(p, &carver);
    const narrow_keys n = narrow_keys_at(r, group);
    memset(n.key_mean, 0, (size_t)p->D * sizeof(float));
    memset(n.value_mean, 0, (size_t)p->E * sizeof(float));
    memset(n.dk, 0, (size_t)(r->blocks * lane_floats(p->D)) * sizeof(float));
    memset(n.dv, 0, (size_t)(r->blocks * lane_floats(p->E)) * sizeof(float));
    for (int64_t block = 0; block < r->blocks; block++)
        n.seen[block] = ada_block_seen(p, r->k, b, g * per_group, per_group, block, s.base.s);
    /* A cap minds the shift of a score; what is dropped has no gradient to be shifted. Nor is a mean of keys
     * that one head of several does not see. */
    const bool alike = per_group == 1 || !p->attn_mask.data || p->attn_mask.stride[1] == 0;
    if (alike && !p->has_softcap) mean_of_rows(r, &p->key, b, g, n.seen, &s, n.key_mean);
    if (alike && !p->drop_below) mean_of_rows(r, &p->value, b, g, n.seen, &s, n.value_mean);
}

static void narrow_keys_task(void *context, ada_job *job, int64_t task, int worker) {
    const back_run *r = context;
    const ada_problem *p = r->p;
    const int64_t group = r->first + task / r->blocks, block = task % r->blocks;
    const int64_t b = group / p->G, g = group % p->G, j = block * ADA_BLOCK, left = ada_key_count(p, b) - j;
    const int nk = left < ADA_BLOCK ? (int)left : ADA_BLOCK;
    if (r->way[group] != WAY_NARROW || r->raised[group] || left <= 0 || ada_job_cancelled(job, worker))
        return;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const narrow_scratch s = narrow_scratch_of(p, &carver);
    const narrow_keys n = narrow_keys_at(r, group);
    /* A row's gradients of scores add up to nothing, but for what a sink or a cap takes. */
    const bool balanced = !p->sinks.data && !p->has_softcap;
    ptrdiff_t ld;
    const uint64_t seen = n.seen[block];
    const float *k = seen_rows(r, &p->key, b, g, j, nk, seen, n.key_mean, s.base.rows, &ld);
    bool good = pack_words(r, &n.key, block, k, ld, nk, n.key_mean, &s);
    if (good) pack_turned(r, &n.key, block, k, ld, nk, balanced ? n.key_mean : NULL, &s);
    for (int i = 0; i < ADA_LANES; i++) n.key.unit[block * ADA_LANES + i] *= (float)(p->scale * ADA_LOG2E);
    const float *v = seen_rows(r, &p->value, b, g, j, nk, seen, n.value_mean, s.base.rows, &ld);
    if (!good || !pack_words(r, &n.value, block, v, ld, nk, n.value_mean, &s)) set_raised(r, group);
}

static void narrow_queries_task(void *context, ada_job *job, int64_t task, int worker) {
    const back_run *r = context;
    const ada_problem *p = r->p;
    const int64_t per_group = p->H / p->G, tile = task % r->tiles, head = task / r->tiles;
    const int64_t group = r->first + head / per_group, x = head % per_group;
    const int64_t b = group / p->G, h = group % p->G * per_group + x, i = tile * ADA_LANES;
    const int n = rows_of_tile(p, tile), D = (int)p->D, E = (int)p->E;
    if (r->way[group] != WAY_NARROW || r->raised[group] || ada_job_cancelled(job, worker)) return;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const narrow_scratch s = narrow_scratch_of(p, &carver);
    const narrow_keys keys = narrow_keys_at(r, group);
    const narrow_queries to = narrow_queries_at(r, group, x);
    const float factor = (float)(p->scale * ADA_LOG2E);
    ptrdiff_t ld;
    memset(to.dq + tile * lane_floats(D), 0, (size_t)lane_floats(D) * sizeof(float));
    uint64_t seen = 0; /* rows that see a key */
    for (int row = 0; row < n; row++) seen |= (uint64_t)sees_keys(r, b, h, i + row) << row;
    const float *q = seen_rows(r, &p->query, b, h, i, n, seen, NULL, s.base.rows, &ld);
    bool good = pack_words(r, &to.q, tile, q, ld, n, NULL, &s);
    if (good) pack_turned(r, &to.q, tile, q, ld, n, NULL, &s);
    r->k->row_scores_f32(to.shift + i, keys.key_mean, 1, q, ld, n, D);
    for (int row = 0; row < n; row++) to.shift[i + row] *= factor;
    const float *go = seen_rows(r, &r->x->grad_out, b, h, i, n, seen, NULL, s.base.rows, &ld);
    good = good && pack_words(r, &to.go, tile, go, ld, n, NULL, &s);
    if (good) pack_turned(r, &to.go, tile, go, ld, n, NULL, &s);
    r->k->row_scores_f32(to.less + i, keys.value_mean, 1, go, ld, n, E);
    if (!good) set_raised(r, group);
}

/* ---- a tile ---- */

/* Rows of a tile times the lanes of a block, in floats. */
static void narrow_product(const back_run *r, narrow_scratch *s, float *to, const narrow_side *rows,
                           int64_t tile, const narrow_side *lanes, int64_t block, int n) {
    const ada_narrow_keys a = {.k = rows->words + tile * rows->tile_words,
                               .scale = rows->unit + tile * ADA_LANES};
    s->t.f32.p = to, s->t.q = lanes->words + block * lanes->tile_words, s->t.DW = lanes->DW;
    s->t.unit = lanes->unit + block * ADA_LANES;
    r->k->scores_i16(&s->t, &a, (int)up_to(n, ADA_KEY_STEP));
}

/* sums[c][lane] += what the words w come to with a side's tile, which they are by pairs of. */
static void narrow_sum(const back_run *r, narrow_scratch *s, float *sums, const uint32_t *w,
                       const narrow_side *side, int64_t tile) {
    s->t.f32.o = sums, s->t.f32.E = side->width, s->t.w = (uint32_t *)w;
    r->k->values_bf16(
        &s->t, side->turned + tile / STRIP_TILES * side->strip_words + tile % STRIP_TILES * (ADA_LANES / 2),
        0, ADA_BLOCK);
}

/* Zeros for the queries and keys of a tile that do not exist. */
static void clear_rest(float *x, int rows, int width) {
    for (int i = 0; i < rows; i++)
        for (int j = width; j < ADA_BLOCK; j++) x[i * ADA_BLOCK + j] = 0;
    memset(x + rows * ADA_BLOCK, 0, (size_t)(ADA_LANES - rows) * ADA_BLOCK * sizeof *x);
}

static bool narrow_tile_back(const back_run *r, narrow_scratch *s, const ada_patch *patch,
                             ada_backward_tile_f32 *t, const narrow_keys *keys,
                             const narrow_queries *queries) {
    const ada_problem *p = r->p;
    const bool *needs = r->x->needs;
    const scratch_f32 *b = &s->base;
    const int64_t tile = patch->i / ADA_LANES, block = patch->j / ADA_BLOCK;
    for (int i = 0; i < patch->n; i++)
        b->lse[i] -= queries->shift[patch->i + i], b->delta[i] -= queries->less[patch->i + i];
    narrow_product(r, s, b->s, &queries->q, tile, &keys->key, block, patch->n);
    if (t->g) narrow_product(r, s, b->g, &queries->go, tile, &keys->value, block, patch->n);
    if (p->has_softcap && !cap_tile_f32(r, b, t)) return false;
    if (!r->k->backward_f32(t)) return false;
    if (t->g) uncap_tile_f32(r, b, t);
    if (patch->n < ADA_LANES || t->width < ADA_BLOCK) {
        clear_rest(b->s, patch->n, t->width);
        if (t->g) clear_rest(b->g, patch->n, t->width);
    }
    if (needs[ADA_OF_VALUE]) {
        r->k->pair_bf16(s->weights, b->s);
        narrow_sum(r, s, keys->dv + block * lane_floats(p->E), s->weights, &queries->go, tile);
    }
    if (needs[ADA_OF_KEY]) {
        r->k->pair_bf16(s->gradients, b->g);
        narrow_sum(r, s, keys->dk + block * lane_floats(p->D), s->gradients, &queries->q, tile);
    }
    if (needs[ADA_OF_QUERY]) {
        r->k->store_bf16(s->halves, b->g, ADA_LANES * ADA_BLOCK);
        r->k->turn_32(s->turned, ADA_LANES, s->halves, ADA_BLOCK / 2, ADA_LANES, ADA_BLOCK / 2);
        narrow_sum(r, s, queries->dq + tile * lane_floats(p->D), s->turned, &keys->key, block);
    }
    return true;
}

/* As part_back. */
static bool narrow_part_back(const back_run *r, int64_t group, int64_t key_part, int64_t query_part,
                             ada_job *job, int worker) {
    const ada_problem *p = r->p;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    narrow_scratch s = narrow_scratch_of(p, &carver);
    const int64_t b = group / p->G, per_group = p->H / p->G, h = group % p->G * per_group;
    const ada_range blocks = part_of(r->blocks, r->key_parts, key_part);
    const ada_range tiles = part_of(r->tiles, r->query_parts, query_part);
    const narrow_keys keys = narrow_keys_at(r, group);
    for (int64_t block = blocks.first; block < blocks.end; block++) {
        const int64_t j = block * ADA_BLOCK, left = ada_key_count(p, b) - j;
        ada_patch patch = {.b = b, .j = j, .nk = (int)(left < ADA_BLOCK ? left : ADA_BLOCK)};
        for (patch.h = h; left > 0 && patch.h < h + per_group; patch.h++) {
            const narrow_queries queries = narrow_queries_at(r, group, patch.h - h);
            for (int64_t tile = tiles.first; tile < tiles.end; tile++) {
                ada_backward_tile_f32 t;
                if (ada_job_cancelled(job, worker)) return true;
                patch.i = tile * ADA_LANES, patch.n = rows_of_tile(p, tile);
                if (!see_tile_f32(r, &s.base, &patch, &t)) continue;
                if (!narrow_tile_back(r, &s, &patch, &t, &keys, &queries)) return false;
            }
        }
    }
    return true;
}

/* Sums of blocks or tiles to rows of a result; false when one is not finite. */
static bool narrow_store(const back_run *r, int which, const float *sums, int64_t b, int64_t h, float factor,
                         const narrow_scratch *s) {
    const ada_array *to = &r->x->results[which];
    const int width = (int)to->shape[3];
    bool finite = true;
    for (int i = 0; i < ADA_LANES; i++) s->factor[i] = factor;
    for (int64_t row = 0; row < to->shape[2]; row += ADA_LANES, sums += lane_floats(width)) {
        const int n = (int)(to->shape[2] - row < ADA_LANES ? to->shape[2] - row : ADA_LANES);
        finite &= r->k->unpack_f32(s->base.rows, width, sums, s->factor, n, width);
        ada_store_rows_f32(r->k, to, b, h, row, n, width, s->base.rows, width);
    }
    return finite;
}

static void narrow_finish_task(void *context, ada_job *job, int64_t task, int worker) {
    const back_run *r = context;
    const ada_problem *p = r->p;
    const int64_t group = r->first + task, b = group / p->G, g = group % p->G, per_group = p->H / p->G;
    const bool *needs = r->x->needs;
    if (r->way[group] != WAY_NARROW || r->raised[group] || ada_job_cancelled(job, worker)) return;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const narrow_scratch s = narrow_scratch_of(p, &carver);
    const narrow_keys keys = narrow_keys_at(r, group);
    const float scale = (float)(p->scale * r->fault);
    bool finite = true;
    if (needs[ADA_OF_KEY]) finite &= narrow_store(r, ADA_OF_KEY, keys.dk, b, g, scale, &s);
    if (needs[ADA_OF_VALUE]) finite &= narrow_store(r, ADA_OF_VALUE, keys.dv, b, g, (float)r->fault, &s);
    for (int64_t x = 0; needs[ADA_OF_QUERY] && x < per_group; x++)
        finite &=
            narrow_store(r, ADA_OF_QUERY, narrow_queries_at(r, group, x).dq, b, g * per_group + x, scale, &s);
    if (!finite) set_raised(r, group);
}

static void narrow_step_task(void *context, ada_job *job, int64_t task, int worker) {
    const back_run *r = context;
    const int64_t group = r->first + task / r->key_parts, key_part = task % r->key_parts;
    const int64_t query_part = (key_part + r->step) % r->steps;
    if (r->way[group] != WAY_NARROW || query_part >= r->query_parts) return;
    if (atomic_load_explicit(&r->raised[group], memory_order_relaxed)) return;
    if (r->k->units_begin) r->k->units_begin();
    if (!narrow_part_back(r, group, key_part, query_part, job, worker)) set_raised(r, group);
    if (r->k->units_end) r->k->units_end();
}
