/* The only validator. Every message is one sentence: the argument, what was expected, what came. */
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adaattn.h"

/* Longest head size: sizes of rows and tiles stay far inside an int. */
#define MAX_HEAD_SIZE ((int64_t)1 << 16)
#define MAX_POSITION ((int64_t)1 << 40)

ada_status ada_fail(ada_error *error, ada_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    error->status = status;
    vsnprintf(error->message, sizeof error->message, format, args);
    va_end(args);
    return status;
}

static const struct {
    const char *name;
    int bytes;
} dtypes[] = {
#define ADA_DTYPE(NAME, name, bytes) {#name, bytes},
#include "dtypes.def"
#undef ADA_DTYPE
    {"bool", 1}, {"int64", 8}, {"uint64", 8}, {"int8", 1}};

const char *ada_dtype_name(ada_dtype dtype) { return dtypes[dtype].name; }
int ada_dtype_bytes(ada_dtype dtype) { return dtypes[dtype].bytes; }

const char *ada_rung_name(ada_rung rung) {
    static const char *const names[] = {
        "auto",
#define ADA_RUNG(NAME, name) name,
#include "rungs.def"
#undef ADA_RUNG
    };
    return names[rung];
}

static bool is_floating(ada_dtype dtype) { return dtype < ADA_BOOL; }

typedef struct {
    char text[112];
} shape_text;

static shape_text shape_of(const ada_array *a) {
    shape_text s = {"("};
    size_t used = 1;
    for (int i = 0; i < a->ndim; i++)
        used += (size_t)snprintf(s.text + used, sizeof s.text - used, i ? ", %lld" : "%lld",
                                 (long long)a->shape[i]);
    snprintf(s.text + used, sizeof s.text - used, a->ndim == 1 ? ",)" : ")");
    return s;
}

static ada_status check_qkv(const ada_array *a, const char *name, const char *letters, ada_error *error) {
    if (!is_floating(a->dtype) && !a->pages)
        return ada_fail(error, ADA_ERR_DTYPE, "%s: expected float32, float64, float16 or bfloat16, got %s",
                        name, ada_dtype_name(a->dtype));
    if (a->ndim != 4)
        return ada_fail(error, ADA_ERR_SHAPE, "%s: expected 4 dimensions %s, got %d with shape %s", name,
                        letters, a->ndim, shape_of(a).text);
    for (int i = 0; i < 4; i++)
        if (a->shape[i] < 1)
            return ada_fail(error, ADA_ERR_SHAPE, "%s: expected sizes of at least 1 in %s, got shape %s",
                            name, letters, shape_of(a).text);
    if (a->shape[3] > MAX_HEAD_SIZE)
        return ada_fail(error, ADA_ERR_SHAPE, "%s: expected a head size of at most %lld, got %lld", name,
                        (long long)MAX_HEAD_SIZE, (long long)a->shape[3]);
    return ADA_OK;
}

static ada_status check_inputs(ada_problem *p, ada_error *error) {
    const ada_array *q = &p->query, *k = &p->key, *v = &p->value;
    if (check_qkv(q, "query", "(B, H, T, D)", error) || check_qkv(k, "key", "(B, G, S, D)", error) ||
        check_qkv(v, "value", "(B, G, S, E)", error))
        return error->status;
    if (!p->stored && (k->dtype != q->dtype || v->dtype != q->dtype))
        return ada_fail(error, ADA_ERR_DTYPE, "%s: expected query's dtype %s, got %s",
                        k->dtype != q->dtype ? "key" : "value", ada_dtype_name(q->dtype),
                        ada_dtype_name(k->dtype != q->dtype ? k->dtype : v->dtype));
    p->B = q->shape[0], p->H = q->shape[1], p->T = q->shape[2], p->D = q->shape[3];
    p->G = k->shape[1], p->S = k->shape[2], p->E = v->shape[3];
    if (k->shape[0] != p->B)
        return ada_fail(error, ADA_ERR_SHAPE, "key: expected query's batch size %lld, got shape %s",
                        (long long)p->B, shape_of(k).text);
    if (k->shape[3] != p->D)
        return ada_fail(error, ADA_ERR_SHAPE, "key: expected query's head size %lld, got shape %s",
                        (long long)p->D, shape_of(k).text);
    if (p->H % p->G)
        return ada_fail(error, ADA_ERR_SHAPE,
                        "key: expected a number of heads that divides query's %lld, got %lld",
                        (long long)p->H, (long long)p->G);
    if (v->shape[0] != p->B || v->shape[1] != p->G || v->shape[2] != p->S)
        return ada_fail(error, ADA_ERR_SHAPE,
                        "value: expected shape (%lld, %lld, %lld, E) like key's, got %s", (long long)p->B,
                        (long long)p->G, (long long)p->S, shape_of(v).text);
    return ADA_OK;
}

