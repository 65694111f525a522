/* The same as attend_rungs.h, but that blocks of keys whose values hardly matter stand in for theirs. All
 * scores are weighed first; then values are added over the list of blocks that are kept, by the same kernels.
 * Blocks where not all is visible are always kept. Included by execute.c.
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

/* Weighs the plain blocks; false when one of their scores is far above the reference. */
static bool weigh_lists(const ada_run *r, const narrow *s, const sparse_lists *x, ada_patch patch, int plain,
                        double level) {
    const ada_format format = s->store->pv.format;
    ada_gauge_i8_fn *gauge = format == ADA_WORDS_I8    ? r->k->gauge_i8
                             : format == ADA_WORDS_I16 ? r->k->gauge_i16
                                                       : r->k->gauge_bf16;
    for (int i = 0, n; i < plain; i += n) {
        n = same_run(x, i, plain, false);
        patch.j = (int64_t)x->block[i] * ADA_BLOCK;
        if (i == 0) seed_reference(r, s, &patch);
        const narrow at = at_block(s, x, i);
        const ada_narrow_keys keys = keys_at(s, patch.j);
        if (!s->weigh(&at.t, &keys, n * ADA_BLOCK)) return false;
        for (int b = i; b < i + n; b++) x->reach[b] = (float)((double)s->head.reach[x->block[b]] / level);
        gauge(&at.t, n * ADA_BLOCK, x->reach + i, x->mass + (ptrdiff_t)i * ADA_LANES,
              x->spread + (ptrdiff_t)i * ADA_LANES);
    }
    return true;
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

typedef enum { TILE_DONE, TILE_UNFIT, TILE_DENSE } tile_end;

/* Of the tile of a head (index of the run's). TILE_DENSE: it is to be computed as if nothing stood in. */
static tile_end attend_tile_sparse(const ada_run *r, narrow *s, const sparse_lists *x, ada_patch patch,
                                   int64_t index, ada_job *job, int worker) {
    const ada_problem *p = r->p;
    const ada_span span = tile_span(p, &patch);
    const int64_t head = patch.b * p->H + patch.h;
    float *shift2 = p->sparse->shift2 + head * p->T + patch.i;
    int plain = 0, others = 0;
    memset(shift2, 0, (size_t)patch.n * sizeof *shift2);
    if (!start_narrow(r, s, &patch, r->store.slots[index])) return TILE_UNFIT;
    if (!s->weigh) return TILE_DENSE;
    for (patch.j = span.first; patch.j < span.end;) {
        if (ada_job_cancelled(job, worker)) return TILE_DONE;
        const int run = plain_keys(r, &patch, span.end) / ADA_BLOCK, first = (int)(patch.j / ADA_BLOCK);
        for (int b = 0; b < run; b++) x->block[plain] = first + b, x->run[plain++] = first;
        patch.j += run * ADA_BLOCK;
        if (run) continue;
        patch.nk = (int)(span.end - patch.j < ADA_BLOCK ? span.end - patch.j : ADA_BLOCK);
        block_f32 block = {0};
        if (see_block_f32(r, &s->base, &patch, &block)) {
            if (!narrow_weights(r, s, &patch, &block, others++ == 0)) return TILE_UNFIT;
            add_block(r, s, &patch);
        }
        patch.j += ADA_BLOCK;
    }
    if (!weigh_lists(r, s, x, patch, plain, sqrt(p->sparse->budget2[head]))) return TILE_DENSE;
    if (ada_job_cancelled(job, worker)) return TILE_DONE;
    for (int i = 0; i < ADA_LANES; i++) {
        const float sum = s->t.sum[i];
        x->weight[i] = i < patch.n && sum > 0 ? 1 / (sum * sum) : 0;
    }
    const int stand = ada_choose_stand_ins(r->k, x->spread, plain, x->weight, patch.n, p->sparse->joint[head],
                                           &x->choosing, x->stands, x->shift2);
    add_lists(r, s, x, plain);
    if (!finish_narrow(r, s, &patch)) return TILE_UNFIT;
    memcpy(shift2, x->shift2, (size_t)patch.n * sizeof *shift2);
    atomic_fetch_add_explicit(&r->tallies[index].blocks, plain + others, memory_order_relaxed);
    atomic_fetch_add_explicit(&r->tallies[index].stand_ins, stand, memory_order_relaxed);
    return TILE_DONE;
}
