/* Pages to codes and norms. */
#include "codes.h"

#include <math.h>
#include <string.h>

#include "execute.h"

#define REAL float
#define KIND(name) name##_f32
#include "read_tpl.h"

/* Squares of sums of larger numbers may leave float's range. */
#define LARGEST 1e15f

typedef struct {
    const ada_array *store;
    const ada_codes *codes;
    const int64_t *until;
    bool values;
    char *scratch; /* of worker w: from scratch + w * scratch_bytes */
    int64_t scratch_bytes, most;
} coding;

typedef struct {
    float *x, *rest, *away; /* [ADA_PAGE][width] */
    float *gram, *up;       /* [ADA_PAGE][ADA_PAGE] */
} pieces;

static pieces pieces_of(int64_t width, ada_carver *c) {
    const int64_t page = ADA_PAGE * width * (int64_t)sizeof(float),
                  square = ADA_PAGE * ADA_PAGE * sizeof(float);
    pieces s;
    s.x = ada_carve(c, page), s.rest = ada_carve(c, page), s.away = ada_carve(c, page);
    s.gram = ada_carve(c, square), s.up = ada_carve(c, square);
    return s;
}

static float largest_of(const float *x, int64_t n) {
    float largest = 0;
    for (int64_t i = 0; i < n; i++) {
        const float size = fabsf(x[i]);
        largest = size > largest || isnan(size) ? size : largest; /* a NaN stays */
    }
    return largest;
}

/* An upper bound of the largest singular value of x, which is spoilt: the eighth root of the sum of all their
 * eighth powers, at most 1.7 times as large; and what rounding may have taken from it. */
static double singular_bound(const pieces *s, float *x, int width) {
    const ada_kernels *k = ada_kernels_get();
    const double top = (double)largest_of(x, ADA_PAGE * width);
    double trace = 0, fourth = 0;
    if (top == 0) return 0;
    for (int i = 0; i < ADA_PAGE * width; i++) x[i] = (float)((double)x[i] / top);
    scores_of_rows_f32(k, s->gram, x, ADA_PAGE, x, width, ADA_PAGE, width);
    scores_of_rows_f32(k, s->up, s->gram, ADA_PAGE, s->gram, ADA_PAGE, ADA_PAGE, ADA_PAGE);
    for (int i = 0; i < ADA_PAGE; i++) trace += (double)s->gram[i * ADA_PAGE + i];
    for (int i = 0; i < ADA_PAGE * ADA_PAGE; i++) fourth += (double)s->up[i] * (double)s->up[i];
    return top * sqrt(1.001 * sqrt(sqrt(fourth)) + (width + 128) * 0x1p-23 * trace);
}

static long nearest_code(double x) {
    const long nearest = lrint(x);
    return nearest > 127 ? 127 : nearest < -127 ? -127 : nearest;
}

double ada_longest_row(const float *x, int n, int width) {
    double longest = 0;
    for (int j = 0; j < n; j++) {
        double sum = 0;
        for (int c = 0; c < width; c++) sum += (double)x[j * width + c] * (double)x[j * width + c];
        longest = sum > longest ? sum : longest;
    }
    return sqrt(longest) * 1.001;
}

/* Codes of one coordinate of a page; rest becomes what the first leave out, x what both do. */
static void code_column(const coding *r, float *x, float *rest, uint8_t *code, uint8_t *fine, int c,
                        float *centre, float *scale) {
    const int width = (int)r->store->shape[3];
    double sum = 0;
    float largest = 0;
    for (int j = 0; j < ADA_PAGE; j++) sum += (double)x[j * width];
    *centre = (float)(sum / ADA_PAGE);
    for (int j = 0; j < ADA_PAGE; j++) largest = fmaxf(largest, fabsf(x[j * width] - *centre));
    *scale = largest < 1e-30f ? 0 : largest / 127;
    const double steps = *scale > 0 ? 1 / (double)*scale : 0;
    for (int j = 0; j < ADA_PAGE; j++) {
        const double away = (double)x[j * width] - (double)*centre;
        const long near = nearest_code(away * steps);
        const double left = away - (double)near * (double)*scale;
        const long nearer = nearest_code(left * steps * ADA_FINE_STEPS);
        const int64_t at = ada_code_place(width, r->values, j, c);
        code[at] = (uint8_t)(near + 128), fine[at] = (uint8_t)(nearer + 128);
        rest[j * width] = (float)left;
        x[j * width] = (float)(left - (double)nearer * (double)*scale / ADA_FINE_STEPS);
    }
}

