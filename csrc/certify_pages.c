/* Pages of a cache that is certified: their weights, and what they add to outputs, by codes or as they are.
 */
#include "certify.h"

#include <string.h>

#include "certifying.h"
#include "cpu.h"

#define REAL float
#define KIND(name) name##_f32
#include "read_tpl.h"

void ada_load_queries(const ada_certifying *r, const ada_certify_scratch *s, int64_t b, int64_t g) {
    const ada_problem *p = r->p;
    for (int64_t row = 0; row < r->rows; row++)
        load_query_f32(p, r->k, s->queries + row * p->D, b, g * r->group + row / p->T, row % p->T);
}

/* Rows of keys or values of a page, as they are: codes lie beside whole rows of floats alone. */
static const float *rows_of(const ada_array *a, int64_t b, int64_t g, int64_t page) {
    return (const float *)ada_row_at(a, b, g, page * ADA_PAGE);
}

/* Scores by codes, less those of the page's centre, or what fine ones add to them. */
static void scores_of_codes(const ada_certifying *r, const ada_certify_scratch *s, int64_t head, int64_t page,
                            bool fine, float *scores) {
    const ada_codes *codes = r->p->key.codes;
    const int64_t at = head * codes->pages + page;
    const int D = (int)r->p->D, width = (int)ada_code_width(D, false);
    const float *scale = codes->scale + at * D, step = fine ? 1.0f / ADA_FINE_STEPS : 1;
    for (int i = 0; i < ADA_ROW_GROUP; i++)
        for (int d = D; d < width; d++) s->scaled[i * width + d] = 0;
    for (int64_t row = 0; row < r->rows; row += ADA_ROW_GROUP) {
        const int n = ada_rows_from(r, row);
        const float *q = s->queries + row * D;
        for (int i = 0; i < n; i++)
            for (int d = 0; d < D; d++) s->scaled[i * width + d] = q[i * D + d] * (scale[d] * step);
        r->k->code_products(scores + row * ADA_PAGE, ADA_PAGE, s->scaled, width, n,
                            (fine ? codes->fine : codes->code) + at * ada_code_bytes(D, false), width,
                            ADA_PAGE);
    }
}

/* Scores of the centres of n <= ADA_CERTIFY_CHUNK pages, [rows][ADA_BLOCK]. */
static void scores_of_centres(const ada_certifying *r, const ada_certify_scratch *s, int64_t head,
                              int64_t page, int n) {
    const ada_codes *codes = r->p->key.codes;
    const int D = (int)r->p->D;
    scores_of_rows_f32(r->k, s->centres, s->queries, (int)r->rows,
                       codes->centre + (head * codes->pages + page) * D, D, n, D);
}

static void add_centre(const ada_certifying *r, const ada_certify_scratch *s, int i, float *scores) {
    for (int64_t row = 0; row < r->rows; row++)
        for (int j = 0; j < ADA_PAGE; j++) scores[row * ADA_PAGE + j] += s->centres[row * ADA_BLOCK + i];
}

static void exact_scores(const ada_certifying *r, const ada_certify_scratch *s, int64_t b, int64_t g,
                         int64_t page) {
    const int D = (int)r->p->D;
    scores_of_rows_f32(r->k, s->scores, s->queries, (int)r->rows, rows_of(&r->p->key, b, g, page), D,
                       ada_keys_of(r, b, page), D);
}

/* Scores of one row to weights relative to the largest, all ADA_PAGE of them. False where a score is not
 * finite. */
static bool weigh(const ada_certifying *r, const ada_certify_scratch *s, const ada_patch *patch,
                  float *scores, ada_row_f32 *state) {
    uint64_t visible = UINT64_MAX;
    *state = (ada_row_f32){NULL, -INFINITY, 0, 0};
    const ada_sight sight = ada_visible_rows(r->p, patch, &visible);
    if (sight == ADA_PLAIN) visible = UINT64_MAX;
    for (int j = patch->nk; j < ADA_PAGE; j++) scores[j] = 0;
    if (sight == ADA_HIDDEN) {
        memset(scores, 0, ADA_PAGE * sizeof *scores);
        return true;
    }
    return weigh_row_f32(r->p, r->k, patch, s->bias, &visible, state, scores);
}

/* Of weights whose sum is known, times scale. */
static ada_page_mass mass_of(const float *u, float sum, float scale) {
    const float mean = sum / ADA_PAGE;
    float norm[8] = {0}, apart[8] = {0}, norm2 = 0, apart2 = 0;
    for (int j = 0; j < ADA_PAGE; j += 8)
        for (int i = 0; i < 8; i++) {
            norm[i] += u[j + i] * u[j + i];
            apart[i] += (u[j + i] - mean) * (u[j + i] - mean);
        }
    for (int i = 0; i < 8; i++) norm2 += norm[i], apart2 += apart[i];
    return (ada_page_mass){scale, sum * scale, sqrtf(norm2) * scale, sqrtf(apart2) * scale};
}

/* Weights of all rows from their scores, in place; masses relative to reference (NULL: to each page's own
 * largest score, which goes into scale). False where a row is unfit. */
