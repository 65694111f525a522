/* Arrays of any dtype and layout to rows of 16-bit elements, as K1 copies them. */
#ifndef ADA_CUDA_PACK_CUH
#define ADA_CUDA_PACK_CUH

#include "common.cuh"

typedef struct {
    ada_cu_array from;
    int32_t dtype, heads, rows, width, chunks; /* chunks of eight elements in a packed row */
    int32_t bf16;
    int64_t items; /* chunks in all */
    uint16_t *to;  /* [B][heads][rows][8 * chunks] */
} ada_pack_args;

enum { ADA_PACK_THREADS = 256 };

static ADA_KERNEL(ADA_PACK_THREADS, 1) ada_pack_rows(ADA_ARGS(ada_pack_args) a) {
    const int64_t i = (int64_t)ada_block() * ADA_PACK_THREADS + ada_thread();
    if (i >= a.items) return;
    const int chunk = (int)(i % a.chunks);
    const int64_t row = i / a.chunks, head = row / a.rows;
    const char *from = (const char *)a.from.data + head / a.heads * a.from.stride[0] +
                       head % a.heads * a.from.stride[1] + row % a.rows * a.from.stride[2];
    float x[8];
    ADA_UNROLL for (int c = 0; c < 8; c++) {
        const int at = 8 * chunk + c;
        x[c] = at < a.width ? ada_element<float>(from + at * a.from.stride[3], a.dtype) : 0;
    }
    ada_vector<uint32_t, 4> packed;
    ADA_UNROLL for (int c = 0; c < 4; c++) packed.x[c] =
        a.bf16 ? ada_pack_bf16(x[2 * c], x[2 * c + 1]) : ada_pack_f16(x[2 * c], x[2 * c + 1]);
    *(ada_vector<uint32_t, 4> *)(a.to + 8 * i) = packed;
}

#endif
