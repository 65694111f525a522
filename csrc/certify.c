/* Certified attention: codes of all keys give every page's weights and bounds of their errors. A page then
 * counts by its mean value, by the codes of its values, or by fine codes of keys and values. Pages go up
 * where that lowers the bound most for the bytes that it costs, until it meets the tolerance; if it never
 * does, all are read as they are.
 *
 * For one row with output o, the page's exact weights w and those of the codes u, values v, their codes y and
 * centre c, the page moves the numerator of o by
 *     sum (w - u)(v - c) + (sum w - u)(c - o) + sum u (v - y)        where codes of values are read,
 *     sum (w - u)(v - c) + (sum w - u)(c - o) + sum (u - mean u)(v - c)      where the mean stands in,
 * at most. Sums of a vector times the rows of a matrix are bounded by its norm times the largest singular
 * value, and so is the vector of the scores' errors: a fraction of what bounds of single keys give. The
 * denominator is at least the sum of u less all |sum w - u|. None of it depends on the order or the threads.
 */
#include "certify.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attending.h"
#include "codes.h"
#include "cpu.h"
#include "execute.h"

#define REAL float
#define KIND(name) name##_f32
#include "read_tpl.h"

enum { CHUNK = 16 }; /* pages of a task */
enum { BUCKETS = 128 };
enum { ATTEMPTS = 2 }; /* choices of pages; after them the head is computed without codes */
/* Beyond it a page's codes tell too little, in nats. */
#define MOST_SHIFT 0.6
/* Share of the tolerance that pages are chosen for: the output that they are chosen by is not the final one.
 */
#define AIM 0.9

/* Bytes, relative to all, from which on reading all is as fast, or nearly. */
#define WORTH 0.52

typedef enum { TIER_MEAN, TIER_CODES, TIER_FINE, TIER_EXACT, TIER_HIDDEN } tier;

/* A page's weights for one row. scale: from those that are kept to those of the whole row; the others are of
 * the latter: their sum, norm, and norm around their mean. */
typedef struct {
    float scale, sum, norm, apart;
} page_mass;

typedef struct {
    float reference;       /* octaves */
    double z;              /* sum of all weights, the sink's among them */
    double query;          /* norm, scaled */
    double rounding, bias; /* of a score: for a key of norm 1, and for any */
    double norm;           /* of the output */
    double lse;
    float *o;
} row_state;

typedef struct {
    atomic_bool unfit; /* numbers that are not finite or too large, or too many of them to read */
    bool open;         /* not certified yet */
    int64_t coded;     /* pages that have codes */
    double bytes;      /* read, relative to all */
} group_state;

typedef struct {
    const ada_problem *p;
    const ada_kernels *k;
    double tolerance;
    int64_t group, rows, pages, chunks;
    int attempt;
    group_state *groups; /* [B * G] */
    row_state *states;   /* [B * G][rows] */
    double *bounds;      /* [B * H] */
    float *weights;      /* [B * G][pages][rows][ADA_PAGE] */
    page_mass *masses;   /* [B * G][pages][rows] */
    float *away;         /* [B * G][pages][rows]: of the page's centre from the output */
    float *longest;      /* [B * G][pages][2]: row of keys and of values, of pages without codes */
    uint8_t *tiers;      /* [B * G][pages] */
    float *partials;     /* [B * G][chunks][rows][E + 1] */
    float *outs;         /* [B * G][rows][E] */
    char *scratch;
    int64_t scratch_bytes;
} certifying;

typedef struct {
    float *queries;        /* [rows][D] */
    float *scaled;         /* [ADA_ROW_GROUP][D], D as codes have it */
    float *centres;        /* [rows][ADA_BLOCK] */
    float *scores, *added; /* [rows][ADA_PAGE] */
    float *bias;           /* [ADA_BLOCK] */
    float *sums;           /* [ADA_ROW_GROUP][E] */
    float *weights;        /* [ADA_ROW_GROUP][ADA_PAGE] */
    uint8_t *steps;        /* [pages][2] */
    double *gains;         /* [BUCKETS][rows] */
} pieces;

