/* The same as attend_rungs.h, but that blocks of keys whose values hardly matter stand in for theirs. All
 * scores are weighed first, but for those of blocks that cannot have any weight to speak of; then values are
 * added over the list of blocks that are kept, by the same kernels. Blocks where not all is visible are
 * always kept. Included by execute.c.
 */
typedef struct {
    uint32_t *w;      /* [strips] of weights, as in a tile */
    float *worth;     /* [blocks][ADA_LANES] of the run that begins there */
    float *mass;      /* [blocks][ADA_LANES], here and below of the list of plain blocks */
    float *spread;    /* [blocks][ADA_LANES] over the root of the head's budget */
    float *reach;     /* [blocks] likewise */
    float *weight;    /* [ADA_LANES] one over the squared sum of a row's weights */
    float *mean;      /* [ADA_BLOCK][E] */
    float *shift2;    /* [ADA_LANES] */
    int *block, *run; /* [blocks] of the keys, and the one that its run begins with */
    int *other;       /* [blocks] that are not plain */
    bool *stands;     /* [blocks] */
    ada_choosing choosing;
} sparse_lists;

static sparse_lists sparse_lists_of(const ada_run *r, ada_carver *c) {
    const int64_t lanes = ADA_LANES * sizeof(float), blocks = r->store.blocks, words = sizeof(uint32_t);
    sparse_lists x;
    x.w = ada_carve(c, r->store.strips * (ADA_STRIP / ada_elements(r->store.pv.format)) * ADA_LANES * words);
    x.worth = ada_carve(c, blocks * lanes);
    x.mass = ada_carve(c, blocks * lanes);
    x.spread = ada_carve(c, blocks * lanes);
    x.reach = ada_carve(c, blocks * (int64_t)sizeof *x.reach);
    x.weight = ada_carve(c, lanes);
    x.mean = ada_carve(c, ADA_BLOCK * r->p->E * (int64_t)sizeof *x.mean);
    x.shift2 = ada_carve(c, lanes);
    x.block = ada_carve(c, blocks * (int64_t)sizeof *x.block);
    x.run = ada_carve(c, blocks * (int64_t)sizeof *x.run);
    x.other = ada_carve(c, blocks * (int64_t)sizeof *x.other);
    x.stands = ada_carve(c, blocks * (int64_t)sizeof *x.stands);
    x.choosing.cost = ada_carve(c, blocks * (int64_t)sizeof(float));
    x.choosing.sum = ada_carve(c, lanes);
    x.choosing.apart = ada_carve(c, lanes);
    x.choosing.order = ada_carve(c, blocks * (int64_t)sizeof *x.choosing.order);
    return x;
}

/* The tile with the weights of a block of some run. */
static narrow at_block(const narrow *s, const sparse_lists *x, int i) {
    narrow at = *s;
    at.t.w = x->w + (ptrdiff_t)x->block[i] * (ADA_BLOCK / ada_elements(s->store->pv.format)) * ADA_LANES;
    at.t.worth = x->worth + (ptrdiff_t)x->run[i] * ADA_LANES;
    return at;
}

/* How many of the list from i on belong to one run and stand in, or do not, as i does; whether they do counts
 * only where asked for. */
static int same_run(const sparse_lists *x, int i, int plain, bool apart) {
    int n = 1;
    while (i + n < plain && x->run[i + n] == x->run[i] && !(apart && x->stands[i + n] != x->stands[i])) n++;
    return n;
}

/* Of a row's budget: what all blocks that are passed over may move it by. */
#define PASSED_OVER 0.02
/* Blocks that are looked at before all are. */
enum { LOOKS = 16 };

/* For n <= ADA_BLOCK centroids: most[j][i] is what a score of block j and lane i is at most, in octaves;
 * floor[i] rises to what the centroid says of the logarithm of the row's sum: 2^6 keys like it. */
static void bound_blocks(const ada_run *r, const ada_tile_f32 *t, const float *centroids, const float *reach,
                         int n, const float *norm, float *floor, float *most) {
    r->k->scores_f32(t, centroids, t->D, (n + ADA_KEY_STEP - 1) / ADA_KEY_STEP * ADA_KEY_STEP);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < ADA_LANES; i++) {
            const float score = t->p[j * ADA_LANES + i];
            floor[i] = floor[i] < score + 6 ? score + 6 : floor[i];
            most[j * ADA_LANES + i] = score + norm[i] * reach[j];
        }
}