static bool weigh_page(const ada_certifying *r, const ada_certify_scratch *s, int64_t b, int64_t g,
                       int64_t page, float *scores, const ada_row_state *rows, ada_page_mass *masses) {
    const ada_problem *p = r->p;
    for (int64_t row = 0; row < r->rows; row++) {
        const ada_patch patch = {b, g * r->group + row / p->T, row % p->T, page * ADA_PAGE,
                                 1, ada_keys_of(r, b, page)};
        float *u = scores + row * ADA_PAGE;
        ada_row_f32 state;
        if (!weigh(r, s, &patch, u, &state)) return false;
        ada_page_mass *m = &masses[row];
        const float scale = state.l > 0 && rows ? exp2f(state.m - rows[row].reference) : rows ? 0 : 1;
        *m = mass_of(u, state.l, scale);
        if (!rows) m->scale = state.m;
    }
    return true;
}

void ada_weigh_pages(void *context, ada_job *job, int64_t task, int worker) {
    ada_certifying *r = context;
    const int64_t head = task / r->chunks, b = head / r->p->G, g = head % r->p->G;
    const int64_t first = task % r->chunks * ADA_CERTIFY_CHUNK, pages = ada_pages_of(r, b);
    const int64_t end = first + ADA_CERTIFY_CHUNK < pages ? first + ADA_CERTIFY_CHUNK : pages;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    ada_certify_scratch s = ada_certify_scratch_of(r, &carver);
    const ada_problem *p = r->p;
    if (r->groups[head].unfit) return;
    ada_load_queries(r, &s, b, g);
    scores_of_centres(r, &s, head, first, (int)(end - first));
    for (int64_t page = first; page < end; page++) {
        if (ada_job_cancelled(job, worker)) return;
        const int64_t at = head * r->pages + page;
        bool seen = false;
        for (int64_t h = 0; h < r->group && !seen; h++) {
            uint64_t bits[ADA_CERTIFIED_QUERIES];
            const ada_patch whole = {b,         g * r->group + h,       0, page * ADA_PAGE,
                                     (int)p->T, ada_keys_of(r, b, page)};
            seen = ada_visible_rows(p, &whole, bits) != ADA_HIDDEN;
        }
        r->tiers[at] = !seen                          ? ADA_TIER_HIDDEN
                       : page < r->groups[head].coded ? ADA_TIER_MEAN
                                                      : ADA_TIER_EXACT;
        if (!seen) continue;
        s.scores = r->weights + at * r->rows * ADA_PAGE;
        if (r->tiers[at] == ADA_TIER_EXACT) {
            exact_scores(r, &s, b, g, page);
            const int n = ada_keys_of(r, b, page);
            r->longest[2 * at] = (float)ada_longest_row(rows_of(&p->key, b, g, page), n, (int)p->D);
            r->longest[2 * at + 1] = (float)ada_longest_row(rows_of(&p->value, b, g, page), n, (int)p->E);
        } else {
            scores_of_codes(r, &s, head, page, false, s.scores);
            add_centre(r, &s, (int)(page - first), s.scores);
        }
        if (!weigh_page(r, &s, b, g, page, s.scores, NULL, r->masses + at * r->rows))
            atomic_store_explicit(&r->groups[head].unfit, true, memory_order_relaxed);
    }
}

/* ---- values ---- */

/* 2^x for |x| < 1, 1e-7 off. */
static float small_exp2(float x) {
    const float c[] = {1.32154867e-6f, 1.52527338e-5f, 1.54035304e-4f,
                       1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f,
                       2.40226507e-1f, 6.93147181e-1f, 1};
    float y = c[0];
    for (int i = 1; i < 9; i++) y = y * x + c[i];
    return y;
}

/* Weights by codes to those by fine ones too; masses as in join_masses. */
static void refine_weights(const ada_certifying *r, const ada_certify_scratch *s, int64_t head, int64_t page,
                           const float *weights, ada_page_mass *masses) {
    scores_of_codes(r, s, head, page, true, s->scores);
    for (int64_t row = 0; row < r->rows; row++) {
        float *x = s->scores + row * ADA_PAGE, parts[8] = {0}, sum = 0;
        const float *u = weights + row * ADA_PAGE;
        for (int j = 0; j < ADA_PAGE; j++) x[j] = u[j] * small_exp2(x[j]);
        for (int j = 0; j < ADA_PAGE; j += 8)
            for (int i = 0; i < 8; i++) parts[i] += x[j + i];
        for (int i = 0; i < 8; i++) sum += parts[i];
        masses[row] = mass_of(x, sum, masses[row].scale);
    }
}

static void add_exact_values(const ada_certifying *r, const ada_certify_scratch *s, float *o,
                             const ada_page_mass *masses, const float *weights, int n, int64_t b, int64_t g,
                             int64_t page) {
    const int E = (int)r->p->E;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < ADA_PAGE; j++)
            s->weights[i * ADA_PAGE + j] = weights[i * ADA_PAGE + j] * masses[i].scale;
    r->k->row_values_f32(o, E + 1, s->weights, n, rows_of(&r->p->value, b, g, page), E,
                         ada_keys_of(r, b, page), E);
}

