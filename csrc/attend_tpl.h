/* Attention of one tile of queries, and of few queries over a split of the keys, in REAL. The including file
 * defines REAL, KIND(name) and KIND_FN(name), names of types and kernels of REAL, and READS_HALF where row
 * kernels of half formats accumulate in REAL. Rows that REAL cannot hold (overflow, NaN, infinities) are left
 * to attend_tile_carefully.
 */
#include "read_tpl.h"

typedef struct {
    KIND(ada_tile) tile;
    REAL *k, *v;         /* [ADA_BLOCK][D] and [ADA_BLOCK][E], rows that could not be read in place */
    REAL *rows;          /* [ADA_LANES][max(D, E, ADA_BLOCK)] */
    REAL *bias;          /* [ADA_BLOCK][ADA_LANES] */
    REAL *factor;        /* [ADA_LANES] */
    REAL *block;         /* [ADA_LANES] sum of the weights of the heaviest block */
    REAL *queries;       /* [H / G * T][D], scaled, on the way of few queries */
    char *page_rows;     /* the same for codes of pages */
    uint64_t *visible;   /* [64], bits of lanes per key */
    uint64_t *keep;      /* [64], the same */
    uint8_t *special;    /* [E][ADA_LANES], used by the careful way only */
    ada_prospect *ahead; /* NULL: none */
} KIND(scratch);

static KIND(scratch) KIND(scratch_of)(const ada_problem *p, ada_carver *c) {
    const int64_t real = sizeof(REAL), strip = ADA_LANES * real, width = p->D > p->E ? p->D : p->E;
    KIND(scratch) s;
    s.tile.D = (int)p->D, s.tile.E = (int)p->E;
    s.tile.ahead = NULL, s.ahead = NULL;
    s.tile.cached = ada_stays_cached(p);
    s.tile.q = ada_carve(c, p->D * strip);
    s.tile.p = ada_carve(c, ADA_BLOCK * strip);
    s.tile.o = ada_carve(c, p->E * strip);
    s.tile.m = ada_carve(c, strip);
    s.tile.l = ada_carve(c, strip);
    s.k = ada_carve(c, ADA_BLOCK * p->D * real);
    s.v = ada_carve(c, ADA_BLOCK * p->E * real);
    s.rows = ada_carve(c, strip * (width > ADA_BLOCK ? width : ADA_BLOCK));
    s.bias = ada_carve(c, ADA_BLOCK * strip);
    s.factor = ada_carve(c, strip);
    s.block = ada_carve(c, strip);
    s.queries = ada_carve(c, p->T <= ADA_ROWS_MAX ? p->H / p->G * p->T * p->D * real : 0);
    s.page_rows = ada_carve(
        c, p->key.pages && p->T <= ADA_ROWS_MAX ? p->H / p->G * p->T * ADA_PAGE_ROW_BYTES(p->D) : 0);
    s.visible = ada_carve(c, 64 * sizeof(uint64_t));
    s.keep = ada_carve(c, 64 * sizeof(uint64_t));
    s.special = ada_carve(c, p->E * ADA_LANES);
    return s;
}

/* One tile against one block of keys: what is visible, added and kept, and where K and V lie. */
typedef struct {
    const REAL *k, *v;
    ptrdiff_t ldk, ldv;
    const uint64_t *visible, *keep; /* NULL: all */
    const REAL *bias;               /* NULL: none */
} KIND(block);

/* All but k and v; false when no query of the patch may see a key of it. */
static bool KIND(see_block)(const ada_run *r, const KIND(scratch) * s, const ada_patch *patch,
                            KIND(block) * block) {
    const ada_problem *p = r->p;
    ada_sight sight = ada_visible_rows(p, patch, s->visible);
    if (sight == ADA_HIDDEN) return false;
    block->visible = block->keep = NULL;
    if (sight == ADA_MIXED) {
        turn_bits(s->visible, patch->n);
        block->visible = s->visible;
    }
    if (p->drop_below) {
        ada_kept_rows(p, r->k, patch, s->keep);
        turn_bits(s->keep, patch->n);
        block->keep = s->keep;
    }
    block->bias = NULL;
    if (KIND(bias_rows)(p, r->k, s->rows, patch)) {
        r->k->KIND(pack)(s->bias, s->rows, ADA_BLOCK, patch->n, patch->nk, s->tile.lanes, 1);
        block->bias = s->bias;
    }
    return true;
}

