/* Conversions between float and half formats, in the vocabulary of a simd_*.h. */
#include "half.h"

void KERNEL(load_f16)(float *to, const uint16_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) {
        int left = n - i < VL ? (int)(n - i) : VL;
        v_store_n(to + i, left == VL ? v_load_f16(from + i) : v_load_f16_n(from + i, left), left);
    }
}

void KERNEL(load_bf16)(float *to, const uint16_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) {
        int left = n - i < VL ? (int)(n - i) : VL;
        v_store_n(to + i, left == VL ? v_load_bf16(from + i) : v_load_bf16_n(from + i, left), left);
    }
}

void KERNEL(store_f16)(uint16_t *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) {
        int left = n - i < VL ? (int)(n - i) : VL;
        uint16_t half[VL];
        v_to_f16(left == VL ? to + i : half, v_load_n(from + i, left));
        if (left < VL) memcpy(to + i, half, (size_t)left * sizeof *to);
    }
}

/* Integer work that compilers vectorise. */
void KERNEL(store_bf16)(uint16_t *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = bf16_from_float(from[i]);
}
