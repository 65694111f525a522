/* What K1 is told, how its tiles of queries, keys and values lie in shared memory, and how they get there.
 *
 * Keys and values come by cp.async into two stages each, one iteration ahead.
 */
#ifndef ADA_CUDA_K1_TILING_CUH
#define ADA_CUDA_K1_TILING_CUH

#include "common.cuh"

typedef struct {
    const char *data; /* halves or bytes, contiguous in a row, rows aligned to 16 bytes */
    int64_t stride[3];
    int64_t part;       /* bytes to the second part of every element, of which one is worth ADA_LOW_UNIT */
    const float *units; /* [B][heads][tiles of ADA_UNIT_ROWS rows] what a one of the first part is worth; of
                           bytes: [B][heads][rows][2] of queries, a unit and what is added to all scores */
} ada_operand;

#define ADA_LOW_UNIT 0.00048828125f /* 2^-11 */
enum { ADA_UNIT_ROWS = 64 };

typedef struct {
    ada_cu_params p;
    ada_operand q, k, v;
    int32_t *again;
    float *partials;                         /* [row][split][E], then of each m, l and whether it saw a key */
    int64_t rows;                            /* B * H * T */
    int32_t tiles, splits, split_keys, pack; /* split_keys: a multiple of all BN */
    int32_t units,
        group;           /* heads or packs of them; of these, those whose tiles of one number come together */
    int32_t options;     /* mask, slopes, cap or dropout */
    float octaves, lazy; /* of a raw score; ADA_LAZY_OCTAVES in raw scores */
    int32_t
        mask_pairs; /* two neighbours of the mask can be read at once, whatever the first, if it is even */
    int32_t pairs;  /* two neighbours of out can be written at once */
} ada_k1_args;

/* Of a row of queries: what a one is worth, and what is added to its scores. */
typedef struct {
    float one, more;
} ada_unit;

/* The list of a tile of queries. */
ADA_DEVICE const int32_t *ada_list_of(const ada_cu_params &p, int64_t tile) {
    return p.lists + tile * (1 + (p.S + ADA_LIST_BLOCK - 1) / ADA_LIST_BLOCK);
}

enum { ADA_LAZY_OCTAVES = 8 }; /* the reference rises when a score exceeds it by more */
/* Weights in e4m3: up to 2^8.75, below its largest, 448; the small ones keep their digits so. */
enum { ADA_FP8_OCTAVES = 8 };
#define ADA_FP8_LAG 0.75f

/* Rows of so many bytes in shared memory, in chunks of 16. The chunks of eight rows that ldmatrix reads lie
 * in different banks: their number is xored with the row's. */
template <int BYTES_> struct ada_rows_of {
    static constexpr int BYTES = BYTES_, CHUNKS = BYTES / 16;
    static constexpr int MASK = CHUNKS % 8 == 0 ? 7 : CHUNKS % 4 == 0 ? 3 : 1;
    static constexpr int SHIFT = CHUNKS % 8 == 0 ? 0 : CHUNKS % 4 == 0 ? 1 : 2;
};

template <typename L> ADA_DEVICE uint32_t ada_place(int row, int chunk) {
    return (uint32_t)(row * L::BYTES + ((chunk ^ (row >> L::SHIFT & L::MASK)) * 16));
}
/* From a place with an even chunk, or one behind it, so many bytes on in the row: a multiple of 32. */
template <typename L> ADA_DEVICE uint32_t ada_along(uint32_t place, int bytes) {
    return (place ^ (uint32_t)(bytes & L::MASK * 16)) + (uint32_t)(bytes & ~(L::MASK * 16));
}

template <bool BF16_, int WIDTH_, int MW_, int MR_, int NW_, int BN_, bool OPTIONS_, bool FEW_, int RESIDENT_,
          int LEAST_CHIP_ = 80, int PARTS_ = 1, bool BYTES_ = false, bool E4M3_ = false, bool FP8_ = false,
          bool LISTED_ = false>