static void KIND(find_keys)(const ada_run *r, const KIND(scratch) * s, const ada_patch *patch,
                            KIND(block) * block) {
    const ada_problem *p = r->p;
    const int64_t g = patch->h / (p->H / p->G);
    block->k = KIND(rows_at)(r->k, &p->key, patch->b, g, patch->j, patch->nk, s->k, &block->ldk);
    /* scores reads whole steps of keys: past the array's end they are zeros in the copy. */
    int whole = (patch->nk + ADA_KEY_STEP - 1) / ADA_KEY_STEP * ADA_KEY_STEP;
    if (whole > patch->nk && (block->k == s->k || patch->j + whole > p->S)) {
        for (int j = 0; block->k != s->k && j < patch->nk; j++)
            memcpy(s->k + j * p->D, block->k + j * block->ldk, (size_t)p->D * sizeof(REAL));
        memset(s->k + patch->nk * p->D, 0, (size_t)((whole - patch->nk) * p->D) * sizeof(REAL));
        block->k = s->k, block->ldk = (ptrdiff_t)p->D;
    }
}

static void KIND(find_values)(const ada_run *r, const KIND(scratch) * s, const ada_patch *patch,
                              KIND(block) * block) {
    const int64_t g = patch->h / (r->p->H / r->p->G);
    block->v = KIND(rows_at)(r->k, &r->p->value, patch->b, g, patch->j, patch->nk, s->v, &block->ldv);
}

/* False when no query of the patch may see a key of it. */
static bool KIND(prepare_block)(const ada_run *r, const KIND(scratch) * s, const ada_patch *patch,
                                KIND(block) * block) {
    if (!KIND(see_block)(r, s, patch, block)) return false;
    KIND(find_keys)(r, s, patch, block);
    KIND(find_values)(r, s, patch, block);
    return true;
}

/* Scores of a block times factor. */
static void KIND(raw_scores)(const ada_run *r, const KIND(scratch) * s, const KIND(block) * block, int nk,
                             REAL factor) {
    r->k->KIND(scores)(&s->tile, block->k, block->ldk, (nk + ADA_KEY_STEP - 1) / ADA_KEY_STEP * ADA_KEY_STEP);
    for (int j = 0; factor != 1 && j < nk; j++)
        for (int i = 0; i < s->tile.lanes; i++) s->tile.p[j * ADA_LANES + i] *= factor;
}

/* False when a score was not finite before it was capped. */
static bool KIND(cap_scores)(const ada_run *r, const KIND(scratch) * s, int nk) {
    bool finite = true;
    for (int j = 0; r->p->has_softcap && j < nk; j++)
        finite &=
            r->k->KIND(softcap)(s->tile.p + j * ADA_LANES, s->tile.lanes, (REAL)(r->p->softcap * ADA_LOG2E));
    return finite;
}

/* Weights of one block; false when REAL cannot hold a score of some lane. */
static bool KIND(block_weights)(const ada_run *r, const KIND(scratch) * s, const KIND(block) * block, int nk,
                                bool first) {
    const ada_kernels *k = r->k;
    bool plain =
        !block->visible && !block->bias && !block->keep && !r->p->has_softcap && nk % ADA_KEY_STEP == 0;
    if (plain && !first && k->KIND(scores_weights)(&s->tile, block->k, block->ldk, nk)) return true;
    for (bool raise = first || plain;; raise = true) {
        KIND(raw_scores)(r, s, block, nk, 1);
        if (!KIND(cap_scores)(r, s, nk)) return false;
        if (raise) k->KIND(reference)(&s->tile, nk, block->visible, block->bias);
        if (k->KIND(weights)(&s->tile, nk, block->visible, block->bias, block->keep)) return true;
        if (raise) return false;
    }
}

