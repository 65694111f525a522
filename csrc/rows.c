/* Conversion of rows. Half formats go through float, in chunks; whole contiguous rows take the kernels. */
#include <string.h>

#include "codes.h"
#include "rows.h"

enum { CHUNK = 256 };

/* n elements of one dtype, stride_bytes apart, to contiguous float. */
static void load_f32(const ada_kernels *k, float *to, const char *from, ada_dtype dtype, int64_t stride_bytes,
                     int n) {
    uint16_t half[CHUNK];
    switch (dtype) {
    case ADA_F32:
        if (stride_bytes == (int64_t)sizeof(float)) {
            memcpy(to, from, (size_t)n * sizeof(float));
            return;
        }
        for (int i = 0; i < n; i++) to[i] = *(const float *)(from + i * stride_bytes);
        return;
    case ADA_F64:
        for (int i = 0; i < n; i++) to[i] = (float)*(const double *)(from + i * stride_bytes);
        return;
    default: {
        const uint16_t *source = (const uint16_t *)from;
        if (stride_bytes != (int64_t)sizeof *half) {
            for (int i = 0; i < n; i++) half[i] = *(const uint16_t *)(from + i * stride_bytes);
            source = half;
        }
        (dtype == ADA_F16 ? k->load_f16 : k->load_bf16)(to, source, n);
    }
    }
}

static void load_f64(const ada_kernels *k, double *to, const char *from, ada_dtype dtype,
                     int64_t stride_bytes, int n) {
    if (dtype == ADA_F64) {
        for (int i = 0; i < n; i++) to[i] = *(const double *)(from + i * stride_bytes);
        return;
    }
    float copy[CHUNK];
    const float *wide = (const float *)from;
    if (dtype != ADA_F32 || stride_bytes != (int64_t)sizeof *wide)
        load_f32(k, copy, from, dtype, stride_bytes, n), wide = copy;
    for (int i = 0; i < n; i++) to[i] = wide[i];
}

static void store_f32(const ada_kernels *k, char *to, ada_dtype dtype, int64_t stride_bytes,
                      const float *from, int n) {
    uint16_t half[CHUNK];
    switch (dtype) {
    case ADA_F32:
        for (int i = 0; i < n; i++) *(float *)(to + i * stride_bytes) = from[i];
        return;
    case ADA_F64:
        for (int i = 0; i < n; i++) *(double *)(to + i * stride_bytes) = from[i];
        return;
    default:
        (dtype == ADA_F16 ? k->store_f16 : k->store_bf16)(half, from, n);
        for (int i = 0; i < n; i++) *(uint16_t *)(to + i * stride_bytes) = half[i];
    }
}

static void store_f64(const ada_kernels *k, char *to, ada_dtype dtype, int64_t stride_bytes,
                      const double *from, int n) {
    if (dtype == ADA_F64) {
        for (int i = 0; i < n; i++) *(double *)(to + i * stride_bytes) = from[i];
        return;
    }
    float narrow[CHUNK] = {0};
    for (int i = 0; i < n; i++) narrow[i] = (float)from[i];
    store_f32(k, to, dtype, stride_bytes, narrow, n);
}

/* The four functions of rows.h: rows, each in chunks. */
#define FOR_CHUNKS(statement)                                                                                \
    for (int r = 0; r < n; r++)                                                                              \
        for (int c = 0; c < width; c += CHUNK) {                                                             \
            int left = width - c < CHUNK ? width - c : CHUNK;                                                \
            statement;                                                                                       \
        }

/* The codes of coordinates c ... c + n - 1 of token j of a page, c a multiple of CHUNK: of keys four lie
 * together, of values a lane's every fourth byte. */
static void row_codes(uint8_t to[CHUNK], const ada_array *a, const uint8_t *page, int64_t j, int c, int n) {
    const int64_t width = a->shape[3];
    if (!a->pages->values) {
        for (int x = 0; x < n; x += 4) memcpy(to + x, page + ada_code_place(width, false, j, c + x), 4);
        return;
    }
    for (int first = 0; first < n; first += ADA_CODE_CHUNK) {
        const uint8_t *lanes = page + ada_code_place(width, true, j, c + first);
        const int m = n - first < ADA_CODE_CHUNK ? n - first : ADA_CODE_CHUNK;
        for (int x = 0; x < m; x++) to[first + x] = lanes[4 * x];
    }
}

/* Rows of an I8 array, in pieces that lie in one page */
#define LOAD_PAGED_ROWS(REAL)                                                                                \
    float mean[CHUNK];                                                                                       \
    uint8_t code[CHUNK];                                                                                     \
    for (int c = 0; c < width; c += CHUNK) {                                                                 \
        const int left = width - c < CHUNK ? width - c : CHUNK;                                              \
        for (int r = 0, end; r < n; r = end) {                                                               \
            const int64_t page = (i + r) / ADA_PAGE, rest = (page + 1) * ADA_PAGE - i;                       \
            const float *open = ada_page_open(from, b, h, page), scale = *ada_page_scale(from, b, h, page);  \
            const uint8_t *codes = (const uint8_t *)ada_row_at(from, b, h, page * ADA_PAGE);                 \
            end = rest < n ? (int)rest : n;                                                                  \
            if (!open) k->load_bf16(mean, ada_page_mean(from, b, h, page) + c, left);                        \
            for (; r < end; r++) {                                                                           \
                REAL *row = to + r * ld + c;                                                                 \
                const int64_t j = (i + r) % ADA_PAGE;                                                        \
                for (int x = 0; open && x < left; x++) row[x] = (REAL)open[j * from->shape[3] + c + x];      \
                if (open) continue;                                                                          \
                row_codes(code, from, codes, j, c, left);                                                    \
                for (int x = 0; x < left; x++) row[x] = (REAL)(code[x] - 128) * scale + mean[x];             \
            }                                                                                                \
        }                                                                                                    \
    }

void ada_load_rows_f32(const ada_kernels *k, float *to, ptrdiff_t ld, const ada_array *from, int64_t b,
                       int64_t h, int64_t i, int n, int width) {
    if (from->pages) {
        LOAD_PAGED_ROWS(float)
        return;
    }
    FOR_CHUNKS(load_f32(k, to + r * ld + c, ada_row_at(from, b, h, i + r) + c * from->stride[3], from->dtype,
                        from->stride[3], left))
}

void ada_load_rows_f64(const ada_kernels *k, double *to, ptrdiff_t ld, const ada_array *from, int64_t b,
                       int64_t h, int64_t i, int n, int width) {
    if (from->pages) {
        LOAD_PAGED_ROWS(double)
        return;
    }
    FOR_CHUNKS(load_f64(k, to + r * ld + c, ada_row_at(from, b, h, i + r) + c * from->stride[3], from->dtype,
                        from->stride[3], left))
}

void ada_store_rows_f32(const ada_kernels *k, const ada_array *to, int64_t b, int64_t h, int64_t i, int n,
                        int width, const float *from, ptrdiff_t ld) {
    FOR_CHUNKS(store_f32(k, ada_row_at(to, b, h, i + r) + c * to->stride[3], to->dtype, to->stride[3],
                         from + r * ld + c, left))
}

void ada_store_rows_f64(const ada_kernels *k, const ada_array *to, int64_t b, int64_t h, int64_t i, int n,
                        int width, const double *from, ptrdiff_t ld) {
    FOR_CHUNKS(store_f64(k, ada_row_at(to, b, h, i + r) + c * to->stride[3], to->dtype, to->stride[3],
                         from + r * ld + c, left))
}
