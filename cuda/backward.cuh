/* What the kernels of the gradients share: who sees whom, what is known of rows, and their launches.
 *
 * Weights are 2^(score - reference - lse) of scores in octaves. dP = grad_out V^T, kept / (1 - p) times where
 * there is dropout; dS = P (dP - delta), where delta is a row's sum of P dP. dV = P^T grad_out of what is
 * kept, dQ = scale dS K, dK = scale dS^T Q.
 */
#ifndef ADA_CUDA_BACKWARD_CUH
#define ADA_CUDA_BACKWARD_CUH

#include "launch.h"

#include "backward.h"

/* Of a row of queries; lse is what is left beyond the reference. Rows are padded to whole tiles of
 * ADA_BACK_ROWS: an lse of +inf makes their weights zeros. */
typedef struct {
    double reference, lse, delta;
} ada_back_row;
typedef struct {
    float lse, delta;
} ada_back_pair;
enum { ADA_BACK_ROWS = 128 };

typedef struct {
    ada_cu_gradients x;
    ada_operand q, k, v, go; /* of tiles on mma.sync */
    ada_back_row *rows;      /* [B * H][padded] */
    ada_back_pair *pairs;    /* likewise */
    int32_t padded;          /* T to whole tiles of rows */
    uint32_t *unfit;         /* [B * G] ADA_BACK_... */
    uint32_t *any;           /* one of them has to be */
    uint32_t *most;          /* [B * G][2] largest norms, as bits, of rows of grad_out and of values */
    double *slopes;          /* [B * H][slope_tiles] */
    int32_t slope_tiles;
    int32_t units, group, tiles; /* as ada_k1_args' */
    int32_t together;            /* two neighbours of a result can be written at once */
    int32_t options;             /* mask, slopes, cap or dropout */
    int32_t own;                 /* rows of key heads that the rung computes come from the inputs, too */
} ada_back_args;

/* Who computes a key head: the rung, float64, or nobody as it is done. */
enum { ADA_BACK_RUNG, ADA_BACK_F64, ADA_BACK_DONE };

/* Key j is seen by query i if lowest <= j - i <= highest and j < keys, as causal, window and kv_lengths have
 * it. */
typedef struct {
    int lowest, highest, keys;
} ada_reach;

ADA_DEVICE int ada_clamp(int64_t x) { return x < INT32_MIN ? INT32_MIN : x > INT32_MAX ? INT32_MAX : (int)x; }

ADA_DEVICE ada_reach ada_reach_of(const ada_cu_params &p, int b) {
    const ada_sequence s = ada_sequence_of(p, b);
    ada_reach r = {INT32_MIN, INT32_MAX, s.keys};
    if (p.window_left != ADA_CU_UNBOUNDED) r.lowest = ada_clamp(s.offset - p.window_left);
    if (p.window_right != ADA_CU_UNBOUNDED) r.highest = ada_clamp(s.offset + p.window_right);
    return r;
}

ADA_DEVICE bool ada_reaches(const ada_reach &r, int i, int j) {
    return j - i >= r.lowest && j - i <= r.highest && j < r.keys;
}

/* Tiles of `tile` keys that any of the queries i ... i + n - 1 sees. */
ADA_DEVICE ada_span ada_tiles_of_keys(const ada_reach &r, int i, int n, int S, int tile) {
    const int64_t low = r.lowest == INT32_MIN ? 0 : (int64_t)i + r.lowest;
    const int64_t high = r.highest == INT32_MAX ? S : (int64_t)i + n + r.highest; /* behind the last */
    const int64_t first = low > 0 ? low : 0, end = high < r.keys ? high : r.keys;
    if (first >= end) return {0, 0};
    return {(int)(first / tile), (int)((end + tile - 1) / tile)};
}
/* Tiles of `tile` queries of which any sees one of the keys j ... j + n - 1. */
ADA_DEVICE ada_span ada_tiles_of_queries(const ada_reach &r, int j, int n, int T, int tile) {
    const int64_t low = r.highest == INT32_MAX ? 0 : (int64_t)j - r.highest;
    const int64_t high = r.lowest == INT32_MIN ? T : (int64_t)j + n - r.lowest;
    const int64_t first = low > 0 ? low : 0, end = high < T ? high : T;
    if (first >= end || j >= r.keys) return {0, 0};
    return {(int)(first / tile), (int)((end + tile - 1) / tile)};
}
/* Whether all of so many queries see all of so many keys. */
ADA_DEVICE bool ada_all_reach(const ada_reach &r, int i, int queries, int j, int keys) {
    return (int64_t)j - (i + queries - 1) >= r.lowest && (int64_t)j + keys - 1 - i <= r.highest &&
           j + keys <= r.keys;
}

/* Who computes a key head, the same for all threads of a block. */
ADA_DEVICE uint32_t ada_computed_by(const uint32_t *flag, uint32_t at) {
    uint32_t *const told = ada_shared_at<uint32_t>(at);
    if (ada_thread() == 0) *told = *(const volatile uint32_t *)flag;
    ada_sync();
    const uint32_t by = *told;
    ada_sync();
    return by;
}

ADA_DEVICE void ada_make_unfit(const ada_back_args &a, int group) {
    a.unfit[group] = ADA_BACK_F64, *a.any = 1;
}

/* Whether query i sees key j, and what a mask adds to the score; mask: of the query, or NULL. */
template <typename REAL>
ADA_DEVICE bool ada_pair_sees(const ada_cu_params &p, const ada_reach &reach, const char *mask, int i, int j,
                              REAL &add) {
    add = 0;
    if (!ada_reaches(reach, i, j)) return false;
    if (!mask) return true;
    const char *const m = mask + j * p.mask.stride[3];
    if (p.mask_dtype == ADA_CU_BOOL) return *m != 0;
    add = ada_mask_value<REAL>(p, m);
    return !(add == (REAL)-ADA_INF);
}

/* A product times the scale to a score in octaves; bend: the derivative of the softcap there. */
template <typename REAL>
ADA_DEVICE REAL ada_pair_score(REAL s, REAL cap, REAL slope, int64_t distance, REAL add, REAL &bend) {
    bend = 1;
    if (cap != 0) {
        const REAL bent = ada_tanh(s / cap);
        s = cap * bent;
        bend = 1 - bent * bent;
    }
    if (slope != 0) s -= slope * (REAL)(distance < 0 ? -distance : distance);
    return (s + add) * (REAL)ADA_LOG2E;
}

cudaError_t ada_back_run_simt(const ada_back_args &a, bool f64, cudaStream_t stream);
cudaError_t ada_back_run_f16(const ada_back_args &a, cudaStream_t stream);
cudaError_t ada_back_run_bf16(const ada_back_args &a, cudaStream_t stream);
/* Rows of key heads that are unfit, from the inputs alone. */
cudaError_t ada_back_run_rows(const ada_back_args &a, cudaStream_t stream);
/* Rows of the tiles by which a kernel adds up slopes; the fewest. */
enum { ADA_BACK_SLOPE_ROWS = 32 };

#endif