static void KIND(hide_lanes)(const KIND(scratch) * s, KIND(block) * block, int nk, uint64_t lanes) {
    for (int j = 0; j < nk; j++) s->visible[j] = (block->visible ? block->visible[j] : UINT64_MAX) & ~lanes;
    block->visible = s->visible;
}

/* The same where some lanes are beyond REAL: finds them by their raw scores, adds them to dead, hides their
 * keys and computes the others, to the same bits as without them. */
static void KIND(living_weights)(const ada_run *r, const KIND(scratch) * s, KIND(block) * block, int nk,
                                 uint64_t *dead) {
    const ada_kernels *k = r->k;
    KIND(raw_scores)(r, s, block, nk, 1);
    for (int j = 0; j < nk; j++)
        for (int i = 0; i < s->tile.lanes; i++) {
            REAL add = block->bias ? block->bias[j * ADA_LANES + i] : 0;
            bool seen = (!block->visible || (block->visible[j] >> i & 1)) && add != -INFINITY;
            /* A quarter: the difference of two scores must be finite too. */
            if (seen &&
                !(fabs((double)s->tile.p[j * ADA_LANES + i] + (double)add) < (double)REAL_LARGEST / 4))
                *dead |= (uint64_t)1 << i;
        }
    KIND(hide_lanes)(s, block, nk, *dead);
    KIND(cap_scores)(r, s, nk);
    k->KIND(reference)(&s->tile, nk, block->visible, block->bias);
    k->KIND(weights)(&s->tile, nk, block->visible, block->bias, block->keep);
}

/* Packs the queries times factor and resets the sums. */
static void KIND(start_tile)(const ada_run *r, KIND(scratch) * s, const ada_patch *patch, REAL factor) {
    const ada_problem *p = r->p;
    ptrdiff_t ld;
    s->tile.lanes = (patch->n + ADA_LANE_STEP - 1) / ADA_LANE_STEP * ADA_LANE_STEP;
    const REAL *q = KIND(rows_at)(r->k, &p->query, patch->b, patch->h, patch->i, patch->n, s->rows, &ld);
    r->k->KIND(pack)(s->tile.q, q, ld, patch->n, (int)p->D, s->tile.lanes, factor);
    memset(s->tile.o, 0, (size_t)p->E * ADA_LANES * sizeof(REAL));
    for (int i = 0; i < ADA_LANES; i++) s->tile.m[i] = -INFINITY, s->tile.l[i] = s->block[i] = 0;
}

/* Where the block that changed m and l from what they were is the heaviest one so far. */
static void KIND(weigh_block)(const KIND(scratch) * s, const REAL *m, const REAL *l) {
    const bool raised = memcmp(m, s->tile.m, ADA_LANES * sizeof(REAL)) != 0;
    for (int i = 0; raised && i < ADA_LANES; i++) {
        const REAL f = m[i] == s->tile.m[i] ? 1 : (REAL)exp2((double)(m[i] - s->tile.m[i]));
        const REAL before = s->block[i] * f, own = s->tile.l[i] - l[i] * f;
        s->block[i] = own > before ? own : before;
    }
    for (int i = 0; !raised && i < ADA_LANES; i++) {
        const REAL own = s->tile.l[i] - l[i];
        s->block[i] = own > s->block[i] ? own : s->block[i];
    }
}

/* What the outputs of each lane are multiplied with; writes lse of the lanes in rows. Returns those of them
 * that REAL cannot hold: a factor that is subnormal, or scores around a bias so large that it swallowed their
 * digits. */
static uint64_t KIND(normalise)(const ada_run *r, const KIND(scratch) * s, const ada_patch *patch,
                                uint64_t rows) {
    const bool single = sizeof(REAL) == sizeof(float);
    uint64_t dead = 0;
    for (int i = 0; i < ADA_LANES; i++) s->factor[i] = 0;
    for (int i = 0; i < patch->n; i++) {
        if (!(rows >> i & 1)) continue;
        double factor =
            finish_row(r->p, patch->b, patch->h, patch->i + i, s->tile.m[i], s->tile.l[i], s->block[i]);
        s->factor[i] = (REAL)factor;
        if (single && row_needs_double(r->p, factor, s->tile.m[i])) dead |= (uint64_t)1 << i;
    }
    return dead;
}

