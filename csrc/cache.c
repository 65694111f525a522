/* Tokens into the arrays of a KV cache: rounded to their dtype, or quantised in pages of ADA_PAGE tokens.
 *
 * A page of int8 is open, its tokens kept in float, until the last of them comes. Then each coordinate's mean
 * becomes the page's centre (rounded to bfloat16 first, so that codes count from what is stored) and the
 * largest distance from it 127 steps.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "cache.h"
#include "codes.h"
#include "rows.h"

enum { PIECE = 256 };

/* Elements c ... c + n - 1 (n <= PIECE) of one token. */
static void load_piece(const ada_array *tokens, int64_t b, int64_t g, int64_t i, int64_t c, int n,
                       double *to) {
    ada_array piece = *tokens;
    piece.data = (char *)piece.data + c * piece.stride[3];
    ada_load_rows_f64(ada_kernels_get(), to, n, &piece, b, g, i, 1, n);
}

/* From here on a finite number becomes infinite. */
static double limit_of(ada_dtype dtype) {
    return dtype == ADA_F16 ? 65520 : dtype == ADA_BF16 ? 0x1.FFp127 : 0x1.FFFFFFp127;
}

ada_status ada_cache_check(const ada_array *store, const ada_array *tokens, const char *name,
                           const int64_t *counts, ada_error *error) {
    const double limit = limit_of(store->dtype);
    double x[PIECE];
    if (store->dtype == tokens->dtype) return ADA_OK;
    for (int64_t b = 0; b < tokens->shape[0]; b++)
        for (int64_t row = 0; row < tokens->shape[1] * counts[b]; row++)
            for (int64_t c = 0; c < tokens->shape[3]; c += PIECE) {
                const int64_t left = tokens->shape[3] - c;
                const int n = left < PIECE ? (int)left : PIECE;
                load_piece(tokens, b, row / counts[b], row % counts[b], c, n, x);
                for (int i = 0; i < n; i++) {
                    if (store->dtype == ADA_I8 && !isfinite(x[i]))
                        return ada_fail(error, ADA_ERR_ARGUMENT,
                                        "%s: expected finite numbers for a cache of int8, got %g", name,
                                        x[i]);
                    if (isfinite(x[i]) && fabs(x[i]) >= limit)
                        return ada_fail(
                            error, ADA_ERR_ARGUMENT, "%s: expected numbers that %s can hold, got %g", name,
                            store->dtype == ADA_I8 ? "float32" : ada_dtype_name(store->dtype), x[i]);
                }
            }
    return ADA_OK;
}

/* One coordinate of a full page: its mean as it is stored. */
static float centre_of(const float *open, int64_t width) {
    const float largest = 0x1.FEp127f; /* of bfloat16 */
    double sum = 0;
    for (int i = 0; i < ADA_PAGE; i++) sum += open[i * width];
    const float mean = fminf(fmaxf((float)(sum / ADA_PAGE), -largest), largest);
    uint16_t half;
    float centre;
    ada_kernels_get()->store_bf16(&half, &mean, 1);
    ada_kernels_get()->load_bf16(&centre, &half, 1);
    return centre;
}

static void close_page(const ada_array *store, int64_t b, int64_t g, int64_t page) {
    const int64_t width = store->shape[3], head = b * store->shape[1] + g;
    const float *open = store->pages->open + head * ADA_PAGE * width;
    uint16_t *mean = store->pages->mean + (head * store->pages->pages + page) * width;
    float *scale = store->pages->scale + head * store->pages->pages + page;
    double largest = 0;
    for (int64_t c = 0; c < width; c++) {
        const float centre = centre_of(open + c, width);
        ada_kernels_get()->store_bf16(mean + c, &centre, 1);
        for (int i = 0; i < ADA_PAGE; i++) {
            const double distance = fabs((double)open[i * width + c] - centre);
            largest = distance > largest ? distance : largest;
        }
    }
    *scale = (float)(largest / 127);
    const double steps = *scale > 0 ? 1 / (double)*scale : 0;
    uint8_t *codes = (uint8_t *)ada_row_at(store, b, g, page * ADA_PAGE);
    for (int64_t c = 0; c < width; c++) {
        float centre;
        ada_kernels_get()->load_bf16(&centre, mean + c, 1);
        for (int i = 0; i < ADA_PAGE; i++) {
            const long code = lrint(((double)open[i * width + c] - centre) * steps);
            codes[ada_code_place(width, store->pages->values, i, c)] =
                (uint8_t)(128 + (code > 127    ? 127
                                 : code < -127 ? -127
                                               : code));
        }
    }
}

