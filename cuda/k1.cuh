/* K1: tiles of queries against tiles of keys on mma.sync, with an online softmax in registers.
 *
 * A block has MW x NW warps. Warps along M have 16 MR rows of queries each; warps along N share those rows
 * and take each their part of a tile's keys, which is merged at the end. Scores stay in registers and become,
 * packed, the left operand of the second product.
 *
 * Few queries: the rows of a tile are all heads that share keys (row r is query r / pack of head r % pack),
 * blocks take a part of the keys each and leave sums to combine.
 */
#ifndef ADA_CUDA_K1_CUH
#define ADA_CUDA_K1_CUH

#include "k1_tiling.cuh"

/* Of a row's weights in e4m3 the sum. */
template <int MR, bool FP8> struct ada_rounded {};
template <int MR> struct ada_rounded<MR, true> { float rounded[MR][2]; };

template <typename X> struct ada_rows : ada_rounded<X::MR, X::FP8> {
    float o[X::MR][X::WIDTH / 8][4];
    float m[X::MR][2], l[X::MR][2]; /* the reference, in raw scores; this lane's part of the sum */
    uint32_t saw;                   /* bit 2 mr + half: a key that a mask shows */
};

template <typename X>
ADA_DEVICE void ada_multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (X::BF16)
        ada_multiply_bf16(c, a, b0, b1);
    else
        ada_multiply_f16(c, a, b0, b1);
}
template <typename X> ADA_DEVICE uint32_t ada_pack(float x, float y) {
    return X::BF16 ? ada_pack_bf16(x, y) : ada_pack_f16(x, y);
}

ADA_DEVICE void ada_multiply_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ada_multiply_i8(c, a, b0, b1);
}
ADA_DEVICE void ada_multiply_bytes(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ada_multiply_e4m3(c, a, b0, b1);
}

/* Adds products of this warp's rows and keys: of integers to integers, of e4m3 to floats. */
template <typename X, typename SUM>
ADA_DEVICE void ada_add_products_of_bytes(SUM (&sum)[X::MR][X::KEYS / 8][4], uint32_t q_at, uint32_t k_at) {
    constexpr int TOGETHER = X::FP8 && X::WIDTH > 128 ? 1 : X::WIDTH / 32; /* registers */
    ADA_UNROLL_BY(TOGETHER) for (int d = 0; d < X::WIDTH; d += 32) {
        uint32_t q[X::MR][4];
        ADA_UNROLL for (int mr = 0; mr < X::MR; mr++)
            ada_load_matrices(q[mr], ada_along<typename X::QK>(q_at, d) + (uint32_t)(16 * mr * X::QK::BYTES));
        ADA_UNROLL for (int j = 0; j < X::KEYS; j += 16) {
            uint32_t k[4];
            ada_load_matrices(k, ada_along<typename X::QK>(k_at, d) + (uint32_t)(j * X::QK::BYTES));
            ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) {
                ada_multiply_bytes(sum[mr][j / 8], q[mr], k[0], k[2]);
                ada_multiply_bytes(sum[mr][j / 8 + 1], q[mr], k[1], k[3]);
            }
        }
    }
}

/* Scores of this warp's rows and keys, raw. Bytes: exact integers, whose sums begin at the bits of a float
 * that shows them behind its point: 127^2 * 256 < 2^22. */
template <typename X>
ADA_DEVICE void ada_scores_of_bytes(float (&s)[X::MR][X::KEYS / 8][4], uint32_t q_at, uint32_t k_at) {
    int32_t sum[X::MR][X::KEYS / 8][4];
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int i = 0; i < X::KEYS / 8; i++)
        ADA_UNROLL for (int c = 0; c < 4; c++) sum[mr][i][c] = 0x4b400000; /* 3 * 2^22 */
    ada_add_products_of_bytes<X>(sum, q_at, k_at);
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int i = 0; i < X::KEYS / 8; i++)
        ADA_UNROLL for (int c = 0; c < 4; c++) s[mr][i][c] =
            ada_from_bits((uint32_t)sum[mr][i][c]) - 12582912.0f;
}

