/* Codes of a cache's full pages beside the pages themselves: 8-bit numbers to read first, as many more that
 * refine them, and bounds of what they leave out.
 */
#ifndef ADA_CODES_H
#define ADA_CODES_H

#include "adaattn.h"
#include "kernels.h"

/* What is known of a page X of ADA_PAGE rows, whose codes stand for Y: upper bounds of the largest singular
 * value and the longest row of X - Y, by codes alone [0] and with the fine ones [1]; of the largest singular
 * value of X less its centre, and of the longest row of X. All are infinite where numbers are not finite or
 * too large. centre2: the squared norm of the centre. */
typedef struct {
    float error[2], error_row[2], spread, row, centre2;
} ada_code_norms;

/* A step of codes is as long as so many of fine ones. */
#define ADA_FINE_STEPS 254

/* Of an array (B, G, S, width): element = (code - 128 + (fine - 128) / ADA_FINE_STEPS) * scale + centre, the
 * latter two of its coordinate and page; the first coded[b] pages of sequence b have some. Codes lie as the
 * kernel code_products takes them: its lanes are the tokens for keys, the coordinates for values. */
struct ada_codes {
    uint8_t *code, *fine;  /* [B][G][pages][ada_code_bytes] */
    float *scale, *centre; /* [B][G][pages][width] */
    ada_code_norms *norms; /* [B][G][pages] */
    const int64_t *coded;  /* [B] */
    int64_t pages;
};

/* Coordinates of keys come in fours, those of values in sixteens. */
static inline int64_t ada_code_width(int64_t width, bool values) {
    return values ? (width + 15) / 16 * 16 : (width + 3) / 4 * 4;
}
static inline int64_t ada_code_bytes(int64_t width, bool values) {
    return ADA_PAGE * ada_code_width(width, values);
}

/* Where the code of coordinate c of a page's token j lies. */
static inline int64_t ada_code_place(int64_t width, bool values, int64_t j, int64_t c) {
    const int64_t lane = values ? c : j, number = values ? j : c,
                  chunk = lane / ADA_CODE_CHUNK * ADA_CODE_CHUNK;
    const int64_t lanes = (values ? ada_code_width(width, true) : ADA_PAGE) - chunk,
                  numbers = values ? ADA_PAGE : ada_code_width(width, false);
    const int64_t wide = lanes < ADA_CODE_CHUNK ? lanes : ADA_CODE_CHUNK;
    return chunk * numbers + 4 * (number / 4 * wide + lane - chunk) + number % 4;
}

/* An upper bound of the longest of n rows, one behind the other. */
double ada_longest_row(const float *x, int n, int width);
/* Makes those of pages coded[b] ... until[b] - 1 of every sequence. No memory is an error. */
ada_status ada_code_pages(const ada_array *store, const ada_codes *codes, bool values, const int64_t *until,
                          ada_error *error);

#endif
