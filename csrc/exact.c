/* The two instances of exact_tpl.h. */
#include "exact.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "execute.h"
#include "memory.h"
#include "rows.h"
#include "visible.h"

int64_t ada_exact_keys(const ada_problem *p) { return ada_block_count(p) * ADA_BLOCK; }

#define REAL float
#define KIND(name) name##_f32
#define OF_FLOATS(name) name##_f32
#include "read_tpl.h"
#include "exact_tpl.h"
#undef REAL
#undef KIND
#undef OF_FLOATS
#undef REAL_DTYPE
#undef REAL_LARGEST

#define REAL double
#define KIND(name) name##_f64
#define OF_FLOATS(name) name##_wide
#include "read_tpl.h"
#include "exact_tpl.h"
#undef REAL
#undef KIND
#undef OF_FLOATS
#undef REAL_DTYPE
#undef REAL_LARGEST

static void carve_results(const ada_problem *p, ada_carver *c, bool weights, ada_exact *exact) {
    exact->o = ada_carve(c, ADA_EXACT_ROWS * p->E * (int64_t)sizeof *exact->o);
    if (weights) exact->p = ada_carve(c, ADA_EXACT_ROWS * ada_exact_keys(p) * (int64_t)sizeof *exact->p);
}

int64_t ada_exact_scratch_bytes(const ada_problem *p) {
    ada_carver size = {NULL, 0};
    ada_exact exact;
    carve_results(p, &size, true, &exact);
    exact_scratch_of_f64(p, &size); /* the larger one */
    return size.used;
}

void ada_exact_rows(const ada_problem *p, const ada_kernels *k, bool f64, bool weights, int64_t b, int64_t h,
                    const int64_t *queries, int n, char *scratch, ada_exact *exact) {
    ada_carver carver = {scratch, 0};
    memset(exact, 0, sizeof *exact);
    carve_results(p, &carver, weights, exact);
    if (f64) {
        const exact_scratch_f64 s = exact_scratch_of_f64(p, &carver);
        exact_rows_f64(p, k, b, h, queries, n, &s, exact);
    } else {
        const exact_scratch_f32 s = exact_scratch_of_f32(p, &carver);
        exact_rows_f32(p, k, b, h, queries, n, &s, exact);
    }
}