/* The same of halves. */
template <typename X>
ADA_DEVICE void ada_scores(float (&s)[X::MR][X::KEYS / 8][4], uint32_t q_at, uint32_t k_at) {
    float low[X::MR][X::KEYS / 8][4]; /* of products with a second part */
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int i = 0; i < X::KEYS / 8; i++)
        ADA_UNROLL for (int c = 0; c < 4; c++) s[mr][i][c] = low[mr][i][c] = 0;
    ADA_UNROLL for (int d = 0; d < X::WIDTH; d += 16) {
        uint32_t q[X::PARTS][X::MR][4];
        ADA_UNROLL for (int part = 0; part < X::PARTS; part++) ADA_UNROLL for (int mr = 0; mr < X::MR; mr++)
            ada_load_matrices(q[part][mr], ada_along<typename X::QK>(q_at, 2 * d) +
                                               (uint32_t)(part * X::Q_PART + 16 * mr * X::QK::BYTES));
        ADA_UNROLL for (int j = 0; j < X::KEYS; j += 16) {
            ADA_UNROLL for (int part = 0; part < X::PARTS; part++) {
                uint32_t k[4];
                ada_load_matrices(k, ada_along<typename X::QK>(k_at, 2 * d) +
                                         (uint32_t)(part * X::K_PART + j * X::QK::BYTES));
                ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) {
                    float(&to)[X::KEYS / 8][4] = part ? low[mr] : s[mr];
                    ada_multiply<X>(to[j / 8], q[0][mr], k[0], k[2]);
                    ada_multiply<X>(to[j / 8 + 1], q[0][mr], k[1], k[3]);
                    if (X::PARTS == 1 || part) continue;
                    ada_multiply<X>(low[mr][j / 8], q[X::PARTS - 1][mr], k[0], k[2]);
                    ada_multiply<X>(low[mr][j / 8 + 1], q[X::PARTS - 1][mr], k[1], k[3]);
                }
            }
        }
    }
    if constexpr (X::PARTS == 2)
        ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int i = 0; i < X::KEYS / 8; i++)
            ADA_UNROLL for (int c = 0; c < 4; c++) s[mr][i][c] += ADA_LOW_UNIT * low[mr][i][c];
}

/* Adds this warp's weights times values, of which a one is worth unit. */
template <typename X>
ADA_DEVICE void ada_add_values(ada_rows<X> &rows, const float (&s)[X::MR][X::KEYS / 8][4], uint32_t v_at,
                               float unit) {
    if constexpr (X::PARTS == 1) {
        ADA_UNROLL for (int j = 0; j < X::KEYS; j += 16) {
            uint32_t weights[X::MR][4];
            ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int i = 0; i < 4; i++) {
                const float *pair = &s[mr][j / 8 + i / 2][i % 2 * 2];
                weights[mr][i] = ada_pack<X>(pair[0], pair[1]);
            }
            ADA_UNROLL for (int e = 0; e < X::WIDTH; e += 16) {
                uint32_t v[4];
                ada_load_transposed(v, ada_along<typename X::V>(v_at, 2 * e) + (uint32_t)(j * X::V::BYTES));
                ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) {
                    ada_multiply<X>(rows.o[mr][e / 8], weights[mr], v[0], v[1]);
                    ada_multiply<X>(rows.o[mr][e / 8 + 1], weights[mr], v[2], v[3]);
                }
            }
        }
    } else {
        /* Two parts, of one tile of 16 rows. The sums of a tile of keys are added in float: the tensor cores'
         * own additions truncate. */
        uint32_t high[X::KEYS / 16][4], low[X::KEYS / 16][4];
        ADA_UNROLL for (int j = 0; j < X::KEYS / 16; j++) ADA_UNROLL for (int i = 0; i < 4; i++) {
            const float *pair = &s[0][2 * j + i / 2][i % 2 * 2];
            high[j][i] = ada_pack_f16(pair[0], pair[1]);
            low[j][i] = ada_pack_f16((pair[0] - ada_from_f16((uint16_t)high[j][i])) / ADA_LOW_UNIT,
                                     (pair[1] - ada_from_f16((uint16_t)(high[j][i] >> 16))) / ADA_LOW_UNIT);
        }
        ADA_UNROLL for (int e = 0; e < X::WIDTH; e += 16) {
            float sum[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}}, less[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
            ADA_UNROLL for (int j = 0; j < X::KEYS / 16; j++) {
                const uint32_t at = ada_along<typename X::V>(v_at, 2 * e) + (uint32_t)(16 * j * X::V::BYTES);
                uint32_t v[4];
                ada_load_transposed(v, at);
                ada_multiply_f16(sum[0], high[j], v[0], v[1]);
                ada_multiply_f16(sum[1], high[j], v[2], v[3]);
                ada_multiply_f16(less[0], low[j], v[0], v[1]);
                ada_multiply_f16(less[1], low[j], v[2], v[3]);
                ada_load_transposed(v, at + (uint32_t)X::V_PART);
                ada_multiply_f16(less[0], high[j], v[0], v[1]);
                ada_multiply_f16(less[1], high[j], v[2], v[3]);
            }
            ADA_UNROLL for (int n = 0; n < 2; n++) ADA_UNROLL for (int c = 0; c < 4; c++)
                rows.o[0][e / 8 + n][c] += (sum[n][c] + ADA_LOW_UNIT * less[n][c]) * unit;
        }
    }
}

