/* Attention of one tile of queries with products of narrow operands. Included by execute.c after the instance
 * of attend_tpl.h for float, whose scratch and steps it shares.
 *
 * Keys come in strips of ADA_STRIP: runs of blocks where nothing is added go through the fused kernel of the
 * pair of formats, others block by block through scores, the float softmax and rounding.
 * What the formats cannot hold ends the tile, and the whole head is computed again in fp32.
 */
typedef struct {
    scratch_f32 base;
    ada_narrow_tile t;
    float *copy; /* [ADA_LANES][D up to 64] */
    void *words;
    const ada_store *store;
    ada_head_store head;
    ada_weigh_bf16_bf16_fn *weigh; /* NULL: no fused kernel for the pair */
} narrow;

static narrow narrow_of(const ada_run *r, ada_carver *c) {
    const ada_problem *p = r->p;
    const ada_store *store = &r->store;
    const int64_t strip = ADA_LANES * 4, rows = (p->E + 16) / 16 * 16, width = (p->D + 63) / 64 * 64;
    narrow s = {.base = scratch_of_f32(p, c), .store = store};
    s.base.tile.p = ada_carve(c, ADA_STRIP * strip);
    /* Behind the sums of the values lies that of the weights: raising the reference scales it along. */
    s.base.tile.o = ada_carve(c, rows * strip);
    s.t.sum = c->base ? s.base.tile.o + p->E * ADA_LANES : NULL;
    s.t.q = ada_carve(c, 3 * (store->DW + 16) * strip);
    s.t.w = ada_carve(c, 3 * ADA_STRIP / 2 * strip);
    s.t.unit = ada_carve(c, strip);
    s.t.offset = ada_carve(c, strip);
    s.t.worth = ada_carve(c, strip);
    s.t.DW = store->DW;
    s.t.qk = store->qk.parts, s.t.pv = store->pv.parts;
    s.copy = ada_carve(c, width * strip);
    s.words = ada_carve(c, 3 * ADA_LANES * (int64_t)store->DW * 4);
    return s;
}

static ada_weigh_bf16_bf16_fn *fused_kernel(const ada_run *r) {
    const ada_operands *qk = &r->store.qk, *pv = &r->store.pv;
    if (qk->parts.a > 1 || pv->parts.a > 1) return NULL;
    switch (qk->format * 4 + pv->format) {
    case ADA_WORDS_BF16 * 4 + ADA_WORDS_BF16:
        return r->k->weigh_bf16_bf16;
    case ADA_WORDS_I8 * 4 + ADA_WORDS_BF16:
        return r->k->weigh_i8_bf16;
    case ADA_WORDS_I8 * 4 + ADA_WORDS_I8:
        return r->k->weigh_i8_i8;
    case ADA_WORDS_I16 * 4 + ADA_WORDS_I16:
        return r->k->weigh_i16_i16;
    default:
        return NULL;
    }
}

/* slot: of the head's keys in the store. */
static bool start_narrow(const ada_run *r, narrow *s, const ada_patch *patch, int64_t slot) {
    const ada_problem *p = r->p;
    ptrdiff_t ld;
    s->base.tile.lanes = (patch->n + ADA_LANE_STEP - 1) / ADA_LANE_STEP * ADA_LANE_STEP;
    memset(s->base.tile.o, 0, (size_t)((p->E + 16) / 16 * 16) * ADA_LANES * sizeof(float));
    for (int i = 0; i < ADA_LANES; i++) s->base.tile.m[i] = -INFINITY, s->base.tile.l[i] = 0;
    /* Lanes that nobody computes hold numbers. */
    if (s->base.tile.lanes < ADA_LANES) memset(s->base.tile.p, 0, ADA_BLOCK * ADA_LANES * sizeof(float));
    s->t.f32 = s->base.tile;
    s->weigh = s->base.tile.lanes == ADA_LANES ? fused_kernel(r) : NULL;
    s->head = ada_head_store_at(s->store, slot);
    s->t.f32.cached = slot < s->store->whole;
    const float *q = rows_at_f32(r->k, &p->query, patch->b, patch->h, patch->i, patch->n, s->base.rows, &ld);
    if (ada_pack_queries(s->store, &s->head, &s->t, q, ld, patch->n, s->copy, s->words)) return true;
    /* What it cannot hold may be in rows that see no key. */
    if (q != s->base.rows)
        ada_load_rows_f32(r->k, s->base.rows, p->D, &p->query, patch->b, patch->h, patch->i, patch->n,
                          (int)p->D);
    int64_t block = 0;
    for (int i = 0; i < patch->n; i++)
        if (!ada_row_sees(p, r->k, patch->b, patch->h, patch->i + i, &block, s->copy))
            memset(s->base.rows + i * p->D, 0, (size_t)p->D * sizeof(float));
    return ada_pack_queries(s->store, &s->head, &s->t, s->base.rows, p->D, patch->n, s->copy, s->words);
}

static ada_narrow_keys keys_at(const narrow *s, int64_t j) {
    const ada_head_store *h = &s->head;
    return (ada_narrow_keys){(const uint32_t *)h->k + j * s->t.DW, h->k_part, h->scale + j / ADA_BLOCK,
                             h->start ? h->start + j : NULL, NULL};
}