bool ada_broadcast(const ada_problem *p, ada_array *a) {
    const int64_t target[4] = {p->B, p->H, p->T, p->S};
    ada_array wide = *a;
    bool fits = a->ndim <= 4;
    for (int i = 3, j = a->ndim - 1; fits && i >= 0; i--, j--) {
        int64_t size = j < 0 ? 1 : a->shape[j];
        fits = size == target[i] || size == 1;
        wide.shape[i] = target[i];
        wide.stride[i] = size == 1 ? 0 : a->stride[j];
    }
    wide.ndim = 4;
    if (fits) *a = wide;
    return fits;
}

static ada_status broadcast_mask(ada_problem *p, ada_error *error) {
    ada_array *mask = &p->attn_mask;
    if (!mask->data) return ADA_OK;
    if (mask->dtype != ADA_BOOL && !is_floating(mask->dtype))
        return ada_fail(error, ADA_ERR_DTYPE, "attn_mask: expected bool or a floating dtype, got %s",
                        ada_dtype_name(mask->dtype));
    if (!ada_broadcast(p, mask))
        return ada_fail(error, ADA_ERR_SHAPE,
                        "attn_mask: expected a shape that broadcasts to (%lld, %lld, %lld, %lld), got %s",
                        (long long)p->B, (long long)p->H, (long long)p->T, (long long)p->S,
                        shape_of(mask).text);
    return ADA_OK;
}

/* A vector over the batch, or a scalar where that is allowed (then of stride 0). */
static ada_status check_per_sequence(ada_array *a, const char *name, bool scalar_allowed, int64_t B,
                                     ada_error *error) {
    if (!a->data) return ADA_OK;
    if (scalar_allowed && a->ndim == 0) {
        a->stride[0] = 0;
        return ADA_OK;
    }
    if (a->ndim != 1 || a->shape[0] != B)
        return ada_fail(error, ADA_ERR_SHAPE, "%s: expected %sshape (%lld,), got %s", name,
                        scalar_allowed ? "an int or " : "", (long long)B, shape_of(a).text);
    return ADA_OK;
}

static ada_status check_range(const ada_array *a, const char *name, int64_t low, int64_t high,
                              ada_error *error) {
    int64_t n = !a->data ? 0 : a->ndim ? a->shape[0] : 1;
    for (int64_t b = 0; b < n; b++) {
        int64_t x = *(const int64_t *)((const char *)a->data + b * a->stride[0]);
        if (x < low || x > high)
            return ada_fail(error, ADA_ERR_ARGUMENT, "%s: expected integers from %lld to %lld, got %lld",
                            name, (long long)low, (long long)high, (long long)x);
    }
    return ADA_OK;
}

static ada_status check_alibi(ada_problem *p, ada_error *error) {
    ada_array *a = &p->alibi_slopes;
    if (!a->data) return ADA_OK;
    bool per_head = a->ndim == 1 && a->shape[0] == p->H;
    if (!per_head && !(a->ndim == 2 && a->shape[0] == p->B && a->shape[1] == p->H))
        return ada_fail(error, ADA_ERR_SHAPE, "alibi_slopes: expected shape (%lld,) or (%lld, %lld), got %s",
                        (long long)p->H, (long long)p->B, (long long)p->H, shape_of(a).text);
    if (per_head) {
        a->stride[1] = a->stride[0], a->shape[1] = a->shape[0];
        a->stride[0] = 0, a->shape[0] = p->B, a->ndim = 2;
    }
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            double x = *(const double *)((const char *)a->data + b * a->stride[0] + h * a->stride[1]);
            if (!isfinite(x))
                return ada_fail(error, ADA_ERR_ARGUMENT, "alibi_slopes: expected finite numbers, got %g", x);
        }
    return ADA_OK;
}

static ada_status check_sinks(const ada_problem *p, ada_error *error) {
    const ada_array *a = &p->sinks;
    if (!a->data) return ADA_OK;
    if (a->ndim != 1 || a->shape[0] != p->H)
        return ada_fail(error, ADA_ERR_SHAPE, "sinks: expected shape (%lld,), got %s", (long long)p->H,
                        shape_of(a).text);
    for (int64_t h = 0; h < p->H; h++) {
        double x = *(const double *)((const char *)a->data + h * a->stride[0]);
        if (!(x < INFINITY))
            return ada_fail(error, ADA_ERR_ARGUMENT, "sinks: expected finite numbers or -inf, got %g", x);
    }
    return ADA_OK;
}