static void code_page(const coding *r, const pieces *s, int64_t b, int64_t g, int64_t page) {
    const ada_codes *codes = r->codes;
    const int width = (int)r->store->shape[3];
    const int64_t at = (b * r->store->shape[1] + g) * codes->pages + page,
                  first = at * ada_code_bytes(width, r->values);
    ada_code_norms *norms = &codes->norms[at];
    float *centre = codes->centre + at * width;
    ada_load_rows_f32(ada_kernels_get(), s->x, width, r->store, b, g, page * ADA_PAGE, ADA_PAGE, width);
    if (!(largest_of(s->x, ADA_PAGE * width) <= LARGEST)) {
        *norms = (ada_code_norms){{INFINITY, INFINITY}, {INFINITY, INFINITY}, INFINITY, INFINITY, INFINITY};
        return;
    }
    norms->row = (float)ada_longest_row(s->x, ADA_PAGE, width);
    memcpy(s->away, s->x, (size_t)(ADA_PAGE * width) * sizeof *s->x);
    for (int c = 0; c < width; c++)
        code_column(r, s->x + c, s->rest + c, codes->code + first, codes->fine + first, c, centre + c,
                    codes->scale + at * width + c);
    for (int j = 0; j < ADA_PAGE; j++)
        for (int c = 0; c < width; c++) s->away[j * width + c] -= centre[c];
    double centre2 = 0;
    for (int c = 0; c < width; c++) centre2 += (double)centre[c] * (double)centre[c];
    norms->centre2 = (float)centre2;
    norms->error_row[0] = (float)ada_longest_row(s->rest, ADA_PAGE, width);
    norms->error_row[1] = (float)ada_longest_row(s->x, ADA_PAGE, width);
    norms->error[0] = (float)singular_bound(s, s->rest, width);
    norms->error[1] = (float)singular_bound(s, s->x, width);
    norms->spread = (float)singular_bound(s, s->away, width);
}

static void code_task(void *context, ada_job *job, int64_t task, int worker) {
    const coding *r = context;
    const int64_t G = r->store->shape[1], head = task / r->most, b = head / G;
    const int64_t page = r->codes->coded[b] + task % r->most;
    (void)job;
    ada_carver carver = {r->scratch + worker * r->scratch_bytes, 0};
    const pieces s = pieces_of(r->store->shape[3], &carver);
    if (page < r->until[b]) code_page(r, &s, b, head % G, page);
}

ada_status ada_code_pages(const ada_array *store, const ada_codes *codes, bool values, const int64_t *until,
                          ada_error *error) {
    coding r = {.store = store, .codes = codes, .until = until, .values = values};
    for (int64_t b = 0; b < store->shape[0]; b++)
        if (until[b] - codes->coded[b] > r.most) r.most = until[b] - codes->coded[b];
    if (r.most == 0) return ADA_OK;
    ada_carver size = {NULL, 0};
    pieces_of(store->shape[3], &size);
    const int64_t tasks = store->shape[0] * store->shape[1] * r.most;
    const int threads = tasks < ada_get_num_threads() ? (int)tasks : ada_get_num_threads();
    r.scratch_bytes = size.used;
    r.scratch = ada_scratch_take(threads * size.used);
    if (!r.scratch) return ada_no_scratch(threads * size.used, error);
    ada_parallel_for(tasks, threads, code_task, &r, NULL, NULL);
    ada_scratch_give_back(r.scratch);
    return ADA_OK;
}