/* Scores of n keys from patch->j on into p. */
static void narrow_scores(const ada_run *r, const narrow *s, const ada_patch *patch, block_f32 *block,
                          int n) {
    const ada_kernels *k = r->k;
    const int whole = (n + ADA_KEY_STEP - 1) / ADA_KEY_STEP * ADA_KEY_STEP, D = (int)r->p->D;
    const ada_narrow_keys keys = keys_at(s, patch->j);
    switch (s->store->qk.format) {
    case ADA_WORDS_BF16:
        k->scores_bf16(&s->t, &keys, whole);
        return;
    case ADA_WORDS_I8:
        k->scores_i8(&s->t, &keys, whole);
        return;
    case ADA_WORDS_I16:
        k->scores_i16(&s->t, &keys, whole);
        return;
    case ADA_FLOATS:
        break;
    }
    if (s->head.k)
        block->k = (const float *)s->head.k + patch->j * D, block->ldk = D;
    else
        find_keys_f32(r, &s->base, patch, block);
    k->scores_f32(&s->t.f32, block->k, block->ldk, whole);
    for (int j = 0; s->head.k && j < n; j++)
        for (int i = 0; i < ADA_LANES; i++) s->t.f32.p[j * ADA_LANES + i] += s->t.offset[i];
}

static void raise_reference(const ada_run *r, const narrow *s, int n, const block_f32 *block) {
    ada_tile_f32 tile = s->t.f32;
    tile.E++; /* the sum of the weights */
    r->k->reference_f32(&tile, n, block->visible, block->bias);
}

/* Weights of one block in p; false when a score is not finite. */
static bool narrow_weights(const ada_run *r, const narrow *s, const ada_patch *patch, block_f32 *block,
                           bool raise) {
    for (;; raise = true) {
        narrow_scores(r, s, patch, block, patch->nk);
        if (!cap_scores_f32(r, &s->base, patch->nk)) return false;
        if (raise) raise_reference(r, s, patch->nk, block);
        if (r->k->weights_f32(&s->t.f32, patch->nk, block->visible, block->bias, block->keep)) return true;
        if (raise) return false;
    }
}

static void narrow_values(const ada_run *r, const narrow *s, int64_t j, int n) {
    const ada_format format = s->store->pv.format;
    const ptrdiff_t row = ADA_STRIP / ada_elements(format), rows = (r->p->E + 15) / 16 * 16;
    const uint32_t *v =
        (const uint32_t *)s->head.v + j / ADA_STRIP * rows * row + j % ADA_STRIP / ada_elements(format);
    (format == ADA_WORDS_BF16  ? r->k->values_bf16
     : format == ADA_WORDS_I16 ? r->k->values_i16
                               : r->k->values_i8)(&s->t, v, s->head.v_part, n);
}

/* A block whose weights lie in p as floats. */
static void add_block(const ada_run *r, const narrow *s, const ada_patch *patch) {
    const ada_operands *pv = &s->store->pv;
    const int E = (int)r->p->E;
    switch (pv->format) {
    case ADA_WORDS_BF16:
        r->k->round_bf16(&s->t, patch->nk);
        break;
    case ADA_WORDS_I8:
        r->k->round_i8(&s->t, patch->nk);
        break;
    case ADA_WORDS_I16:
        r->k->round_i16(&s->t, patch->nk);
        break;
    case ADA_FLOATS:
        /* A weight keeps its digits where its format is wider than bf16. */
        if (pv->grid == ADA_GRID_BF16) ada_round_to_grid(r->k, pv->grid, s->t.f32.p, patch->nk * ADA_LANES);
        for (int j = 0; j < patch->nk; j++)
            for (int i = 0; i < ADA_LANES; i++) s->t.sum[i] += s->t.f32.p[j * ADA_LANES + i];
    }
    /* Dropped weights count in the sum. */
    if (r->p->drop_below) memcpy(s->t.sum, s->t.f32.l, ADA_LANES * sizeof(float));
    if (pv->format != ADA_FLOATS) {
        narrow_values(r, s, patch->j, ADA_BLOCK);
        return;
    }
    r->k->values_f32(&s->t.f32, (const float *)s->head.v + patch->j * E, E, patch->nk);
}

/* How many keys of whole blocks, from patch->j on, before end and the strip's end, have nothing added to
 * their scores. visible (NULL: only blocks of which every lane sees all) gets the lanes that see each key,
 * mixed whether some do not; blocks that none sees end the run. */