/* Hides keys by the spans of their rows: -inf. */
template <typename X> ADA_DEVICE void ada_hide(float (&s)[X::MR][X::KEYS / 8][4], int first) {
    const ada_span *const spans = ada_spans<X>();
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++) {
        const ada_span span = spans[16 * mr + 8 * half];
        const int lowest = span.first - first, end = span.end - first;
        ADA_UNROLL for (int n = 0; n < X::KEYS / 8; n++) ADA_UNROLL for (int c = 0; c < 2; c++) {
            float &x = s[mr][n][2 * half + c];
            x = 8 * n + c >= lowest && 8 * n + c < end ? x : -ADA_INF;
        }
    }
}

/* Adds a float mask of octaves to the scores of one row, or hides by a boolean one, DTYPE or, -1, any; -inf
 * hides. PAIRS: two neighbours are read at once. Returns whether the row sees a key. */
template <typename X, int DTYPE, bool PAIRS>
ADA_DEVICE bool ada_mask_row_of_tile(const ada_cu_params &p, float (&s)[X::KEYS / 8][4], int half,
                                     const char *row, ada_span span, int first) {
    bool any = false;
    ADA_UNROLL for (int n = 0; n < X::KEYS / 8; n++) {
        ada_vector<float, 2> add = {{0, 0}};
        ada_vector<uint8_t, 2> seen = {{0, 0}};
        const int j = first + 8 * n;
        if (PAIRS && j < p.S) {
            if (DTYPE == ADA_CU_BOOL)
                seen = *(const ada_vector<uint8_t, 2> *)(row + j);
            else
                add = *(const ada_vector<float, 2> *)(row + 4 * (int64_t)j);
        }
        ADA_UNROLL for (int c = 0; c < 2; c++) {
            float &x = s[n][2 * half + c];
            bool visible = j + c >= span.first && j + c < span.end;
            if (!PAIRS && visible) {
                const char *at = row + (j + c) * p.mask.stride[3];
                if (DTYPE == ADA_CU_BOOL)
                    seen.x[c] = (uint8_t)*at;
                else
                    add.x[c] = ada_mask_value<float>(p, at);
            }
            if (DTYPE == ADA_CU_BOOL) {
                visible = visible && seen.x[c] != 0;
            } else {
                visible = visible && !(add.x[c] == -ADA_INF);
                const float octaves = add.x[c] * (float)ADA_LOG2E;
                x += octaves < -3.4028234e38f ? -3.4028234e38f : octaves;
            }
            any |= visible;
            x = visible ? x : -ADA_INF;
        }
    }
    return any;
}

/* Makes octaves of raw scores, caps, biases and hides; what is hidden becomes -inf. Notes, where there is a
 * mask, which rows saw a key. */
