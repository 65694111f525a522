/* Both products of one kind of words on AVX-512 vectors. The including file defines NAME(op), a symbol of the
 * kind, KERNEL(op), a slot's (without it only the steps are defined), DOT(acc, lanes, b), which adds the
 * products of a word's elements, ELEMENTS of a word, INTEGER (0: sums are floats), and START(keys, j), what
 * the sum of key j starts from.
 */
#if INTEGER
#    define FLOATS(acc) _mm512_cvtepi32_ps(acc)
#else
#    define FLOATS(acc) _mm512_castsi512_ps(acc)
#endif

/* ROWS rows of K or V, DW words apart, against NV vectors of lanes: words first ... end - 1 of the sum. */
INLINE void NAME(steps)(words acc[], const uint32_t *q, const uint32_t *k, ptrdiff_t DW, ptrdiff_t first,
                        ptrdiff_t end, const int ROWS, const int NV) {
    q += first * ADA_LANES;
    for (ptrdiff_t d = first; d < end; d++, q += ADA_LANES) {
        words x[TILE_NV];
        UNROLL for (int v = 0; v < NV; v++) {
            x[v] = w_load(q + v * VL);
            PIN(x[v]);
        }
        UNROLL for (int i = 0; i < ROWS; i++) {
            const words b = _mm512_set1_epi32((int)k[i * DW + d]);
            UNROLL for (int v = 0; v < NV; v++) acc[i * NV + v] = DOT(acc[i * NV + v], x[v], b);
        }
    }
}

INLINE void NAME(start)(words acc[], const ada_narrow_keys *keys, int j, const int ROWS, const int NV) {
    const int sums = ROWS * NV;
    (void)keys, (void)j;
    UNROLL for (int a = 0; a < sums; a++) acc[a] = START(keys, j + a / NV);
}

#ifdef KERNEL
INLINE void NAME(scores_strip)(const ada_narrow_tile *t, const ada_narrow_keys *keys, int lane, int n,
                               const int NV) {
    const int group = TILE_ACC / NV, DW = t->DW;
    vec unit[TILE_NV], offset[TILE_NV];
    UNROLL for (int v = 0; v < NV; v++) {
        unit[v] = v_mul(v_load(t->unit + lane + v * VL), v_set1(INTEGER ? keys->scale[0] : 1));
        offset[v] = v_load(t->offset + lane + v * VL);
    }
    for (int j = 0; j < n; j += group) {
        words acc[TILE_ACC];
        NAME(start)(acc, keys, j, group, NV);
        for (int a = 0; a < t->qk.a; a++)
            for (int b = 0; b < t->qk.b && a + b < t->qk.terms; b++) NAME(steps)
        (acc, t->q + (ptrdiff_t)a * DW * ADA_LANES + lane, keys->k + b * keys->part + (ptrdiff_t)j * DW, DW,
         0, DW, group, NV);
        UNROLL for (int a = 0; a < TILE_ACC; a++)
            v_store(t->f32.p + (j + a / NV) * ADA_LANES + lane + a % NV * VL,
                    v_fma(FLOATS(acc[a]), unit[a % NV], offset[a % NV]));
    }
}

void KERNEL(scores)(const ada_narrow_tile *t, const ada_narrow_keys *keys, int n) {
    for (int lane = 0; lane < t->f32.lanes;)
        if (t->f32.lanes - lane >= 4 * VL) {
            NAME(scores_strip)(t, keys, lane, n, 4);
            lane += 4 * VL;
        } else {
            NAME(scores_strip)(t, keys, lane, n, 1);
            lane += VL;
        }
}

/* ROWS rows of V against NV vectors of lanes. */
INLINE void NAME(values_group)(const ada_narrow_tile *t, const uint32_t *v, ptrdiff_t part, int n, int lane,
                               int e, const int ROWS, const int NV) {
    const int ldv = ADA_STRIP / ELEMENTS, width = (n + ELEMENTS - 1) / ELEMENTS, sums = ROWS * NV;
    words acc[TILE_ACC];
    UNROLL for (int a = 0; a < sums; a++) acc[a] = _mm512_setzero_si512();
    for (int a = 0; a < t->pv.a; a++)
        for (int b = 0; b < t->pv.b && a + b < t->pv.terms; b++) {
            const uint32_t *w = t->w + a * (ADA_STRIP / ELEMENTS * ADA_LANES) + lane;
            const uint32_t *x = v + b * part + e * ldv;
            NAME(steps)(acc, w, x, ldv, 0, width, ROWS, NV);
        }
    UNROLL for (int a = 0; a < sums; a++) {
        float *o = t->f32.o + (e + a / NV) * ADA_LANES + lane + a % NV * VL;
        const vec sum = FLOATS(acc[a]);
        v_store(o, INTEGER ? v_fma(sum, v_load(t->worth + lane + a % NV * VL), v_load(o))
                           : v_add(v_load(o), sum));
    }
}

INLINE void NAME(values_strip)(const ada_narrow_tile *t, const uint32_t *v, ptrdiff_t part, int n, int lane,
                               const int NV) {
    const int rows = TILE_ACC / NV, E = t->f32.E;
    int e = 0;
    for (; e + rows <= E; e += rows) {
        /* The next strip's rows of V. */
        const char *next = (const char *)(v + ((E + 15) / 16 * 16 + e) * (ADA_STRIP / ELEMENTS));
        for (int i = 0; !t->f32.cached && i < rows * n * 4 / ELEMENTS; i += 64)
            __builtin_prefetch(next + i, 0, 2);
        ask_ahead(t->f32.ahead, e / rows, E / rows);
        NAME(values_group)(t, v, part, n, lane, e, rows, NV);
    }
    for (; e < E; e++) NAME(values_group)(t, v, part, n, lane, e, 1, NV);
}

void KERNEL(values)(const ada_narrow_tile *t, const uint32_t *v, ptrdiff_t part, int n) {
    for (int lane = 0; lane < t->f32.lanes;)
        if (t->f32.lanes - lane >= 4 * VL) {
            NAME(values_strip)(t, v, part, n, lane, 4);
            lane += 4 * VL;
        } else {
            NAME(values_strip)(t, v, part, n, lane, 1);
            lane += VL;
        }
}
#    undef KERNEL
#endif
#undef FLOATS
#undef NAME
#undef DOT
#undef ELEMENTS
#undef INTEGER
#undef START