/* Whether a block's bounds lie below the rows' floors by that much: `above` is negative. */
static bool is_weightless(const float *most, const float *floor, float above) {
    int good = 0;
    for (int i = 0; i < ADA_LANES; i++) good += most[i] - floor[i] <= above;
    return good == ADA_LANES;
}

/* Takes blocks from the list whose keys cannot weigh anything in any row, whatever they are: no score is
 * above that of the block's centroid by more than the product of the query's norm and the block's radius, and
 * rows sum up to at least what centroids weigh, by Jensen, and what is weighed already. Returns how many. */
static int pass_over(const ada_run *r, const narrow *s, const sparse_lists *x, const ada_patch *patch,
                     int *plain) {
    const ada_problem *p = r->p;
    const ada_head_store *h = &s->head;
    const int D = (int)p->D, listed = *plain;
    const double budget = sqrt(p->sparse->budget2[patch->b * p->H + patch->h]);
    float norm[ADA_LANES] = {0}, floor[ADA_LANES], largest = 0, reach[ADA_BLOCK];
    ada_tile_f32 t = s->base.tile;
    ptrdiff_t ld;
    if (listed < 2 * LOOKS) return 0;
    for (int64_t b = 0; b < r->store.blocks; b++) largest = fmaxf(largest, h->seen[b] ? h->v_most[b] : 0);
    /* The mass of all of them times the largest distance of two values. */
    const double mass = PASSED_OVER * budget / (2 * (double)largest);
    const float above = (float)(log2(fmin(mass, 1) / listed) - 6);
    const double scale = p->scale * ADA_LOG2E;
    const float *q = rows_at_f32(r->k, &p->query, patch->b, patch->h, patch->i, patch->n, s->base.rows, &ld);
    r->k->pack_f32(t.q, q, ld, patch->n, D, ADA_LANES, (float)scale);
    r->k->squares(norm, NULL, q, ld, patch->n, D, NULL, NULL);
    for (int i = 0; i < ADA_LANES; i++) {
        const int own = i < patch->n ? i : patch->n - 1;
        norm[i] = i < patch->n ? 1.001f * sqrtf(norm[i]) * (float)fabs(scale) : norm[own];
        floor[i] = s->t.f32.m[own] + log2f(s->t.f32.l[own]) - 1; /* which rounding may be off by */
        if (!(floor[i] > -INFINITY)) floor[i] = -INFINITY;
    }
    for (int j = 0; j < LOOKS; j++) { /* some of them, evenly, with the last one */
        const int block = x->block[(j + 1) * listed / LOOKS - 1];
        memcpy(s->base.k + j * D, h->k_mean + (ptrdiff_t)block * D, (size_t)D * sizeof(float));
        reach[j] = h->k_reach[block];
    }
    bound_blocks(r, &t, s->base.k, reach, LOOKS, norm, floor, x->spread);
    int light = 0;
    for (int j = 0; j < LOOKS; j++) light += is_weightless(x->spread + j * ADA_LANES, floor, above);
    if (light == 0) return 0;
    for (int i = 0, n; i < listed; i += n) {
        const int first = x->block[i];
        for (n = 1; i + n < listed && n < ADA_BLOCK && x->block[i + n] == first + n;) n++;
        bound_blocks(r, &t, h->k_mean + (ptrdiff_t)first * D, h->k_reach + first, n, norm, floor,
                     x->spread + (ptrdiff_t)i * ADA_LANES);
    }
    int kept = 0;
    for (int i = 0; i < listed; i++) {
        if (is_weightless(x->spread + (ptrdiff_t)i * ADA_LANES, floor, above)) continue;
        const int block = x->block[i], run = x->run[i];
        const bool goes_on = kept && x->block[kept - 1] == block - 1 && block != run;
        x->run[kept] = goes_on ? x->run[kept - 1] : block;
        x->block[kept++] = block;
    }
    *plain = kept;
    return listed - kept;
}

/* Weighs the plain blocks; returns how many, less than all when a score of the next run is far above the
 * reference. */