template <typename X>
ADA_DEVICE void ada_apply_options(const ada_k1_args &a, const ada_where &w, float (&s)[X::MR][X::KEYS / 8][4],
                                  int first, bool plain, uint32_t &saw) {
    const ada_cu_params &p = a.p;
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int n = 0; n < X::KEYS / 8; n++)
        ADA_UNROLL for (int c = 0; c < 4; c++) s[mr][n][c] *= a.octaves;
    if (p.softcap != 0) {
        const float cap = (float)(p.softcap * ADA_LOG2E), inverse = 2 * (float)ADA_LOG2E / cap;
        ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int n = 0; n < X::KEYS / 8; n++)
            ADA_UNROLL for (int c = 0; c < 4; c++) {
            float &x = s[mr][n][c];
            x = cap - 2 * cap * ada_reciprocal(ada_exp2(x * inverse) + 1);
        }
    }
    if (p.alibi_slopes || p.mask.data) {
        const int64_t offset = p.alibi_slopes ? ada_sequence_of(p, w.b).offset : 0;
        const ada_span *const spans = ada_spans<X>();
        ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++) {
            int r = w.row0 + 16 * mr + 8 * half;
            r = r < w.rows ? r : w.rows - 1;
            const int t = r / ada_pack_of<X>(a), h = w.h0 + r % ada_pack_of<X>(a);
            if (p.alibi_slopes) {
                const double slope = p.alibi_slopes[w.b * p.alibi_stride[0] + h * p.alibi_stride[1]];
                const float octaves = (float)(slope * ADA_LOG2E), distance = (float)(offset + t - first);
                ADA_UNROLL for (int n = 0; n < X::KEYS / 8; n++) ADA_UNROLL for (int c = 0; c < 2; c++)
                    s[mr][n][2 * half + c] -= octaves * fabsf(distance - (float)(8 * n + c));
            }
            if (p.mask.data) {
                const char *row = ada_mask_row(p, w.b, h, t);
                const ada_span span = spans[16 * mr + 8 * half];
                bool any;
                if (p.mask_dtype == ADA_CU_BOOL && a.mask_pairs)
                    any = ada_mask_row_of_tile<X, ADA_CU_BOOL, true>(p, s[mr], half, row, span, first);
                else if (p.mask_dtype == ADA_CU_F32 && a.mask_pairs)
                    any = ada_mask_row_of_tile<X, ADA_CU_F32, true>(p, s[mr], half, row, span, first);
                else if (p.mask_dtype == ADA_CU_BOOL)
                    any = ada_mask_row_of_tile<X, ADA_CU_BOOL, false>(p, s[mr], half, row, span, first);
                else
                    any = ada_mask_row_of_tile<X, -1, false>(p, s[mr], half, row, span, first);
                saw |= (uint32_t)any << (2 * mr + half);
            }
        }
    }
    if (!plain && !p.mask.data) ada_hide<X>(s, first);
}

/* Raises references where scores exceed them, and turns scores into weights. factor: of a score, to octaves.
 */
template <typename X>
ADA_DEVICE void ada_weigh(float (&s)[X::MR][X::KEYS / 8][4], ada_rows<X> &rows, float factor, float lazy) {
    float top[X::MR][2];
    bool rise = false;
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++) {
        float x = fmaxf(s[mr][0][2 * half], s[mr][0][2 * half + 1]);
        ADA_UNROLL for (int n = 1; n < X::KEYS / 8; n++) x =
            fmaxf(x, fmaxf(s[mr][n][2 * half], s[mr][n][2 * half + 1]));
        x = fmaxf(x, ada_shuffle_xor(x, 1));
        x = fmaxf(x, ada_shuffle_xor(x, 2));
        top[mr][half] = x;
        rise |= x > rows.m[mr][half] + lazy;
    }
    if (ada_any(rise)) {
        ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++) {
            const bool higher =
                top[mr][half] > rows.m[mr][half] + lazy; /* whatever the warp's other rows do */
            const float by = higher ? ada_exp2((rows.m[mr][half] - top[mr][half]) * factor) : 1;
            rows.m[mr][half] = higher ? top[mr][half] : rows.m[mr][half];
            rows.l[mr][half] *= by;
            if constexpr (X::FP8) rows.rounded[mr][half] *= by;
            ADA_UNROLL for (int n = 0; n < X::WIDTH / 8; n++) {
                rows.o[mr][n][2 * half] *= by;
                rows.o[mr][n][2 * half + 1] *= by;
            }
        }
    }
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++) {
        const float m = rows.m[mr][half] == -ADA_INF ? 0 : rows.m[mr][half] * factor - X::BELOW;
        float sum = 0;
        ADA_UNROLL for (int n = 0; n < X::KEYS / 8; n++) ADA_UNROLL for (int c = 0; c < 2; c++) {
            float &x = s[mr][n][2 * half + c];
            x = ada_exp2(x * factor - m);
            sum += x;
        }
        rows.l[mr][half] += sum;
    }
}

