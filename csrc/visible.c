/* Spans, mask bits and dropout bits. */
#include <string.h>

#include "visible.h"

int64_t ada_key_count(const ada_problem *p, int64_t b) {
    const ada_array *lengths = &p->kv_lengths;
    return lengths->data ? *(const int64_t *)((const char *)lengths->data + b * lengths->stride[0]) : p->S;
}

int64_t ada_position(const ada_problem *p, int64_t b, int64_t i) {
    const ada_array *offset = &p->query_offset;
    if (offset->data) return *(const int64_t *)((const char *)offset->data + b * offset->stride[0]) + i;
    return p->causal == ADA_UPPER_LEFT ? i : i + p->S - p->T;
}

static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

ada_span ada_visible_span(const ada_problem *p, int64_t b, int64_t i) {
    ada_span span = {0, ada_key_count(p, b)};
    int64_t position = ada_position(p, b, i);
    int64_t right = p->causal ? 0 : p->window_right;
    if (right != ADA_UNBOUNDED) span.end = clamp(position + right + 1, 0, span.end);
    if (p->window_left != ADA_UNBOUNDED) span.first = clamp(position - p->window_left, 0, p->S);
    return span;
}

void ada_seeing_rows(const ada_problem *p, int64_t b, int64_t *start, int64_t *end) {
    *start = 0, *end = p->T;
    while (*start < *end && !ada_sees_keys(p, b, *start)) ++*start;
    while (*end > *start && !ada_sees_keys(p, b, *end - 1)) --*end;
}

/* n bytes, nonzero = true, to bits. */
static uint64_t bits_of_bytes(const char *bytes, int64_t stride, int n) {
    uint64_t bits = 0;
    int c = 0;
    if (stride == 1)
        for (; c + 8 <= n; c += 8) {
            uint64_t x;
            memcpy(&x, bytes + c, 8);
            /* Each byte's bits are gathered in its lowest one; the multiplication brings the eight together.
             */
            x |= x >> 4;
            x |= x >> 2;
            x |= x >> 1;
            bits |= (((x & 0x0101010101010101u) * 0x0102040810204080u) >> 56) << c;
        }
    for (; c < n; c++) bits |= (uint64_t)(bytes[c * stride] != 0) << c;
    return bits;
}

ada_sight ada_visible_rows(const ada_problem *p, const ada_patch *patch, uint64_t *rows) {
    const ada_array *mask = &p->attn_mask;
    bool masked = mask->data && mask->dtype == ADA_BOOL;
    ada_span low = ada_visible_span(p, patch->b, patch->i);
    ada_span high = ada_visible_span(p, patch->b, patch->i + patch->n - 1);
    if (high.end <= patch->j || low.first >= patch->j + patch->nk) return ADA_HIDDEN;
    bool inside = high.first <= patch->j && low.end >= patch->j + patch->nk;
    if (inside && !masked) return ADA_PLAIN;

    const uint64_t all = ada_first_bits(patch->nk);
    uint64_t any = 0, every = all;
    for (int r = 0; r < patch->n; r++) {
        ada_span span = inside ? low : ada_visible_span(p, patch->b, patch->i + r);
        uint64_t bits = all;
        if (!inside) bits &= ada_first_bits(span.end - patch->j) & ~ada_first_bits(span.first - patch->j);
        if (masked) {
            const char *row = (const char *)mask->data + patch->b * mask->stride[0] +
                              patch->h * mask->stride[1] + (patch->i + r) * mask->stride[2] +
                              patch->j * mask->stride[3];
            bits &= bits_of_bytes(row, mask->stride[3], patch->nk);
        }
        rows[r] = bits;
        any |= bits;
        every &= bits;
    }
    return every == all ? ADA_PLAIN : any ? ADA_MIXED : ADA_HIDDEN;
}

/* splitmix64 */
static uint64_t mix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

void ada_kept_rows(const ada_problem *p, const ada_kernels *k, const ada_patch *patch, uint64_t *rows) {
    const ada_array *seed = &p->seed;
    uint64_t sequence = *(const uint64_t *)((const char *)seed->data + patch->b * seed->stride[0]);
    if (seed->ndim == 0) sequence = mix64(sequence ^ mix64((uint64_t)patch->b));
    uint64_t head = mix64(sequence + (uint64_t)patch->h);
    for (int r = 0; r < patch->n; r++)
        rows[r] = p->drop_below > UINT32_MAX ? 0
                                             : k->dropout(mix64(head + (uint64_t)(patch->i + r)),
                                                          (uint32_t)patch->j, patch->nk, p->drop_below);
}

void ada_transpose_bits(uint64_t rows[64]) {
    uint64_t mask = 0x00000000ffffffffu;
    for (int width = 32; width; width >>= 1, mask ^= mask << width)
        for (int r = 0; r < 64; r = (r + width + 1) & ~width) {
            uint64_t t = ((rows[r] >> width) ^ rows[r + width]) & mask;
            rows[r] ^= t << width;
            rows[r + width] ^= t;
        }
}
