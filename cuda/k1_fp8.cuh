/* K1's products in e4m3. Included by k1.cuh.
 *
 * Tensor cores take the right operand of bytes by columns only, so values lie as columns of 64 keys. Within
 * every 16 keys these stand in the order in which the scores' accumulators hold them: places 4 t ... 4 t + 3
 * are keys 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t, and weights need no shuffle to become the left operand.
 *
 * Sums of a tile of keys are added in float, since the tensor cores keep few digits. A weight's rounding is
 * as large as 1/16 of it: outputs are divided by the sum of the rounded weights, a product with ones, so that
 * where one weight is all of a row its rounding cancels. The lse is that of the weights as they were.
 */

/* Scores of this warp's rows and keys, raw. */
template <typename X>
ADA_DEVICE void ada_scores_of_e4m3(float (&s)[X::MR][X::KEYS / 8][4], uint32_t q_at, uint32_t k_at) {
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int i = 0; i < X::KEYS / 8; i++)
        ADA_UNROLL for (int c = 0; c < 4; c++) s[mr][i][c] = 0;
    ada_add_products_of_bytes<X>(s, q_at, k_at);
}

/* Weights as the left operand. */
template <typename X>
ADA_DEVICE void ada_round(uint32_t (&weights)[X::MR][X::KEYS / 32][4],
                          const float (&s)[X::MR][X::KEYS / 8][4]) {
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int j = 0; j < X::KEYS / 32; j++)
        ADA_UNROLL for (int i = 0; i < 4; i++) {
        const int n = 4 * j + i / 2 * 2, c = i % 2 * 2;
        weights[mr][j][i] = ada_pack_e4m3(s[mr][n][c], s[mr][n][c + 1]) |
                            ada_pack_e4m3(s[mr][n + 1][c], s[mr][n + 1][c + 1]) << 16;
    }
}

/* Adds this warp's weights times values, of which a one is worth unit; to the sums those of all weights. */
template <typename X>
ADA_DEVICE void ada_add_columns(const ada_k1_args &a, const ada_where &w, ada_rows<X> &rows,
                                float (&s)[X::MR][X::KEYS / 8][4], int first, uint32_t v_at, float unit) {
    constexpr int STEPS = X::KEYS / 32;
    uint32_t weights[X::MR][STEPS][4];
    ada_round<X>(weights, s);
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) {
        const uint32_t ones = 0x38383838;
        float sum[4] = {0, 0, 0, 0};
        ADA_UNROLL for (int j = 0; j < STEPS; j++) ada_multiply_e4m3(sum, weights[mr][j], ones, ones);
        ADA_UNROLL for (int half = 0; half < 2; half++) rows.rounded[mr][half] += sum[2 * half];
    }
    if (a.p.drop_below) {
        ada_drop<X>(a, w, s, first);
        ada_round<X>(weights, s);
    }
    ADA_UNROLL for (int e = 0; e < X::WIDTH; e += 16) {
        float sum[X::MR][2][4];
        ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int n = 0; n < 2; n++)
            ADA_UNROLL for (int c = 0; c < 4; c++) sum[mr][n][c] = 0;
        ADA_UNROLL for (int j = 0; j < STEPS; j++) {
            uint32_t v[4];
            ada_load_matrices(v, ada_along<typename X::V>(v_at, 32 * j) + (uint32_t)(e * X::V::BYTES));
            ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) {
                ada_multiply_e4m3(sum[mr][0], weights[mr][j], v[0], v[2]);
                ada_multiply_e4m3(sum[mr][1], weights[mr][j], v[1], v[3]);
            }
        }
        ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int n = 0; n < 2; n++)
            ADA_UNROLL for (int c = 0; c < 4; c++) rows.o[mr][e / 8 + n][c] += sum[mr][n][c] * unit;
    }
}

/* Outputs as if the rounded weights had the sum of those that were rounded. */
template <typename X> ADA_DEVICE void ada_scale_by_sums(ada_rows<X> &rows) {
    ADA_UNROLL for (int mr = 0; mr < X::MR; mr++) ADA_UNROLL for (int half = 0; half < 2; half++) {
        const float rounded = rows.rounded[mr][half], by = rounded > 0 ? rows.l[mr][half] / rounded : 1;
        ADA_UNROLL for (int n = 0; n < X::WIDTH / 8; n++) ADA_UNROLL for (int c = 0; c < 2; c++)
            rows.o[mr][n][2 * half + c] *= by;
    }
}
