/* exp2 and tanh by polynomials in the vocabulary of a simd_*.h: y = k + r with integral k, |r| <= 1/2.
 * Minimax coefficients of (2^r - 1) / r; the relative error of 2^r before rounding is 5e-9 (float), 8e-18
 * (double).
 */
INLINE vec exp2_fraction_minus_1(vec r) {
#if REAL_BITS == 32
    static const float c[] = {0.0001545316295f, 0.001339086336f, 0.009618082557f,
                              0.05550357114f,   0.2402265076f,   0.693147188f};
#else
    static const double c[] = {4.4549605981865184e-10, 7.0725859492692237e-9, 1.0178062445845774e-7,
                               1.321544258792169e-6,   1.5252733829836118e-5, 0.0001540353044173605,
                               0.0013333558146416935,  0.0096181291076068885, 0.055504108664821594,
                               0.24022650695910098,    0.69314718055994531};
#endif
    vec p = v_set1(c[0]);
    UNROLL for (int i = 1; i < (int)(sizeof c / sizeof c[0]); i++) p = v_fma(p, r, v_set1(c[i]));
    return v_mul(p, r);
}

#ifndef OWN_EXP2
/* 2^y, 0 where it would be subnormal. */
INLINE vec v_exp2(vec y) {
    y = v_max(v_set1(EXP2_ZERO), y);
    vec k = v_round(y);
    return v_scale2(v_add(v_set1(1), exp2_fraction_minus_1(v_sub(y, k))), k);
}
#endif

/* tanh(x) = expm1(2x) / (expm1(2x) + 2), with expm1 formed without cancellation: 2^k (2^r - 1) + (2^k - 1).
 */
INLINE vec v_tanh(vec x) {
    vec y = v_mul(x, v_set1((REAL)2.8853900817779268)); /* 2 log2(e) */
    y = v_max(v_set1(-60), v_min(v_set1(60), y));
    vec k = v_round(y), scale = v_scale2(v_set1(1), k);
    vec expm1 = v_fma(exp2_fraction_minus_1(v_sub(y, k)), scale, v_sub(scale, v_set1(1)));
    return v_div(expm1, v_add(expm1, v_set1(2)));
}