/* Writes out; false when an output is not finite. */
static bool KIND(finish_tile)(const ada_run *r, const KIND(scratch) * s, const ada_patch *patch) {
    const ada_array *out = &r->p->out;
    const int E = (int)r->p->E;
    bool direct = out->dtype == REAL_DTYPE && out->stride[3] == (int64_t)sizeof(REAL);
    REAL *rows = direct ? (REAL *)ada_row_at(out, patch->b, patch->h, patch->i) : s->rows;
    ptrdiff_t ld = direct ? out->stride[2] / (ptrdiff_t)sizeof(REAL) : E;
    if (!r->k->KIND(unpack)(rows, ld, s->tile.o, s->factor, patch->n, E)) return false;
    if (!direct) KIND(ada_store_rows)(r->k, out, patch->b, patch->h, patch->i, patch->n, E, rows, E);
    return true;
}

/* Writes the rows out after putting back what take_special_values took; returns those with other infinities
 * or NaN. */
static uint64_t KIND(finish_patched)(const ada_run *r, const KIND(scratch) * s, const ada_patch *patch,
                                     uint64_t rows) {
    const int E = (int)r->p->E;
    uint64_t overflown = 0;
    r->k->KIND(unpack)(s->rows, E, s->tile.o, s->factor, patch->n, E);
    for (int i = 0; i < patch->n; i++) {
        REAL *row = s->rows + i * E;
        if (!(rows >> i & 1)) continue;
        for (int e = 0; e < E; e++) {
            int kind = s->special[e * ADA_LANES + i];
            if (!isfinite(row[e])) overflown |= (uint64_t)1 << i;
            if (kind) row[e] = kind == SPECIAL_PLUS ? INFINITY : kind == SPECIAL_MINUS ? -INFINITY : NAN;
        }
        KIND(ada_store_rows)(r->k, &r->p->out, patch->b, patch->h, patch->i + i, 1, E, row, E);
    }
    return overflown;
}

/* Takes NaN and infinities out of the block's values and notes them for every lane that may attend to them;
 * scales the others. */
static void KIND(take_special_values)(const ada_run *r, KIND(scratch) * s, KIND(block) * block, int nk,
                                      REAL scale) {
    const int E = (int)r->p->E;
    for (int j = 0; j < nk; j++)
        for (int e = 0; e < E; e++) {
            REAL x = block->v[j * block->ldv + e];
            int kind = isnan(x)         ? SPECIAL_NAN
                       : x == INFINITY  ? SPECIAL_PLUS
                       : x == -INFINITY ? SPECIAL_MINUS
                                        : 0;
            uint64_t lanes = block->visible ? block->visible[j] : UINT64_MAX;
            for (int i = 0; kind && i < s->tile.lanes; i++)
                if ((lanes >> i & 1) && !(block->bias && block->bias[j * ADA_LANES + i] == -INFINITY))
                    s->special[e * ADA_LANES + i] |= (uint8_t)kind;
            s->v[j * E + e] = kind ? 0 : x * scale;
        }
    block->v = s->v, block->ldv = E;
}

/* Queries patch->i ... patch->i + n - 1 of a head against all keys. Returns the lanes whose rows REAL cannot
 * hold. again: an output is not finite, and values must be patched. patched: NaN and infinities in V are
 * taken out and put back into the result, which leaves every other bit as if they had been finite. */
