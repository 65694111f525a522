/* Arrays of any dtype and layout to rows of halves, of pairs of them or of bytes, as K1 copies them. */
#ifndef ADA_CUDA_PACK_CUH
#define ADA_CUDA_PACK_CUH

#include "k1_tiling.cuh"

typedef struct {
    ada_cu_array from;
    int32_t dtype, heads, rows, width, chunks; /* chunks of 16 bytes in a packed row */
    int32_t bf16, e4m3;                        /* bytes: e4m3 rather than integers */
    const int32_t *list;                       /* query heads that are wanted, ascending; NULL: all */
    int32_t per;                               /* of them share a packed head */
    int64_t items;                             /* chunks in all; bytes: queries */
    uint16_t *to;                              /* [B][heads][rows][8 * chunks] */
    int64_t part;                              /* pairs: elements from first parts to second ones */
    float *units;                              /* pairs, bytes: as ada_operand's */
    float *mean;                               /* bytes: [B][G][D] of the keys */
    int32_t G;
    const int64_t *lengths; /* rows of sequence b, NULL: all; [b * stride] */
    int64_t lengths_stride;
} ada_pack_args;

enum { ADA_PACK_THREADS = 256 };

/* The head that is packed as the n-th one; -1: it was packed before. */
ADA_DEVICE int64_t ada_packed_head(const ada_pack_args &a, int64_t n) {
    if (!a.list) return n;
    const int head = a.list[n] / a.per;
    return n > 0 && a.list[n - 1] / a.per == head ? -1 : head;
}

/* The tile of ADA_UNIT_ROWS rows of a head that a block packs: rows first ... end - 1. */
typedef struct {
    int64_t head; /* -1: it was packed before */
    int first, end;
    const char *from;
    float *unit; /* the tile's */
} ada_packed_tile;

ADA_DEVICE ada_packed_tile ada_tile_of_block(const ada_pack_args &a) {
    const int tiles = (a.rows + ADA_UNIT_ROWS - 1) / ADA_UNIT_ROWS, tile = ada_block() % tiles;
    const int64_t head = ada_packed_head(a, ada_block() / tiles);
    if (head < 0) return {head, 0, 0, nullptr, nullptr};
    const int first = tile * ADA_UNIT_ROWS, b = (int)(head / a.heads);
    const int64_t all = a.lengths ? a.lengths[b * a.lengths_stride] : a.rows;
    const int end = first + ADA_UNIT_ROWS < all ? first + ADA_UNIT_ROWS : (int)all;
    return {head, first, end > first ? end : first,
            (const char *)a.from.data + b * a.from.stride[0] + head % a.heads * a.from.stride[1],
            a.units + head * tiles + tile};
}

static ADA_KERNEL(ADA_PACK_THREADS, 1) ada_pack_rows(ADA_ARGS(ada_pack_args) a) {
    const int64_t i = (int64_t)ada_block() * ADA_PACK_THREADS + ada_thread();
    if (i >= a.items) return;
    const int chunk = (int)(i % a.chunks);
    const int64_t head = ada_packed_head(a, i / a.chunks / a.rows), row = i / a.chunks % a.rows;
    if (head < 0) return;
    const char *from = (const char *)a.from.data + head / a.heads * a.from.stride[0] +
                       head % a.heads * a.from.stride[1] + row * a.from.stride[2];
    float x[8];
    ADA_UNROLL for (int c = 0; c < 8; c++) {
        const int at = 8 * chunk + c;
        x[c] = at < a.width ? ada_element<float>(from + at * a.from.stride[3], a.dtype) : 0;
    }
    ada_vector<uint32_t, 4> packed;
    ADA_UNROLL for (int c = 0; c < 4; c++) packed.x[c] =
        a.bf16 ? ada_pack_bf16(x[2 * c], x[2 * c + 1]) : ada_pack_f16(x[2 * c], x[2 * c + 1]);
    *(ada_vector<uint32_t, 4> *)(a.to + 8 * ((head * a.rows + row) * a.chunks + chunk)) = packed;
}

