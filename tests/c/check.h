/* The harness of check_kernels.c, first half: random inputs, guarded buffers, an expectation per element.
 *
 * A buffer lies between two pages that trap, flush with one of them or a few elements off, so that vector
 * instructions that no sanitizer sees cannot read beyond it either. An element without an expectation must
 * keep its bits: inputs, gaps between rows, unused lanes.
 */
#ifndef CHECK_H
#define CHECK_H

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __SANITIZE_ADDRESS__
#    include <sanitizer/asan_interface.h>
#else
#    define ASAN_POISON_MEMORY_REGION(start, bytes) ((void)0)
#    define ASAN_UNPOISON_MEMORY_REGION(start, bytes) ((void)0)
#endif

#include "../../csrc/adaattn.h"
#include "../../csrc/cpu.h"
#include "../../csrc/kernels.h"

typedef long double wide; /* what expectations are computed in */

/* Elements beside those of ada_dtype: of narrow operands. */
#define CHECK_I8 ((ada_dtype)64)
#define CHECK_U8 ((ada_dtype)65)
#define CHECK_I16 ((ada_dtype)66)
#define CHECK_I32 ((ada_dtype)67)

typedef enum { SAME, NEAR, NONFINITE, BITS, ANY } rule; /* BITS: value is the pattern */
typedef struct {
    rule rule;
    wide value;
    double tolerance;
    double exp2; /* to be multiplied by the relative error that exp2 may have in this kernel */
} expectation;

typedef struct {
    const char *name;
    ada_dtype dtype;
    int bytes; /* of an element */
    int64_t count, columns;
    char *data;
    char *mapping, *before; /* everything between the two pages that trap, and its bytes before the call */
    size_t mapped;
    wide *values;
    expectation *expected; /* NULL: all SAME */
} buffer;

/* n rows of D elements; first is row 0, at its index in b; rows are ld elements apart. */
typedef struct {
    buffer *b;
    int64_t at;
    ptrdiff_t ld;
    void *first;
} matrix;

enum { SAMPLES = 15, CALIBRATIONS = 3, MAX_BUFFERS = 13, MAX_KERNELS = 16 };

typedef void (*function)(void);

typedef struct {
    const char *slot, *isa;
    uint32_t needs;
    function run;
    bool failed;
    double worst; /* largest error as a share of its bound */
    int64_t turns;
    double ns[SAMPLES];
} kernel;

typedef struct {
    double unit, normal, least; /* unit roundoff, smallest normal and subnormal number */
    wide largest;
} limits;

static const limits limits_f32 = {FLT_EPSILON / 2, FLT_MIN, 0x1p-149, FLT_MAX};
static const limits limits_f64 = {DBL_EPSILON / 2, DBL_MIN, 0x1p-1074, DBL_MAX};

typedef enum { PLAIN, SCALES, SPECIALS } style;

typedef struct {
    ada_dtype real, element; /* accumulation; K and V */
    limits limit;
    uint64_t seed, random;
    int index; /* of the case */
    style style;
    double low, high; /* SCALES: exponents; SPECIALS: their share is 2^low */
    char shape[160];
    buffer buffers[MAX_BUFFERS];
    int n_buffers;
    kernel *kernels[MAX_KERNELS];
    int n_kernels, running; /* -1: none yet */
    function kernel;
    uint64_t result, expected;
    bool any_result;
    uint32_t without; /* kernels that need one of these sets are left out of the case */
    union {
        ada_tile_f32 f32;
        ada_tile_f64 f64;
    } tile;
    bool bench;
    double flops, bytes; /* of one call, for the benchmark */
    bool walks;          /* through memory */
    int64_t turn, start, turns;
    int sample;
    double started, peaks[SAMPLES];
} check;

/* ---- random numbers ---- */

static uint64_t random_bits(check *c) {
    uint64_t x = c->random += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

static int integer(check *c, int low, int high) {
    return low + (int)(random_bits(c) % (uint64_t)(high - low + 1));
}
static double uniform(check *c, double low, double high) {
    return low + (high - low) * (double)(random_bits(c) >> 11) * 0x1p-53;
}
static bool chance(check *c, double p) { return uniform(c, 0, 1) < p; }

/* ---- elements ---- */

/* Half formats: bits of the significand, exponent of the smallest normal number. */
static int precision(ada_dtype dtype) { return dtype == ADA_F16 ? 11 : 8; }
static int low_exponent(ada_dtype dtype) { return dtype == ADA_F16 ? -14 : -126; }
static uint16_t half_infinity(ada_dtype dtype) { return dtype == ADA_F16 ? 0x7c00 : 0x7f80; }

/* By arithmetic, nothing shared with the kernels: to nearest, ties to even; a NaN keeps its sign and the top
 * of its payload and becomes quiet. */
static uint16_t to_half(float x, ada_dtype dtype) {
    const int p = precision(dtype);
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000), infinity = half_infinity(dtype);
    if (isnan(x)) return (uint16_t)(sign | infinity | 1 << (p - 2) | (bits & 0x7fffff) >> (24 - p));
    if (isinf(x)) return sign | infinity;
    int exponent = x == 0 ? low_exponent(dtype) : ilogb(x);
    if (exponent < low_exponent(dtype)) exponent = low_exponent(dtype);
    double units = nearbyint(ldexp(fabs((double)x), p - 1 - exponent));
    double magnitude = units + ldexp(exponent - low_exponent(dtype), p - 1);
    return sign | (magnitude < infinity ? (uint16_t)magnitude : infinity);
}