static uint64_t KIND(attend_tile)(const ada_run *r, KIND(scratch) * s, ada_patch patch, bool patched,
                                  bool *again, ada_job *job, int worker) {
    KIND(start_tile)(r, s, &patch, (REAL)(r->p->scale * ADA_LOG2E));
    if (patched) memset(s->special, 0, (size_t)r->p->E * ADA_LANES);
    ada_span span = tile_span(r->p, &patch);
    uint64_t dead = 0;
    bool first = true;
    for (patch.j = span.first; patch.j < span.end && ~dead & lanes_of(&patch); patch.j += ADA_BLOCK) {
        if (ada_job_cancelled(job, worker)) return 0;
        patch.nk = (int)(span.end - patch.j < ADA_BLOCK ? span.end - patch.j : ADA_BLOCK);
        KIND(block) block;
        if (!KIND(prepare_block)(r, s, &patch, &block)) continue;
        if (dead) KIND(hide_lanes)(s, &block, patch.nk, dead);
        REAL m[ADA_LANES], l[ADA_LANES];
        if (r->p->mass) memcpy(m, s->tile.m, sizeof m), memcpy(l, s->tile.l, sizeof l);
        if (!KIND(block_weights)(r, s, &block, patch.nk, first))
            KIND(living_weights)(r, s, &block, patch.nk, &dead);
        if (r->p->mass) KIND(weigh_block)(s, m, l);
        if (patched) KIND(take_special_values)(r, s, &block, patch.nk, 1);
        r->k->KIND(values)(&s->tile, block.v, block.ldv, patch.nk);
        if (s->ahead) ada_step_ahead(s->ahead);
        first = false;
    }
    dead |= KIND(normalise)(r, s, &patch, ~dead & lanes_of(&patch));
    if (patched) return dead | KIND(finish_patched)(r, s, &patch, ~dead);
    *again = !KIND(finish_tile)(r, s, &patch);
    return dead;
}

/* One tile; returns the lanes whose rows REAL cannot hold. */
static uint64_t KIND(complete_tile)(const ada_run *r, const ada_patch *patch, ada_prospect *ahead,
                                    ada_job *job, int worker) {
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    KIND(scratch) s = KIND(scratch_of)(r->p, &carver);
    s.ahead = ahead, s.tile.ahead = ahead->now;
    bool again = false;
    uint64_t dead = KIND(attend_tile)(r, &s, *patch, false, &again, job, worker);
    if (!again) return dead;
    /* Doubles beyond float look like infinities to float. */
    if (r->p->value.dtype == ADA_F64 && REAL_DTYPE == ADA_F32) return UINT64_MAX;
    return KIND(attend_tile)(r, &s, *patch, true, &again, job, worker);
}

/* m, l, o[E] of one query over one split of the keys; m is NaN where REAL did not suffice. */
static REAL *KIND(partial)(const ada_run *r, int64_t b, int64_t h, int64_t i, int64_t split) {
    const ada_problem *p = r->p;
    return (REAL *)r->partials + (((b * p->H + h) * p->T + i) * r->splits + split) * (p->E + 2);
}

/* How the rows of K or V are read by the row kernels: in place in a dtype that they know, else converted to
 * REAL. */
typedef struct {
    const ada_array *array;
    KIND_FN(ada_row_scores) * scores;
    KIND_FN(ada_row_values) * values;
    bool in_place, paged; /* paged: rows of open pages alone */
    int bytes;            /* of an element as the kernels read it */
    REAL *copy;
} KIND(row_reader);

static KIND(row_reader) KIND(row_reader_of)(const ada_kernels *k, const ada_array *a, REAL *copy) {
    bool unit = a->stride[3] == ada_dtype_bytes(a->dtype) || a->shape[3] == 1;
    bool in_place = unit && a->dtype == REAL_DTYPE;
    KIND(row_reader)
    reader = {a, k->KIND(row_scores), k->KIND(row_values), in_place, false, sizeof(REAL), copy};
#ifdef READS_HALF
    if (unit && a->dtype == ADA_F16)
        reader = (KIND(row_reader)){a, k->row_scores_f16, k->row_values_f16, true, false, 2, NULL};
    if (unit && a->dtype == ADA_BF16)
        reader = (KIND(row_reader)){a, k->row_scores_bf16, k->row_values_bf16, true, false, 2, NULL};
    if (a->dtype == ADA_I8 && a->shape[3] <= ADA_CODES_MOST)
        reader = (KIND(row_reader)){a, k->row_scores_f32, k->row_values_f32, true, true, 1, NULL};
#endif
    return reader;
}

