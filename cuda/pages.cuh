/* Reading the pages of a cache, and their elements. */
#ifndef ADA_CUDA_PAGES_CUH
#define ADA_CUDA_PAGES_CUH

#include "common.cuh"

/* Where a side of a head begins in a page of a sequence, and how it is kept there. */
typedef struct {
    const char *at; /* its first row */
    int64_t row;    /* bytes from one to the next */
    bool bytes;     /* which count from 128 in steps of a scale, from the means behind them; else floats */
} ada_kept_page;

/* Page of the tokens from ADA_CU_PAGE * page on; of int8 the one that is not full is open. */
ADA_DEVICE ada_kept_page ada_page_of(const ada_cu_pages &pages, const ada_sequence &s, int g, int side,
                                     int page) {
    const bool bytes = pages.dtype == ADA_CU_I8 && page < s.keys / ADA_CU_PAGE;
    const bool open = pages.dtype == ADA_CU_I8 && !bytes;
    const auto &shape = open ? pages.open : pages.closed;
    const uint64_t at = pages.table[s.b * pages.columns + (open ? 0 : 1 + page)];
    return {(const char *)(uintptr_t)at + shape.at[side] + g * shape.head[side], shape.row[side], bytes};
}

ADA_DEVICE float ada_page_scale(const ada_kept_page &page) {
    return *(const float *)(page.at + ADA_CU_PAGE * page.row);
}
ADA_DEVICE float ada_page_mean(const ada_kept_page &page, int d) {
    return ada_from_bf16(((const uint16_t *)(page.at + ADA_CU_PAGE * page.row + 16))[d]);
}

/* Element d of a page's row. */
template <typename REAL>
ADA_DEVICE REAL ada_kept_element(const ada_kept_page &page, int dtype, int row, int d) {
    const char *at = page.at + row * page.row;
    if (page.bytes)
        return (REAL)((int)((const uint8_t *)at)[d] - 128) * (REAL)ada_page_scale(page) +
               (REAL)ada_page_mean(page, d);
    if (dtype == ADA_CU_F16) return (REAL)ada_from_f16(((const uint16_t *)at)[d]);
    if (dtype == ADA_CU_BF16) return (REAL)ada_from_bf16(((const uint16_t *)at)[d]);
    return (REAL)((const float *)at)[d];
}

/* Four elements of token j from index d on; zeros from width on. */
template <typename REAL>
ADA_DEVICE void ada_load_kept(REAL (&x)[4], const ada_cu_params &p, const ada_sequence &s, int g, int side,
                              int j, int d, int width) {
    const ada_kept_page page = ada_page_of(p.pages, s, g, side, j / ADA_CU_PAGE);
    ADA_UNROLL for (int i = 0; i < 4; i++) x[i] =
        d + i < width ? ada_kept_element<REAL>(page, p.pages.dtype, j % ADA_CU_PAGE, d + i) : 0;
}

#endif