template <typename X>
ADA_DEVICE void ada_drop(const ada_k1_args &a, const ada_where &w, float (&s)[X::MR][X::KEYS / 8][4],
                         int first) {
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++) {
        const int r = w.row0 + 16 * mr + 8 * half;
        const uint64_t random =
            ada_dropout_row(a.p, w.b, w.h0 + r % ada_pack_of<X>(a), r / ada_pack_of<X>(a));
        ADA_UNROLL for (int n = 0; n < X::KEYS / 8; n++) ADA_UNROLL for (int c = 0; c < 2; c++) {
            float &x = s[mr][n][2 * half + c];
            x = ada_dropped(a.p, random, first + 8 * n + c) ? 0 : x;
        }
    }
}

#include "k1_fp8.cuh"

/* Writes rows out, each by the four lanes that hold it. */
template <typename X> ADA_DEVICE void ada_finish(const ada_k1_args &a, ada_rows<X> &rows, float factor) {
    const ada_cu_params &p = a.p;
    const ada_where w = ada_where_of<X>(a);
    const ada_span *const spans = ada_spans<X>();
    const int lane = ada_thread() % 32;
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++) {
        const int r = w.row0 + 16 * mr + 8 * half, t = r / ada_pack_of<X>(a),
                  h = w.h0 + r % ada_pack_of<X>(a);
        const bool there = r < w.rows;
        const ada_span span = spans[16 * mr + 8 * half];
        const bool saw = X::OPTIONS && p.mask.data ? rows.saw >> (2 * mr + half) & 1 : span.first < span.end;
        const ada_row_end end =
            ada_end_row(p, there ? h : w.h0, rows.m[mr][half] * factor - X::BELOW, rows.l[mr][half], saw);
        float good = 0; /* NaN where an output is not finite */
        ADA_UNROLL for (int n = 0; n < X::WIDTH / 8; n++) ADA_UNROLL for (int c = 0; c < 2; c++) {
            float &x = rows.o[mr][n][2 * half + c];
            x = end.factor == 0 ? 0 : x * end.factor;
            good += x * 0;
        }
        good += ada_shuffle_xor(good, 1);
        good += ada_shuffle_xor(good, 2);
        if (!there) continue;
        const int64_t row = ((int64_t)w.b * p.H + h) * p.T + t;
        if (lane % 4 == 0) {
            ada_store_lse(p, row, end.lse);
            if (!end.good || !(good == 0)) ada_again(p, a.again, row);
        }
        char *to = ada_out_row(p, w.b, h, t);
        ADA_UNROLL for (int n = 0; n < X::WIDTH / 8; n++) {
            const int e = 8 * n + lane % 4 * 2;
            const float x = rows.o[mr][n][2 * half], y = rows.o[mr][n][2 * half + 1];
            if (a.pairs && e + 1 < p.E) {
                if (p.dtype == ADA_CU_F32)
                    *(ada_vector<float, 2> *)(to + 4 * e) = {{x, y}};
                else
                    *(uint32_t *)(to + 2 * e) =
                        p.dtype == ADA_CU_BF16 ? ada_pack_bf16(x, y) : ada_pack_f16(x, y);
            } else {
                if (e < p.E) ada_store_element(to + e * p.out.stride[3], p.dtype, x);
                if (e + 1 < p.E) ada_store_element(to + (e + 1) * p.out.stride[3], p.dtype, y);
            }
        }
    }
}

