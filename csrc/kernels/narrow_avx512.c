/* Kernels of narrow operands, avx512. */
#define KERNEL(op) ada_##op##_avx512
#include <immintrin.h>

#include "kernel.h"
#define OWN_ROUND_BF16
#include "narrow_tpl.h"

/* Bits of x rounded to bf16 in the high half; x is finite. */
INLINE __m512i bf16_bits(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000));
}

INLINE __m512 weight_at(const float *p, bool there) {
    const __m512 x = _mm512_load_ps(p);
    return _mm512_maskz_mov_ps(there ? _mm512_cmp_ps_mask(x, _mm512_set1_ps(ADA_WEIGHTLESS), _CMP_GT_OQ) : 0,
                               x);
}

void KERNEL(round_bf16)(const ada_narrow_tile *t, int n) {
    const ptrdiff_t part = ADA_STRIP / 2 * ADA_LANES;
    for (int i = 0; i < ADA_LANES; i += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int j = 0; j < ADA_BLOCK; j += 2) {
            const float *p = t->f32.p + j * ADA_LANES + i;
            uint32_t *w = t->w + j / 2 * ADA_LANES + i;
            __m512 low = weight_at(p, j < n), high = weight_at(p + ADA_LANES, j + 1 < n);
            for (int a = 0; a < t->pv.a; a++, w += part) {
                const __m512i x = bf16_bits(low), y = bf16_bits(high);
                const __m512 first = _mm512_castsi512_ps(x), second = _mm512_castsi512_ps(y);
                _mm512_store_si512(w, _mm512_or_si512(_mm512_srli_epi32(x, 16), y));
                low = _mm512_sub_ps(low, first), high = _mm512_sub_ps(high, second);
                sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
            }
        }
        _mm512_store_ps(t->sum + i, _mm512_add_ps(_mm512_load_ps(t->sum + i), sum));
    }
}