ada_status ada_check_rung(const ada_problem *p, const char *name, ada_rung rung, ada_error *error) {
    if (rung != ADA_RUNG_FP8 || p->on_gpu) return ADA_OK;
    return ada_fail(error, ADA_ERR_ARGUMENT,
                    "%s: expected a rung that CPUs compute, got 'fp8', which takes a GPU of compute "
                    "capability 8.9 or more",
                    name);
}

static ada_status check_numbers(ada_problem *p, ada_error *error) {
    if (p->window_left < 0 || p->window_right < 0)
        return ada_fail(error, ADA_ERR_ARGUMENT, "window: expected integers of at least 0 or None, got %lld",
                        (long long)(p->window_left < 0 ? p->window_left : p->window_right));
    if (p->has_softcap && !(p->softcap > 0 && isfinite(p->softcap)))
        return ada_fail(error, ADA_ERR_ARGUMENT, "softcap: expected a finite number above 0, got %g",
                        p->softcap);
    if (p->has_scale && !(p->scale > 0 && isfinite(p->scale)))
        return ada_fail(error, ADA_ERR_ARGUMENT, "scale: expected a finite number above 0, got %g", p->scale);
    if (!(p->dropout_p >= 0 && p->dropout_p <= 1))
        return ada_fail(error, ADA_ERR_ARGUMENT, "dropout_p: expected a number from 0 to 1, got %g",
                        p->dropout_p);
    if (p->dropout_p > 0 && !p->seed.data)
        return ada_fail(error, ADA_ERR_ARGUMENT,
                        "seed: expected an int or %lld ints since dropout_p is %g, got None", (long long)p->B,
                        p->dropout_p);
    if (p->has_tolerance && !(p->tolerance > 0 && isfinite(p->tolerance)))
        return ada_fail(error, ADA_ERR_ARGUMENT, "tolerance: expected a finite number above 0, got %g",
                        p->tolerance);
    if (p->precision.qk != p->precision.pv &&
        (p->precision.qk == ADA_RUNG_FP64 || p->precision.pv == ADA_RUNG_FP64))
        return ada_fail(error, ADA_ERR_ARGUMENT,
                        "precision: expected 'fp64' for both products or none, got ('%s', '%s')",
                        ada_rung_name(p->precision.qk), ada_rung_name(p->precision.pv));
    if (ada_check_rung(p, "precision", p->precision.qk, error) ||
        ada_check_rung(p, "precision", p->precision.pv, error))
        return error->status;
    if (p->has_num_threads && p->num_threads < 1)
        return ada_fail(error, ADA_ERR_ARGUMENT, "num_threads: expected an int of at least 1, got %lld",
                        (long long)p->num_threads);
    return ADA_OK;
}

ada_status ada_problem_init(ada_problem *p, ada_error *error) {
    if (check_inputs(p, error) || broadcast_mask(p, error) || check_alibi(p, error) ||
        check_sinks(p, error) || check_per_sequence(&p->kv_lengths, "kv_lengths", false, p->B, error) ||
        check_range(&p->kv_lengths, "kv_lengths", 0, p->S, error) ||
        check_per_sequence(&p->query_offset, "query_offset", true, p->B, error) ||
        check_range(&p->query_offset, "query_offset", -MAX_POSITION, MAX_POSITION, error) ||
        check_per_sequence(&p->seed, "seed", true, p->B, error) || check_numbers(p, error))
        return error->status;
    if (!p->has_scale) p->scale = 1 / sqrt((double)p->D);
    /* Beyond any position a window is no limit. */
    if (p->window_left > 2 * MAX_POSITION) p->window_left = ADA_UNBOUNDED;
    if (p->window_right > 2 * MAX_POSITION) p->window_right = ADA_UNBOUNDED;
    /* In log2 units the cap would overflow: it is none. */
    if (!isfinite(p->softcap * 1.5)) p->has_softcap = false;
    /* Queries are multiplied with the scale first, which must not leave float's range by itself. */
    const bool fp32_scale = p->scale * 1.5 > FLT_MIN && p->scale * 1.5 < FLT_MAX;
    if (p->precision.qk == ADA_RUNG_AUTO)
        p->precision.qk = p->precision.pv = p->query.dtype == ADA_F64 ? ADA_RUNG_FP64 : ADA_RUNG_FP32;
    p->only_f64 = !fp32_scale;
    if (!fp32_scale) p->precision.qk = p->precision.pv = ADA_RUNG_FP64;
    p->compute_f64 = p->precision.qk == ADA_RUNG_FP64;
    p->most_bias = 1024;
    p->drop_below = (uint64_t)(p->dropout_p * 0x1p32);
    if (p->dropout_p == 1) p->dropout_p = 0; /* nothing is left to be scaled */
    return ADA_OK;
}

