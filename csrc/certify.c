/* Certified attention: codes of all keys give every page's weights and bounds of their errors. A page then
 * counts by its mean value, by the codes of its values, or by fine codes of keys and values. Pages go up
 * where that lowers the bound most for the bytes that it costs, until it meets the tolerance; if it never
 * does, all are read as they are.
 * certify_pages.c reads pages; certify_bounds.c bounds what that leaves open and chooses how to. */
#include "certify.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "attending.h"
#include "certifying.h"
#include "cpu.h"

enum { ATTEMPTS = 2 }; /* choices of pages; after them the head is computed without codes */

/* Whether pages that are read as they are lie as certify_pages.c takes them. */
static bool is_read_in_place(const ada_array *a) {
    const int64_t real = sizeof(float);
    return a->dtype == ADA_F32 && a->stride[3] == real && a->stride[2] == a->shape[3] * real;
}

bool ada_may_certify(const ada_problem *p, const ada_budget *b) {
    return is_read_in_place(&p->key) && is_read_in_place(&p->value) && p->key.codes && p->value.codes &&
           b->tolerance >= ADA_CERTIFIED_LEAST && !b->plan_only && b->structure == ADA_STRUCTURE_AUTO &&
           b->asked.qk == ADA_RUNG_AUTO && b->dearest == ADA_RUNG_AUTO && b->cheapest == ADA_RUNG_AUTO &&
           p->query.dtype != ADA_F64 && !p->only_f64 && !p->drop_below && p->S >= ADA_CERTIFIED_KEYS &&
           p->D <= ADA_CODES_MOST && p->E <= ADA_CODES_MOST && p->T <= ADA_CERTIFIED_QUERIES &&
           p->H / p->G * p->T <= ADA_CERTIFIED_ROWS;
}

ada_certify_scratch ada_certify_scratch_of(const ada_certifying *r, ada_carver *c) {
    const int64_t real = sizeof(float), D = r->p->D, E = r->p->E;
    ada_certify_scratch s;
    s.queries = ada_carve(c, r->rows * D * real);
    s.scaled = ada_carve(c, ADA_ROW_GROUP * ada_code_width(D, false) * real);
    s.centres = ada_carve(c, r->rows * ADA_BLOCK * real);
    s.scores = ada_carve(c, r->rows * ADA_PAGE * real);
    s.added = ada_carve(c, r->rows * ADA_PAGE * real);
    s.bias = ada_carve(c, ADA_BLOCK * real);
    s.sums = ada_carve(c, ADA_ROW_GROUP * ada_code_width(E, true) * real);
    s.weights = ada_carve(c, ADA_ROW_GROUP * ADA_PAGE * real);
    s.steps = ada_carve(c, 2 * r->pages);
    s.gains = ada_carve(c, ADA_CERTIFY_BUCKETS * r->rows * (int64_t)sizeof(double));
    return s;
}

/* Pages of sequence b that have codes. */
static int64_t coded_pages(const ada_certifying *r, int64_t b) {
    const int64_t keys = r->p->key.codes->coded[b], values = r->p->value.codes->coded[b];
    const int64_t full = ada_key_count(r->p, b) / ADA_PAGE;
    const int64_t coded = keys < values ? keys : values;
    return coded < full ? coded : full;
}

/* Queries' norms and what rounding may do to a score; false where codes of all keys would say too little. */
static bool start_group(ada_certifying *r, const ada_certify_scratch *s, int64_t head) {
    const ada_problem *p = r->p;
    const ada_codes *keys = p->key.codes, *values = p->value.codes;
    const int64_t b = head / p->G, pages = ada_pages_of(r, b);
    const int64_t coded = r->groups[head].coded;
    /* That follow each other in a score: rows are summed in lanes, codes with VNNI exactly. */
    const double additions = r->k->isa & ADA_ISA_AVX512VNNI ? (double)p->D / 8 + 32 : (double)p->D + 32;
    double error2 = 0;
    if (coded * 2 <= pages) return false;
    ada_load_queries(r, s, b, head % p->G);
    for (int64_t page = 0; page < coded; page++) {
        const double error = (double)keys->norms[head * keys->pages + page].error[1];
        if (isinf(error) || isinf(values->norms[head * values->pages + page].row)) return false;
        error2 += error * error;
    }
    for (int64_t row = 0; row < r->rows; row++) {
        ada_row_state *state = &r->states[head * r->rows + row];
        double sum = 0;
        for (int64_t d = 0; d < p->D; d++) {
            const double x = (double)s->queries[row * p->D + d];
            sum += x * x;
        }
        *state = (ada_row_state){.query = sqrt(sum) * ADA_LN2 * 1.001,
                                 .o = r->outs + (head * r->rows + row) * p->E};
        state->rounding = state->query * additions * 0x1p-24;
        if (!(state->query < 0x1p60)) return false;
        if (state->query * sqrt(error2 / (double)(coded * ADA_PAGE)) > r->tolerance / 2) return false;
    }
    return true;
}