/* Merges the warps that share rows and leaves their sums to ada_combine. */
template <typename X> ADA_DEVICE void ada_leave(const ada_k1_args &a, ada_rows<X> &rows, float factor) {
    const ada_cu_params &p = a.p;
    const ada_where w = ada_where_of<X>(a);
    const int lane = ada_thread() % 32, warp = ada_thread() / 32, wn = warp / X::MW;
    float *const o = ada_shared_at<float>(0);         /* [NW][BM][WIDTH] */
    float *const ends = o + X::NW * X::BM * X::WIDTH; /* [NW][BM][3] */
    ada_sync();                                       /* keys and values have been read */
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++) {
        const int at = wn * X::BM + warp % X::MW * 16 * X::MR + 16 * mr + 8 * half + lane / 4;
        ADA_UNROLL for (int n = 0; n < X::WIDTH / 8; n++) ADA_UNROLL for (int c = 0; c < 2; c++)
            o[at * X::WIDTH + 8 * n + lane % 4 * 2 + c] = rows.o[mr][n][2 * half + c];
        if (lane % 4 == 0) {
            ends[3 * at] = rows.m[mr][half] * factor - X::BELOW;
            ends[3 * at + 1] = rows.l[mr][half];
            ends[3 * at + 2] = (float)(rows.saw >> (2 * mr + half) & 1);
        }
    }
    ada_sync();
    float *const heads = a.partials + a.rows * a.splits * p.E;
    for (int i = ada_thread(); i < X::BM * X::WIDTH; i += X::THREADS) {
        const int row = i / X::WIDTH, e = i % X::WIDTH, r = w.tile * X::BM + row;
        if (r >= w.rows || e >= p.E) continue;
        float m = -ADA_INF, l = 0, sum = 0, saw = 0;
        for (int n = 0; n < X::NW; n++) m = fmaxf(m, ends[3 * (n * X::BM + row)]);
        for (int n = 0; n < X::NW; n++) {
            const float *end = ends + 3 * (n * X::BM + row);
            const float by = end[0] == m ? 1 : ada_exp2(end[0] - m);
            l += end[1] * by, saw = fmaxf(saw, end[2]);
            sum += o[(n * X::BM + row) * X::WIDTH + e] * by;
        }
        const int64_t at =
            (((int64_t)w.b * p.H + w.h0 + r % ada_pack_of<X>(a)) * p.T + r / ada_pack_of<X>(a)) * a.splits +
            w.split;
        a.partials[at * p.E + e] = sum;
        if (e == 0) heads[3 * at] = m, heads[3 * at + 1] = l, heads[3 * at + 2] = saw;
    }
}