void ada_array_extent(const ada_array *a, uintptr_t *low, uintptr_t *high) {
    *low = *high = (uintptr_t)a->data;
    for (int i = 0; i < a->ndim; i++) {
        int64_t reach = (a->shape[i] - 1) * a->stride[i];
        if (reach < 0)
            *low -= (uintptr_t)-reach;
        else
            *high += (uintptr_t)reach;
    }
    *high += (uintptr_t)ada_dtype_bytes(a->dtype);
}

/* True where every dimension steps over all that the smaller-stepping ones cover. */
static bool elements_are_distinct(const ada_array *a) {
    int64_t covered = ada_dtype_bytes(a->dtype);
    bool used[4] = {false};
    for (int n = 0; n < a->ndim; n++) {
        int next = -1;
        for (int i = 0; i < a->ndim; i++)
            if (!used[i] && (next < 0 || llabs(a->stride[i]) < llabs(a->stride[next]))) next = i;
        used[next] = true;
        if (a->shape[next] == 1) continue;
        if (llabs(a->stride[next]) < covered) return false;
        covered += (a->shape[next] - 1) * llabs(a->stride[next]);
    }
    return true;
}

ada_status ada_problem_check_out(const ada_problem *p, ada_error *error) {
    const ada_array *out = &p->out;
    const int64_t shape[4] = {p->B, p->H, p->T, p->E};
    if (out->dtype != p->query.dtype)
        return ada_fail(error, ADA_ERR_DTYPE, "out: expected query's dtype %s, got %s",
                        ada_dtype_name(p->query.dtype), ada_dtype_name(out->dtype));
    if (out->ndim != 4 || memcmp(out->shape, shape, sizeof shape))
        return ada_fail(error, ADA_ERR_SHAPE, "out: expected shape (%lld, %lld, %lld, %lld), got %s",
                        (long long)p->B, (long long)p->H, (long long)p->T, (long long)p->E,
                        shape_of(out).text);
    if (!elements_are_distinct(out))
        return ada_fail(error, ADA_ERR_ARGUMENT,
                        "out: expected elements with a place in memory each, got an array "
                        "whose strides overlap");
    const struct {
        const ada_array *array;
        const char *name;
    } inputs[] = {{&p->query, "query"}, {&p->key, "key"}, {&p->value, "value"}, {&p->attn_mask, "attn_mask"}};
    uintptr_t low, high, input_low, input_high;
    ada_array_extent(out, &low, &high);
    for (int i = 0; i < 4; i++) {
        if (!inputs[i].array->data) continue;
        ada_array_extent(inputs[i].array, &input_low, &input_high);
        if (low < input_high && input_low < high)
            return ada_fail(error, ADA_ERR_ARGUMENT,
                            "out: expected memory apart from the inputs, got a range of "
                            "memory that overlaps that of %s",
                            inputs[i].name);
    }
    return ADA_OK;
}

static ada_status check_merged(const ada_array *a, const char *name, const ada_array *model, const char *like,
                               int ndim, ada_error *error) {
    if (a->dtype != model->dtype)
        return ada_fail(error, ADA_ERR_DTYPE, "%s: expected %s's dtype %s, got %s", name, like,
                        ada_dtype_name(model->dtype), ada_dtype_name(a->dtype));
    if (a->ndim != ndim || memcmp(a->shape, model->shape, (size_t)ndim * sizeof a->shape[0]))
        return ada_fail(error, ADA_ERR_SHAPE,
                        "%s: expected %d dimensions with the sizes of %s %s, got shape %s", name, ndim, like,
                        shape_of(model).text, shape_of(a).text);
    return ADA_OK;
}

ada_status ada_merge_init(const ada_merge_problem *m, ada_error *error) {
    if (check_qkv(&m->out_a, "out_a", "(B, H, T, E)", error) ||
        check_merged(&m->out_b, "out_b", &m->out_a, "out_a", 4, error))
        return error->status;
    ada_array lse = m->out_a;
    lse.dtype = lse.dtype == ADA_F64 ? ADA_F64 : ADA_F32;
    lse.ndim = 3;
    if (m->lse_a.dtype != lse.dtype)
        return ada_fail(error, ADA_ERR_DTYPE, "lse_a: expected %s for outputs of dtype %s, got %s",
                        ada_dtype_name(lse.dtype), ada_dtype_name(m->out_a.dtype),
                        ada_dtype_name(m->lse_a.dtype));
    if (check_merged(&m->lse_a, "lse_a", &lse, "out_a", 3, error)) return error->status;
    return check_merged(&m->lse_b, "lse_b", &m->lse_a, "lse_a", 3, error);
}

