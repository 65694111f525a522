/* Where sums of products with codes go: to scores or sums, or to outputs beside what their page's mean adds.
 */
typedef struct {
    float *s; /* [rows] lds apart */
    ptrdiff_t lds;
    int lanes;
    float scale;
    const float *centre;  /* [rows] ADA_BLOCK apart, added; NULL: none */
    const uint16_t *mean; /* bfloat16, times weight added to what s holds; NULL: s is written */
    float weight[ADA_ROW_GROUP];
} target;

/* Sums of row r, lanes from `lane` on. */
INLINE void finish(const target *t, int r, int lane, vec sum) {
    float *s = t->s + r * t->lds + lane;
    const int left = t->lanes - lane;
    vec to = v_zero();
    if (left <= 0) return;
    if (t->centre) to = v_set1(t->centre[r * ADA_BLOCK]);
    if (t->mean)
        to = v_fma(v_set1(t->weight[r]),
                   left < VL ? v_load_bf16_n(t->mean + lane, left) : v_load_bf16(t->mean + lane),
                   left < VL ? v_load_n(s, left) : v_loadu(s));
    to = v_fma(sum, v_set1(t->scale), to);
    if (left < VL)
        v_store_n(s, to, left);
    else
        v_storeu(s, to);
}