static int keys_of_run(const ada_run *r, const ada_patch *patch, int64_t end, uint64_t *visible,
                       bool *mixed) {
    const ada_problem *p = r->p;
    int n = 0;
    if (is_biased(p) || p->has_softcap || p->drop_below) return 0;
    for (ada_patch next = *patch; next.j < end && n < ADA_STRIP; next.j += ADA_BLOCK, n += ADA_BLOCK) {
        uint64_t rows[ADA_LANES], *to = visible ? visible + n : rows;
        if (n && next.j % ADA_STRIP == 0) break;
        next.nk = (int)(end - next.j < ADA_BLOCK ? end - next.j : ADA_BLOCK);
        const ada_sight sight = ada_visible_rows(p, &next, to);
        const bool plain = sight == ADA_PLAIN && next.nk == ADA_BLOCK;
        if (sight == ADA_HIDDEN || !(plain || visible)) break;
        if (plain) {
            for (int i = 0; i < ADA_LANES; i++) to[i] = UINT64_MAX;
            continue;
        }
        for (int i = 0; sight == ADA_PLAIN && i < ADA_LANES; i++) to[i] = ada_first_bits(next.nk);
        turn_bits(to, patch->n), *mixed = true;
    }
    return n;
}

/* Raises the references to what the first keys say. */
static void seed_reference(const ada_run *r, const narrow *s, const ada_patch *patch,
                           const uint64_t *visible) {
    block_f32 block = {.visible = visible};
    narrow_scores(r, s, patch, &block, ADA_KEY_STEP);
    raise_reference(r, s, ADA_KEY_STEP, &block);
}

/* Lanes that have none yet get one from the first few keys of which they see any. */
static void seed_lanes(const ada_run *r, const narrow *s, ada_patch patch, int n, const uint64_t *visible) {
    uint64_t open = 0;
    int some = 0;
    for (int i = 0; i < ADA_LANES; i++) some |= s->t.f32.m[i] == -INFINITY;
    for (int i = 0; some && i < ADA_LANES; i++) open |= (uint64_t)(s->t.f32.m[i] == -INFINITY) << i;
    for (int j = 0; open && j < n; j += ADA_KEY_STEP, patch.j += ADA_KEY_STEP) {
        uint64_t seen = 0;
        for (int c = j; c < j + ADA_KEY_STEP; c++) seen |= visible[c];
        if (open & seen) seed_reference(r, s, &patch, visible + j);
        open &= ~seen;
    }
}

/* Factors of a tile whose rows are divided by their sums and no more; false when one is subnormal. */
static bool plain_factors(const narrow *s, int n) {
    int subnormal = 0;
    for (int i = 0; i < n; i++) {
        const float inverse = 1 / s->t.sum[i], factor = s->t.sum[i] != 0 ? inverse : 0;
        subnormal |= (factor != 0) & (factor <= FLT_MIN);
        s->base.factor[i] = factor;
    }
    return !subnormal;
}

static bool finish_narrow(const ada_run *r, const narrow *s, const ada_patch *patch) {
    const ada_format format = s->store->pv.format;
    if (format == ADA_WORDS_I8 || format == ADA_WORDS_I16) r->k->scale_channels(&s->t.f32, s->head.v_unit);
    const double fault = ada_narrow_fault_now();
    const bool plain = !r->p->lse && !r->p->sinks.data && !r->p->drop_below && !is_biased(r->p) && fault == 1;
    for (int i = 0; i < ADA_LANES; i++) s->base.factor[i] = 0;
    if (plain && !plain_factors(s, patch->n)) return false;
    for (int i = 0; !plain && i < patch->n; i++) {
        const float m = s->t.f32.m[i];
        const double factor = finish_row(r->p, patch->b, patch->h, patch->i + i, m, s->t.sum[i], 0);
        s->base.factor[i] = (float)(factor * fault);
        if (row_needs_double(r->p, factor, m)) return false;
        /* The logarithm is that of the sum before rounding. */
        if (r->p->lse) finish_row(r->p, patch->b, patch->h, patch->i + i, m, s->t.f32.l[i], 0);
    }
    return finish_tile_f32(r, &s->base, patch);
}

/* False when the formats cannot hold the tile. */
static bool attend_tile_narrow(const ada_run *r, narrow *s, ada_patch patch, int64_t slot, ada_job *job,
                               int worker) {
    const ada_span span = tile_span(r->p, &patch);
    uint64_t visible[ADA_STRIP];
    bool first = true;
    if (!start_narrow(r, s, &patch, slot)) return false;
    for (patch.j = span.first; patch.j < span.end; first = false) {
        if (ada_job_cancelled(job, worker)) return true;
        bool mixed = false;
        const int run = s->weigh ? keys_of_run(r, &patch, span.end, visible, &mixed) : 0;
        if (run) {
            ada_narrow_keys keys = keys_at(s, patch.j);
            if (mixed) keys.visible = visible;
            seed_lanes(r, s, patch, run, visible);
            if (s->weigh(&s->t, &keys, run)) {
                narrow_values(r, s, patch.j, run);
                ada_step_ahead(s->base.ahead);
                patch.j += run;
                continue;
            }
        }
        patch.nk = (int)(span.end - patch.j < ADA_BLOCK ? span.end - patch.j : ADA_BLOCK);
        block_f32 block = {0};
        if (see_block_f32(r, &s->base, &patch, &block)) {
            if (!narrow_weights(r, s, &patch, &block, first || run)) return false;
            add_block(r, s, &patch);
        }
        patch.j += ADA_BLOCK;
    }
    return finish_narrow(r, s, &patch);
}
