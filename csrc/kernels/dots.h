/* One step of a product on vectors of words: to each lane of acc the products of the elements of a word.
 * ADAATTN_EMULATE_BF16 replaces vdpbf16ps by the multiply-adds that it stands for, for machines without it.
 */
INLINE words dot_i8(words acc, words lanes, words b) {
    /* gcc 12 copies and spills the accumulators of the intrinsics. */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(lanes), "v"(b));
    return acc;
}

INLINE words dot_i16(words acc, words lanes, words b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(lanes), "v"(b));
    return acc;
}

INLINE words dot_bf16(words acc, words lanes, words b) {
#if ADAATTN_EMULATE_BF16
    const words high = _mm512_set1_epi32((int)0xffff0000);
    const vec sum = v_fma(_mm512_castsi512_ps(_mm512_and_si512(lanes, high)),
                          _mm512_castsi512_ps(_mm512_and_si512(b, high)), _mm512_castsi512_ps(acc));
    return _mm512_castps_si512(v_fma(_mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16)),
                                     _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum));
#else
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(lanes), "v"(b));
    return acc;
#endif
}