struct ada_tiling {
    static constexpr bool LISTED = LISTED_; /* of the keys' tiles those of the blocks on params.h's lists */
    static constexpr bool BF16 = BF16_, OPTIONS = OPTIONS_, FEW = FEW_;
    static constexpr bool BYTES = BYTES_; /* queries and keys are signed bytes or, E4M3, such floats */
    static constexpr bool E4M3 = E4M3_;
    static constexpr bool FP8 = FP8_;    /* weights and values are e4m3: k1_fp8.cuh */
    static constexpr int PARTS = PARTS_; /* fp16 numbers that add up to an element; 2: accurate to float */
    /* The next tile's copies are sent off before the first product, or behind it, which then begins at once.
     */
    static constexpr bool EARLY = FEW || PARTS == 2;
    static constexpr bool UNITS = BYTES || PARTS == 2;
    static constexpr int WIDTH = WIDTH_; /* D and E, padded */
    static constexpr int MW = MW_, MR = MR_, NW = NW_;
    static constexpr int BM = 16 * MW * MR, BN = BN_; /* rows of queries and of keys in a tile */
    static constexpr int KEYS = BN / NW;              /* of a tile, for one warp */
    static constexpr int THREADS = 32 * MW * NW, RESIDENT = RESIDENT_, LEAST_CHIP = LEAST_CHIP_;
    typedef ada_rows_of<BYTES ? WIDTH : 2 * WIDTH> QK;
    typedef ada_rows_of<FP8 ? BN_ : 2 * WIDTH> V; /* of keys; of columns where FP8 */
    /* Weights are relative to so many octaves below the reference, which lags behind by fewer than LAG. */
    static constexpr int BELOW = FP8 ? ADA_FP8_OCTAVES : 0;
    static constexpr float LAG = FP8 ? ADA_FP8_LAG : (float)ADA_LAZY_OCTAVES;
    /* Shared memory: queries, two stages of keys and of values, all parts of each; then what rows know. */
    static constexpr int Q_PART = BM * QK::BYTES, K_PART = BN * QK::BYTES,
                         V_PART = (FP8 ? WIDTH : BN) * V::BYTES;
    static constexpr int K_STAGE = PARTS * K_PART, V_STAGE = PARTS * V_PART;
    static constexpr int K_AT = PARTS * Q_PART, V_AT = K_AT + 2 * K_STAGE, LOOP_BYTES = V_AT + 2 * V_STAGE;
    static constexpr int MERGE_BYTES = FEW ? NW * BM * (WIDTH + 3) * 4 : 0;
    static constexpr int SPANS_AT = LOOP_BYTES > MERGE_BYTES ? LOOP_BYTES : MERGE_BYTES;
    static constexpr int UNITS_AT = SPANS_AT + BM * (int)sizeof(ada_span);
    static constexpr int SHARED = UNITS_AT + (UNITS ? BM * (int)sizeof(ada_unit) : 0);
    static_assert(KEYS % (FP8 ? 32 : 16) == 0 && (NW == 1 || (FEW && MW == 1)), "");
};

/* A chunk of a row; zeros where it is not there or behind the row's bytes. */
ADA_DEVICE void ada_copy_chunk(uint32_t to, const char *row, bool there, int chunk, int bytes) {
    const int left = bytes - chunk * 16, n = !there || left < 0 ? 0 : left < 16 ? left : 16;
    ada_copy(to, n ? row + chunk * 16 : row, n);
}

/* Rows first ... first + BN - 1 of keys or values, of so many bytes. Those outside the span are zeros: they
 * may hold anything. */
template <typename X, typename L>
ADA_DEVICE void ada_copy_part(uint32_t to, const char *from, int64_t stride, int first, ada_span span,
                              int bytes) {
    const int thread = ada_thread();
    if constexpr (X::THREADS % L::CHUNKS == 0 && X::THREADS / L::CHUNKS % 8 == 0) {
        /* This thread's chunks are one behind the other. */
        constexpr int STEP = X::THREADS / L::CHUNKS;
        const int row = thread / L::CHUNKS, chunk = thread % L::CHUNKS, left = bytes - chunk * 16;
        const int n = left < 0 ? 0 : left < 16 ? left : 16;
        const char *at = from + (first + row) * stride + chunk * 16;
        const int lowest = span.first - first - row, end = span.end - first - row;
        to += ada_place<L>(row, chunk);
        ADA_UNROLL for (int i = 0; i < X::BN; i += STEP) {
            if (X::BN % STEP && row + i >= X::BN) break;
            ada_copy(to + (uint32_t)(i * L::BYTES), at, i >= lowest && i < end ? n : 0);
            at += STEP * stride;
        }
    } else {
        ADA_UNROLL for (int i = 0; i < X::BN * L::CHUNKS; i += X::THREADS) {
            const int at = i + thread, row = at / L::CHUNKS, chunk = at % L::CHUNKS, j = first + row;
            if (X::BN * L::CHUNKS % X::THREADS && at >= X::BN * L::CHUNKS) break;
            const bool there = j >= span.first && j < span.end;
            ada_copy_chunk(to + ada_place<L>(row, chunk), there ? from + j * stride : from, there, chunk,
                           bytes);
        }
    }
}

