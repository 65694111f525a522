/* Rows of an array of any floating dtype and strides, as contiguous float or double, and back. */
#ifndef ADA_ROWS_H
#define ADA_ROWS_H

#include "adaattn.h"
#include "kernels.h"

/* Start of row (b, h, i) of a four-dimensional array. */
static inline char *ada_row_at(const ada_array *a, int64_t b, int64_t h, int64_t i) {
    return (char *)a->data + b * a->stride[0] + h * a->stride[1] + i * a->stride[2];
}

/* Where page `page` of (b, h) of an I8 array has its scale, its mean and, if it is the open one, its tokens.
 */
static inline const float *ada_page_scale(const ada_array *a, int64_t b, int64_t h, int64_t page) {
    return a->pages->scale + (b * a->shape[1] + h) * a->pages->pages + page;
}
static inline const uint16_t *ada_page_mean(const ada_array *a, int64_t b, int64_t h, int64_t page) {
    return a->pages->mean + ((b * a->shape[1] + h) * a->pages->pages + page) * a->shape[3];
}
static inline const float *ada_page_open(const ada_array *a, int64_t b, int64_t h, int64_t page) {
    return page == a->pages->open_page[b] ? a->pages->open + (b * a->shape[1] + h) * ADA_PAGE * a->shape[3]
                                          : NULL;
}

/* to[r * ld + c] = element c of row i + r of (b, h), r < n, c < width. A double beyond float's range becomes
 * inf. */
void ada_load_rows_f32(const ada_kernels *k, float *to, ptrdiff_t ld, const ada_array *from, int64_t b,
                       int64_t h, int64_t i, int n, int width);
void ada_load_rows_f64(const ada_kernels *k, double *to, ptrdiff_t ld, const ada_array *from, int64_t b,
                       int64_t h, int64_t i, int n, int width);
/* The reverse, rounded to nearest even. */
void ada_store_rows_f32(const ada_kernels *k, const ada_array *to, int64_t b, int64_t h, int64_t i, int n,
                        int width, const float *from, ptrdiff_t ld);
void ada_store_rows_f64(const ada_kernels *k, const ada_array *to, int64_t b, int64_t h, int64_t i, int n,
                        int width, const double *from, ptrdiff_t ld);

#endif
