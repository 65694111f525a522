/* What codes leave open of a page, and which pages are read more exactly for it.
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

#include <string.h>

#include "certifying.h"

/* Beyond it a page's codes tell too little, in nats. */
#define MOST_SHIFT 0.6
/* Share of the tolerance that pages are chosen for: the output that they are chosen by is not the final one.
 */
#define AIM 0.9

/* Bytes, relative to all, from which on reading all is as fast, or nearly. */
#define WORTH 0.52

/* What a page may move the numerator of a row's output by, and its denominator, in each tier. */
typedef struct {
    double error[ADA_TIER_HIDDEN], shift[ADA_TIER_HIDDEN];
} page_bound;

static inline double least(double a, double b) { return a < b ? a : b; }
static inline double most(double a, double b) { return a > b ? a : b; }

static void bound_page(const ada_certifying *r, int64_t head, int64_t page, int64_t row, page_bound *bound) {
    const int64_t at = head * r->pages + page;
    const ada_codes *keys = r->p->key.codes, *values = r->p->value.codes;
    const ada_row_state *state = &r->states[head * r->rows + row];
    const ada_page_mass *m = &r->masses[at * r->rows + row];
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
    bound->shift[ADA_TIER_EXACT] = 1.1 * sum * (exact + state->bias) + own;
    bound->error[ADA_TIER_EXACT] = bound->shift[ADA_TIER_EXACT] * longest;
    for (int i = 0; i < ADA_TIER_EXACT; i++) bound->error[i] = bound->shift[i] = INFINITY;
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
        const ada_tier t = fine ? ADA_TIER_FINE : ADA_TIER_CODES;
        bound->shift[t] = shift;
        bound->error[t] = error + norm * (double)v->error[fine];
        if (fine) continue;
        bound->shift[ADA_TIER_MEAN] = shift;
        bound->error[ADA_TIER_MEAN] = error + (double)m->apart * spread;
    }
}

/* Distances of the centres from the rows' outputs, upper bounds. */
void ada_measure_away(ada_certifying *r, int64_t head) {
    const ada_codes *values = r->p->value.codes;
    const int E = (int)r->p->E;
    const int64_t b = head / r->p->G, pages = ada_pages_of(r, b);
    ada_row_state *rows = &r->states[head * r->rows];
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
            const int rest = ada_rows_from(r, row);
            r->k->row_scores_f32(dots, rows[row].o, rest, centre, E, n, E);
            for (int i = 0; i < rest; i++)
                for (int j = 0; j < n; j++) {
                    const double c2 = (double)norms[j].centre2, o2 = rows[row + i].norm * rows[row + i].norm;
                    const double slack = (E + 8) * 0x1p-22 * (c2 + o2), dot = (double)dots[i * ADA_BLOCK + j];
                    /* Keys without codes may have values so large that a float does not hold the product. */
                    const double away2 = isfinite(dot) ? c2 + o2 - 2 * dot + slack : INFINITY;
                    r->away[(head * r->pages + first + j) * r->rows + row + i] =
                        (float)(1.001 * sqrt(away2 > 0 ? away2 : 0));
                }
        }
    }
}

