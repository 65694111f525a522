/* Few queries on keys and values in float32, or in the pages of a cache: read once, as they are, and computed
 * in float32 by plain arithmetic. A block has a part of the keys of one head and up to ROWS of the rows that
 * share them; sixteen lanes share a key. It leaves sums to combine, as K1 does.
 *
 * What a row adds up does not depend on what is computed beside it: products are fused by name, so that all
 * instances round alike.
 */
#include "launch.h"

namespace {

enum { THREADS = 128, LANES = 16, GROUPS = THREADS / LANES };

typedef struct {
    ada_cu_params p;
    float *partials; /* as ada_k1_args has them */
    int64_t rows;
    int32_t splits, split_keys, pack, chunks; /* chunks: of ROWS rows, of those that share keys */
    int32_t options;
    float octaves;
} few_args;

/* SIZE: of an element of keys and values, in bytes; PER: elements of a row that a lane holds. */
template <int SIZE_, int PER_, int ROWS_> struct few_tiling {
    static constexpr int SIZE = SIZE_, PER = PER_, ROWS = ROWS_, WIDTH = LANES * PER;
    static constexpr bool BYTES = SIZE == 1;
    static constexpr int VECTOR = PER < 16 / SIZE ? PER : 16 / SIZE; /* elements that are read together */
    static constexpr int KEYS = PER > 8 ? 2 : 4;                     /* of a group, at a time */
    static constexpr int STEP = GROUPS * KEYS;                       /* of a block, all in one page */
    static constexpr int SHARED = GROUPS * ROWS * (WIDTH + 3) * 4;
    static_assert(ADA_CU_PAGE % STEP == 0, "");
};

/* Where a step's keys or values lie. */
typedef struct {
    const char *at;
    int64_t row;
    bool bytes, bf16;
    float scale;
} few_rows;

/* VECTOR elements from index d on; zeros behind the width. */
template <typename X> ADA_DEVICE void few_load(float *x, const few_rows &rows, int row, int d, int width) {
    constexpr int V = X::VECTOR;
    const char *const at = rows.at + row * rows.row;
    const char *const means = rows.at + ADA_CU_PAGE * rows.row + 16;
    const bool whole = d + V <= width;
    if (X::BYTES && rows.bytes) {
        ada_vector<uint8_t, V> codes = {};
        ada_vector<uint16_t, V> mean = {};
        if (whole) {
            codes = *(const ada_vector<uint8_t, V> *)(at + d);
            if constexpr (V == 16)
                for (int i = 0; i < 2; i++) {
                    const ada_vector<uint16_t, 8> half =
                        ((const ada_vector<uint16_t, 8> *)(means + 2 * d))[i];
                    ADA_UNROLL for (int c = 0; c < 8; c++) mean.x[8 * i + c] = half.x[c];
                }
            else
                mean = *(const ada_vector<uint16_t, V> *)(means + 2 * d);
        } else {
            ADA_UNROLL for (int c = 0; c < V; c++) if (d + c < width) codes.x[c] = (uint8_t)at[d + c],
                                                                      mean.x[c] =
                                                                          ((const uint16_t *)means)[d + c];
        }
        ADA_UNROLL for (int c = 0; c < V; c++) {
            const float value = fmaf((float)((int)codes.x[c] - 128), rows.scale, ada_from_bf16(mean.x[c]));
            x[c] = d + c < width ? value : 0;
        }
    } else if (X::SIZE == 4 || X::BYTES) {
        ADA_UNROLL for (int i = 0; i < V; i += 4) {
            if (d + i + 4 <= width) {
                const ada_vector<float, 4> four = *(const ada_vector<float, 4> *)(at + 4 * (d + i));
                ADA_UNROLL for (int c = 0; c < 4; c++) x[i + c] = four.x[c];
            } else {
                ADA_UNROLL for (int c = 0; c < 4; c++) x[i + c] =
                    d + i + c < width ? ((const float *)at)[d + i + c] : 0;
            }
        }
    } else if (whole) {
        const ada_vector<uint16_t, V> halves = *(const ada_vector<uint16_t, V> *)(at + 2 * d);
        ADA_UNROLL for (int c = 0; c < V; c++) x[c] =
            rows.bf16 ? ada_from_bf16(halves.x[c]) : ada_from_f16(halves.x[c]);
    } else {
        ADA_UNROLL for (int c = 0; c < V; c++) {
            const uint16_t half = d + c < width ? ((const uint16_t *)at)[d + c] : 0;
            x[c] = rows.bf16 ? ada_from_bf16(half) : ada_from_f16(half);
        }
    }
}

/* Rows of a step that begins with key `base`; contiguous ones are counted from there. */
template <typename X>
ADA_DEVICE few_rows few_rows_of(const ada_cu_params &p, const ada_sequence &s, int b, int g, int side,
                                int base) {
    few_rows rows = {};
    if (p.pages.table) {
        const ada_kept_page page = ada_page_of(p.pages, s, g, side, base / ADA_CU_PAGE);
        rows.at = page.at, rows.row = page.row, rows.bytes = page.bytes;
        rows.bf16 = p.pages.dtype == ADA_CU_BF16;
        if (X::BYTES && page.bytes) rows.scale = ada_page_scale(page);
    } else {
        const ada_cu_array &a = side ? p.value : p.key;
        rows.row = a.stride[2];
        rows.at = (const char *)a.data + b * a.stride[0] + g * a.stride[1] +
                  base / ADA_CU_PAGE * ADA_CU_PAGE * rows.row;
    }
    return rows;
}

/* Caps, biases and hides the score of one key, in octaves; visible: also whether the mask shows it. */
ADA_DEVICE float few_score(const few_args &a, const ada_sequence &s, int h, int t, int j, float x,
                           bool &visible) {
    const ada_cu_params &p = a.p;
    if (p.softcap != 0) {
        const float cap = (float)(p.softcap * ADA_LOG2E), inverse = 2 * (float)ADA_LOG2E / cap;
        x = fmaf(-2 * cap, ada_reciprocal(ada_exp2(x * inverse) + 1), cap);
    }
    if (p.alibi_slopes) {
        const double slope = p.alibi_slopes[s.b * p.alibi_stride[0] + h * p.alibi_stride[1]];
        x = fmaf(-(float)(slope * ADA_LOG2E), fabsf((float)(s.offset + t - j)), x);
    }
    if (p.mask.data && visible) {
        const char *at = ada_mask_row(p, s.b, h, t) + j * p.mask.stride[3];
        if (p.mask_dtype == ADA_CU_BOOL) {
            visible = *at != 0;
        } else {
            const float add = ada_mask_value<float>(p, at);
            const float octaves = fmaxf(add * (float)ADA_LOG2E, -3.4028234e38f);
            visible = !(add == -ADA_INF);
            x = x + (add != add ? add : octaves);
        }
    }
    return visible ? x : -ADA_INF;
}

template <typename X> ADA_KERNEL(THREADS, 2) few_queries(ADA_ARGS(few_args) a) {
    const ada_cu_params &p = a.p;
    const int lane = ada_thread() % LANES, group = ada_thread() / LANES;
    const int chunk = ada_block() % a.chunks, split = ada_block() / a.chunks % a.splits;
    const int unit = ada_block() / a.chunks / a.splits, unit_rows = a.pack * p.T;
    const int head = a.pack > 1 ? unit * a.pack : p.heads ? p.heads[unit] : unit;
    const int b = head / p.H, h0 = head % p.H, g = h0 / (p.H / p.G);
    const ada_sequence sequence = ada_sequence_of(p, b);

    float q[X::ROWS][X::PER], o[X::ROWS][X::PER], m[X::ROWS], l[X::ROWS];
    ada_span spans[X::ROWS], all = {p.S, 0};
    uint32_t saw = 0;
    ADA_UNROLL for (int r = 0; r < X::ROWS; r++) {
        int row = chunk * X::ROWS + r;
        row = row < unit_rows ? row : unit_rows - 1; /* the last one again, which nobody writes */
        const int t = row / a.pack, h = h0 + row % a.pack;
        spans[r] = ada_visible(p, sequence, t);
        all.first = spans[r].first < all.first ? spans[r].first : all.first;
        all.end = spans[r].end > all.end ? spans[r].end : all.end;
        const char *from = (const char *)p.query.data + b * p.query.stride[0] + h * p.query.stride[1] +
                           t * p.query.stride[2];
        ADA_UNROLL for (int i = 0; i < X::PER; i++) {
            const int d = (i / X::VECTOR * LANES + lane) * X::VECTOR + i % X::VECTOR;
            q[r][i] = d < p.D ? ada_element<float>(from + d * p.query.stride[3], p.dtype) * a.octaves : 0;
            o[r][i] = 0;
        }
        m[r] = -ADA_INF, l[r] = 0;
    }

    const int part_end = (split + 1) * a.split_keys, part = split * a.split_keys;
    const int begin = all.first > part ? all.first / X::STEP * X::STEP : part;
    const int end = all.end < part_end ? all.end : part_end;
    ADA_UNROLL_NOT for (int base = begin; base < end; base += X::STEP) {
        const few_rows keys = few_rows_of<X>(p, sequence, b, g, 0, base);
        const few_rows values = few_rows_of<X>(p, sequence, b, g, 1, base);
        float k[X::KEYS][X::PER], v[X::KEYS][X::PER], s[X::ROWS][X::KEYS];
        ADA_UNROLL for (int i = 0; i < X::KEYS; i++) {
            const int j = base + i * GROUPS + group, row = j % ADA_CU_PAGE;
            const bool there = j >= all.first && j < all.end; /* others may be anything, or nowhere */
            ADA_UNROLL for (int c = 0; c < X::PER; c += X::VECTOR) {
                const int d = (c / X::VECTOR * LANES + lane) * X::VECTOR;
                few_load<X>(&k[i][c], keys, row, d, there ? p.D : 0);
                few_load<X>(&v[i][c], values, row, d, there ? p.E : 0);
            }
        }
        ADA_UNROLL for (int r = 0; r < X::ROWS; r++) ADA_UNROLL for (int i = 0; i < X::KEYS; i++) {
            float x = 0;
            ADA_UNROLL for (int c = 0; c < X::PER; c++) x = fmaf(q[r][c], k[i][c], x);
            s[r][i] = x;
        }
        ADA_UNROLL for (int r = 0; r < X::ROWS; r++) ADA_UNROLL for (int i = 0; i < X::KEYS; i++)
            ADA_UNROLL for (int lanes = 1; lanes < LANES; lanes *= 2) s[r][i] +=
            ada_shuffle_xor(s[r][i], lanes);
        bool rise = false;
        float top[X::ROWS];
        ADA_UNROLL for (int r = 0; r < X::ROWS; r++) {
            int row = chunk * X::ROWS + r;
            row = row < unit_rows ? row : unit_rows - 1;
            top[r] = m[r];
            ADA_UNROLL for (int i = 0; i < X::KEYS; i++) {
                const int j = base + i * GROUPS + group;
                bool visible = j >= spans[r].first && j < spans[r].end;
                if (a.options)
                    s[r][i] = few_score(a, sequence, h0 + row % a.pack, row / a.pack, j, s[r][i], visible);
                else
                    s[r][i] = visible ? s[r][i] : -ADA_INF;
                saw |= (uint32_t)visible << r;
                top[r] = fmaxf(top[r], s[r][i]);
            }
            rise |= top[r] > m[r];
        }
        float by[X::ROWS];
        ADA_UNROLL for (int r = 0; r < X::ROWS; r++) by[r] = 1;
        if (ada_any(rise)) {
            ADA_UNROLL for (int r = 0; r < X::ROWS; r++) {
                by[r] = top[r] > m[r] ? ada_exp2(m[r] - top[r]) : 1;
                m[r] = top[r];
                ADA_UNROLL for (int c = 0; c < X::PER; c++) o[r][c] *= by[r];
            }
        }
        ADA_UNROLL for (int r = 0; r < X::ROWS; r++) {
            const float reference = m[r] == -ADA_INF ? 0 : m[r];
            float sum = 0;
            ADA_UNROLL for (int i = 0; i < X::KEYS; i++) {
                s[r][i] = ada_exp2(s[r][i] - reference);
                sum += s[r][i];
            }
            l[r] = fmaf(l[r], by[r], sum);
            if (p.drop_below) {
                int row = chunk * X::ROWS + r;
                row = row < unit_rows ? row : unit_rows - 1;
                const uint64_t random = ada_dropout_row(p, b, h0 + row % a.pack, row / a.pack);
                ADA_UNROLL for (int i = 0; i < X::KEYS;
                                i++) if (ada_dropped(p, random, base + i * GROUPS + group)) s[r][i] = 0;
            }
            ADA_UNROLL for (int i = 0; i < X::KEYS; i++) ADA_UNROLL for (int c = 0; c < X::PER; c++) o[r][c] =
                fmaf(s[r][i], v[i][c], o[r][c]);
        }
    }

    float *const sums = ada_shared_at<float>(0);            /* [GROUPS][ROWS][WIDTH] */
    float *const ends = sums + GROUPS * X::ROWS * X::WIDTH; /* [GROUPS][ROWS][3] */
    ADA_UNROLL for (int r = 0; r < X::ROWS; r++) {
        const int at = group * X::ROWS + r;
        ADA_UNROLL for (int i = 0; i < X::PER; i++)
            sums[at * X::WIDTH + (i / X::VECTOR * LANES + lane) * X::VECTOR + i % X::VECTOR] = o[r][i];
        if (lane == 0) ends[3 * at] = m[r], ends[3 * at + 1] = l[r], ends[3 * at + 2] = (float)(saw >> r & 1);
    }
    ada_sync();
    float *const heads = a.partials + a.rows * a.splits * p.E;
    for (int i = ada_thread(); i < X::ROWS * X::WIDTH; i += THREADS) {
        const int r = i / X::WIDTH, e = i % X::WIDTH, row = chunk * X::ROWS + r;
        if (row >= unit_rows || e >= p.E) continue;
        float most = -ADA_INF, total = 0, sum = 0, seen = 0;
        for (int n = 0; n < GROUPS; n++) most = fmaxf(most, ends[3 * (n * X::ROWS + r)]);
        for (int n = 0; n < GROUPS; n++) {
            const float *const end_of = ends + 3 * (n * X::ROWS + r);
            const float factor = end_of[0] == most ? 1 : ada_exp2(end_of[0] - most);
            total = fmaf(end_of[1], factor, total), seen = fmaxf(seen, end_of[2]);
            sum = fmaf(sums[(n * X::ROWS + r) * X::WIDTH + e], factor, sum);
        }
        const int64_t at = (((int64_t)b * p.H + h0 + row % a.pack) * p.T + row / a.pack) * a.splits + split;
        a.partials[at * p.E + e] = sum;
        if (e == 0) heads[3 * at] = most, heads[3 * at + 1] = total, heads[3 * at + 2] = seen;
    }
}

template <int SIZE, int PER, int ROWS> cudaError_t run_rows(few_args &a, cudaStream_t stream) {
    typedef few_tiling<SIZE, PER, ROWS> X;
    a.chunks = (a.pack * a.p.T + ROWS - 1) / ROWS;
    const int64_t units = (a.p.heads ? a.p.n_heads : (int64_t)a.p.B * a.p.H) / a.pack;
    return ada_launch(few_queries<X>, units * a.splits * a.chunks, THREADS, X::SHARED, stream, a);
}

template <int SIZE, int PER> cudaError_t run_width(few_args &a, cudaStream_t stream) {
    return a.pack * a.p.T == 1 ? run_rows<SIZE, PER, 1>(a, stream) : run_rows<SIZE, PER, 4>(a, stream);
}

template <int SIZE> cudaError_t run(few_args &a, cudaStream_t stream) {
    const int most = a.p.D > a.p.E ? a.p.D : a.p.E;
    if (most <= 64) return run_width<SIZE, 4>(a, stream);
    if (most <= 128) return run_width<SIZE, 8>(a, stream);
    return run_width<SIZE, 16>(a, stream);
}

/* By the number of keys alone, so that a head's bits do not depend on how many there are. */
int keys_of_split(const ada_cu_params *p) {
    const int least = p->S > 8192 ? 512 : 256, each = (p->S + 65535) / 65536 * 64;
    return each > least ? each : least;
}
int splits_of(const ada_cu_params *p) { return (p->S + keys_of_split(p) - 1) / keys_of_split(p); }

} // namespace

