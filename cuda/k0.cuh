/* K0: one row of queries by one block, on plain arithmetic of REAL: any chip, any dtype, any layout. In
 * double it is the oracle, and computes the rows that other kernels could not hold.
 *
 * LANES lanes share a key; each holds PER of the head's elements, in fours. A block's groups of lanes take
 * keys in turn and are merged in order.
 */
#ifndef ADA_CUDA_K0_CUH
#define ADA_CUDA_K0_CUH

#include "pages.cuh"

enum { ADA_K0_THREADS = 128 };

typedef struct {
    ada_cu_params p;
    const int32_t *pairs; /* [rows][2] head and row; NULL: all rows of p's heads, */
    const int32_t *list;  /* or those that other kernels could not hold */
    int64_t rows;
    double *o, *lse; /* of pairs */
    int32_t *again;  /* takes the rows that REAL cannot hold; NULL: it can hold all */
    int32_t fours;   /* query, key and value can be read four elements at a time */
} ada_k0_args;

/* Four elements from index d on; zeros from width on. */
template <typename REAL>
ADA_DEVICE void ada_load_four(REAL (&x)[4], const char *row, int64_t stride, int dtype, int d, int width,
                              int fours) {
    ADA_UNROLL for (int i = 0; i < 4; i++) x[i] = 0;
    if (fours && d + 4 <= width) {
        if (dtype == ADA_CU_F32) {
            const ada_vector<float, 4> y = *(const ada_vector<float, 4> *)(row + d * 4);
            ADA_UNROLL for (int i = 0; i < 4; i++) x[i] = (REAL)y.x[i];
        } else if (dtype == ADA_CU_F64) {
            const ada_vector<double, 2> *y = (const ada_vector<double, 2> *)(row + d * 8);
            const ada_vector<double, 2> low = y[0], high = y[1];
            ADA_UNROLL for (int i = 0; i < 4; i++) x[i] = (REAL)(i < 2 ? low.x[i] : high.x[i - 2]);
        } else {
            const ada_vector<uint16_t, 4> y = *(const ada_vector<uint16_t, 4> *)(row + d * 2);
            ADA_UNROLL for (int i = 0; i < 4; i++) x[i] =
                (REAL)(dtype == ADA_CU_F16 ? ada_from_f16(y.x[i]) : ada_from_bf16(y.x[i]));
        }
        return;
    }
    ADA_UNROLL for (int i = 0; i < 4; i++) if (d + i < width) x[i] =
        ada_element<REAL>(row + (d + i) * stride, dtype);
}

ADA_DEVICE float ada_exp(float x) { return expf(x); }
ADA_DEVICE double ada_exp(double x) { return exp(x); }
ADA_DEVICE float ada_tanh(float x) { return tanhf(x); }
ADA_DEVICE double ada_tanh(double x) { return tanh(x); }
ADA_DEVICE bool ada_is_finite(float x) { return fabsf(x) < ADA_INF; }
ADA_DEVICE bool ada_is_finite(double x) { return fabs(x) < (double)ADA_INF; }

/* What lanes of a group know after their keys, in shared memory behind the outputs. */
template <typename REAL> struct ada_k0_part {
    REAL m, l;
    int saw, bad; /* bad: a score was NaN or +inf */
};

template <typename REAL, int PER, int LANES> ADA_DEVICE constexpr int ada_k0_shared() {
    return ADA_K0_THREADS / LANES * (int)(LANES * PER * (sizeof(REAL) + 1) + sizeof(ada_k0_part<REAL>));
}

enum { ADA_SPECIAL_NAN = 1, ADA_SPECIAL_UP = 2, ADA_SPECIAL_DOWN = 4 };