static const char *KIND(read_rows)(const ada_run *r, const KIND(row_reader) * reader, int64_t b, int64_t g,
                                   int64_t j, int n, ptrdiff_t *ld) {
    const ada_array *a = reader->array;
    if (!reader->in_place) return (const char *)KIND(rows_at)(r->k, a, b, g, j, n, reader->copy, ld);
    *ld = a->stride[2] / ada_dtype_bytes(a->dtype);
    return ada_row_at(a, b, g, j);
}

/* Keys j ... j + nk - 1 of (b, g), of one page where rows are paged, and their rows as the kernels read them.
 */
typedef struct {
    int64_t b, g, j;
    int nk;
    const char *k, *v; /* NULL: not read yet */
    ptrdiff_t ldk, ldv;
} KIND(turn);

#ifdef READS_HALF
/* The mean of a turn's page; asks for the next one, which codes leave too far away for the hardware. */
static const uint16_t *KIND(page_mean)(const KIND(row_reader) * reader, const KIND(turn) * turn) {
    const ada_array *a = reader->array;
    const int64_t page = turn->j / ADA_PAGE;
    const uint16_t *mean = ada_page_mean(a, turn->b, turn->g, page);
    for (int64_t c = 0; c < a->shape[3]; c += 32) __builtin_prefetch(mean + a->shape[3] + c);
    __builtin_prefetch(ada_page_scale(a, turn->b, turn->g, page) + 1);
    return mean;
}
#endif

/* Raw scores of `rows` queries from `first` on against n keys of a turn from `skipped` on. */
static void KIND(score_rows)(const ada_run *r, const KIND(scratch) * s, const KIND(row_reader) * reader,
                             const KIND(turn) * turn, REAL *scores, int64_t first, int rows, int skipped,
                             int n) {
    const int D = (int)r->p->D;
    const REAL *q = s->queries + first * D;
#ifdef READS_HALF
    if (reader->paged) {
        const int64_t page = turn->j / ADA_PAGE;
        const float *open = ada_page_open(reader->array, turn->b, turn->g, page);
        if (open) {
            open += (turn->j % ADA_PAGE + skipped) * D;
            r->k->row_scores_f32(scores, q, rows, open, D, n, D);
            return;
        }
        const float scale = *ada_page_scale(reader->array, turn->b, turn->g, page);
        float centre[ADA_ROW_GROUP * ADA_BLOCK];
        r->k->row_scores_bf16(centre, q, rows, KIND(page_mean)(reader, turn), D, 1, D);
        r->k->page_scores(scores - skipped, s->page_rows + first * ADA_PAGE_ROW_BYTES(D), rows,
                          (const uint8_t *)turn->k, D, scale, centre);
        return;
    }
#endif
    reader->scores(scores, q, rows, turn->k + skipped * turn->ldk * reader->bytes, turn->ldk, n, D);
}

#ifdef READS_HALF
/* o of some queries += the values of a page times the weights of nk keys from `skipped` on. */
static void KIND(add_page)(const ada_run *r, const KIND(row_reader) * reader, const KIND(turn) * turn,
                           REAL *o, ptrdiff_t ldo, REAL *weights, int rows, int skipped, int nk) {
    const int64_t page = turn->j / ADA_PAGE;
    weights -= skipped;
    for (int row = 0; row < rows; row++) {
        REAL *w = weights + row * ADA_BLOCK;
        for (int j = 0; j < skipped; j++) w[j] = 0;
        for (int j = skipped + nk; j < ADA_PAGE; j++) w[j] = 0;
    }
    r->k->page_values(o, ldo, weights, rows, (const uint8_t *)turn->v, (int)r->p->E,
                      *ada_page_scale(reader->array, turn->b, turn->g, page), KIND(page_mean)(reader, turn));
}
#endif

/* o of some queries += the values of n keys of a turn from `first` on, times their weights. */
static void KIND(value_rows)(const ada_run *r, const KIND(row_reader) * reader, const KIND(turn) * turn,
                             REAL *o, ptrdiff_t ldo, REAL *weights, int rows, int first, int n, int E) {
#ifdef READS_HALF
    if (reader->paged) {
        const int64_t page = turn->j / ADA_PAGE;
        const float *open = ada_page_open(reader->array, turn->b, turn->g, page);
        reader->values(o, ldo, weights, rows, open + (turn->j % ADA_PAGE + first) * E, E, n, E);
        return;
    }
#endif
    (void)r;
    reader->values(o, ldo, weights, rows, turn->v + first * turn->ldv * reader->bytes, turn->ldv, n, E);
}