/* What a tile's elements are multiplied by, of all threads of a block: a power of two that brings the largest
 * finite one below 2^reach; 1 over it is the tile's unit. No exponent below least counts. */
ADA_DEVICE float ada_scale_tile(const ada_pack_args &a, const ada_packed_tile &tile, int reach, int least) {
    float most = 0;
    for (int i = ada_thread(); i < (tile.end - tile.first) * a.width; i += ADA_PACK_THREADS) {
        const char *row = tile.from + (tile.first + i / a.width) * a.from.stride[2];
        const float x = fabsf(ada_element<float>(row + i % a.width * a.from.stride[3], a.dtype));
        most = x < ADA_INF ? fmaxf(most, x) : most;
    }
    ADA_UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) most = fmaxf(most, ada_shuffle_xor(most, lanes));
    float *const each = ada_shared_at<float>(0);
    if (ada_thread() % 32 == 0) each[ada_thread() / 32] = most;
    ada_sync();
    for (int i = 0; i < ADA_PACK_THREADS / 32; i++) most = fmaxf(most, each[i]);
    int exponent = 0; /* of a power of two above most */
    frexpf(most, &exponent);
    exponent = exponent < least ? least : exponent;
    if (ada_thread() == 0) *tile.unit = ldexpf(1, exponent - reach);
    return ldexpf(1, reach - exponent);
}

/* Pairs: a tile of ADA_UNIT_ROWS rows by one block. A power of two brings its largest finite number to 2^14,
 * so that small ones keep their digits; the first part holds 11 bits of a number, the second one the next 11.
 */
static ADA_KERNEL(ADA_PACK_THREADS, 1) ada_split_rows(ADA_ARGS(ada_pack_args) a) {
    const ada_packed_tile tile = ada_tile_of_block(a);
    const int64_t head = tile.head;
    if (head < 0) return;
    const int first = tile.first, end = tile.end;
    const char *const from = tile.from;
    const float factor = ada_scale_tile(a, tile, 14, -80);
    for (int i = ada_thread(); i < (end - first) * a.chunks; i += ADA_PACK_THREADS) {
        const int row = first + i / a.chunks, chunk = i % a.chunks;
        ada_vector<uint32_t, 4> high, low;
        ADA_UNROLL for (int c = 0; c < 4; c++) {
            float x[2];
            ADA_UNROLL for (int k = 0; k < 2; k++) {
                const int at = 8 * chunk + 2 * c + k;
                const char *element = from + row * a.from.stride[2] + at * a.from.stride[3];
                x[k] = at < a.width ? ada_element<float>(element, a.dtype) * factor : 0;
            }
            high.x[c] = ada_pack_f16(x[0], x[1]);
            low.x[c] = ada_pack_f16((x[0] - ada_from_f16((uint16_t)high.x[c])) / ADA_LOW_UNIT,
                                    (x[1] - ada_from_f16((uint16_t)(high.x[c] >> 16))) / ADA_LOW_UNIT);
        }
        uint16_t *const to = a.to + ((head * a.rows + row) * a.chunks + chunk) * 8;
        *(ada_vector<uint32_t, 4> *)to = high;
        *(ada_vector<uint32_t, 4> *)(to + a.part) = low;
    }
}

/* Bytes: the mean of up to ADA_MEAN_KEYS keys of a head by one block, of their finite numbers. Keys less
 * their mean have smaller ones; what that takes from a row's scores is the same for all keys, and added
 * again. */
enum { ADA_MEAN_KEYS = 128 };