static pieces pieces_of(const certifying *r, ada_carver *c) {
    const int64_t real = sizeof(float), D = r->p->D, E = r->p->E;
    pieces s;
    s.queries = ada_carve(c, r->rows * D * real);
    s.scaled = ada_carve(c, ADA_ROW_GROUP * ada_code_width(D, false) * real);
    s.centres = ada_carve(c, r->rows * ADA_BLOCK * real);
    s.scores = ada_carve(c, r->rows * ADA_PAGE * real);
    s.added = ada_carve(c, r->rows * ADA_PAGE * real);
    s.bias = ada_carve(c, ADA_BLOCK * real);
    s.sums = ada_carve(c, ADA_ROW_GROUP * ada_code_width(E, true) * real);
    s.weights = ada_carve(c, ADA_ROW_GROUP * ADA_PAGE * real);
    s.steps = ada_carve(c, 2 * r->pages);
    s.gains = ada_carve(c, BUCKETS * r->rows * (int64_t)sizeof(double));
    return s;
}

/* Whether pages that are read as they are lie as rows_of takes them. */
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

/* ---- one page ---- */

static int rows_from(const certifying *r, int64_t row) {
    return (int)(r->rows - row < ADA_ROW_GROUP ? r->rows - row : ADA_ROW_GROUP);
}

static int64_t pages_of(const certifying *r, int64_t b) {
    return (ada_key_count(r->p, b) + ADA_PAGE - 1) / ADA_PAGE;
}

/* Pages of sequence b that have codes. */
static int64_t coded_pages(const certifying *r, int64_t b) {
    const int64_t keys = r->p->key.codes->coded[b], values = r->p->value.codes->coded[b];
    const int64_t full = ada_key_count(r->p, b) / ADA_PAGE;
    const int64_t coded = keys < values ? keys : values;
    return coded < full ? coded : full;
}

static int keys_of(const certifying *r, int64_t b, int64_t page) {
    const int64_t left = ada_key_count(r->p, b) - page * ADA_PAGE;
    return left < ADA_PAGE ? (int)left : ADA_PAGE;
}

static void load_queries(const certifying *r, const pieces *s, int64_t b, int64_t g) {
    const ada_problem *p = r->p;
    for (int64_t row = 0; row < r->rows; row++)
        load_query_f32(p, r->k, s->queries + row * p->D, b, g * r->group + row / p->T, row % p->T);
}

/* Rows of keys or values of a page, as they are: codes lie beside whole rows of floats alone. */
static const float *rows_of(const ada_array *a, int64_t b, int64_t g, int64_t page) {
    return (const float *)ada_row_at(a, b, g, page * ADA_PAGE);
}

/* Scores by codes, less those of the page's centre, or what fine ones add to them. */
static void scores_of_codes(const certifying *r, const pieces *s, int64_t head, int64_t page, bool fine,
                            float *scores) {
    const ada_codes *codes = r->p->key.codes;
    const int64_t at = head * codes->pages + page;
    const int D = (int)r->p->D, width = (int)ada_code_width(D, false);
    const float *scale = codes->scale + at * D, step = fine ? 1.0f / ADA_FINE_STEPS : 1;
    for (int i = 0; i < ADA_ROW_GROUP; i++)
        for (int d = D; d < width; d++) s->scaled[i * width + d] = 0;
    for (int64_t row = 0; row < r->rows; row += ADA_ROW_GROUP) {
        const int n = rows_from(r, row);
        const float *q = s->queries + row * D;
        for (int i = 0; i < n; i++)
            for (int d = 0; d < D; d++) s->scaled[i * width + d] = q[i * D + d] * (scale[d] * step);
        r->k->code_products(scores + row * ADA_PAGE, ADA_PAGE, s->scaled, width, n,
                            (fine ? codes->fine : codes->code) + at * ada_code_bytes(D, false), width,
                            ADA_PAGE);
    }
}

/* Scores of the centres of n <= CHUNK pages, [rows][ADA_BLOCK]. */
static void scores_of_centres(const certifying *r, const pieces *s, int64_t head, int64_t page, int n) {
    const ada_codes *codes = r->p->key.codes;
    const int D = (int)r->p->D;
    scores_of_rows_f32(r->k, s->centres, s->queries, (int)r->rows,
                       codes->centre + (head * codes->pages + page) * D, D, n, D);
}

static void add_centre(const certifying *r, const pieces *s, int i, float *scores) {
    for (int64_t row = 0; row < r->rows; row++)
        for (int j = 0; j < ADA_PAGE; j++) scores[row * ADA_PAGE + j] += s->centres[row * ADA_BLOCK + i];
}

static void exact_scores(const certifying *r, const pieces *s, int64_t b, int64_t g, int64_t page) {
    const int D = (int)r->p->D;
    scores_of_rows_f32(r->k, s->scores, s->queries, (int)r->rows, rows_of(&r->p->key, b, g, page), D,
                       keys_of(r, b, page), D);
}