template <typename X> ADA_DEVICE void ada_k1_block(const ada_k1_args &a) {
    const ada_cu_params &p = a.p;
    const int thread = ada_thread(), lane = thread % 32, warp = thread / 32, wm = warp % X::MW,
              wn = warp / X::MW;
    const uint32_t shared = ada_shared();
    const ada_where w = ada_where_of<X>(a);
    const int row_first = w.tile * X::BM;
    const int row_last = row_first + X::BM < w.rows ? row_first + X::BM - 1 : w.rows - 1;
    const ada_sequence sequence = ada_sequence_of(p, w.b);
    const ada_span low = ada_visible(p, sequence, row_first / ada_pack_of<X>(a));
    const ada_span high = ada_visible(p, sequence, row_last / ada_pack_of<X>(a));
    for (int row = thread; row < X::BM; row += X::THREADS)
        ada_shared_at<ada_span>(X::SPANS_AT)[row] =
            ada_visible(p, sequence, (row_first + row) / ada_pack_of<X>(a));
    for (int row = thread; X::UNITS && row < X::BM; row += X::THREADS) {
        const int r = row_first + row < w.rows ? row_first + row : w.rows - 1, t = r / ada_pack_of<X>(a);
        const int64_t head = (int64_t)w.b * p.H + w.h0 + r % ada_pack_of<X>(a);
        const float *const unit =
            X::BYTES ? a.q.units + (head * p.T + t) * 2
                     : a.q.units + head * ((p.T + ADA_UNIT_ROWS - 1) / ADA_UNIT_ROWS) + t / ADA_UNIT_ROWS;
        ada_shared_at<ada_unit>(X::UNITS_AT)[row] = {unit[0], X::BYTES ? unit[1] : 0};
    }
    ada_sync();
    const ada_span span = {low.first, high.end};
    int begin = span.first / X::BN, end = (span.end + X::BN - 1) / X::BN;
    if (X::FEW) {
        const int each = a.split_keys / X::BN;
        begin = begin > w.split * each ? begin : w.split * each;
        end = end < (w.split + 1) * each ? end : (w.split + 1) * each;
    }

    const int32_t *const list = X::LISTED ? ada_list_of(p, (int64_t)w.unit * a.tiles + w.tile) : nullptr;
    if (X::LISTED) begin = 0, end = list[0] * (ADA_LIST_BLOCK / X::BN);
    const auto tile_of = [&](int turn) {
        constexpr int PER = X::LISTED ? ADA_LIST_BLOCK / X::BN : 1;
        return X::LISTED ? list[1 + turn / PER] * PER + turn % PER : turn;
    };

    const int plain_first = (high.first + X::BN - 1) / X::BN, plain_end = low.end / X::BN;

    const char *const keys = a.k.data + w.b * a.k.stride[0] + w.g * a.k.stride[1];
    const char *const values = a.v.data + w.b * a.v.stride[0] + w.g * a.v.stride[1];
    ADA_UNROLL for (int i = 0; i < X::BM * X::QK::CHUNKS; i += X::THREADS) {
        const int at = i + thread, row = at / X::QK::CHUNKS, chunk = at % X::QK::CHUNKS, r = row_first + row;
        if (X::BM * X::QK::CHUNKS % X::THREADS && at >= X::BM * X::QK::CHUNKS) break;
        const int t = r / ada_pack_of<X>(a), h = w.h0 + r % ada_pack_of<X>(a);
        const bool there = r < w.rows;
        const char *from = a.q.data + w.b * a.q.stride[0];
        if (there) from += h * a.q.stride[1] + t * a.q.stride[2];
        ADA_UNROLL for (int part = 0; part < X::PARTS; part++)
            ada_copy_chunk(shared + (uint32_t)(part * X::Q_PART) + ada_place<typename X::QK>(row, chunk),
                           from + part * a.q.part, there, chunk, X::BYTES ? p.D : 2 * p.D);
    }
    if (begin < end) ada_copy_tile<X>(a, shared, keys, values, tile_of(begin), begin, span);
    ada_copy_commit();

    ada_rows<X> rows;
    rows.saw = 0;
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) {
        ADA_UNROLL for (int half = 0; half < 2; half++) rows.m[mr][half] = -ADA_INF, rows.l[mr][half] = 0;
        ADA_UNROLL for (int n = 0; n < X::WIDTH / 8; n++) ADA_UNROLL for (int c = 0; c < 4; c++)
            rows.o[mr][n][c] = 0;
    }
    if constexpr (X::FP8)
        ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++)
            rows.rounded[mr][half] = 0;
    const float factor = X::OPTIONS ? 1 : a.octaves, lazy = X::OPTIONS ? X::LAG : a.lazy;
    /* Lanes 0 ... 15 address sixteen rows, lanes 16 ... 31 the same rows 16 bytes on. */
    const uint32_t q_at = shared + ada_place<typename X::QK>(wm * 16 * X::MR + lane % 16, lane / 16);
    const uint32_t k_at = shared + X::K_AT + ada_place<typename X::QK>(wn * X::KEYS + lane % 16, lane / 16);
    const int64_t unit_tiles = (p.S + ADA_UNIT_ROWS - 1) / ADA_UNIT_ROWS;
    const int64_t units = X::UNITS ? ((int64_t)w.b * p.G + w.g) * unit_tiles : 0;

    ADA_UNROLL_NOT for (int turn = begin; turn < end; turn++) {
        const int n = tile_of(turn);
        const uint32_t stage = (uint32_t)(turn % 2 * X::K_STAGE);
        ada_copy_wait<0>(); /* this thread's part of the tile */
        ada_sync();         /* all have this tile's keys and values, and have read those before */
        if (turn + 1 < end && X::EARLY)
            ada_copy_tile<X>(a, shared, keys, values, tile_of(turn + 1), turn + 1, span);

        float s[X::MR][X::KEYS / 8][4];
        if constexpr (X::E4M3)
            ada_scores_of_e4m3<X>(s, q_at, k_at + stage);
        else if constexpr (X::BYTES)
            ada_scores_of_bytes<X>(s, q_at, k_at + stage);
        else
            ada_scores<X>(s, q_at, k_at + stage);
        if constexpr (X::UNITS) {
            const float k_unit = a.k.units[units + n * X::BN / ADA_UNIT_ROWS];
            const ada_unit *const q_units = ada_shared_at<ada_unit>(X::UNITS_AT) + wm * 16 * X::MR + lane / 4;
            ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++) {
                const ada_unit q = q_units[16 * mr + 8 * half];
                ADA_UNROLL for (int i = 0; i < X::KEYS / 8; i++) ADA_UNROLL for (int c = 0; c < 2; c++) {
                    float &x = s[mr][i][2 * half + c];
                    x = x * (q.one * k_unit) + q.more;
                }
            }
        }

        if (turn + 1 < end && !X::EARLY)
            ada_copy_tile<X>(a, shared, keys, values, tile_of(turn + 1), turn + 1, span);
        ada_copy_commit();

        const int first = n * X::BN + wn * X::KEYS + lane % 4 * 2; /* this lane's first key */
        const bool plain = n >= plain_first && n < plain_end;
        if constexpr (X::OPTIONS)
            ada_apply_options<X>(a, w, s, first, plain, rows.saw);
        else if (!plain)
            ada_hide<X>(s, first);
        ada_weigh<X>(s, rows, factor, lazy);
        if (!X::FP8 && X::OPTIONS && p.drop_below) ada_drop<X>(a, w, s, first);

        uint32_t v_at = k_at + stage + (X::V_AT - X::K_AT);
        if (X::BYTES)
            v_at = shared + (uint32_t)(X::V_AT + turn % 2 * X::V_STAGE) +
                   (X::FP8 ? ada_place<typename X::V>(lane % 16, wn * (X::KEYS / 16) + lane / 16)
                           : ada_place<typename X::V>(wn * X::KEYS + lane % 16, lane / 16));
        const float v_unit = X::PARTS == 2 || X::FP8 ? a.v.units[units + n * X::BN / ADA_UNIT_ROWS] : 1;
        if constexpr (X::FP8)
            ada_add_columns<X>(a, w, rows, s, first, v_at, v_unit);
        else
            ada_add_values<X>(rows, s, v_at, v_unit);
    }

    ada_copy_wait<0>(); /* the queries, where there was no key */

    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++) {
        float &l = rows.l[mr][half];
        l += ada_shuffle_xor(l, 1);
        l += ada_shuffle_xor(l, 2);
    }
    if constexpr (X::FP8) ada_scale_by_sums<X>(rows);
    if (X::OPTIONS) {
        rows.saw |= ada_shuffle_xor(rows.saw, 1);
        rows.saw |= ada_shuffle_xor(rows.saw, 2);
    }
    if (X::FEW)
        ada_leave<X>(a, rows, factor);
    else
        ada_finish<X>(a, rows, factor);
}

template <typename X> ADA_KERNEL(X::THREADS, X::RESIDENT) ada_k1(ADA_ARGS(ada_k1_args) a) {
    if constexpr (ADA_CHIP >= X::LEAST_CHIP) ada_k1_block<X>(a);
}

#endif