static ADA_KERNEL(ADA_PACK_THREADS, 1) ada_mean_of_keys(ADA_ARGS(ada_pack_args) a) {
    const int64_t head = ada_packed_head(a, ada_block());
    if (head < 0) return;
    const int b = (int)(head / a.heads);
    const int64_t all = a.lengths ? a.lengths[b * a.lengths_stride] : a.rows;
    const int64_t step = (all + ADA_MEAN_KEYS - 1) / ADA_MEAN_KEYS;
    const char *from = (const char *)a.from.data + b * a.from.stride[0] + head % a.heads * a.from.stride[1];
    for (int d = ada_thread(); d < a.width; d += ADA_PACK_THREADS) {
        float sum = 0, count = 0;
        for (int64_t j = 0; j < all; j += step) {
            const float x = ada_element<float>(from + j * a.from.stride[2] + d * a.from.stride[3], a.dtype);
            if (fabsf(x) < ADA_INF) sum += x / ADA_MEAN_KEYS, count += 1.0f / ADA_MEAN_KEYS;
        }
        a.mean[head * a.width + d] = count > 0 ? sum / count : 0;
    }
}

/* The largest byte. */
ADA_DEVICE float ada_largest_byte(const ada_pack_args &a) { return a.e4m3 ? 448 : 127; }

/* Four neighbours, times factor, as bytes. */
ADA_DEVICE uint32_t ada_four_bytes(const ada_pack_args &a, const char *row, const float *mean, int at,
                                   float factor) {
    uint32_t bytes = 0;
    float y[4] = {0, 0, 0, 0};
    ADA_UNROLL for (int k = 0; k < 4; k++) {
        if (at + k >= a.width) break;
        const float x =
            ada_element<float>(row + (at + k) * a.from.stride[3], a.dtype) - (mean ? mean[at + k] : 0);
        y[k] = x * factor;
    }
    if (a.e4m3) return ada_pack_e4m3(y[0], y[1]) | ada_pack_e4m3(y[2], y[3]) << 16;
    ADA_UNROLL for (int k = 0; k < 4; k++) bytes |= (uint32_t)(uint8_t)(int8_t)rintf(y[k]) << 8 * k;
    return bytes;
}

/* The largest |x - mean| that a thread finds in a row; NaN where a number is not finite. */
ADA_DEVICE float ada_most_of_row(const ada_pack_args &a, const char *row, const float *mean, int first,
                                 int step, float most) {
    for (int d = first; d < a.width; d += step) {
        const float x = ada_element<float>(row + d * a.from.stride[3], a.dtype) - (mean ? mean[d] : 0);
        most = !(fabsf(x) < ADA_INF) ? ADA_NAN : fabsf(x) > most ? fabsf(x) : most;
    }
    return most;
}

/* NaN wins. */
ADA_DEVICE float ada_most(float x, float y) { return x != x || x > y ? x : y; }

/* A tile of keys by one block. Its unit is NaN where a key holds what bytes cannot: rows that see one of the
 * tile's keys are computed again. */
static ADA_KERNEL(ADA_PACK_THREADS, 1) ada_bytes_of_keys(ADA_ARGS(ada_pack_args) a) {
    const int warps = ADA_PACK_THREADS / 32;
    const ada_packed_tile tile = ada_tile_of_block(a);
    const int64_t head = tile.head;
    if (head < 0) return;
    const int first = tile.first, end = tile.end;
    const char *const from = tile.from;
    const float *const mean = a.mean + head * a.width;
    float most = 0;
    for (int j = first + ada_thread() / 32; j < end; j += warps)
        most = ada_most_of_row(a, from + j * a.from.stride[2], mean, ada_thread() % 32, 32, most);
    ADA_UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) most =
        ada_most(most, ada_shuffle_xor(most, lanes));
    float *const each = ada_shared_at<float>(0);
    if (ada_thread() % 32 == 0) each[ada_thread() / 32] = most;
    ada_sync();
    for (int i = 0; i < warps; i++) most = ada_most(most, each[i]);
    const float factor = most > 1e-30f ? ada_largest_byte(a) / most : 0;
    if (ada_thread() == 0) *tile.unit = most / ada_largest_byte(a);
    for (int i = ada_thread(); i < (end - first) * a.chunks * 4; i += ADA_PACK_THREADS) {
        const int row = first + i / (a.chunks * 4), word = i % (a.chunks * 4);
        ((uint32_t *)a.to)[(head * a.rows + row) * a.chunks * 4 + word] =
            ada_four_bytes(a, from + row * a.from.stride[2], mean, 4 * word, factor);
    }
}