static void add_exact_values(const certifying *r, const pieces *s, float *o, const page_mass *masses,
                             const float *weights, int n, int64_t b, int64_t g, int64_t page) {
    const int E = (int)r->p->E;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < ADA_PAGE; j++)
            s->weights[i * ADA_PAGE + j] = weights[i * ADA_PAGE + j] * masses[i].scale;
    r->k->row_values_f32(o, E + 1, s->weights, n, rows_of(&r->p->value, b, g, page), E, keys_of(r, b, page),
                         E);
}

/* What codes of values add to those of the centre. */
static void add_codes(const certifying *r, const pieces *s, float *o, const page_mass *masses,
                      const float *weights, int n, int64_t head, int64_t page, bool fine) {
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

/* Scores of one row to weights relative to the largest, all ADA_PAGE of them. False where a score is not
 * finite. */
static bool weigh(const certifying *r, const pieces *s, const ada_patch *patch, float *scores,
                  ada_row_f32 *state) {
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
static page_mass mass_of(const float *u, float sum, float scale) {
    const float mean = sum / ADA_PAGE;
    float norm[8] = {0}, apart[8] = {0}, norm2 = 0, apart2 = 0;
    for (int j = 0; j < ADA_PAGE; j += 8)
        for (int i = 0; i < 8; i++) {
            norm[i] += u[j + i] * u[j + i];
            apart[i] += (u[j + i] - mean) * (u[j + i] - mean);
        }
    for (int i = 0; i < 8; i++) norm2 += norm[i], apart2 += apart[i];
    return (page_mass){scale, sum * scale, sqrtf(norm2) * scale, sqrtf(apart2) * scale};
}

/* Weights of all rows from their scores, in place; masses relative to reference (NULL: to each page's own
 * largest score, which goes into scale). False where a row is unfit. */
static bool weigh_page(const certifying *r, const pieces *s, int64_t b, int64_t g, int64_t page,
                       float *scores, const row_state *rows, page_mass *masses) {
    const ada_problem *p = r->p;
    for (int64_t row = 0; row < r->rows; row++) {
        const ada_patch patch = {b, g * r->group + row / p->T, row % p->T, page * ADA_PAGE,
                                 1, keys_of(r, b, page)};
        float *u = scores + row * ADA_PAGE;
        ada_row_f32 state;
        if (!weigh(r, s, &patch, u, &state)) return false;
        page_mass *m = &masses[row];
        const float scale = state.l > 0 && rows ? exp2f(state.m - rows[row].reference) : rows ? 0 : 1;
        *m = mass_of(u, state.l, scale);
        if (!rows) m->scale = state.m;
    }
    return true;
}

/* ---- weights by codes ---- */

static void codes_task(void *context, ada_job *job, int64_t task, int worker) {
    certifying *r = context;
    const int64_t head = task / r->chunks, b = head / r->p->G, g = head % r->p->G;
    const int64_t first = task % r->chunks * CHUNK, pages = pages_of(r, b);
    const int64_t end = first + CHUNK < pages ? first + CHUNK : pages;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    pieces s = pieces_of(r, &carver);
    const ada_problem *p = r->p;
    if (r->groups[head].unfit) return;
    load_queries(r, &s, b, g);
    scores_of_centres(r, &s, head, first, (int)(end - first));
    for (int64_t page = first; page < end; page++) {
        if (ada_job_cancelled(job, worker)) return;
        const int64_t at = head * r->pages + page;
        bool seen = false;
        for (int64_t h = 0; h < r->group && !seen; h++) {
            uint64_t bits[ADA_CERTIFIED_QUERIES];
            const ada_patch whole = {b, g * r->group + h, 0, page * ADA_PAGE, (int)p->T, keys_of(r, b, page)};
            seen = ada_visible_rows(p, &whole, bits) != ADA_HIDDEN;
        }
        r->tiers[at] = !seen ? TIER_HIDDEN : page < r->groups[head].coded ? TIER_MEAN : TIER_EXACT;
        if (!seen) continue;
        s.scores = r->weights + at * r->rows * ADA_PAGE;
        if (r->tiers[at] == TIER_EXACT) {
            exact_scores(r, &s, b, g, page);
            const int n = keys_of(r, b, page);
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

/* ---- bounds ---- */

/* What a page may move the numerator of a row's output by, and its denominator, in each tier. */
typedef struct {
    double error[TIER_HIDDEN], shift[TIER_HIDDEN];
} page_bound;

static inline double least(double a, double b) { return a < b ? a : b; }
static inline double most(double a, double b) { return a > b ? a : b; }

static void bound_page(const certifying *r, int64_t head, int64_t page, int64_t row, page_bound *bound) {
    const int64_t at = head * r->pages + page;
    const ada_codes *keys = r->p->key.codes, *values = r->p->value.codes;
    const row_state *state = &r->states[head * r->rows + row];
    const page_mass *m = &r->masses[at * r->rows + row];
    const double digits = 0x1p-19 + (double)(2 * ADA_PAGE + r->chunks) * 0x1p-24;
    const bool coded = page < r->groups[head].coded;
    const ada_code_norms *k = &keys->norms[head * keys->pages + page];
    const ada_code_norms *v = &values->norms[head * values->pages + page];
    const double row_of_keys = (double)(coded ? k->row : r->longest[2 * at]);
    const double row_of_values = (double)(coded ? v->row : r->longest[2 * at + 1]);
    const double exact = state->rounding * row_of_keys, sum = (double)m->sum;
    const double rounding = 3 * exact + state->bias; /* codes and their centre are summed apart */
    const double longest = row_of_values + state->norm;
    const double own = sum * digits + 0x1p-141; /* weights below 2^-149 are 0 */
    bound->shift[TIER_EXACT] = 1.1 * sum * (exact + state->bias) + own;
    bound->error[TIER_EXACT] = bound->shift[TIER_EXACT] * longest;
    for (int i = 0; i < TIER_EXACT; i++) bound->error[i] = bound->shift[i] = INFINITY;
    if (!coded || !(state->query * (double)k->error_row[0] + rounding <= MOST_SHIFT)) return;
    const double norm = (double)m->norm, spread = (double)v->spread,
                 away = (double)r->away[at * r->rows + row];
    for (int fine = 0; fine < 2; fine++) {
        const double delta = state->query * (double)k->error_row[fine] + rounding;
        const double all = state->query * (double)k->error[fine] + 8 * rounding;
        const double second = delta * delta / 2 * (1 + delta / 2);
        /* Fine codes have changed the largest weight, which was 1, by at most MOST_SHIFT nats. */
        const double top = (double)m->scale * (fine ? 1.83 : 1);
        const double shift = least(norm * all, sum * delta) + sum * second + own;
        const double wide = least(top * all, norm * delta) + norm * second;
        const double error = shift * away + wide * spread + own * longest;
        const tier t = fine ? TIER_FINE : TIER_CODES;
        bound->shift[t] = shift;
        bound->error[t] = error + norm * (double)v->error[fine];
        if (fine) continue;
        bound->shift[TIER_MEAN] = shift;
        bound->error[TIER_MEAN] = error + (double)m->apart * spread;
    }
}

/* Distances of the centres from the rows' outputs, upper bounds. */
static void measure_away(certifying *r, int64_t head) {
    const ada_codes *values = r->p->value.codes;
    const int E = (int)r->p->E;
    const int64_t b = head / r->p->G, pages = pages_of(r, b);
    row_state *rows = &r->states[head * r->rows];
    float dots[ADA_ROW_GROUP * ADA_BLOCK];
    for (int64_t row = 0; row < r->rows; row++) {
        double sum = 0;
        for (int e = 0; e < E; e++) sum += (double)rows[row].o[e] * (double)rows[row].o[e];
        rows[row].norm = sqrt(sum);
    }
    for (int64_t first = 0; first < pages; first += ADA_BLOCK) {
        const int n = (int)(pages - first < ADA_BLOCK ? pages - first : ADA_BLOCK);
        const float *centre = values->centre + (head * values->pages + first) * E;
        const ada_code_norms *norms = values->norms + head * values->pages + first;
        for (int64_t row = 0; row < r->rows; row += ADA_ROW_GROUP) {
            const int rest = rows_from(r, row);
            r->k->row_scores_f32(dots, rows[row].o, rest, centre, E, n, E);
            for (int i = 0; i < rest; i++)
                for (int j = 0; j < n; j++) {
                    const double c2 = (double)norms[j].centre2, o2 = rows[row + i].norm * rows[row + i].norm;
                    const double slack = (E + 8) * 0x1p-22 * (c2 + o2);
                    const double away2 = c2 + o2 - 2 * (double)dots[i * ADA_BLOCK + j] + slack;
                    r->away[(head * r->pages + first + j) * r->rows + row + i] =
                        (float)(1.001 * sqrt(away2 > 0 ? away2 : 0));
                }
        }
    }
}

/* ---- choice ---- */

/* Bytes of a page: as it is, and of the codes of keys or values. */
static double exact_bytes(const ada_problem *p, int keys) {
    return (double)keys *
           (double)(p->D * ada_dtype_bytes(p->key.dtype) + p->E * ada_dtype_bytes(p->value.dtype));
}
static double code_bytes(int64_t width) { return (double)(ADA_PAGE + 2 * sizeof(float)) * (double)width; }

/* The sum of a row's weights and its sink's, relative to its reference. */
static double with_sink(const ada_problem *p, int64_t h, const row_state *state, double sum) {
    return sum + exp2(ada_sink(p, h) * ADA_LOG2E - (double)state->reference);
}

/* Relative to the reference of the whole row; the output as all centres make it. */
static bool join_masses(certifying *r, int64_t head) {
    const ada_problem *p = r->p;
    const ada_codes *values = p->value.codes;
    const int64_t b = head / p->G, g = head % p->G, pages = pages_of(r, b), E = p->E;
    for (int64_t row = 0; row < r->rows; row++) {
        row_state *state = &r->states[head * r->rows + row];
        page_mass *masses = &r->masses[head * r->pages * r->rows + row];
        float top = -INFINITY;
        double z = 0, coded = 0;
        for (int64_t page = 0; page < pages; page++)
            if (r->tiers[head * r->pages + page] != TIER_HIDDEN)
                top = fmaxf(top, masses[page * r->rows].scale);
        if (isinf(top)) top = 0; /* no key */
        state->reference = top;
        memset(state->o, 0, (size_t)E * sizeof *state->o);
        for (int64_t page = 0; page < pages; page++) {
            page_mass *m = &masses[page * r->rows];
            if (r->tiers[head * r->pages + page] == TIER_HIDDEN) continue;
            const float scale = m->sum > 0 ? exp2f(m->scale - top) : 0;
            *m = (page_mass){scale, m->sum * scale, m->norm * scale, m->apart * scale};
            z += (double)m->sum;
            if (page >= r->groups[head].coded) continue;
            const float *centre = values->centre + (head * values->pages + page) * E;
            coded += (double)m->sum;
            for (int64_t e = 0; e < E; e++) state->o[e] += m->sum * centre[e];
        }
        for (int64_t e = 0; e < E && coded > 0; e++) state->o[e] /= (float)coded;
        state->z = with_sink(p, g * r->group + row / p->T, state, z);
        const double bias = p->alibi_slopes.data || (p->attn_mask.data && p->attn_mask.dtype != ADA_BOOL)
                                ? (fabs((double)top) + 256) * 0x1p-23
                                : 0;
        state->bias = bias;
        if (!isfinite(state->z) || bias > r->tolerance / 8) return false;
    }
    return true;
}

/* A ratio of what is saved to what it costs, in quarters of an octave from 2^16 down. */
static int bucket_of(double ratio) {
    const float x = (float)ratio;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const int steps = (127 + 16) * 4 - (int)(bits >> 21); /* the exponent and two bits */
    return ratio <= 0 || steps > BUCKETS - 1 ? BUCKETS - 1 : steps < 0 ? 0 : steps;
}

/* Raises pages, those first that gain most for their bytes, until the bound of every row is what it may be. A
 * page goes from its mean to codes and on to fine codes, or straight there where the second step gains more
 * for its bytes than the first. What fine codes leave out stays. */
static void choose_tiers(const certifying *r, const pieces *s, int64_t head, double aim) {
    const ada_problem *p = r->p;
    const int64_t b = head / p->G, pages = pages_of(r, b);
    const double whole = exact_bytes(p, ADA_PAGE) * (double)pages, codes = code_bytes(p->E) / whole;
    const double fine = (double)(ADA_PAGE * (p->D + p->E)) / whole;
    const double most_shift = 1 / (aim * r->tolerance);
    double rest[ADA_CERTIFIED_ROWS] = {0}, allowed[ADA_CERTIFIED_ROWS];
    for (int64_t row = 0; row < r->rows; row++) {
        const row_state *own = &r->states[head * r->rows + row], *first = own - row % p->T;
        double norm2 = 0;
        for (int64_t i = 0; i < p->T; i++) norm2 += first[i].norm * first[i].norm;
        allowed[row] = aim * r->tolerance / (1 + r->tolerance) * sqrt(norm2 / (double)p->T) * own->z;
    }
    memset(s->gains, 0, (size_t)(BUCKETS * r->rows) * sizeof *s->gains);
    for (int64_t page = 0; page < pages; page++) {
        uint8_t *t = &r->tiers[head * r->pages + page], *steps = s->steps + 2 * page;
        double error[3][ADA_CERTIFIED_ROWS], first = 0, second = 0, both = 0;
        if (*t >= TIER_EXACT) continue;
        for (int64_t row = 0; row < r->rows; row++) {
            page_bound bound;
            bound_page(r, head, page, row, &bound);
            const double lse = p->lse ? most_shift / r->states[head * r->rows + row].z : 0;
            for (int i = TIER_FINE; i >= 0; i--) {
                const double share = bound.error[i] > 0 ? bound.error[i] / allowed[row] : 0;
                error[i][row] = i < (int)*t ? 0 : most(share, p->lse ? bound.shift[i] * lse : 0);
            }
            for (int i = 0; i < (int)*t; i++) error[i][row] = error[*t][row];
            first = most(first, error[0][row] - error[1][row]);
            second = most(second, error[1][row] - error[2][row]);
            both = most(both, error[0][row]);
        }
        if (!(both < INFINITY)) {
            *t = TIER_EXACT;
            continue;
        }
        steps[0] = (uint8_t)bucket_of(first / codes), steps[1] = (uint8_t)bucket_of(second / fine);
        if (steps[1] <= steps[0]) steps[0] = steps[1] = (uint8_t)bucket_of(both / (codes + fine));
        for (int64_t row = 0; row < r->rows; row++) {
            rest[row] += error[0][row];
            s->gains[steps[0] * r->rows + row] += error[0][row] - error[1][row];
            s->gains[steps[1] * r->rows + row] += error[1][row] - error[2][row];
        }
    }
    int limit = 0;
    for (; limit < BUCKETS; limit++) {
        bool met = true;
        for (int64_t row = 0; row < r->rows; row++) met &= rest[row] <= 1;
        if (met) break;
        for (int64_t row = 0; row < r->rows; row++) rest[row] -= s->gains[limit * r->rows + row];
    }
    for (int64_t page = 0; page < pages; page++) {
        uint8_t *t = &r->tiers[head * r->pages + page];
        const uint8_t *steps = s->steps + 2 * page;
        if (*t < TIER_FINE) *t = steps[1] < limit ? TIER_FINE : steps[0] < limit ? TIER_CODES : *t;
    }
}

/* Bytes that the tiers read, relative to those of all visible pages. */
static double bytes_of(const certifying *r, int64_t head) {
    const ada_problem *p = r->p;
    double bytes = 0, all = 0;
    const int64_t b = head / p->G;
    for (int64_t page = 0; page < pages_of(r, b); page++) {
        const tier t = (tier)r->tiers[head * r->pages + page];
        const double exact = exact_bytes(p, keys_of(r, b, page));
        if (t == TIER_HIDDEN) continue;
        all += exact;
        if (page < r->groups[head].coded) bytes += code_bytes(p->D);
        bytes += t == TIER_EXACT   ? exact
                 : t == TIER_FINE  ? code_bytes(p->E) + (double)(ADA_PAGE * (p->D + p->E))
                 : t == TIER_CODES ? code_bytes(p->E)
                                   : (double)p->E * (double)sizeof(float);
    }
    return all > 0 ? bytes / all : 1;
}

static void choose_task(void *context, ada_job *job, int64_t head, int worker) {
    certifying *r = context;
    group_state *group = &r->groups[head];
    (void)job;
    if (!group->open || group->unfit) return;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const pieces s = pieces_of(r, &carver);
    if (r->attempt == 0 && !join_masses(r, head)) {
        group->unfit = true;
        return;
    }
    if (r->attempt == 0) measure_away(r, head);
    choose_tiers(r, &s, head, AIM / (1 << r->attempt));
    group->bytes = bytes_of(r, head);
    if (group->bytes > WORTH) group->unfit = true;
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
static void refine_weights(const certifying *r, const pieces *s, int64_t head, int64_t page,
                           const float *weights, page_mass *masses) {
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

static void add_page(const certifying *r, const pieces *s, int64_t head, int64_t page, float *partial) {
    const ada_problem *p = r->p;
    const int64_t at = head * r->pages + page, b = head / p->G, g = head % p->G;
    const int E = (int)p->E;
    const tier t = (tier)r->tiers[at];
    page_mass *masses = r->masses + at * r->rows;
    const float *weights = r->weights + at * r->rows * ADA_PAGE;
    if (t >= TIER_FINE) {
        bool fit = true;
        if (t == TIER_FINE && !p->has_softcap) {
            refine_weights(r, s, head, page, weights, masses);
        } else {
            if (t == TIER_EXACT) {
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
    for (int64_t row = 0; row < r->rows && t != TIER_MEAN; row += ADA_ROW_GROUP) {
        const int n = rows_from(r, row);
        float *o = partial + row * (E + 1);
        if (t == TIER_EXACT)
            add_exact_values(r, s, o, masses + row, weights + row * ADA_PAGE, n, b, g, page);
        else
            add_codes(r, s, o, masses + row, weights + row * ADA_PAGE, n, head, page, t == TIER_FINE);
    }
}

/* The centres of a task's pages, for all that do not count as they are. */
static void add_centres(const certifying *r, const pieces *s, int64_t head, int64_t first, int n,
                        float *partial) {
    const ada_codes *codes = r->p->value.codes;
    const int E = (int)r->p->E;
    for (int64_t row = 0; row < r->rows; row += ADA_ROW_GROUP) {
        const int rows = rows_from(r, row);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < n; j++) {
                const int64_t at = head * r->pages + first + j;
                s->weights[i * ADA_PAGE + j] =
                    r->tiers[at] < TIER_EXACT ? r->masses[at * r->rows + row + i].sum : 0;
            }
        r->k->row_values_f32(partial + row * (E + 1), E + 1, s->weights, rows,
                             codes->centre + (head * codes->pages + first) * E, E, n, E);
    }
}

static void values_task(void *context, ada_job *job, int64_t task, int worker) {
    certifying *r = context;
    const int64_t head = task / r->chunks, pages = pages_of(r, head / r->p->G);
    const int64_t first = task % r->chunks * CHUNK, end = first + CHUNK < pages ? first + CHUNK : pages;
    const group_state *group = &r->groups[head];
    if (!group->open || group->unfit) return;
    float *partial = r->partials + task * r->rows * (r->p->E + 1);
    memset(partial, 0, (size_t)(r->rows * (r->p->E + 1)) * sizeof *partial);
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const pieces s = pieces_of(r, &carver);
    load_queries(r, &s, head / r->p->G, head % r->p->G);
    for (int64_t page = first; page < end; page++) {
        if (ada_job_cancelled(job, worker)) return;
        if (r->tiers[head * r->pages + page] != TIER_HIDDEN) add_page(r, &s, head, page, partial);
    }
    add_centres(r, &s, head, first, (int)(end - first), partial);
}

/* ---- the end ---- */

/* The output of a row; false where it cannot be held. */
static bool join_row(certifying *r, int64_t head, int64_t row) {
    const ada_problem *p = r->p;
    const int64_t E = p->E, h = head % p->G * r->group + row / p->T;
    row_state *state = &r->states[head * r->rows + row];
    float l = 0;
    memset(state->o, 0, (size_t)E * sizeof *state->o);
    for (int64_t chunk = 0; chunk * CHUNK < pages_of(r, head / p->G); chunk++) {
        const float *partial = r->partials + ((head * r->chunks + chunk) * r->rows + row) * (E + 1);
        for (int64_t e = 0; e < E; e++) state->o[e] += partial[e];
        l += partial[E];
    }
    const double factor = ada_row_factor(p, h, (double)state->reference, (double)l, &state->lse);
    state->z = with_sink(p, h, state, (double)l);
    bool finite = isfinite(state->z) && (l == 0 || (l > 0x1p-60f && factor >= FLT_MIN));
    for (int64_t e = 0; e < E; e++) {
        state->o[e] *= (float)factor;
        finite &= fabsf(state->o[e]) <= FLT_MAX;
    }
    return finite;
}

/* The bound of a head, relative to what the exact output is at least. */
static double bound_of(const certifying *r, int64_t head, int64_t first) {
    const ada_problem *p = r->p;
    double error2 = 0, norm2 = 0, lse = 0;
    for (int64_t row = first; row < first + p->T; row++) {
        const row_state *state = &r->states[head * r->rows + row];
        double sum = 0, shifts = 0;
        for (int64_t page = 0; page < pages_of(r, head / p->G); page++) {
            const tier t = (tier)r->tiers[head * r->pages + page];
            if (t == TIER_HIDDEN) continue;
            page_bound bound;
            bound_page(r, head, page, row, &bound);
            sum += bound.error[t], shifts += bound.shift[t];
        }
        if (state->z == 0) continue;
        if (!(shifts <= state->z / 2)) return INFINITY;
        sum /= state->z - shifts;
        error2 += sum * sum, norm2 += state->norm * state->norm;
        lse = fmax(lse, -log1p(-shifts / state->z));
    }
    if (p->lse && lse > r->tolerance) return INFINITY;
    if (error2 == 0) return 0;
    return norm2 > error2 ? sqrt(error2) / (sqrt(norm2) - sqrt(error2)) : INFINITY;
}

static void join_task(void *context, ada_job *job, int64_t head, int worker) {
    certifying *r = context;
    const ada_problem *p = r->p;
    group_state *group = &r->groups[head];
    (void)job, (void)worker;
    if (!group->open || group->unfit) return;
    for (int64_t row = 0; row < r->rows; row++)
        if (!join_row(r, head, row)) group->unfit = true;
    if (group->unfit) return;
    measure_away(r, head);
    group->open = false;
    for (int64_t h = 0; h < r->group; h++) {
        double *bound = &r->bounds[head * r->group + h];
        *bound = bound_of(r, head, h * p->T);
        group->open |= !(*bound <= r->tolerance);
    }
    if (group->open && r->attempt == ATTEMPTS - 1) group->unfit = true;
}

/* Queries' norms and what rounding may do to a score; false where codes of all keys would say too little. */
static bool start_group(certifying *r, const pieces *s, int64_t head) {
    const ada_problem *p = r->p;
    const ada_codes *keys = p->key.codes, *values = p->value.codes;
    const int64_t b = head / p->G, pages = pages_of(r, b);
    const int64_t coded = r->groups[head].coded;
    /* That follow each other in a score: rows are summed in lanes, codes with VNNI exactly. */
    const double additions = r->k->isa & ADA_ISA_AVX512VNNI ? (double)p->D / 8 + 32 : (double)p->D + 32;
    double error2 = 0;
    if (coded * 2 <= pages) return false;
    load_queries(r, s, b, head % p->G);
    for (int64_t page = 0; page < coded; page++) {
        const double error = (double)keys->norms[head * keys->pages + page].error[1];
        if (isinf(error) || isinf(values->norms[head * values->pages + page].row)) return false;
        error2 += error * error;
    }
    for (int64_t row = 0; row < r->rows; row++) {
        row_state *state = &r->states[head * r->rows + row];
        double sum = 0;
        for (int64_t d = 0; d < p->D; d++) {
            const double x = (double)s->queries[row * p->D + d];
            sum += x * x;
        }
        *state =
            (row_state){.query = sqrt(sum) * ADA_LN2 * 1.001, .o = r->outs + (head * r->rows + row) * p->E};
        state->rounding = state->query * additions * 0x1p-24;
        if (!(state->query < 0x1p60)) return false;
        if (state->query * sqrt(error2 / (double)(coded * ADA_PAGE)) > r->tolerance / 2) return false;
    }
    return true;
}

static void carve_all(certifying *r, ada_carver *c) {
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

static void store_group(const certifying *r, ada_budget *budget, int64_t head) {
    const ada_problem *p = r->p;
    const int64_t b = head / p->G;
    for (int64_t row = 0; row < r->rows; row++) {
        const row_state *state = &r->states[head * r->rows + row];
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
static ada_status attend_unfit(const certifying *r, ada_budget *budget, bool (*interrupt)(void *),
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

static bool compute(certifying *r, int threads, bool (*interrupt)(void *), void *context) {
    const int64_t heads = r->p->B * r->p->G, tasks = heads * r->chunks;
    if (!ada_parallel_for(tasks, threads, codes_task, r, interrupt, context)) return false;
    for (r->attempt = 0; r->attempt < ATTEMPTS; r->attempt++) {
        bool open = false;
        for (int64_t head = 0; head < heads; head++) open |= r->groups[head].open && !r->groups[head].unfit;
        if (!open) return true;
        if (!ada_parallel_for(heads, threads, choose_task, r, interrupt, context) ||
            !ada_parallel_for(tasks, threads, values_task, r, interrupt, context) ||
            !ada_parallel_for(heads, threads, join_task, r, interrupt, context))
            return false;
    }
    return true;
}

ada_status ada_certify(const ada_problem *p, ada_budget *budget, bool (*interrupt)(void *), void *context,
                       ada_error *error) {
    const int64_t heads = p->B * p->G, pages = (p->S + ADA_PAGE - 1) / ADA_PAGE;
    certifying r = {.p = p,
                    .k = ada_kernels_get(),
                    .tolerance = budget->tolerance,
                    .group = p->H / p->G,
                    .rows = p->H / p->G * p->T,
                    .pages = pages,
                    .chunks = (pages + CHUNK - 1) / CHUNK};
    const double start = ada_seconds_now();
    const int threads = ada_threads_for(p, heads * r.chunks,
                                        (double)(heads * r.rows) * (double)p->S * (double)(p->D + p->E) / 4);
    ada_carver size = {NULL, 0};
    pieces_of(&r, &size);
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
    const pieces s = pieces_of(&r, &own);
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
