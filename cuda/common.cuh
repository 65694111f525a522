/* What all kernels share: who may attend to what, elements of any dtype, and the end of a row. Meanings are
 * those of csrc/visible.h, csrc/kernels/dropout_tpl.h and csrc/execute.h.
 */
#ifndef ADA_CUDA_COMMON_CUH
#define ADA_CUDA_COMMON_CUH

#include "ptx.cuh"
#include "params.h"

#define ADA_LOG2E 1.4426950408889634
#define ADA_LN2 0.6931471805599453
#define ADA_INF ada_from_bits(0x7f800000u)
#define ADA_NAN ada_from_bits(0x7fc00000u)
#define ADA_MOST_BIAS 1024 /* octaves of a biased score that floats may hold */

typedef struct {
    int first, end;
} ada_span;

/* So many elements read or written at once. */
template <typename T, int N> struct alignas(sizeof(T) * N) ada_vector { T x[N]; };

template <typename REAL> ADA_DEVICE REAL ada_sum_of_warp(REAL x) {
    for (int lanes = 16; lanes; lanes /= 2) x += ada_shuffle_xor(x, lanes);
    return x;
}

static inline int64_t ada_divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

/* Whether rows of an array can be read and written four elements at a time. */
static inline bool ada_in_fours(const ada_cu_array *a, int dtype) {
    const int64_t size = dtype == ADA_CU_F32 ? 4 : dtype == ADA_CU_F64 ? 8 : 2;
    const int64_t together = a->stride[0] | a->stride[1] | a->stride[2] | (int64_t)(uintptr_t)a->data;
    return a->stride[3] == size && together % (4 * size) == 0;
}

/* What a head's rows have in common. */
typedef struct {
    int64_t offset; /* of query 0 on the keys' axis */
    int b, keys;
} ada_sequence;

ADA_DEVICE ada_sequence ada_sequence_of(const ada_cu_params &p, int b) {
    ada_sequence s;
    s.b = b;
    s.offset = p.query_offset ? p.query_offset[b * p.query_offset_stride] : p.offset;
    s.keys = p.kv_lengths ? (int)p.kv_lengths[b * p.kv_lengths_stride] : p.S;
    return s;
}

/* Keys that causal, window and kv_lengths leave to query t; both ends never decrease with t. */
ADA_DEVICE ada_span ada_visible(const ada_cu_params &p, const ada_sequence &s, int t) {
    const int64_t position = s.offset + t;
    ada_span span = {0, s.keys};
    if (p.window_right != ADA_CU_UNBOUNDED) {
        const int64_t end = position + p.window_right + 1;
        span.end = end < 0 ? 0 : end > s.keys ? s.keys : (int)end;
    }
    if (p.window_left != ADA_CU_UNBOUNDED) {
        const int64_t first = position - p.window_left;
        span.first = first < 0 ? 0 : first > p.S ? p.S : (int)first;
    }
    return span;
}

template <typename REAL> ADA_DEVICE REAL ada_element(const char *at, int dtype) {
    switch (dtype) {
    case ADA_CU_F32:
        return (REAL) * (const float *)at;
    case ADA_CU_F64:
        return (REAL) * (const double *)at;
    case ADA_CU_F16:
        return (REAL)ada_from_f16(*(const uint16_t *)at);
    default:
        return (REAL)ada_from_bf16(*(const uint16_t *)at);
    }
}

template <typename REAL> ADA_DEVICE void ada_store_element(char *at, int dtype, REAL x) {
    switch (dtype) {
    case ADA_CU_F32:
        *(float *)at = (float)x;
        return;
    case ADA_CU_F64:
        *(double *)at = (double)x;
        return;
    case ADA_CU_F16:
        *(uint16_t *)at = (uint16_t)ada_pack_f16((float)x, 0);
        return;
    default:
        *(uint16_t *)at = (uint16_t)ada_pack_bf16((float)x, 0);
    }
}

ADA_DEVICE int ada_dtype_size(int dtype) { return dtype == ADA_CU_F32 ? 4 : dtype == ADA_CU_F64 ? 8 : 2; }