bool ada_reads_floats(const ada_cu_params *p) {
    if (p->pages.table) return true;
    return p->rung == ADA_CU_SPLIT && p->dtype == ADA_CU_F32 && (int64_t)p->T * (p->H / p->G) <= 16 &&
           ada_in_fours(&p->key, ADA_CU_F32) && ada_in_fours(&p->value, ADA_CU_F32);
}

size_t ada_few_workspace(const ada_cu_params *p) {
    return (size_t)p->B * p->H * p->T * splits_of(p) * (p->E + 3) * sizeof(float);
}

cudaError_t ada_few_attend(const ada_cu_params *p, const ada_k0_args &again, cudaStream_t stream) {
    few_args a = {};
    a.p = *p;
    a.partials = (float *)p->workspace, a.rows = (int64_t)p->B * p->H * p->T;
    a.splits = splits_of(p), a.split_keys = keys_of_split(p), a.pack = p->heads ? 1 : p->H / p->G;
    a.options = p->mask.data || p->alibi_slopes || p->softcap != 0;
    a.octaves = (float)(p->scale * ADA_LOG2E);
    const bool floats = !p->pages.table || p->pages.dtype == ADA_CU_F32;
    const cudaError_t error = floats                        ? run<4>(a, stream)
                              : p->pages.dtype == ADA_CU_I8 ? run<1>(a, stream)
                                                            : run<2>(a, stream);
    if (error) return error;
    ada_combine_args combine = {};
    combine.k0 = again, combine.partials = a.partials, combine.rows = a.rows, combine.splits = a.splits;
    return ada_combine_run(combine, again.rows, stream);
}