/* The output of a row; false where it cannot be held. */
static bool join_row(ada_certifying *r, int64_t head, int64_t row) {
    const ada_problem *p = r->p;
    const int64_t E = p->E, h = head % p->G * r->group + row / p->T;
    ada_row_state *state = &r->states[head * r->rows + row];
    float l = 0;
    memset(state->o, 0, (size_t)E * sizeof *state->o);
    for (int64_t chunk = 0; chunk * ADA_CERTIFY_CHUNK < ada_pages_of(r, head / p->G); chunk++) {
        const float *partial = r->partials + ((head * r->chunks + chunk) * r->rows + row) * (E + 1);
        for (int64_t e = 0; e < E; e++) state->o[e] += partial[e];
        l += partial[E];
    }
    const double factor = ada_row_factor(p, h, (double)state->reference, (double)l, &state->lse);
    state->z = ada_with_sink(p, h, state, (double)l);
    bool finite = isfinite(state->z) && (l == 0 || (l > 0x1p-60f && factor >= FLT_MIN));
    for (int64_t e = 0; e < E; e++) {
        state->o[e] *= (float)factor;
        finite &= fabsf(state->o[e]) <= FLT_MAX;
    }
    return finite;
}

static void join_task(void *context, ada_job *job, int64_t head, int worker) {
    ada_certifying *r = context;
    const ada_problem *p = r->p;
    ada_group_state *group = &r->groups[head];
    (void)job, (void)worker;
    if (!group->open || group->unfit) return;
    for (int64_t row = 0; row < r->rows; row++)
        if (!join_row(r, head, row)) group->unfit = true;
    if (group->unfit) return;
    ada_measure_away(r, head);
    group->open = false;
    for (int64_t h = 0; h < r->group; h++) {
        double *bound = &r->bounds[head * r->group + h];
        *bound = ada_bound_of(r, head, h * p->T);
        group->open |= !(*bound <= r->tolerance);
    }
    if (group->open && r->attempt == ATTEMPTS - 1) group->unfit = true;
}

static void carve_all(ada_certifying *r, ada_carver *c) {
    const ada_problem *p = r->p;
    const int64_t heads = p->B * p->G, all = heads * r->pages * r->rows, real = sizeof(float);
    r->groups = ada_carve(c, heads * (int64_t)sizeof *r->groups);
    r->states = ada_carve(c, heads * r->rows * (int64_t)sizeof *r->states);
    r->bounds = ada_carve(c, p->B * p->H * (int64_t)sizeof *r->bounds);
    r->weights = ada_carve(c, all * ADA_PAGE * real);
    r->masses = ada_carve(c, all * (int64_t)sizeof *r->masses);
    r->away = ada_carve(c, all * real);
    r->longest = ada_carve(c, 2 * heads * r->pages * real);
    r->tiers = ada_carve(c, heads * r->pages);
    r->partials = ada_carve(c, heads * r->chunks * r->rows * (p->E + 1) * real);
    r->outs = ada_carve(c, heads * r->rows * p->E * real);
}

static void store_group(const ada_certifying *r, ada_budget *budget, int64_t head) {
    const ada_problem *p = r->p;
    const int64_t b = head / p->G;
    for (int64_t row = 0; row < r->rows; row++) {
        const ada_row_state *state = &r->states[head * r->rows + row];
        const int64_t h = head % p->G * r->group + row / p->T, i = row % p->T;
        ada_store_rows_f32(r->k, &p->out, b, h, i, 1, (int)p->E, state->o, p->E);
        ada_store_lse(p, b, h, i, state->lse);
    }
    for (int64_t h = 0; h < r->group; h++) {
        ada_head *to = &budget->heads[b * p->H + head % p->G * r->group + h];
        *to = ada_unknown_head();
        to->choice = (ada_choice){ADA_RUNG_FP32, ADA_RUNG_FP32};
        to->predicted_error = to->error_bound = r->bounds[head * r->group + h];
        to->kept = r->groups[head].bytes;
    }
}

/* The heads of groups from that one on, `groups` of each of `sequences`, as a call of their own: it gives the
 * same bits as one with the others. */
