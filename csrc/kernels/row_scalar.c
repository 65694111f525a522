/* Single-query kernels, conversions of half formats and dropout bits, plain C. */
#include "kernel.h"
#include "half.h"

#define KERNEL(op) ada_##op##_scalar
#include "dropout_tpl.h"

void ada_load_f16_scalar(float *to, const uint16_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = float_from_f16(from[i]);
}
void ada_load_bf16_scalar(float *to, const uint16_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = float_from_bf16(from[i]);
}
void ada_store_f16_scalar(uint16_t *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = f16_from_float(from[i]);
}
void ada_store_bf16_scalar(uint16_t *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = bf16_from_float(from[i]);
}

#define REAL float
#define ROW(op) ada_##op##_f32_scalar
#define ELEMENT float
#define VALUE(x) (x)
#include "scalar_row_tpl.h"

#define ROW(op) ada_##op##_f16_scalar
#define ELEMENT uint16_t
#define VALUE float_from_f16
#include "scalar_row_tpl.h"

#define ROW(op) ada_##op##_bf16_scalar
#define ELEMENT uint16_t
#define VALUE float_from_bf16
#include "scalar_row_tpl.h"

#undef REAL
#define REAL double
#define ROW(op) ada_##op##_f64_scalar
#define ELEMENT double
#define VALUE(x) (x)
#include "scalar_row_tpl.h"

#define ROW(op) ada_##op##_wide_scalar
#define ELEMENT float
#define VALUE(x) (double)(x)
#include "scalar_row_tpl.h"
