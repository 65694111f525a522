/* cuBLASLt without a GPU, for tests: the functions of cuda/blas.h on the CPU's memory, by loops. It refuses
 * what the library would refuse, fails on demand, and counts what is not given back. */
#define _POSIX_C_SOURCE 199309L
#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef FAKE_VERSION
#    define FAKE_VERSION 130000
#endif
#ifndef FAKE_BROKEN
#    define FAKE_BROKEN 0
#endif
enum {
    SUCCESS = 0,
    NOT_INITIALIZED = 1,
    INVALID_VALUE = 7,
    EXECUTION_FAILED = 13,
    INTERNAL_ERROR = 14,
    NOT_SUPPORTED = 15
};
enum { R_32F = 0, R_64F = 1, R_16F = 2, R_16BF = 14, R_E4M3 = 28 };
enum { FAST_TF32 = 77, COMPUTE_64F = 70, WORKSPACE = 1000 };

int fake_fail_after = -1, fake_status = 14, fake_live, fake_handles, fake_products;
bool fake_without_fp8, fake_capturing;
int fake_meetings;      /* of threads at a handle */
static atomic_int busy; /* the one handle is */
double fake_fault = 1;  /* by which products are wrong */
const char *fake_failed;

typedef struct {
    int compute, scale, pointers, transpose, epilogue;
    const void *bias;
} description;
typedef struct {
    int type;
    uint64_t rows, columns;
    int64_t ld;
} layout;
typedef struct {
    size_t workspace;
    uint32_t alignment[4];
} preference;
typedef struct {
    uint64_t algo[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
} choice;

static int fails(const char *name) {
    if (fake_fail_after < 0 || fake_fail_after-- > 0) return SUCCESS;
    fake_failed = name;
    return fake_status;
}
#define CALL()                                                                                               \
    do {                                                                                                     \
        const int status = fails(__func__);                                                                  \
        if (status) return status;                                                                           \
    } while (0)
static void *make(size_t bytes) {
    fake_live++;
    return calloc(1, bytes);
}
static int drop(void *x) {
    fake_live--;
    free(x);
    return SUCCESS;
}

size_t cublasLtGetVersion(void) { return FAKE_VERSION; }
const char *cublasLtGetStatusString(int status) {
    return status == NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : "injected";
}
int cublasLtCreate(void **handle) {
    CALL();
    if (FAKE_BROKEN || fake_capturing) return NOT_INITIALIZED;
    fake_handles++;
    *handle = &fake_handles;
    return SUCCESS;
}
int cublasLtMatmulDescCreate(void **desc, int compute, int scale) {
    CALL();
    description *d = *desc = make(sizeof *d);
    d->compute = compute, d->scale = scale;
    return SUCCESS;
}
int cublasLtMatmulDescDestroy(void *desc) { return drop(desc); }
int cublasLtMatmulDescSetAttribute(void *desc, int attribute, const void *value, size_t bytes) {
    CALL();
    description *d = desc;
    void *to = attribute == 2   ? (void *)&d->pointers
               : attribute == 3 ? (void *)&d->transpose
               : attribute == 7 ? (void *)&d->epilogue
               : attribute == 8 ? (void *)&d->bias
                                : NULL;
    if (!to || bytes != (attribute == 8 ? sizeof(void *) : sizeof(int32_t))) return INVALID_VALUE;
    memcpy(to, value, bytes);
    return SUCCESS;
}
int cublasLtMatrixLayoutCreate(void **made, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    CALL();
    layout *l = *made = make(sizeof *l);
    *l = (layout){type, rows, columns, ld};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(void *made) { return drop(made); }
int cublasLtMatmulPreferenceCreate(void **made) {
    CALL();
    preference *p = *made = make(sizeof *p);
    for (int i = 0; i < 4; i++) p->alignment[i] = 256;
    return SUCCESS;
}
int cublasLtMatmulPreferenceDestroy(void *made) { return drop(made); }
int cublasLtMatmulPreferenceSetAttribute(void *made, int attribute, const void *value, size_t bytes) {
    CALL();
    preference *p = made;
    if (attribute == 1 && bytes == sizeof(size_t))
        memcpy(&p->workspace, value, bytes);
    else if (attribute >= 5 && attribute <= 8 && bytes == sizeof(uint32_t))
        memcpy(&p->alignment[attribute - 5], value, bytes);
    else
        return INVALID_VALUE;
    return SUCCESS;
}

static bool fits(const description *d, const layout *a, const layout *b, const layout *c) {
    const bool fp8 = a->type == R_E4M3;
    if (!d->transpose || a->type != b->type || a->rows != b->rows || c->rows != a->columns ||
        c->columns != b->columns || a->ld < (int64_t)a->rows || b->ld < (int64_t)b->rows ||
        c->ld < (int64_t)c->rows)
        return false;
    if ((d->compute == COMPUTE_64F) != (a->type == R_64F) || (d->compute == FAST_TF32 && a->type != R_32F) ||
        d->scale != (a->type == R_64F ? R_64F : R_32F))
        return false;
    if (fp8) /* e4m3: sizes of 16 bytes, no bias of floats */
        return !fake_without_fp8 && a->rows % 16 == 0 && a->ld % 16 == 0 && b->ld % 16 == 0 &&
               c->ld % 16 == 0 && !(d->epilogue && c->type == R_32F);
    return c->type == a->type || c->type == R_32F;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, void *a, void *b, void *c, void *d, void *wish,
                                   int wanted, choice *choices, int *count) {
    CALL();
    if (fake_capturing) return INTERNAL_ERROR; /* that of CUDA 13.3 does so */
    const preference *p = wish;
    if (handle != &fake_handles || c != d || wanted < 1) return INVALID_VALUE;
    *count = fits(desc, a, b, c) && p->workspace >= WORKSPACE;
    if (!*count) return NOT_SUPPORTED;
    memset(choices, 0, sizeof *choices);
    memcpy(choices->algo, p->alignment, sizeof p->alignment);
    choices->workspace = WORKSPACE;
    return SUCCESS;
}

static double of_e4m3(uint8_t x) {
    const int exponent = x >> 3 & 15, digits = x & 7;
    const double size = exponent ? ldexp(8 + digits, exponent - 10) : ldexp(digits, -9);
    return (x & 127) == 127 ? NAN : x & 128 ? -size : size;
}
static double of_half(uint16_t x) {
    const int exponent = x >> 10 & 31, digits = x & 1023;
    const double size = exponent == 31 ? (digits ? NAN : INFINITY)
                        : exponent     ? ldexp(1024 + digits, exponent - 25)
                                       : ldexp(digits, -24);
    return x & 0x8000 ? -size : size;
}
static double element(const void *at, int type, int64_t i, bool tf32) {
    union {
        uint32_t bits;
        float x;
    } u;
    switch (type) {
    case R_64F:
        return ((const double *)at)[i];
    case R_16F:
        return of_half(((const uint16_t *)at)[i]);
    case R_E4M3:
        return of_e4m3(((const uint8_t *)at)[i]);
    case R_16BF:
        u.bits = (uint32_t)((const uint16_t *)at)[i] << 16;
        return (double)u.x;
    default:
        u.x = ((const float *)at)[i];
        if (tf32 && isfinite(u.x)) u.bits &= ~0x1fffu; /* it cuts digits off */
        return (double)u.x;
    }
}
static uint16_t to_half(double x) {
    uint16_t best = 0;
    if (isnan(x)) return 0x7e00;
    if (fabs(x) >= 65520) return (uint16_t)(x < 0 ? 0xfc00 : 0x7c00);
    int exponent;
    frexp(x, &exponent);
    exponent = exponent < -13 ? -13 : exponent;
    const double digits = rint(fabs(ldexp(x, 11 - exponent)));
    best = digits < 1024 ? (uint16_t)digits : (uint16_t)(((exponent + 13) << 10) + (int)digits);
    return (uint16_t)(best | (signbit(x) ? 0x8000 : 0));
}
static uint16_t to_bf16(double y) {
    union {
        uint32_t bits;
        float x;
    } u = {.x = (float)y};
    if (isnan(y)) return 0x7fc0;
    return (uint16_t)((u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16);
}

int cublasLtMatmul(void *handle, void *desc, const void *alpha, const void *a, void *a_layout, const void *b,
                   void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                   const uint64_t *algo, void *workspace, size_t workspace_bytes, void *stream) {
    CALL();
    (void)stream;
    fake_meetings += atomic_fetch_add(&busy, 1) > 0;
    nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    atomic_fetch_sub(&busy, 1);
    const description *x = desc;
    const layout *la = a_layout, *lb = b_layout, *ld = d_layout;
    const void *const pointers[4] = {a, b, c, d};
    uint32_t alignment[4];
    memcpy(alignment, algo, sizeof alignment);
    for (int i = 0; i < 4; i++)
        if (!alignment[i] || (uintptr_t)pointers[i] % alignment[i] ||
            (la->type == R_E4M3 && alignment[i] < 16))
            return EXECUTION_FAILED;
    if (x->epilogue == 4 && (uintptr_t)x->bias % 16) /* kernels read it so, whatever was asked for */
        return EXECUTION_FAILED;
    if (handle != &fake_handles || c_layout != d_layout || c != d || !workspace ||
        workspace_bytes < WORKSPACE)
        return INVALID_VALUE;
    memset(workspace, 0xff, WORKSPACE);
    const bool wide = x->scale == R_64F, tf32 = x->compute == FAST_TF32;
    const double factor = wide ? *(const double *)alpha : (double)*(const float *)alpha;
    const double keep = wide ? *(const double *)beta : (double)*(const float *)beta;
    for (uint64_t n = 0; n < ld->rows; n++)
        for (uint64_t m = 0; m < ld->columns; m++) {
            double sum = 0;
            for (uint64_t k = 0; k < la->rows; k++)
                sum += element(a, la->type, (int64_t)(n * (uint64_t)la->ld + k), tf32) *
                       element(b, lb->type, (int64_t)(m * (uint64_t)lb->ld + k), tf32);
            const int64_t at = (int64_t)(m * (uint64_t)ld->ld + n);
            sum *= factor * fake_fault;
            if (keep != 0) sum += keep * element(d, ld->type, at, false);
            if (x->epilogue == 4) sum += element(x->bias, ld->type, (int64_t)n, false);
            if (ld->type == R_64F)
                ((double *)d)[at] = sum;
            else if (ld->type == R_32F)
                ((float *)d)[at] = (float)sum;
            else
                ((uint16_t *)d)[at] = ld->type == R_16F ? to_half(sum) : to_bf16(sum);
        }
    fake_products++;
    return SUCCESS;
}