static ada_status attend_groups(const ada_problem *whole, const ada_budget *budget, int64_t head,
                                int64_t sequences, int64_t groups, double seconds[4],
                                bool (*interrupt)(void *), void *context, ada_error *error) {
    const int64_t group = whole->H / whole->G, b = head / whole->G, g = head % whole->G, h = g * group;
    ada_problem p = *whole;
    ada_budget own = *budget;
    ada_array *const of_heads[] = {&p.query, &p.attn_mask, &p.out, &p.alibi_slopes};
    ada_array *const of_groups[] = {&p.key, &p.value}, *const of_sequences[] = {&p.kv_lengths,
                                                                                &p.query_offset};
    for (int i = 0; i < 4; i++)
        if (of_heads[i]->data)
            of_heads[i]->data =
                (char *)of_heads[i]->data + b * of_heads[i]->stride[0] + h * of_heads[i]->stride[1];
    for (int i = 0; i < 2; i++) {
        of_groups[i]->data = ada_row_at(of_groups[i], b, g, 0);
        of_groups[i]->shape[0] = sequences, of_groups[i]->shape[1] = groups;
        of_groups[i]->codes = NULL;
        if (of_sequences[i]->data)
            of_sequences[i]->data = (char *)of_sequences[i]->data + b * of_sequences[i]->stride[0];
    }
    if (p.sinks.data) p.sinks.data = (char *)p.sinks.data + h * p.sinks.stride[0];
    if (p.lse) p.lse = (float *)p.lse + (b * p.H + h) * p.T;
    if (p.ran) p.ran += b * p.H + h;
    p.B = sequences, p.G = groups, p.H = groups * group;
    p.query.shape[0] = p.out.shape[0] = p.B, p.query.shape[1] = p.out.shape[1] = p.H;
    own.heads += b * whole->H + h;
    own.picture = NULL; /* nothing stands in on a cache */
    if (own.given) own.given += b * whole->H + h;
    memset(own.seconds, 0, sizeof own.seconds);
    const ada_status status = ada_attend_within(&p, &ada_cpu_backend, NULL, &own, interrupt, context, error);
    for (int i = 0; i < 4; i++) seconds[i] += own.seconds[i];
    return status;
}

/* Those that are not certified, in as few calls as slices of the arrays allow. */
static ada_status attend_unfit(const ada_certifying *r, ada_budget *budget, bool (*interrupt)(void *),
                               void *context, ada_error *error) {
    const int64_t G = r->p->G, heads = r->p->B * G;
    for (int64_t head = 0, n; head < heads; head += n) {
        for (n = 0; head + n < heads && r->groups[head + n].unfit; n++) {
        }
        if (n == 0) {
            n = 1;
            continue;
        }
        const bool whole = head % G == 0 && n >= G;
        const int64_t sequences = whole ? n / G : 1, left = G - head % G, groups = n < left ? n : left;
        n = sequences * groups;
        if (attend_groups(r->p, budget, head, sequences, groups, budget->seconds, interrupt, context, error))
            return error->status;
    }
    return ADA_OK;
}

static bool compute(ada_certifying *r, int threads, bool (*interrupt)(void *), void *context) {
    const int64_t heads = r->p->B * r->p->G, tasks = heads * r->chunks;
    if (!ada_parallel_for(tasks, threads, ada_weigh_pages, r, interrupt, context)) return false;
    for (r->attempt = 0; r->attempt < ATTEMPTS; r->attempt++) {
        bool open = false;
        for (int64_t head = 0; head < heads; head++) open |= r->groups[head].open && !r->groups[head].unfit;
        if (!open) return true;
        if (!ada_parallel_for(heads, threads, ada_choose_tiers, r, interrupt, context) ||
            !ada_parallel_for(tasks, threads, ada_add_pages, r, interrupt, context) ||
            !ada_parallel_for(heads, threads, join_task, r, interrupt, context))
            return false;
    }
    return true;
}

ada_status ada_certify(const ada_problem *p, ada_budget *budget, bool (*interrupt)(void *), void *context,
                       ada_error *error) {
    const int64_t heads = p->B * p->G, pages = (p->S + ADA_PAGE - 1) / ADA_PAGE;
    ada_certifying r = {.p = p,
                        .k = ada_kernels_get(),
                        .tolerance = budget->tolerance,
                        .group = p->H / p->G,
                        .rows = p->H / p->G * p->T,
                        .pages = pages,
                        .chunks = (pages + ADA_CERTIFY_CHUNK - 1) / ADA_CERTIFY_CHUNK};
    const double start = ada_seconds_now();
    const int threads = ada_threads_for(p, heads * r.chunks,
                                        (double)(heads * r.rows) * (double)p->S * (double)(p->D + p->E) / 4);
    ada_carver size = {NULL, 0};
    ada_certify_scratch_of(&r, &size);
    r.scratch_bytes = size.used;
    size.used = 0;
    carve_all(&r, &size);
    const int64_t bytes = size.used + threads * r.scratch_bytes;
    char *memory = ada_scratch_take(bytes);
    if (!memory) return ada_no_scratch(bytes, error);
    ada_carver carver = {memory, 0};
    carve_all(&r, &carver);
    r.scratch = memory + carver.used;
    ada_carver own = {r.scratch, 0};
    const ada_certify_scratch s = ada_certify_scratch_of(&r, &own);
    for (int64_t head = 0; head < heads; head++) {
        r.groups[head].coded = coded_pages(&r, head / p->G);
        atomic_init(&r.groups[head].unfit, !start_group(&r, &s, head));
        r.groups[head].open = true;
    }
    if (!compute(&r, threads, interrupt, context)) {
        ada_fail(error, ADA_INTERRUPTED, "attention: interrupted");
        goto done;
    }
    error->status = ADA_OK;
    budget->seconds[2] = ada_seconds_now() - start;
    for (int64_t head = 0; head < heads; head++)
        if (!r.groups[head].unfit) store_group(&r, budget, head);
    attend_unfit(&r, budget, interrupt, context, error);
done:
    ada_scratch_give_back(memory);
    return error->status;
}