/* The columns of a tile of values in e4m3, as ada_columns_of_values packed them. */
template <typename X> ADA_DEVICE void ada_copy_columns(uint32_t to, const char *values, int E, int first) {
    constexpr int CHUNKS = X::BN / 16, STEP = X::THREADS / CHUNKS;
    static_assert(STEP % 8 == 0 && X::WIDTH % STEP == 0, "");
    const int e = ada_thread() / CHUNKS, chunk = ada_thread() % CHUNKS;
    const char *at = values + (int64_t)(first / ADA_UNIT_ROWS) * E * ADA_UNIT_ROWS + first % ADA_UNIT_ROWS +
                     e * ADA_UNIT_ROWS + chunk * 16;
    to += ada_place<typename X::V>(e, chunk);
    ADA_UNROLL_BY(4) for (int i = 0; i < X::WIDTH; i += STEP) {
        ada_copy(to + (uint32_t)(i * X::V::BYTES), e + i < E ? at : values, e + i < E ? 16 : 0);
        at += STEP * ADA_UNIT_ROWS;
    }
}

/* A tile of keys and of values into the stage of a turn. */
template <typename X>
ADA_DEVICE void ada_copy_tile(const ada_k1_args &a, uint32_t shared, const char *keys, const char *values,
                              int tile, int turn, ada_span span) {
    const uint32_t k_to = shared + (uint32_t)(X::K_AT + turn % 2 * X::K_STAGE);
    const uint32_t v_to = shared + (uint32_t)(X::V_AT + turn % 2 * X::V_STAGE);
    ADA_UNROLL for (int part = 0; part < X::PARTS; part++)
        ada_copy_part<X, typename X::QK>(k_to + (uint32_t)(part * X::K_PART), keys + part * a.k.part,
                                         a.k.stride[2], tile * X::BN, span, X::BYTES ? a.p.D : 2 * a.p.D);
    if constexpr (X::FP8)
        ada_copy_columns<X>(v_to, values, a.p.E, tile * X::BN);
    else
        ADA_UNROLL for (int part = 0; part < X::PARTS; part++)
            ada_copy_part<X, typename X::V>(v_to + (uint32_t)(part * X::V_PART), values + part * a.v.part,
                                            a.v.stride[2], tile * X::BN, span, 2 * a.p.E);
}

/* Heads that share a tile's rows. */
template <typename X> ADA_DEVICE int ada_pack_of(const ada_k1_args &a) { return X::FEW ? a.pack : 1; }

/* This lane's place in the launch. */
typedef struct {
    int b, h0, g; /* the first head of the pack, its keys' head */
    int tile, split;
    int row0; /* this lane's first row */
    int rows; /* of the unit */
    int unit;
} ada_where;

template <typename X> ADA_DEVICE ada_where ada_where_of(const ada_k1_args &a) {
    const ada_cu_params &p = a.p;
    const int warp = ada_thread() / 32 % X::MW, lane = ada_thread() % 32;
    int index = ada_block();
    ada_where w;
    w.split = 0;
    if (X::FEW) w.split = index % a.splits, index /= a.splits;
    /* Blocks come in this order: groups of units, in them tiles, in these units. */
    const int of_group = a.group * a.tiles, group = index / of_group * a.group, within = index % of_group;
    const int here = a.group < a.units - group ? a.group : a.units - group, unit = group + within % here;
    const int head = ada_pack_of<X>(a) > 1 ? unit * ada_pack_of<X>(a) : p.heads ? p.heads[unit] : unit;
    w.unit = unit;
    w.tile = a.tiles - 1 - within / here; /* the longest causal ones first */
    w.b = head / p.H, w.h0 = head % p.H;
    w.g = w.h0 / (p.H / p.G);
    w.rows = ada_pack_of<X>(a) * p.T;
    w.row0 = w.tile * X::BM + warp * 16 * X::MR + lane / 4;
    return w;
}

/* Spans of this lane's rows, from the first one on. */
template <typename X> ADA_DEVICE const ada_span *ada_spans() {
    const int row = ada_thread() / 32 % X::MW * 16 * X::MR + ada_thread() % 32 / 4;
    return ada_shared_at<ada_span>(X::SPANS_AT) + row;
}

#endif