/* A row of queries by one warp. */
static ADA_KERNEL(ADA_PACK_THREADS, 1) ada_bytes_of_queries(ADA_ARGS(ada_pack_args) a) {
    const int lane = ada_thread() % 32;
    const int64_t n = (int64_t)ada_block() * (ADA_PACK_THREADS / 32) + ada_thread() / 32;
    if (n >= a.items) return;
    const int64_t head = ada_packed_head(a, n / a.rows), b = head / a.heads, i = head * a.rows + n % a.rows;
    const char *row = (const char *)a.from.data + b * a.from.stride[0] + head % a.heads * a.from.stride[1] +
                      i % a.rows * a.from.stride[2];
    const float *const mean = a.mean + (b * a.G + head % a.heads / (a.heads / a.G)) * a.width;
    float most = ada_most_of_row(a, row, NULL, lane, 32, 0), more = 0;
    for (int d = lane; d < a.width; d += 32)
        more += ada_element<float>(row + d * a.from.stride[3], a.dtype) * mean[d];
    ADA_UNROLL for (int lanes = 1; lanes < 32; lanes *= 2) {
        most = ada_most(most, ada_shuffle_xor(most, lanes));
        more += ada_shuffle_xor(more, lanes);
    }
    if (lane == 0) a.units[2 * i] = most / ada_largest_byte(a), a.units[2 * i + 1] = more;
    for (int word = lane; word < a.chunks * 4; word += 32)
        ((uint32_t *)a.to)[i * a.chunks * 4 + word] =
            ada_four_bytes(a, row, NULL, 4 * word, most > 1e-30f ? ada_largest_byte(a) / most : 0);
}

/* Values in e4m3 by one block per tile, as columns of 64 keys in the order that k1_fp8.cuh tells of; those
 * that are not there are zeros. A power of two brings the largest finite one to 2^8; what is not finite is
 * NaN, so that rows which see it are computed again. */
static ADA_KERNEL(ADA_PACK_THREADS, 1) ada_columns_of_values(ADA_ARGS(ada_pack_args) a) {
    const ada_packed_tile tile = ada_tile_of_block(a);
    if (tile.head < 0) return;
    const int keys = tile.end - tile.first;
    const char *const from = tile.from + tile.first * a.from.stride[2];
    const float factor = ada_scale_tile(a, tile, 8, -118);
    ada_sync(); /* all have read what now becomes columns */
    for (int i = ada_thread(); i < ADA_UNIT_ROWS * a.width; i += ADA_PACK_THREADS) {
        const int key = i / a.width, e = i % a.width, k = key % 16;
        float x = 0;
        if (key < keys) x = ada_element<float>(from + key * a.from.stride[2] + e * a.from.stride[3], a.dtype);
        x = fabsf(x) < ADA_INF ? x * factor : ADA_NAN;
        *ada_shared_at<uint8_t>((uint32_t)(e * ADA_UNIT_ROWS + key - k + k % 8 / 2 * 4 + k / 8 * 2 + k % 2)) =
            (uint8_t)ada_pack_e4m3(x, 0);
    }
    ada_sync();
    const int tiles = (a.rows + ADA_UNIT_ROWS - 1) / ADA_UNIT_ROWS, chunks = a.width * ADA_UNIT_ROWS / 16;
    ada_vector<uint32_t, 4> *const to =
        (ada_vector<uint32_t, 4> *)a.to + (tile.head * tiles + tile.first / ADA_UNIT_ROWS) * chunks;
    for (int i = ada_thread(); i < chunks; i += ADA_PACK_THREADS)
        to[i] = *ada_shared_at<ada_vector<uint32_t, 4>>((uint32_t)(16 * i));
}

#endif