/* Adds the values of the visible keys, bits from `skipped` on, run by run: what is hidden is not even read.
 */
static void KIND(add_values)(const ada_run *r, const KIND(row_reader) * reader, const KIND(turn) * turn,
                             REAL *o, ptrdiff_t ldo, REAL *weights, int rows, uint64_t visible, int skipped,
                             int nk) {
    const int E = (int)r->p->E;
#ifdef READS_HALF
    if (reader->paged && !ada_page_open(reader->array, turn->b, turn->g, turn->j / ADA_PAGE)) {
        KIND(add_page)(r, reader, turn, o, ldo, weights, rows, skipped, nk);
        return;
    }
#endif
    for (int first = 0, n; first < nk; first += n) {
        uint64_t rest = visible >> first;
        n = rest & 1 ? (~rest ? __builtin_ctzll(~rest) : 64) : rest ? __builtin_ctzll(rest) : 64;
        if (n > nk - first) n = nk - first;
        if (rest & 1) KIND(value_rows)(r, reader, turn, o, ldo, weights + first, rows, skipped + first, n, E);
    }
}

/* Up to ADA_ROW_GROUP queries that share a key head against the keys of a turn; plain: they see all of it. */
static void KIND(attend_turn)(const ada_run *r, const KIND(scratch) * s, const KIND(row_reader) * keys,
                              const KIND(row_reader) * values, KIND(turn) * turn, int64_t first, int rows,
                              int64_t split, bool plain) {
    const ada_problem *p = r->p;
    const ptrdiff_t ldo = r->splits * (p->E + 2);
    const int64_t h = turn->g * (p->H / p->G);
    REAL *scores = s->tile.p, *partial = KIND(partial)(r, turn->b, h + first / p->T, first % p->T, split);
    ada_patch patches[ADA_ROW_GROUP];
    uint64_t visible[ADA_ROW_GROUP];
    int skipped[ADA_ROW_GROUP], low = turn->nk, high = 0;
    bool live[ADA_ROW_GROUP], alike = true;
    for (int i = 0; i < rows; i++) {
        patches[i] = (ada_patch){turn->b, h + (first + i) / p->T, (first + i) % p->T, turn->j, 1, turn->nk};
        visible[i] = UINT64_MAX;
        live[i] = partial[i * ldo] == partial[i * ldo] &&
                  (plain || ada_visible_rows(p, &patches[i], &visible[i]) != ADA_HIDDEN);
        if (!live[i]) continue;
        skipped[i] = trim_patch(&patches[i], &visible[i]);
        if (skipped[i] < low) low = skipped[i];
        if (skipped[i] + patches[i].nk > high) high = skipped[i] + patches[i].nk;
    }
    if (high == 0) return;
    if (!turn->k) {
        turn->k = KIND(read_rows)(r, keys, turn->b, turn->g, turn->j, turn->nk, &turn->ldk);
        turn->v = KIND(read_rows)(r, values, turn->b, turn->g, turn->j, turn->nk, &turn->ldv);
    }
    KIND(score_rows)(r, s, keys, turn, scores + low, first, rows, low, high - low);
    for (int i = 0; i < rows; i++) {
        REAL *x = partial + i * ldo;
        KIND(ada_row) state = {x + 2, x[0], x[1], (int)p->E};
        if (live[i] && KIND(weigh_row)(p, r->k, &patches[i], s->rows, &visible[i], &state,
                                       scores + i * ADA_BLOCK + skipped[i])) {
            x[0] = state.m, x[1] = state.l;
        } else {
            if (live[i]) x[0] = NAN;
            live[i] = false;
        }
        alike &= live[i] && visible[i] == visible[0] && skipped[i] == skipped[0];
    }
    for (int i = 0; i < (alike ? 1 : rows); i++)
        if (live[i]) KIND(add_values)
    (r, values, turn, partial + 2 + i * ldo, ldo, scores + i * ADA_BLOCK + skipped[i], alike ? rows : 1,
     visible[i], skipped[i], patches[i].nk);
}