static int weigh_runs(const ada_run *r, const narrow *s, const sparse_lists *x, int plain, double level) {
    const ada_format format = s->store->pv.format;
    ada_gauge_i8_fn *gauge = format == ADA_WORDS_I8    ? r->k->gauge_i8
                             : format == ADA_WORDS_I16 ? r->k->gauge_i16
                                                       : r->k->gauge_bf16;
    int i = 0;
    for (int n; i < plain; i += n) {
        n = same_run(x, i, plain, false);
        const narrow at = at_block(s, x, i);
        const ada_narrow_keys keys = keys_at(s, (int64_t)x->block[i] * ADA_BLOCK);
        if (!s->weigh(&at.t, &keys, n * ADA_BLOCK)) break;
        for (int b = i; b < i + n; b++) x->reach[b] = (float)((double)s->head.reach[x->block[b]] / level);
        gauge(&at.t, n * ADA_BLOCK, x->reach + i, x->mass + (ptrdiff_t)i * ADA_LANES,
              x->spread + (ptrdiff_t)i * ADA_LANES);
    }
    return i;
}

/* All of them. Where the first keys are a poor reference, the run that is far above raises it, then all that
 * follow, and they are weighed again. False where that does not help. */
static bool weigh_lists(const ada_run *r, const narrow *s, const sparse_lists *x, ada_patch patch, int plain,
                        double level) {
    enum { TIMES = 3 };
    float l[ADA_LANES], sum[ADA_LANES];
    if (plain == 0) return true;
    patch.j = (int64_t)x->block[0] * ADA_BLOCK;
    seed_reference(r, s, &patch, NULL);
    for (int time = 0; time < TIMES; time++) {
        memcpy(l, s->t.f32.l, sizeof l);
        memcpy(sum, s->t.sum, sizeof sum);
        const int weighed = weigh_runs(r, s, x, plain, level);
        if (weighed == plain) return true;
        const int end = time ? plain : weighed + same_run(x, weighed, plain, false);
        memcpy(s->t.f32.l, l, sizeof l);
        memcpy(s->t.sum, sum, sizeof sum);
        for (int i = weighed; i < end; i++) {
            block_f32 block = {0};
            patch.j = (int64_t)x->block[i] * ADA_BLOCK;
            narrow_scores(r, s, &patch, &block, ADA_BLOCK);
            raise_reference(r, s, ADA_BLOCK, &block);
        }
    }
    return false;
}

static void add_lists(const ada_run *r, const narrow *s, const sparse_lists *x, int plain) {
    const int64_t E = r->p->E;
    ada_tile_f32 tile = s->t.f32;
    for (int i = 0, n; i < plain; i += n) {
        n = same_run(x, i, plain, true);
        if (x->stands[i]) continue;
        const narrow at = at_block(s, x, i);
        narrow_values(r, &at, (int64_t)x->block[i] * ADA_BLOCK, n * ADA_BLOCK);
    }
    tile.p = x->mass; /* those of the blocks that stand in move to the front */
    for (int i = 0, n = 0; i <= plain; i++) {
        if (n == ADA_BLOCK || (i == plain && n)) {
            r->k->values_f32(&tile, x->mean, E, n);
            tile.p += (ptrdiff_t)n * ADA_LANES, n = 0;
        }
        if (i == plain || !x->stands[i]) continue;
        memmove(tile.p + (ptrdiff_t)n * ADA_LANES, x->mass + (ptrdiff_t)i * ADA_LANES,
                ADA_LANES * sizeof(float));
        memcpy(x->mean + n++ * E, s->head.v_mean + x->block[i] * E, (size_t)E * sizeof *x->mean);
    }
}

/* The column that a block is in. */
static int column_of(const ada_run *r, const ada_picture *to, int block) {
    return (int)((int64_t)block * to->columns / r->store.blocks);
}

/* How many of a tile's blocks are visible, stand in, and are visible and kept in each column. */
typedef struct {
    int blocks, stand_ins;
    uint32_t visible[ADA_PICTURE_MOST], kept[ADA_PICTURE_MOST];
} tile_count;

/* Adds what became of a tile to what is told of its head (index of the run's). */
static void tell_of_tile(const ada_run *r, const ada_patch *patch, int64_t index, const tile_count *count) {
    const ada_picture *to = r->p->sparse->picture;
    atomic_fetch_add_explicit(&r->tallies[index].blocks, count->blocks, memory_order_relaxed);
    atomic_fetch_add_explicit(&r->tallies[index].stand_ins, count->stand_ins, memory_order_relaxed);
    if (!to) return;
    const int64_t row = patch->i / ADA_LANES * to->rows / r->tiles, head = patch->b * r->p->H + patch->h;
    const int64_t at = (head * to->rows + row) * to->columns;
    for (int c = 0; c < to->columns; c++) { /* several tiles share a row */
        __atomic_fetch_add(&to->visible[at + c], count->visible[c], __ATOMIC_RELAXED);
        __atomic_fetch_add(&to->kept[at + c], count->kept[c], __ATOMIC_RELAXED);
    }
}