const char *ada_gradient_name(int which) {
    static const char *const names[] = {"query", "key", "value", "attn_mask", "sinks", "alibi_slopes"};
    return names[which];
}

/* What belongs to the output of a call. */
static ada_status check_output(const ada_problem *p, const ada_array *a, const char *name, bool is_lse,
                               ada_error *error) {
    const ada_dtype dtype = !is_lse ? p->query.dtype : p->query.dtype == ADA_F64 ? ADA_F64 : ADA_F32;
    const ada_array expected = {.ndim = is_lse ? 3 : 4, .shape = {p->B, p->H, p->T, p->E}};
    if (a->dtype != dtype)
        return ada_fail(error, ADA_ERR_DTYPE, "%s: expected %s%s, got %s", name,
                        is_lse ? "for query's dtype " : "query's dtype ", ada_dtype_name(dtype),
                        ada_dtype_name(a->dtype));
    if (a->ndim != expected.ndim || memcmp(a->shape, expected.shape, (size_t)a->ndim * sizeof a->shape[0]))
        return ada_fail(error, ADA_ERR_SHAPE, "%s: expected shape %s, got %s", name, shape_of(&expected).text,
                        shape_of(a).text);
    return ADA_OK;
}

/* Gradients have fewer rungs than outputs. */
static ada_status check_gradient_rungs(const ada_backward_problem *x, ada_choice c, ada_error *error) {
    const bool in_f64 = x->p.query.dtype == ADA_F64, narrow = c.qk == ADA_RUNG_INT16 && c.pv == ADA_RUNG_BF16;
    if (narrow && x->needs[ADA_OF_SLOPES])
        return ada_fail(error, ADA_ERR_ARGUMENT,
                        "precision: expected 'auto', 'fp32' or 'fp64' beside needs of 'alibi_slopes', got "
                        "('int16', 'bf16')");
    if (narrow || c.qk == ADA_RUNG_AUTO || (c.qk == ADA_RUNG_FP64 && c.pv == ADA_RUNG_FP64) ||
        (c.qk == ADA_RUNG_FP32 && c.pv == ADA_RUNG_FP32 && !in_f64))
        return ADA_OK;
    return ada_fail(
        error, ADA_ERR_ARGUMENT,
        "precision: expected 'auto', %s'fp64' or ('int16', 'bf16') for the gradient of %s arrays, got "
        "('%s', '%s')",
        in_f64 ? "" : "'fp32', ", ada_dtype_name(x->p.query.dtype), ada_rung_name(c.qk), ada_rung_name(c.pv));
}

ada_status ada_backward_init(ada_backward_problem *x, ada_error *error) {
    const ada_array *inputs[] = {&x->p.query,     &x->p.key,   &x->p.value,
                                 &x->p.attn_mask, &x->p.sinks, &x->p.alibi_slopes};
    ada_array shapes[ADA_GRADIENTS];
    for (int i = 0; i < ADA_GRADIENTS; i++) shapes[i] = *inputs[i];
    const ada_choice asked = x->p.precision;
    if (ada_problem_init(&x->p, error) || check_gradient_rungs(x, asked, error) ||
        check_output(&x->p, &x->grad_out, "grad_out", false, error) ||
        check_output(&x->p, &x->out, "out", false, error) || check_output(&x->p, &x->lse, "lse", true, error))
        return error->status;
    for (int i = 0; i < ADA_GRADIENTS; i++) {
        if (!x->needs[i]) continue;
        if (!inputs[i]->data || (i == ADA_OF_MASK && inputs[i]->dtype == ADA_BOOL))
            return ada_fail(error, ADA_ERR_ARGUMENT, "needs: expected '%s' only with %s, got %s",
                            ada_gradient_name(i),
                            i == ADA_OF_MASK ? "a floating attn_mask" : ada_gradient_name(i),
                            inputs[i]->data ? "a bool one" : "None");
        x->results[i] = shapes[i];
        x->results[i].dtype = i < ADA_OF_MASK ? x->p.query.dtype : x->lse.dtype;
    }
    return ADA_OK;
}