static wide from_half(uint16_t bits, ada_dtype dtype) {
    const int p = precision(dtype), mantissa = bits & ((1 << (p - 1)) - 1),
              exponent = (bits & 0x7fff) >> (p - 1);
    wide x =
        ldexpl(mantissa + (exponent ? 1 << (p - 1) : 0), (exponent ? exponent : 1) + low_exponent(dtype) - p);
    if ((bits & 0x7fff) >= half_infinity(dtype)) x = mantissa ? (wide)NAN : (wide)INFINITY;
    return bits & 0x8000 ? -x : x;
}

static int dtype_bytes(ada_dtype dtype) {
    if (dtype >= CHECK_I8) return dtype == CHECK_I32 ? 4 : dtype == CHECK_I16 ? 2 : 1;
    return dtype == ADA_I8 ? 1 : dtype == ADA_F32 ? 4 : dtype == ADA_F64 || dtype == ADA_U64 ? 8 : 2;
}

static uint64_t bits_at(const buffer *b, int64_t i) {
    uint64_t bits = 0;
    memcpy(&bits, b->data + i * b->bytes, (size_t)b->bytes);
    return bits;
}
static void set_bits(buffer *b, int64_t i, uint64_t bits) {
    memcpy(b->data + i * b->bytes, &bits, (size_t)b->bytes);
}

static wide value_at(const buffer *b, int64_t i) {
    float f;
    double d;
    uint64_t bits = bits_at(b, i);
    if (b->dtype == CHECK_I8) return (int8_t)bits;
    if (b->dtype == CHECK_I16) return (int16_t)bits;
    if (b->dtype == CHECK_I32) return (int32_t)bits;
    if (b->dtype == CHECK_U8) return (wide)bits;
    switch (b->dtype) {
    case ADA_F32:
        memcpy(&f, &bits, sizeof f);
        return f;
    case ADA_F64:
        memcpy(&d, &bits, sizeof d);
        return d;
    case ADA_U64:
        return bits;
    case ADA_I8:
        return (int8_t)bits;
    default:
        return from_half((uint16_t)bits, b->dtype);
    }
}

static void set(buffer *b, int64_t i, double x) {
    float f = (float)x;
    if (b->dtype >= CHECK_I8) {
        set_bits(b, i, (uint64_t)(int64_t)x);
        return;
    }
    switch (b->dtype) {
    case ADA_F32:
        memcpy(b->data + i * 4, &f, sizeof f);
        break;
    case ADA_F64:
        memcpy(b->data + i * 8, &x, sizeof x);
        break;
    default:
        set_bits(b, i, to_half(f, b->dtype));
    }
}

/* All elements as they were before the call. */
static const wide *values(buffer *b) {
    if (!b->values) {
        b->values = malloc((size_t)b->count * sizeof *b->values);
        for (int64_t i = 0; i < b->count; i++) b->values[i] = value_at(b, i);
    }
    return b->values;
}

static double rounded(const check *c, double x) { return c->real == ADA_F32 ? (float)x : x; }
/* Whether REAL can hold x exactly. */
static bool holds(const check *c, wide x) { return c->real == ADA_F32 ? x == (float)x : x == (double)x; }
static double sum_of(const check *c, wide a, wide b) {
    return c->real == ADA_F32 ? (float)a + (float)b : (double)a + (double)b;
}

