/* Single-query kernels that accumulate in float, conversions of half formats, dropout bits; AVX-512. */
#define REAL float
#define REAL_BITS 32
#define KERNEL(op) ada_##op##_avx512
#include "kernel.h"
#include "simd_avx512.h"
#include "dropout_tpl.h"
#include "half_tpl.h"

#define ROW(op) ada_##op##_f32_avx512
#define ELEMENT float
#define LOAD v_load_f32
#define LOAD_N v_load_f32_n
#include "row_tpl.h"

#define ROW(op) ada_##op##_f16_avx512
#define ELEMENT uint16_t
#define LOAD v_load_f16
#define LOAD_N v_load_f16_n
#include "row_tpl.h"

#define ROW(op) ada_##op##_bf16_avx512
#define ELEMENT uint16_t
#define LOAD v_load_bf16
#define LOAD_N v_load_bf16_n
#include "row_tpl.h"
