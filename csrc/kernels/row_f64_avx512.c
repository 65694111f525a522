/* Single-query kernels, double; AVX-512. */
#define REAL double
#define REAL_BITS 64
#include "kernel.h"
#include "simd_avx512.h"

#define ROW(op) ada_##op##_f64_avx512
#define ELEMENT double
#define LOAD v_load_f64
#define LOAD_N v_load_f64_n
#include "row_tpl.h"

#define ROW(op) ada_##op##_wide_avx512
#define ELEMENT float
#define LOAD v_load_f32_wide
#define LOAD_N v_load_f32_wide_n
#include "row_tpl.h"