/* NaN of any payload and sign, infinities, zeros, subnormal and very large numbers. */
static void set_special(check *c, buffer *b, int64_t i) {
    static const int mantissa_bits[] = {[ADA_F32] = 23, [ADA_F64] = 52, [ADA_F16] = 10, [ADA_BF16] = 7};
    int mantissa = mantissa_bits[b->dtype], width = b->bytes * 8;
    uint64_t payload = random_bits(c) >> integer(c, 64 - mantissa, 63);
    uint64_t infinity = (UINT64_C(1) << (width - 1)) - (UINT64_C(1) << mantissa);
    uint64_t sign = random_bits(c) << (width - 1);
    switch (integer(c, 0, 7)) {
    case 0:
    case 1:
        set_bits(b, i, sign | infinity | payload | (payload == 0));
        break;
    case 2:
    case 3:
        set_bits(b, i, sign | infinity);
        break;
    case 4:
        set_bits(b, i, sign);
        break;
    case 5:
        set_bits(b, i, sign | payload);
        break;
    case 6:
        set_bits(b, i, sign | (infinity - 1));
        break;
    default:
        set(b, i, chance(c, 0.5) ? 1e30 : -1e30);
    }
}

/* A random number in the style of the case. */
static void put(check *c, buffer *b, int64_t i) {
    if (b->dtype == ADA_I8)
        set_bits(b, i, random_bits(c));
    else if (c->style == SPECIALS && chance(c, exp2(c->low)))
        set_special(c, b, i);
    else if (c->style == SCALES)
        set(b, i, (chance(c, 0.5) ? 1 : -1) * exp2(uniform(c, c->low, c->high)));
    else
        set(b, i, uniform(c, -2, 2));
}

/* ---- shapes and buffers ---- */

static int note(check *c, const char *name, int value) {
    size_t used = strlen(c->shape);
    snprintf(c->shape + used, sizeof c->shape - used, "%s%s=%d", used ? " " : "", name, value);
    return value;
}

static int pick(check *c, const char *name, int low, int high, int bench) {
    return note(c, name, c->bench ? bench : integer(c, low, high));
}

/* D or E: small, around multiples of vectors, anything. */
static int pick_size(check *c, const char *name) {
    int sizes[] = {integer(c, 1, 20), 16 * integer(c, 1, 16) + integer(c, -1, 1), 8 * integer(c, 1, 37),
                   integer(c, 1, 300)};
    return note(c, name, c->bench ? 128 : sizes[integer(c, 0, 3)]);
}

static int pick_lanes(check *c) {
    return note(c, "lanes", c->bench ? ADA_LANES : ADA_LANE_STEP * integer(c, 1, ADA_LANES / ADA_LANE_STEP));
}

/* Filled with random bits: what a kernel must not read is likely NaN. */
static buffer *new_buffer(check *c, const char *name, ada_dtype dtype, int64_t count, int64_t columns,
                          size_t alignment) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (c->n_buffers == MAX_BUFFERS) abort();
    buffer *b = &c->buffers[c->n_buffers++];
    *b = (buffer){
        .name = name, .dtype = dtype, .bytes = dtype_bytes(dtype), .count = count, .columns = columns};
    size_t bytes = (size_t)count * (size_t)b->bytes;
    b->mapped = (bytes + 128 + page - 1) / page * page;
    char *whole = mmap(NULL, b->mapped + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED || mprotect(whole + page, b->mapped, PROT_READ | PROT_WRITE) != 0) {
        perror("mmap");
        exit(2);
    }
    b->mapping = whole + page;
    size_t steps =
        (b->mapped - bytes) / alignment; /* to the end, or the last multiple of alignment before it */
    if (chance(c, 0.3)) steps -= (size_t)integer(c, 0, (int)(128 / alignment));
    if (chance(c, 0.1)) steps = 0;
    b->data = b->mapping + steps * alignment;
    for (size_t i = 0; i < (c->bench ? 0 : b->mapped); i += 8) {
        uint64_t bits = random_bits(c);
        memcpy(b->mapping + i, &bits, 8);
    }
    return b;
}

static void free_buffers(check *c) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (buffer *b = c->buffers; b < c->buffers + c->n_buffers; b++) {
        munmap(b->mapping - page, b->mapped + 2 * page);
        free(b->before);
        free(b->values);
        free(b->expected);
    }
    c->n_buffers = 0;
}

/* [rows][ADA_LANES]; lanes from `lanes` on stay random bits. */
static buffer *new_strips(check *c, const char *name, int rows, int lanes) {
    buffer *b = new_buffer(c, name, c->real, (int64_t)rows * ADA_LANES, ADA_LANES, 64);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < lanes; i++) put(c, b, r * ADA_LANES + i);
    return b;
}

static buffer *new_vector(check *c, const char *name, ada_dtype dtype, int n) {
    buffer *b = new_buffer(c, name, dtype, n, n, (size_t)dtype_bytes(dtype));
    for (int i = 0; i < n; i++) put(c, b, i);
    return b;
}