/* All queries that share key head g against one split of its keys, turn by turn, so that a turn is read from
 * memory once. */
static void KIND(attend_split)(const ada_run *r, KIND(scratch) * s, int64_t b, int64_t g, int64_t split,
                               ada_job *job, int worker) {
    const ada_problem *p = r->p;
    const int64_t group = p->H / p->G, rows = group * p->T, size = ada_split_keys(p, b);
    const int64_t first = split * size, last = ada_key_count(p, b),
                  end = first + size < last ? first + size : last;
    const int step = ada_turn_keys(p);
    const bool masked = p->attn_mask.data && p->attn_mask.dtype == ADA_BOOL;
    const KIND(row_reader) keys = KIND(row_reader_of)(r->k, &p->key, s->k);
    const KIND(row_reader) values = KIND(row_reader_of)(r->k, &p->value, s->v);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t h = g * group + row / p->T, i = row % p->T;
        REAL *partial = KIND(partial)(r, b, h, i, split);
        memset(partial, 0, (size_t)(p->E + 2) * sizeof *partial);
        partial[0] = -INFINITY;
        KIND(load_query)(p, r->k, s->queries + row * p->D, b, h, i);
    }
#ifdef READS_HALF
    if (keys.paged) r->k->page_rows(s->page_rows, s->queries, (int)rows, (int)p->D);
#endif
    for (int64_t j = first; j < end; j += step) {
        if (j % ADA_BLOCK == 0 && ada_job_cancelled(job, worker)) return;
        KIND(turn) turn = {b, g, j, (int)(end - j < step ? end - j : step), NULL, NULL, 0, 0};
        const ada_patch whole = {b, g * group, 0, j, (int)p->T, turn.nk};
        const ada_sight sight = masked ? ADA_MIXED : ada_visible_rows(p, &whole, s->visible);
        for (int64_t row = 0; row < rows && sight != ADA_HIDDEN; row += ADA_ROW_GROUP) {
            const int n = (int)(rows - row < ADA_ROW_GROUP ? rows - row : ADA_ROW_GROUP);
            KIND(attend_turn)(r, s, &keys, &values, &turn, row, n, split, sight == ADA_PLAIN);
        }
    }
}

/* Joins the splits of query i in their order; false when it needs the careful way. */
static bool KIND(join_splits)(const ada_run *r, const KIND(scratch) * s, int64_t b, int64_t h, int64_t i) {
    const ada_problem *p = r->p;
    const REAL *partial = KIND(partial)(r, b, h, i, 0), *end = partial + r->splits * (p->E + 2);
    REAL m = -INFINITY, l = 0, *row = s->rows;
    for (const REAL *x = partial; x < end; x += p->E + 2) {
        if (x[0] != x[0]) return false;
        if (x[0] > m) m = x[0];
    }
    memset(row, 0, (size_t)p->E * sizeof *row);
    for (const REAL *x = partial; x < end; x += p->E + 2) {
        if (x[0] == -INFINITY) continue;
        REAL factor = (REAL)exp2((double)x[0] - m);
        l += factor * x[1];
        for (int64_t e = 0; e < p->E; e++) row[e] += factor * x[2 + e];
    }
    const double exact_factor = finish_row(p, b, h, i, m, l, 0);
    const REAL factor = (REAL)exact_factor;
    if (sizeof(REAL) == sizeof(float) && row_needs_double(p, exact_factor, m)) return false;
    bool finite = true;
    for (int64_t e = 0; e < p->E; e++) {
        row[e] *= factor;
        finite &= row[e] >= -REAL_LARGEST && row[e] <= REAL_LARGEST;
    }
    if (finite) KIND(ada_store_rows)(r->k, &p->out, b, h, i, 1, (int)p->E, row, p->E);
    return finite;
}
#undef REAL_DTYPE
#undef REAL_LARGEST
