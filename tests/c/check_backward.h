/* Generators of the slots of a backward pass. */
#ifndef CHECK_BACKWARD_H
#define CHECK_BACKWARD_H

#include "check_tiles.h"

static void make_product(check *c) {
    int rows = pick(c, "rows", 1, 70, 64), depth = pick(c, "depth", 1, 150, 64);
    int width = pick(c, "width", 1, 150, 64);
    bool turned = note(c, "turned", chance(c, 0.5)), add = note(c, "add", chance(c, 0.5));
    matrix a =
        turned ? new_rows(c, "a", c->real, depth, rows, true) : new_rows(c, "a", c->real, rows, depth, true);
    matrix b = new_rows(c, "b", c->real, depth, width, true);
    matrix to = new_rows(c, "c", c->real, rows, width, false);
    ptrdiff_t a_row = turned ? 1 : a.ld, a_step = turned ? a.ld : 1;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < width; i++) put(c, to.b, to.at + r * to.ld + i);
    const wide *x = values(a.b) + a.at, *y = values(b.b) + b.at, *z = values(to.b) + to.at;
    for (int r = 0; r < rows && !c->bench; r++)
        for (int i = 0; i < width; i++) {
            total t = {0};
            if (add) add_product(&t, 1, z[r * to.ld + i]);
            for (int k = 0; k < depth; k++) add_product(&t, x[r * a_row + k * a_step], y[k * b.ld + i]);
            expect_total(c, to.b, to.at + r * to.ld + i, &t);
        }
    c->flops = 2.0 * rows * depth * width;
    if (c->real == ADA_F32) {
        const ada_product_f32 p = {to.first, a.first, b.first, to.ld, a_row, a_step,
                                   b.ld,     rows,    depth,   width, add};
        RUN(c, CALL_AS(c, product_f32, &p));
    } else {
        const ada_product_f64 p = {to.first, a.first, b.first, to.ld, a_row, a_step,
                                   b.ld,     rows,    depth,   width, add};
        RUN(c, CALL_AS(c, product_f64, &p));
    }
}

/* One weight and its gradient; false when one of them is not finite. */
static bool expect_back(check *c, buffer *s, buffer *g, int64_t at, const wide in[4], double kept,
                        bool keep) {
    const wide score = in[0], bias = in[1], lse = in[2], delta = in[3], sum = score + bias, y = sum - lse;
    const double beyond = c->real == ADA_F32 ? 126 : 1022;
    weight w = power(c, y, rounding(c, sum) + rounding(c, y));
    if (!(y <= beyond)) { /* some kernels give infinity from here on */
        expect_any(s, at);
        if (g) expect_any(g, at);
        c->any_result |= y < beyond + 2 || !keep;
        return false;
    }
    const wide value = keep ? w.value * kept : 0;
    expect_near(s, at, value, keep ? w.tolerance * kept + 2 * rounding(c, value) : 0,
                keep ? w.exp2 * kept : 0);
    if (!g) return true;
    const wide own = keep ? values(g)[at] * (wide)kept : 0, difference = own - delta;
    const double slack = rounding(c, own) + rounding(c, difference);
    expect_near(g, at, w.value * difference,
                (double)fabsl(difference) * w.tolerance + (double)w.value * slack +
                    rounding(c, w.value * difference) + slack * w.tolerance,
                (double)fabsl(difference) * w.exp2);
    return true;
}

static void make_backward(check *c) {
    int rows = pick(c, "rows", 1, ADA_LANES, ADA_LANES), width = pick_lanes(c);
    c->style = PLAIN;
    buffer *s = new_strips(c, "s", rows, width), *g = NULL;
    if (c->bench || chance(c, 0.8)) g = new_strips(c, "g", rows, width);
    buffer *lse = new_vector(c, "lse", c->real, rows), *delta = new_vector(c, "delta", c->real, rows);
    buffer *visible = c->bench || chance(c, 0.4) ? NULL : new_bits(c, "visible", rows);
    buffer *keep = c->bench || chance(c, 0.5) ? NULL : new_bits(c, "keep", rows);
    buffer *bias = c->bench || chance(c, 0.5) ? NULL : new_strips(c, "bias", rows, width);
    const double kept = keep ? rounded(c, uniform(c, 1, 4)) : 1, level = uniform(c, -1000, 1000);
    note(c, "g", g != NULL), note(c, "visible", visible != NULL), note(c, "keep", keep != NULL);
    note(c, "bias", bias != NULL);
    for (int r = 0; r < rows; r++) {
        set(lse, r, level + uniform(c, -3, 3));
        for (int j = 0; j < width; j++) {
            const int at = r * ADA_BLOCK + j;
            set(s, at,
                octaves(c, false) + (double)value_at(lse, r) - (bias ? (double)value_at(bias, at) : 0));
            if (!bit(visible, r, j) && chance(c, 0.3))
                set_special(c, chance(c, 0.5) && bias ? bias : g && chance(c, 0.5) ? g : s, at);
            else if (bias && chance(c, 0.05))
                set(bias, at, -INFINITY);
        }
    }
    if (!c->bench && chance(c, 0.3)) {
        buffer *const which[] = {s, g ? g : s, lse, delta};
        buffer *b = which[integer(c, 0, 3)];
        set_special(c, b,
                    b == s || b == g ? integer(c, 0, rows - 1) * ADA_BLOCK + integer(c, 0, width - 1)
                                     : integer(c, 0, rows - 1));
    }
    c->expected = true;
    for (int r = 0; r < rows && !c->bench; r++)
        for (int j = 0; j < width; j++) {
            const int64_t at = r * ADA_BLOCK + j;
            const wide in[4] = {values(s)[at], bias ? values(bias)[at] : 0, values(lse)[r], values(delta)[r]};
            if (!bit(visible, r, j) || hides(bias, at)) {
                expect_near(s, at, 0, 0, 0);
                if (g) expect_near(g, at, 0, 0, 0);
                continue;
            }
            if (!expect_back(c, s, g, at, in, kept, bit(keep, r, j))) {
                c->expected = false;
                continue;
            }
            /* A gradient or sum that is special, or large, makes one that may not be finite. */
            const wide own = g && bit(keep, r, j) ? values(g)[at] : 0, most = c->limit.largest / 16;
            const wide size = fabsl(own) * (wide)kept + fabsl(in[3]);
            if (!g || (size < most && size * exp2l(in[0] + in[1] - in[2]) < most)) continue;
            if (isfinite(own) && isfinite(in[3])) {
                expect_any(g, at);
                c->any_result = true;
            } else {
                expect(g, at, (expectation){.rule = NONFINITE});
                c->expected = false;
            }
        }
    c->bytes = 4.0 * rows * width * s->bytes;
    c->any_result |= c->bench; /* one call works on what the last one left */
    if (c->real == ADA_F32) {
        const ada_backward_tile_f32 t = {data(s),       data(g),    data(bias),  data(lse), data(delta),
                                         data(visible), data(keep), (float)kept, rows,      width};
        RUN(c, c->result = CALL_AS(c, backward_f32, &t));
    } else {
        const ada_backward_tile_f64 t = {data(s),       data(g),    data(bias), data(lse), data(delta),
                                         data(visible), data(keep), kept,       rows,      width};
        RUN(c, c->result = CALL_AS(c, backward_f64, &t));
    }
}

#endif