/* Figures of a head's first so many tokens, from those before and the last ones, which lie in one page. */
static void take_figures(const ada_array *store, int64_t b, int64_t g, int64_t tokens) {
    enum { WIDTH = 64 };
    const ada_kernels *k = ada_kernels_get();
    const int64_t width = store->shape[3], head = b * store->shape[1] + g, at = ada_last_figures(tokens);
    float *to = store->figures + (head * store->figured + at) * ADA_FIGURE(width);
    const float *before = at > 0 ? to - ADA_FIGURE(width) : NULL;
    const int64_t old = before ? ada_figured_tokens(at - 1) : 0, all = ada_figured_tokens(at);
    const int n = (int)(all - old);
    const float known = (float)old / (float)all, fresh = (float)n / (float)all;
    double total = 0;
    for (int64_t c = 0; c < width; c += WIDTH) {
        const int left = width - c < WIDTH ? (int)(width - c) : WIDTH;
        float copy[ADA_PAGE * WIDTH], norm2[ADA_PAGE], mean[WIDTH] = {0}, square[WIDTH] = {0},
                                                       largest[WIDTH] = {0};
        const float *rows = copy;
        ptrdiff_t ld = left;
        if (store->pages) {
            rows = store->pages->open + (head * ADA_PAGE + (tokens - n) % ADA_PAGE) * width + c;
            ld = width;
        } else {
            ada_array piece = *store;
            piece.data = (char *)piece.data + c * piece.stride[3];
            ada_load_rows_f32(k, copy, ld, &piece, b, g, tokens - n, n, left);
        }
        k->columns(mean, largest, rows, ld, n, left);
        for (int i = 0; i < left; i++) mean[i] /= (float)n;
        k->squares(norm2, square, rows, ld, n, left, mean, NULL);
        for (int i = 0; i < left; i++) {
            const float was = before ? before[c + i] : 0, varied = before ? before[width + c + i] : 0;
            const float apart = mean[i] - was, variance = square[i] / (float)n;
            to[c + i] = was + fresh * apart;
            to[width + c + i] = known * varied + fresh * variance + known * fresh * apart * apart;
            total += (double)to[width + c + i];
        }
    }
    to[2 * width] = (float)total;
}

static void append_token(const ada_array *store, const ada_array *tokens, int64_t b, int64_t g, int64_t i,
                         int64_t at) {
    const ada_kernels *k = ada_kernels_get();
    const int64_t width = store->shape[3];
    if (store->pages) {
        float *open = store->pages->open + (b * store->shape[1] + g) * ADA_PAGE * width;
        ada_load_rows_f32(k, open + at % ADA_PAGE * width, width, tokens, b, g, i, 1, (int)width);
        if (ada_last_figures(at + 1) > ada_last_figures(at)) take_figures(store, b, g, at + 1);
        if (at % ADA_PAGE == ADA_PAGE - 1) close_page(store, b, g, at / ADA_PAGE);
        return;
    }
    const bool direct = store->dtype == ADA_F32;
    if (direct)
        ada_load_rows_f32(k, (float *)ada_row_at(store, b, g, at), width, tokens, b, g, i, 1, (int)width);
    float x[PIECE];
    ada_array from = *tokens, to = *store;
    for (int64_t c = 0; !direct && c < width; c += PIECE) {
        const int n = width - c < PIECE ? (int)(width - c) : PIECE;
        ada_load_rows_f32(k, x, n, &from, b, g, i, 1, n);
        ada_store_rows_f32(k, &to, b, g, at, 1, n, x, n);
        from.data = (char *)from.data + n * from.stride[3], to.data = (char *)to.data + n * to.stride[3];
    }
    if (ada_last_figures(at + 1) > ada_last_figures(at)) take_figures(store, b, g, at + 1);
}

void ada_cache_append(const ada_array *store, const ada_array *tokens, const int64_t *lengths,
                      const int64_t *counts) {
    for (int64_t b = 0; b < tokens->shape[0]; b++)
        for (int64_t g = 0; g < tokens->shape[1]; g++)
            for (int64_t i = 0; i < counts[b]; i++) append_token(store, tokens, b, g, i, lengths[b] + i);
}

void ada_cache_reopen(const ada_array *store, int64_t b, int64_t page) {
    const int64_t width = store->shape[3];
    for (int64_t g = 0; g < store->shape[1]; g++) {
        float *row = store->pages->open + (b * store->shape[1] + g) * ADA_PAGE * width;
        const double scale = (double)*ada_page_scale(store, b, g, page);
        const uint8_t *codes = (const uint8_t *)ada_row_at(store, b, g, page * ADA_PAGE);
        for (int i = 0; i < ADA_PAGE; i++, row += width) {
            ada_kernels_get()->load_bf16(row, ada_page_mean(store, b, g, page), (int)width);
            for (int64_t c = 0; c < width; c++) {
                const int code = codes[ada_code_place(width, store->pages->values, i, c)] - 128;
                row[c] = (float)(code * scale + (double)row[c]);
            }
        }
    }
}