typedef enum { TILE_DONE, TILE_UNFIT, TILE_DENSE } tile_end;

/* A tile of which all that is visible is kept. */
static tile_end end_dense(const ada_run *r, ada_patch patch, int64_t index) {
    const ada_span span = tile_span(r->p, &patch);
    tile_count count = {0};
    uint64_t rows[ADA_LANES];
    for (patch.j = span.first; patch.j < span.end; patch.j += ADA_BLOCK) {
        patch.nk = (int)(span.end - patch.j < ADA_BLOCK ? span.end - patch.j : ADA_BLOCK);
        if (ada_visible_rows(r->p, &patch, rows) == ADA_HIDDEN) continue;
        count.blocks++;
        if (r->p->sparse->picture)
            count.visible[column_of(r, r->p->sparse->picture, (int)(patch.j / ADA_BLOCK))]++;
    }
    memcpy(count.kept, count.visible, sizeof count.kept);
    tell_of_tile(r, &patch, index, &count);
    return TILE_DENSE;
}

/* Of the tile of a head (index of the run's). TILE_DENSE: it is to be computed as if nothing stood in. */
static tile_end attend_tile_sparse(const ada_run *r, narrow *s, const sparse_lists *x, ada_patch patch,
                                   int64_t index, ada_job *job, int worker) {
    const ada_problem *p = r->p;
    const ada_span span = tile_span(p, &patch);
    const int64_t head = patch.b * p->H + patch.h;
    float *shift2 = p->sparse->shift2 + head * p->T + patch.i;
    const ada_picture *picture = p->sparse->picture;
    tile_count count = {0};
    int plain = 0, others = 0;
    memset(shift2, 0, (size_t)patch.n * sizeof *shift2);
    if (!start_narrow(r, s, &patch, r->store.slots[index])) return TILE_UNFIT;
    if (!s->weigh) return end_dense(r, patch, index);
    for (patch.j = span.first; patch.j < span.end;) {
        if (ada_job_cancelled(job, worker)) return TILE_DONE;
        const int run = keys_of_run(r, &patch, span.end, NULL, NULL) / ADA_BLOCK,
                  first = (int)(patch.j / ADA_BLOCK);
        for (int b = 0; b < run; b++) x->block[plain] = first + b, x->run[plain++] = first;
        patch.j += run * ADA_BLOCK;
        if (run) continue;
        patch.nk = (int)(span.end - patch.j < ADA_BLOCK ? span.end - patch.j : ADA_BLOCK);
        block_f32 block = {0};
        if (see_block_f32(r, &s->base, &patch, &block)) {
            x->other[others] = (int)(patch.j / ADA_BLOCK);
            if (!narrow_weights(r, s, &patch, &block, others++ == 0)) return TILE_UNFIT;
            add_block(r, s, &patch);
        }
        patch.j += ADA_BLOCK;
    }
    count.blocks = plain + others;
    for (int i = 0; picture && i < count.blocks; i++)
        count.visible[column_of(r, picture, i < plain ? x->block[i] : x->other[i - plain])]++;
    count.stand_ins = pass_over(r, s, x, &patch, &plain);
    if (!weigh_lists(r, s, x, patch, plain, sqrt(p->sparse->budget2[head])))
        return end_dense(r, patch, index);
    if (ada_job_cancelled(job, worker)) return TILE_DONE;
    for (int i = 0; i < ADA_LANES; i++) {
        const float sum = s->t.sum[i];
        x->weight[i] = i < patch.n && sum > 0 ? 1 / (sum * sum) : 0;
    }
    count.stand_ins += ada_choose_stand_ins(r->k, x->spread, plain, x->weight, patch.n,
                                            p->sparse->joint[head], &x->choosing, x->stands, x->shift2);
    add_lists(r, s, x, plain);
    if (!finish_narrow(r, s, &patch)) return TILE_UNFIT;
    memcpy(shift2, x->shift2, (size_t)patch.n * sizeof *shift2);
    for (int i = 0; picture && i < plain; i++)
        count.kept[column_of(r, picture, x->block[i])] += !x->stands[i];
    for (int i = 0; picture && i < others; i++) count.kept[column_of(r, picture, x->other[i])]++;
    tell_of_tile(r, &patch, index, &count);
    return TILE_DONE;
}