ADA_DEVICE const char *ada_row_of(const ada_cu_array &a, int b, int h, int64_t row) {
    return (const char *)a.data + b * a.stride[0] + h * a.stride[1] + row * a.stride[2];
}

ADA_DEVICE const char *ada_mask_row(const ada_cu_params &p, int b, int h, int t) {
    return ada_row_of(p.mask, b, h, t);
}

/* A float mask's value; the lowest float16 counts as float32's lowest, which swallows scores. */
template <typename REAL> ADA_DEVICE REAL ada_mask_value(const ada_cu_params &p, const char *at) {
    const REAL x = ada_element<REAL>(at, p.mask_dtype);
    return p.mask_dtype == ADA_CU_F16 && x == (REAL)-65504 ? (REAL)-3.4028234663852886e38 : x;
}

ADA_DEVICE uint64_t ada_mix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}
ADA_DEVICE uint32_t ada_fmix32(uint32_t h) {
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return h ^ h >> 16;
}
/* The random state of a row. */
ADA_DEVICE uint64_t ada_dropout_row(const ada_cu_params &p, int b, int h, int t) {
    uint64_t sequence = p.seed[b * p.seed_stride];
    if (p.one_seed) sequence = ada_mix64(sequence ^ ada_mix64((uint64_t)b));
    return ada_mix64(ada_mix64(sequence + (uint64_t)h) + (uint64_t)t);
}
ADA_DEVICE bool ada_dropped(const ada_cu_params &p, uint64_t row, int j) {
    const uint32_t bits = ada_fmix32((uint32_t)j * 0x9E3779B1u + (uint32_t)row) ^ (uint32_t)(row >> 32);
    return ada_fmix32(bits) < p.drop_below; /* which may be 2^32 */
}

ADA_DEVICE double ada_sink(const ada_cu_params &p, int h) {
    return p.sinks ? p.sinks[h * p.sinks_stride] : (double)-ADA_INF;
}

ADA_DEVICE void ada_store_lse(const ada_cu_params &p, int64_t row, double lse) {
    if (!p.lse) return;
    if (p.dtype == ADA_CU_F64)
        ((double *)p.lse)[row] = lse;
    else
        ((float *)p.lse)[row] = (float)lse;
}

ADA_DEVICE char *ada_out_row(const ada_cu_params &p, int b, int h, int t) {
    return (char *)p.out.data + b * p.out.stride[0] + h * p.out.stride[1] + t * p.out.stride[2];
}

/* Rows that a kernel could not hold: the count, then b * H * T + h * T + t of each. */
#define ADA_AGAIN_LIST 64
ADA_DEVICE void ada_again(const ada_cu_params &p, int32_t *again, int64_t row) {
    again[ADA_AGAIN_LIST + ada_count_up(again)] = (int32_t)row;
    if (p.raised) p.raised[row / p.T] = 1;
}

/* A row's end, from its reference m (octaves) and sum l of weights: what its output is multiplied with. */
typedef struct {
    float factor, lse;
    bool good;
} ada_row_end;

ADA_DEVICE ada_row_end ada_end_row(const ada_cu_params &p, int h, float m, float l, bool saw) {
    const float sink = (float)(ada_sink(p, h) * ADA_LOG2E), above = sink - m;
    ada_row_end end = {0, (float)ada_sink(p, h), !saw};
    if (l == 0) return end; /* no key, or nothing but weights of zero */
    float factor = 1, base = m;
    if (above > 0) {
        factor = ada_exp2(-above);
        l = l * factor + 1;
        base = sink;
    } else if (p.sinks) {
        l += ada_exp2(above);
    }
    end.lse = (base + log2f(l)) * (float)ADA_LN2;
    end.factor = factor / (l * (float)(1 - p.dropout_p));
    const bool biased = p.alibi_slopes || (p.mask.data && p.mask_dtype != ADA_CU_BOOL);
    end.good = end.factor >= 1.17549435e-38f && end.factor < ADA_INF && !(biased && fabsf(m) > ADA_MOST_BIAS);
    return end;
}

#endif