/* PAGES: keys and values are those of a cache. */
template <typename REAL, int PER, int LANES, bool PAGES = false>
ADA_DEVICE void ada_k0_row(const ada_k0_args &a, int head, int t, double *o_to, double *lse_to) {
    constexpr int GROUPS = ADA_K0_THREADS / LANES, WIDTH = LANES * PER;
    const ada_cu_params &p = a.p;
    const int b = head / p.H, h = head % p.H, g = h / (p.H / p.G);
    const int group = ada_thread() / LANES, c = ada_thread() % LANES;
    const ada_sequence sequence = ada_sequence_of(p, b);
    const ada_span span = ada_visible(p, sequence, t);
    const char *query =
        (const char *)p.query.data + b * p.query.stride[0] + h * p.query.stride[1] + t * p.query.stride[2];
    const char *key = (const char *)p.key.data + b * p.key.stride[0] + g * p.key.stride[1];
    const char *value = (const char *)p.value.data + b * p.value.stride[0] + g * p.value.stride[1];
    const char *mask = p.mask.data ? ada_mask_row(p, b, h, t) : NULL;
    const uint64_t random = p.drop_below ? ada_dropout_row(p, b, h, t) : 0;
    const REAL slope =
        p.alibi_slopes ? (REAL)p.alibi_slopes[b * p.alibi_stride[0] + h * p.alibi_stride[1]] : 0;
    const REAL scale = (REAL)p.scale, cap = (REAL)p.softcap;

    REAL q[PER / 4][4], o[PER / 4][4], m = (REAL)-ADA_INF, l = 0;
    uint32_t nan[4] = {0}, up[4] = {0},
             down[4] = {0}; /* bit i: element (LANES i + c) * 4 + x of some value */
    bool saw = false, bad = false;
    ADA_UNROLL for (int i = 0; i < PER / 4; i++) {
        ada_load_four(q[i], query, p.query.stride[3], p.dtype, (LANES * i + c) * 4, p.D, a.fours);
        ADA_UNROLL for (int x = 0; x < 4; x++) o[i][x] = 0;
    }
    ADA_UNROLL_NOT for (int first = span.first; first < span.end; first += GROUPS) {
        const int j = first + group;
        bool visible = j < span.end;
        REAL add = 0, s = 0;
        if (visible && mask) {
            const char *at = mask + j * p.mask.stride[3];
            if (p.mask_dtype == ADA_CU_BOOL)
                visible = *at != 0;
            else
                add = ada_mask_value<REAL>(p, at), visible = !(add == (REAL)-ADA_INF);
        }
        if (visible) {
            const char *row = key + j * p.key.stride[2];
            ADA_UNROLL for (int i = 0; i < PER / 4; i++) {
                REAL k[4];
                if (PAGES)
                    ada_load_kept(k, p, sequence, g, 0, j, (LANES * i + c) * 4, p.D);
                else
                    ada_load_four(k, row, p.key.stride[3], p.dtype, (LANES * i + c) * 4, p.D, a.fours);
                ADA_UNROLL for (int x = 0; x < 4; x++) s += q[i][x] * k[x];
            }
        }
        ADA_UNROLL for (int lanes = 1; lanes < LANES; lanes *= 2) s += ada_shuffle_xor(s, lanes);
        if (!visible) continue;
        s *= scale;
        if (cap != 0) s = cap * ada_tanh(s / cap);
        if (slope != 0) {
            const int64_t distance = sequence.offset + t - j;
            s -= slope * (REAL)(distance < 0 ? -distance : distance);
        }
        s += add;
        saw = true;
        if (!(s < (REAL)ADA_INF)) {
            bad = true;
            continue;
        }
        if (s > m) {
            const REAL factor = ada_exp(m - s);
            m = s, l *= factor;
            ADA_UNROLL for (int i = 0; i < PER / 4; i++) ADA_UNROLL for (int x = 0; x < 4; x++) o[i][x] *=
                factor;
        }
        REAL w = m > (REAL)-ADA_INF ? ada_exp(s - m) : 0;
        l += w;
        if (p.drop_below && ada_dropped(p, random, j)) w = 0;
        const char *row = value + j * p.value.stride[2];
        ADA_UNROLL for (int i = 0; i < PER / 4; i++) {
            REAL v[4];
            if (PAGES)
                ada_load_kept(v, p, sequence, g, 1, j, (LANES * i + c) * 4, p.E);
            else
                ada_load_four(v, row, p.value.stride[3], p.dtype, (LANES * i + c) * 4, p.E, a.fours);
            ADA_UNROLL for (int x = 0; x < 4; x++) {
                if (ada_is_finite(v[x])) {
                    o[i][x] += w * v[x];
                } else {
                    nan[x] |= (uint32_t)(v[x] != v[x]) << i;
                    up[x] |= (uint32_t)(v[x] > 0) << i;
                    down[x] |= (uint32_t)(v[x] < 0) << i;
                }
            }
        }
    }

    REAL *const outputs = ada_shared_at<REAL>(0);
    const uint32_t behind = GROUPS * WIDTH * (uint32_t)sizeof(REAL);
    ada_k0_part<REAL> *const parts = ada_shared_at<ada_k0_part<REAL>>(behind);
    uint8_t *const special = ada_shared_at<uint8_t>(behind + GROUPS * (uint32_t)sizeof(ada_k0_part<REAL>));
    ada_sync(); /* the row before has been read */
    ADA_UNROLL for (int i = 0; i < PER / 4; i++) ADA_UNROLL for (int x = 0; x < 4; x++) {
        const int at = group * WIDTH + (LANES * i + c) * 4 + x;
        outputs[at] = o[i][x];
        special[at] = (uint8_t)((nan[x] >> i & 1) | (up[x] >> i & 1) << 1 | (down[x] >> i & 1) << 2);
    }
    if (c == 0) {
        ada_k0_part<REAL> own = {m, l, saw, bad};
        parts[group] = own;
    }
    ada_sync();

    /* From here on every thread computes the same, but for its elements. */
    const REAL sink = (REAL)ada_sink(p, h);
    REAL top = sink, total = 0;
    saw = bad = false;
    for (int i = 0; i < GROUPS; i++) {
        saw |= parts[i].saw, bad |= parts[i].bad;
        if (parts[i].m > top) top = parts[i].m;
    }
    bad |= saw && top == (REAL)-ADA_INF;
    if (top > (REAL)-ADA_INF) {
        total = ada_exp(sink - top);
        for (int i = 0; i < GROUPS; i++) total += parts[i].l * ada_exp(parts[i].m - top);
    }
    bool good = !bad;
    const double lse = !saw ? (double)sink : bad ? (double)ADA_NAN : (double)top + log((double)total);
    char *const out = o_to || lse_to ? NULL : ada_out_row(p, b, h, t);
    for (int e = ada_thread(); e < p.E; e += ADA_K0_THREADS) {
        REAL sum = 0;
        int kinds = 0;
        for (int i = 0; saw && !bad && i < GROUPS; i++) {
            sum += outputs[i * WIDTH + e] * ada_exp(parts[i].m - top);
            kinds |= special[i * WIDTH + e];
        }
        if (saw) sum = sum / total / (REAL)(1 - p.dropout_p);
        if (!ada_is_finite(sum)) good = false;
        if (bad && saw) sum = (REAL)ADA_NAN;
        if (kinds) {
            const bool none = (kinds & ADA_SPECIAL_NAN) || kinds == (ADA_SPECIAL_UP | ADA_SPECIAL_DOWN);
            sum += none ? (REAL)ADA_NAN : (REAL)(kinds == ADA_SPECIAL_UP ? ADA_INF : -ADA_INF);
        }
        if (out)
            ada_store_element(out + e * p.out.stride[3], p.dtype, sum);
        else if (o_to)
            o_to[e] = (double)sum;
    }
    if (ada_thread() == 0 && out) ada_store_lse(p, (int64_t)head * p.T + t, lse);
    if (ada_thread() == 0 && lse_to) *lse_to = lse;
    if (sizeof(REAL) == sizeof(float) && a.again) {
        const bool biased = p.alibi_slopes || (p.mask.data && p.mask_dtype != ADA_CU_BOOL);
        if (saw && biased && fabs((double)top) > ADA_MOST_BIAS * ADA_LN2) good = false;
        int *const any = ada_shared_at<int>(0);
        ada_sync();
        if (ada_thread() == 0) *any = 0;
        ada_sync();
        if (!good) *any = 1;
        ada_sync();
        if (ada_thread() == 0 && *any) ada_again(p, a.again, (int64_t)head * p.T + t);
    }
}

template <typename REAL, int PER, int LANES> ADA_KERNEL(ADA_K0_THREADS, 1) ada_k0(ADA_ARGS(ada_k0_args) a) {
    const int64_t rows = a.list ? a.list[0] : a.rows;
    ADA_UNROLL_NOT for (int64_t i = ada_block(); i < rows; i += ada_blocks()) {
        if (a.pairs) {
            ada_k0_row<REAL, PER, LANES>(a, a.pairs[2 * i], a.pairs[2 * i + 1], a.o ? a.o + i * a.p.E : NULL,
                                         a.lse ? a.lse + i : NULL);
            continue;
        }
        const int64_t row = a.list ? a.list[ADA_AGAIN_LIST + i] : i;
        int head = (int)(row / a.p.T);
        if (!a.list && a.p.heads) head = a.p.heads[head];
        ada_k0_row<REAL, PER, LANES>(a, head, (int)(row % a.p.T), NULL, NULL);
    }
}

#endif
