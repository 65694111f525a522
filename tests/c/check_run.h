/* The harness of check_kernels.c, second half: runs every kernel of a slot on a case, verifies what it
 * leaves.
 *
 * A generator makes the case: buffers, their expectations, and the call, wrapped in RUN. To check, RUN makes
 * the call once per kernel, each time on the same inputs; to measure, many times, the kernels taking turns.
 */
#ifndef CHECK_RUN_H
#define CHECK_RUN_H

#include "check.h"

static void fail(check *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void fail(check *c, const char *format, ...) {
    kernel *k = c->kernels[c->running];
    if (!k->failed) {
        char text[400];
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        printf("%s %s: seed %" PRIu64 ", case %d (%s): %s\n", k->slot, k->isa, c->seed, c->index, c->shape,
               text);
    }
    k->failed = true;
}

/* The error as a share of its bound. */
static double badness(const check *c, const kernel *k, const buffer *b, int64_t i, const expectation *e) {
    if (e->rule == ANY) return 0;
    if (e->rule == BITS) return bits_at(b, i) == (uint64_t)e->value ? 0 : INFINITY;
    wide x = value_at(b, i);
    if (e->rule == NONFINITE) return isfinite(x) ? INFINITY : 0;
    double tolerance = e->tolerance + e->exp2 * exp2_error(c, k);
    if (isnan(e->value)) return isnan(x) ? 0 : INFINITY;
    if (x == e->value) return 0;
    if (isinf(x) && fabsl(e->value) + tolerance >= c->limit.largest && signbit(x) == signbit(e->value))
        return 0;
    return isfinite(x) && tolerance > 0 ? (double)(fabsl(x - e->value) / tolerance) : INFINITY;
}

static void fail_at(check *c, const buffer *b, int64_t i, const char *what) {
    if (b->columns < b->count)
        fail(c, "%s[%lld][%lld] %s", b->name, (long long)(i / b->columns), (long long)(i % b->columns), what);
    else
        fail(c, "%s[%lld] %s", b->name, (long long)i, what);
}

static void verify_element(check *c, kernel *k, const buffer *b, int64_t i, const expectation *e) {
    char what[160];
    double bad = badness(c, k, b, i, e);
    if (bad > k->worst) k->worst = bad;
    if (bad <= 1) return;
    if (e->rule == BITS)
        snprintf(what, sizeof what, "has bits %#" PRIx64 ", expected %#" PRIx64, bits_at(b, i),
                 (uint64_t)e->value);
    else if (e->rule == NONFINITE)
        snprintf(what, sizeof what, "is %.9Lg, expected NaN or an infinity", value_at(b, i));
    else
        snprintf(what, sizeof what, "is %.17Lg, expected %.17Lg within %.3g", value_at(b, i), e->value,
                 e->tolerance + e->exp2 * exp2_error(c, k));
    fail_at(c, b, i, what);
}

static void verify_buffer(check *c, kernel *k, const buffer *b) {
    const size_t start = (size_t)(b->data - b->mapping), end = start + (size_t)(b->count * b->bytes);
    for (size_t at = 0; at < b->mapped; at++) {
        if (at == start && end == b->mapped) break;
        if (at == start) at = end;
        if (b->mapping[at] != b->before[at]) {
            fail(c, "wrote %td bytes from the start of %s, which has %zu", at - start, b->name, end - start);
            break;
        }
    }
    for (int64_t i = 0; i < b->count && !k->failed; i++) {
        const expectation *e = b->expected ? &b->expected[i] : NULL;
        if (e && e->rule != SAME)
            verify_element(c, k, b, i, e);
        else if (memcmp(b->data + i * b->bytes, b->before + start + i * b->bytes, (size_t)b->bytes) != 0)
            fail_at(c, b, i, "was changed");
    }
}

/* Tells AddressSanitizer, if it is there, about the zones around the data. */
static void guard(const buffer *b, bool on) {
    char *data_end = b->data + b->count * b->bytes, *end = b->mapping + b->mapped;
    if (on) {
        ASAN_POISON_MEMORY_REGION(b->mapping, (size_t)(b->data - b->mapping));
        ASAN_POISON_MEMORY_REGION(data_end, (size_t)(end - data_end));
    } else {
        ASAN_UNPOISON_MEMORY_REGION(b->mapping, b->mapped);
    }
    (void)data_end, (void)end;
}

static void check_result(check *c) {
    if (!c->any_result && c->result != c->expected)
        fail(c, "returned %#" PRIx64 ", expected %#" PRIx64, c->result, c->expected);
}

static double now(void), measure_peak(const check *c);

/* Kernels take turns, so that all see the same weather; the first rounds find how many calls are a sample. */
static bool next_sample(check *c) {
    double elapsed = now() - c->started;
    if (c->running >= 0) {
        kernel *k = c->kernels[c->running];
        check_result(c);
        c->start += c->turns;
        if (c->sample < CALIBRATIONS) {
            double turns = 3e-4 / (elapsed / (double)k->turns + 1e-9);
            k->turns = turns > 1 ? (int64_t)turns : 1;
        } else {
            k->ns[c->sample - CALIBRATIONS] = elapsed * 1e9 / (double)k->turns;
        }
    }
    if (++c->running == c->n_kernels) c->running = 0, c->sample++;
    if (c->sample == CALIBRATIONS + SAMPLES) return false;
    if (c->running == 0 && c->sample >= CALIBRATIONS) c->peaks[c->sample - CALIBRATIONS] = measure_peak(c);
    kernel *k = c->kernels[c->running];
    if (c->sample == 0) k->turns = 1;
    c->turns = k->turns;
    c->kernel = k->run;
    c->started = now();
    return true;
}

/* Puts the inputs in place and chooses the next kernel, after checking what the previous one left. */
static bool next_run(check *c) {
    if (c->bench) return next_sample(c);
    if (c->running >= 0) check_result(c);
    for (buffer *b = c->buffers; b < c->buffers + c->n_buffers; b++) {
        if (c->running < 0) {
            b->before = malloc(b->mapped);
            memcpy(b->before, b->mapping, b->mapped);
        } else {
            guard(b, false);
            verify_buffer(c, c->kernels[c->running], b);
            memcpy(b->mapping, b->before, b->mapped);
        }
    }
    c->result = 0;
    c->turns = 1;
    while (++c->running < c->n_kernels)
        if (!c->kernels[c->running]->failed && !(c->kernels[c->running]->needs & c->without)) {
            c->kernel = c->kernels[c->running]->run;
            for (buffer *b = c->buffers; b < c->buffers + c->n_buffers; b++) guard(b, true);
            return true;
        }
    return false;
}

#define RUN(c, statement)                                                                                    \
    while (next_run(c))                                                                                      \
        for ((c)->turn = (c)->start; (c)->turn < (c)->start + (c)->turns; (c)->turn++) statement
/* The kernel under check, called through the type of its slot. */
#define CALL_AS(c, slot, ...) (((ada_##slot##_fn *)(c)->kernel)(__VA_ARGS__))
#define CALL(c, op, ...)                                                                                     \
    ((c)->real == ADA_F32 ? CALL_AS(c, op##_f32, __VA_ARGS__) : CALL_AS(c, op##_f64, __VA_ARGS__))

#endif