/* A caller's rows, apart or backwards; inputs may also overlap or be one row for all. */
static matrix new_rows(check *c, const char *name, ada_dtype dtype, int n, int width, bool input) {
    int ld = width + (chance(c, 0.5) ? 0 : integer(c, 1, 20));
    if (input && chance(c, 0.1)) ld = integer(c, 0, 2);
    if (chance(c, 0.2)) ld = -ld;
    if (c->bench) ld = width;
    note(c, "ld", ld);
    int64_t count = (int64_t)(n - 1) * abs(ld) + width;
    buffer *b = new_buffer(c, name, dtype, count, count, (size_t)dtype_bytes(dtype));
    matrix m = {b, ld < 0 ? (int64_t)(n - 1) * -ld : 0, ld, NULL};
    m.first = b->data + m.at * b->bytes;
    for (int j = 0; j < n && input; j++)
        for (int d = 0; d < width; d++) put(c, b, m.at + (int64_t)j * ld + d);
    return m;
}

static void *data(const buffer *b) { return b ? b->data : NULL; }

static void *tile_of(check *c, buffer *q, buffer *p, buffer *o, buffer *m, buffer *l, int D, int E,
                     int lanes) {
    if (c->real == ADA_F32)
        c->tile.f32 = (ada_tile_f32){data(q), data(p), data(o), data(m), data(l), D, E, lanes, NULL, false};
    else
        c->tile.f64 = (ada_tile_f64){data(q), data(p), data(o), data(m), data(l), D, E, lanes, NULL, false};
    return &c->tile;
}

/* ---- expectations ---- */

static void expect(buffer *b, int64_t i, expectation e) {
    if (!b->expected) b->expected = calloc((size_t)b->count, sizeof *b->expected);
    b->expected[i] = e;
}
static void expect_near(buffer *b, int64_t i, wide value, double tolerance, double exp2) {
    expect(b, i, (expectation){NEAR, value, tolerance, exp2});
}
static void expect_bits(buffer *b, int64_t i, uint64_t bits) {
    expect(b, i, (expectation){.rule = BITS, .value = bits});
}
static void expect_any(buffer *b, int64_t i) { expect(b, i, (expectation){.rule = ANY}); }

/* One rounding of value, a hair more because `wide` rounds too. */
static double rounding(const check *c, wide value) {
    return isfinite(value) ? (double)fabsl(value) * c->limit.unit * 1.001 + c->limit.least * 0.501 : 0;
}

/* A sum of products, and what bounds its error. */
typedef struct {
    wide sum, magnitude, largest; /* of finite products */
    int terms;                    /* that are not zero */
} total;

static inline void add_product(total *t, wide a, wide b) {
    wide x = a * b, size = fabsl(x);
    t->sum += x;
    t->terms += x != 0;
    if (!(size <= LDBL_MAX)) return;
    t->magnitude += size;
    if (size > t->largest) t->largest = size;
}

/* Any order, with or without FMA: a product and at most terms - 1 additions, each within one unit roundoff of
 * a magnitude of at most that of the whole, to first order; the same number of roundings to subnormals. */
static double total_tolerance(const check *c, const total *t) {
    if (t->terms <= 1) return holds(c, t->sum) ? 0 : rounding(c, t->sum);
    return (double)t->magnitude * c->limit.unit * (t->terms + 1) + c->limit.least * t->terms;
}

typedef enum { FINITE, MAYBE, INFINITE } finiteness;
/* Whether REAL can hold the sum in any order of computation; a product beyond twice the largest number
 * overflows whatever it is added to. */
static finiteness total_finiteness(const check *c, const total *t) {
    if (!isfinite(t->sum) || t->largest > 2.1L * c->limit.largest) return INFINITE;
    return t->magnitude + total_tolerance(c, t) > c->limit.largest ? MAYBE : FINITE;
}

static void expect_total(const check *c, buffer *b, int64_t i, const total *t) {
    finiteness finite = total_finiteness(c, t);
    bool overflow = t->magnitude + total_tolerance(c, t) > c->limit.largest;
    if (finite == FINITE || (finite == INFINITE && (isnan(t->sum) || !overflow)))
        expect_near(b, i, t->sum, total_tolerance(c, t), 0);
    else
        expect(b, i, (expectation){.rule = finite == MAYBE ? ANY : NONFINITE});
}

/* Relative error of exp2. AVX-512 float: (ln 2)^3 / 6 * (1/32)^3 / 4 = 4.2e-7 of the polynomial of degree 2,
 * and the roundings of a table entry and the result. Others: polynomials whose error is far below the
 * rounding of their last steps. */
static double exp2_error(const check *c, const kernel *k) {
    return c->real == ADA_F64 ? 4e-16 : k->needs & ADA_ISA_AVX512 ? 2e-7 : 1e-7;
}

#endif