/* What codes of values add to those of the centre. */
static void add_codes(const ada_certifying *r, const ada_certify_scratch *s, float *o,
                      const ada_page_mass *masses, const float *weights, int n, int64_t head, int64_t page,
                      bool fine) {
    const ada_codes *codes = r->p->value.codes;
    const int E = (int)r->p->E, width = (int)ada_code_width(E, true);
    const int64_t at = head * codes->pages + page, first = at * ada_code_bytes(E, true);
    const float *scale = codes->scale + at * E;
    for (int plane = 0; plane <= fine; plane++) {
        r->k->code_products(s->sums, width, weights, ADA_PAGE, n, (plane ? codes->fine : codes->code) + first,
                            ADA_PAGE, width);
        for (int i = 0; i < n; i++) {
            const float factor = masses[i].scale * (plane ? 1.0f / ADA_FINE_STEPS : 1);
            float *to = o + i * (E + 1);
            for (int e = 0; e < E; e++) to[e] += s->sums[i * width + e] * (factor * scale[e]);
        }
    }
}

static void add_page(const ada_certifying *r, const ada_certify_scratch *s, int64_t head, int64_t page,
                     float *partial) {
    const ada_problem *p = r->p;
    const int64_t at = head * r->pages + page, b = head / p->G, g = head % p->G;
    const int E = (int)p->E;
    const ada_tier t = (ada_tier)r->tiers[at];
    ada_page_mass *masses = r->masses + at * r->rows;
    const float *weights = r->weights + at * r->rows * ADA_PAGE;
    if (t >= ADA_TIER_FINE) {
        bool fit = true;
        if (t == ADA_TIER_FINE && !p->has_softcap) {
            refine_weights(r, s, head, page, weights, masses);
        } else {
            if (t == ADA_TIER_EXACT) {
                exact_scores(r, s, b, g, page);
            } else {
                scores_of_codes(r, s, head, page, false, s->scores);
                scores_of_codes(r, s, head, page, true, s->added);
                scores_of_centres(r, s, head, page, 1);
                add_centre(r, s, 0, s->scores);
                for (int64_t i = 0; i < r->rows * ADA_PAGE; i++) s->scores[i] += s->added[i];
            }
            fit = weigh_page(r, s, b, g, page, s->scores, r->states + head * r->rows, masses);
        }
        if (!fit) atomic_store_explicit(&r->groups[head].unfit, true, memory_order_relaxed);
        weights = s->scores;
    }
    for (int64_t row = 0; row < r->rows; row++) partial[row * (E + 1) + E] += masses[row].sum;
    for (int64_t row = 0; row < r->rows && t != ADA_TIER_MEAN; row += ADA_ROW_GROUP) {
        const int n = ada_rows_from(r, row);
        float *o = partial + row * (E + 1);
        if (t == ADA_TIER_EXACT)
            add_exact_values(r, s, o, masses + row, weights + row * ADA_PAGE, n, b, g, page);
        else
            add_codes(r, s, o, masses + row, weights + row * ADA_PAGE, n, head, page, t == ADA_TIER_FINE);
    }
}

/* The centres of a task's pages, for all that do not count as they are. */
static void add_centres(const ada_certifying *r, const ada_certify_scratch *s, int64_t head, int64_t first,
                        int n, float *partial) {
    const ada_codes *codes = r->p->value.codes;
    const int E = (int)r->p->E;
    for (int64_t row = 0; row < r->rows; row += ADA_ROW_GROUP) {
        const int rows = ada_rows_from(r, row);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < n; j++) {
                const int64_t at = head * r->pages + first + j;
                s->weights[i * ADA_PAGE + j] =
                    r->tiers[at] < ADA_TIER_EXACT ? r->masses[at * r->rows + row + i].sum : 0;
            }
        r->k->row_values_f32(partial + row * (E + 1), E + 1, s->weights, rows,
                             codes->centre + (head * codes->pages + first) * E, E, n, E);
    }
}

void ada_add_pages(void *context, ada_job *job, int64_t task, int worker) {
    ada_certifying *r = context;
    const int64_t head = task / r->chunks, pages = ada_pages_of(r, head / r->p->G);
    const int64_t first = task % r->chunks * ADA_CERTIFY_CHUNK,
                  end = first + ADA_CERTIFY_CHUNK < pages ? first + ADA_CERTIFY_CHUNK : pages;
    const ada_group_state *group = &r->groups[head];
    if (!group->open || group->unfit) return;
    float *partial = r->partials + task * r->rows * (r->p->E + 1);
    memset(partial, 0, (size_t)(r->rows * (r->p->E + 1)) * sizeof *partial);
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const ada_certify_scratch s = ada_certify_scratch_of(r, &carver);
    ada_load_queries(r, &s, head / r->p->G, head % r->p->G);
    for (int64_t page = first; page < end; page++) {
        if (ada_job_cancelled(job, worker)) return;
        if (r->tiers[head * r->pages + page] != ADA_TIER_HIDDEN) add_page(r, &s, head, page, partial);
    }
    add_centres(r, &s, head, first, (int)(end - first), partial);
}