/* The bound of a head, relative to what the exact output is at least. */
double ada_bound_of(const ada_certifying *r, int64_t head, int64_t first) {
    const ada_problem *p = r->p;
    double error2 = 0, norm2 = 0, lse = 0;
    for (int64_t row = first; row < first + p->T; row++) {
        const ada_row_state *state = &r->states[head * r->rows + row];
        double sum = 0, shifts = 0;
        for (int64_t page = 0; page < ada_pages_of(r, head / p->G); page++) {
            const ada_tier t = (ada_tier)r->tiers[head * r->pages + page];
            if (t == ADA_TIER_HIDDEN) continue;
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

/* ---- choice ---- */

/* Bytes of a page: as it is, and of the codes of keys or values. */
static double exact_bytes(const ada_problem *p, int keys) {
    return (double)keys *
           (double)(p->D * ada_dtype_bytes(p->key.dtype) + p->E * ada_dtype_bytes(p->value.dtype));
}
static double code_bytes(int64_t width) { return (double)(ADA_PAGE + 2 * sizeof(float)) * (double)width; }

/* Relative to the reference of the whole row; the output as all centres make it. */
static bool join_masses(ada_certifying *r, int64_t head) {
    const ada_problem *p = r->p;
    const ada_codes *values = p->value.codes;
    const int64_t b = head / p->G, g = head % p->G, pages = ada_pages_of(r, b), E = p->E;
    for (int64_t row = 0; row < r->rows; row++) {
        ada_row_state *state = &r->states[head * r->rows + row];
        ada_page_mass *masses = &r->masses[head * r->pages * r->rows + row];
        float top = -INFINITY;
        double z = 0, coded = 0;
        for (int64_t page = 0; page < pages; page++)
            if (r->tiers[head * r->pages + page] != ADA_TIER_HIDDEN)
                top = fmaxf(top, masses[page * r->rows].scale);
        if (isinf(top)) top = 0; /* no key */
        state->reference = top;
        memset(state->o, 0, (size_t)E * sizeof *state->o);
        for (int64_t page = 0; page < pages; page++) {
            ada_page_mass *m = &masses[page * r->rows];
            if (r->tiers[head * r->pages + page] == ADA_TIER_HIDDEN) continue;
            const float scale = m->sum > 0 ? exp2f(m->scale - top) : 0;
            *m = (ada_page_mass){scale, m->sum * scale, m->norm * scale, m->apart * scale};
            z += (double)m->sum;
            if (page >= r->groups[head].coded) continue;
            const float *centre = values->centre + (head * values->pages + page) * E;
            coded += (double)m->sum;
            for (int64_t e = 0; e < E; e++) state->o[e] += m->sum * centre[e];
        }
        for (int64_t e = 0; e < E && coded > 0; e++) state->o[e] /= (float)coded;
        state->z = ada_with_sink(p, g * r->group + row / p->T, state, z);
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
    return ratio <= 0 || steps > ADA_CERTIFY_BUCKETS - 1 ? ADA_CERTIFY_BUCKETS - 1 : steps < 0 ? 0 : steps;
}

/* Raises pages, those first that gain most for their bytes, until the bound of every row is what it may be. A
 * page goes from its mean to codes and on to fine codes, or straight there where the second step gains more
 * for its bytes than the first. What fine codes leave out stays. */
static void raise_tiers(const ada_certifying *r, const ada_certify_scratch *s, int64_t head, double aim) {
    const ada_problem *p = r->p;
    const int64_t b = head / p->G, pages = ada_pages_of(r, b);
    const double whole = exact_bytes(p, ADA_PAGE) * (double)pages, codes = code_bytes(p->E) / whole;
    const double fine = (double)(ADA_PAGE * (p->D + p->E)) / whole;
    const double most_shift = 1 / (aim * r->tolerance);
    double rest[ADA_CERTIFIED_ROWS] = {0}, allowed[ADA_CERTIFIED_ROWS];
    for (int64_t row = 0; row < r->rows; row++) {
        const ada_row_state *own = &r->states[head * r->rows + row], *first = own - row % p->T;
        double norm2 = 0;
        for (int64_t i = 0; i < p->T; i++) norm2 += first[i].norm * first[i].norm;
        allowed[row] = aim * r->tolerance / (1 + r->tolerance) * sqrt(norm2 / (double)p->T) * own->z;
    }
    memset(s->gains, 0, (size_t)(ADA_CERTIFY_BUCKETS * r->rows) * sizeof *s->gains);
    for (int64_t page = 0; page < pages; page++) {
        uint8_t *t = &r->tiers[head * r->pages + page], *steps = s->steps + 2 * page;
        double error[3][ADA_CERTIFIED_ROWS], first = 0, second = 0, both = 0;
        if (*t >= ADA_TIER_EXACT) continue;
        for (int64_t row = 0; row < r->rows; row++) {
            page_bound bound;
            bound_page(r, head, page, row, &bound);
            const double lse = p->lse ? most_shift / r->states[head * r->rows + row].z : 0;
            for (int i = ADA_TIER_FINE; i >= 0; i--) {
                const double share = bound.error[i] > 0 ? bound.error[i] / allowed[row] : 0;
                error[i][row] = i < (int)*t ? 0 : most(share, p->lse ? bound.shift[i] * lse : 0);
            }
            for (int i = 0; i < (int)*t; i++) error[i][row] = error[*t][row];
            first = most(first, error[0][row] - error[1][row]);
            second = most(second, error[1][row] - error[2][row]);
            both = most(both, error[0][row]);
        }
        if (!(both < INFINITY)) {
            *t = ADA_TIER_EXACT;
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
    for (; limit < ADA_CERTIFY_BUCKETS; limit++) {
        bool met = true;
        for (int64_t row = 0; row < r->rows; row++) met &= rest[row] <= 1;
        if (met) break;
        for (int64_t row = 0; row < r->rows; row++) rest[row] -= s->gains[limit * r->rows + row];
    }
    for (int64_t page = 0; page < pages; page++) {
        uint8_t *t = &r->tiers[head * r->pages + page];
        const uint8_t *steps = s->steps + 2 * page;
        if (*t < ADA_TIER_FINE)
            *t = steps[1] < limit ? ADA_TIER_FINE : steps[0] < limit ? ADA_TIER_CODES : *t;
    }
}

/* Bytes that the tiers read, relative to those of all visible pages. */
static double bytes_of(const ada_certifying *r, int64_t head) {
    const ada_problem *p = r->p;
    double bytes = 0, all = 0;
    const int64_t b = head / p->G;
    for (int64_t page = 0; page < ada_pages_of(r, b); page++) {
        const ada_tier t = (ada_tier)r->tiers[head * r->pages + page];
        const double exact = exact_bytes(p, ada_keys_of(r, b, page));
        if (t == ADA_TIER_HIDDEN) continue;
        all += exact;
        if (page < r->groups[head].coded) bytes += code_bytes(p->D);
        bytes += t == ADA_TIER_EXACT   ? exact
                 : t == ADA_TIER_FINE  ? code_bytes(p->E) + (double)(ADA_PAGE * (p->D + p->E))
                 : t == ADA_TIER_CODES ? code_bytes(p->E)
                                       : (double)p->E * (double)sizeof(float);
    }
    return all > 0 ? bytes / all : 1;
}

void ada_choose_tiers(void *context, ada_job *job, int64_t head, int worker) {
    ada_certifying *r = context;
    ada_group_state *group = &r->groups[head];
    (void)job;
    if (!group->open || group->unfit) return;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const ada_certify_scratch s = ada_certify_scratch_of(r, &carver);
    if (r->attempt == 0 && !join_masses(r, head)) {
        group->unfit = true;
        return;
    }
    if (r->attempt == 0) ada_measure_away(r, head);
    raise_tiers(r, &s, head, AIM / (1 << r->attempt));
    group->bytes = bytes_of(r, head);
    if (group->bytes > WORTH) group->unfit = true;
}
