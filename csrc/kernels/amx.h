/* The matrix unit: six instructions on eight tiles of 16 rows of 64 bytes. Statements, as a tile's number is
 * part of the instruction. With ADAATTN_EMULATE_AMX the same names are AVX-512, to run the kernels where
 * there is no such unit: slow, and exact to the manual's pseudocode.
 */
#include <immintrin.h>

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* All tiles whole: every matrix here is padded to them. */
static const tile_shapes whole_tiles __attribute__((aligned(64))) = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

#ifndef ADAATTN_EMULATE_AMX

/* Compilers know neither tiles nor the memory behind them: order is that of volatile statements. */
#    define TILES_BEGIN() __asm__ volatile("ldtilecfg %0" ::"m"(whole_tiles))
#    define TILES_END() __asm__ volatile("tilerelease" ::: "memory")
#    define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #    t ::)
#    define TILE_MOVE(op, t, at, stride, order)                                                              \
        __asm__ volatile(op order ::"r"(at), "r"((ptrdiff_t)(stride)) : "memory")
#    define TILE_LOAD(t, at, stride) TILE_MOVE("tileloadd ", t, at, stride, "(%0,%1,1), %%tmm" #    t)
/* What is read once, past the first cache. */
#    define TILE_STREAM(t, at, stride) TILE_MOVE("tileloaddt1 ", t, at, stride, "(%0,%1,1), %%tmm" #    t)
#    define TILE_STORE(t, at, stride) TILE_MOVE("tilestored ", t, at, stride, "%%tmm" #    t ", (%0,%1,1)")
#    define TILE_PRODUCT(op, c, a, b) __asm__ volatile(op " %%tmm" #    b ", %%tmm" #    a ", %%tmm" #    c ::)
/* c += a b: pairs of bf16; or quads of signed bytes in a and unsigned ones in b. */
#    define TILE_PRODUCT_BF16(c, a, b) TILE_PRODUCT("tdpbf16ps", c, a, b)
#    define TILE_PRODUCT_I8(c, a, b) TILE_PRODUCT("tdpbsud", c, a, b)

#else

static _Thread_local struct {
    uint32_t tile[8][16][16] __attribute__((aligned(64)));
    bool configured;
} unit_of_thread;

#    define TILES_BEGIN()                                                                                    \
        (memset(&unit_of_thread, 0, sizeof unit_of_thread), unit_of_thread.configured = true)
#    define TILES_END() memset(&unit_of_thread, 0, sizeof unit_of_thread)
#    define TILE_ZERO(t) memset(emulated_tile(t), 0, sizeof unit_of_thread.tile[t])
#    define TILE_LOAD(t, at, stride) emulate_load(t, at, stride)
#    define TILE_STREAM(t, at, stride) emulate_load(t, at, stride)
#    define TILE_STORE(t, at, stride) emulate_store(t, at, stride)
#    define TILE_PRODUCT_BF16(c, a, b)                                                                       \
        emulate_product_bf16(emulated_tile(c), emulated_tile(a), emulated_tile(b))
#    define TILE_PRODUCT_I8(c, a, b) emulate_product_i8(emulated_tile(c), emulated_tile(a), emulated_tile(b))

typedef uint32_t (*emulated)[16];

/* Without a configuration the instructions trap. */
static inline emulated emulated_tile(int t) {
    if (!unit_of_thread.configured) __builtin_trap();
    return unit_of_thread.tile[t];
}

static inline void emulate_load(int t, const void *at, ptrdiff_t stride) {
    emulated tile = emulated_tile(t);
    for (int r = 0; r < 16; r++) memcpy(tile[r], (const char *)at + r * stride, 64);
}

static inline void emulate_store(int t, void *at, ptrdiff_t stride) {
    emulated tile = emulated_tile(t);
    for (int r = 0; r < 16; r++) memcpy((char *)at + r * stride, tile[r], 64);
}

static inline void set_control(unsigned control) { __asm__ volatile("ldmxcsr %0" ::"m"(control) : "memory"); }

/* Low and high elements have sums of their own; denormals count as zero, coming and going. */
__attribute__((noinline)) static void emulate_product_bf16(emulated c, emulated a, emulated b) {
    enum { ZERO_DENORMALS = 0x9fc0 }; /* in and out, to nearest, nothing traps */
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    const unsigned control = _mm_getcsr();
    set_control(ZERO_DENORMALS);
    for (int m = 0; m < 16; m++) {
        __m512 even = _mm512_setzero_ps(), odd = even, sum = _mm512_load_ps(c[m]);
        for (int k = 0; k < 16; k++) {
            const __m512i x = _mm512_set1_epi32((int)a[m][k]), y = _mm512_load_si512(b[k]);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                                  _mm512_castsi512_ps(_mm512_and_si512(y, high)), odd);
        }
        _mm512_store_ps(c[m], _mm512_add_ps(sum, _mm512_add_ps(even, odd)));
    }
    set_control(control);
}

__attribute__((noinline)) static void emulate_product_i8(emulated c, emulated a, emulated b) {
    const __m512i low = _mm512_set1_epi16(255);
    for (int m = 0; m < 16; m++) {
        __m512i sum = _mm512_load_si512(c[m]);
        for (int k = 0; k < 16; k++) {
            const __m512i x = _mm512_set1_epi32((int)a[m][k]), y = _mm512_load_si512(b[k]);
            const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), odd = _mm512_srai_epi16(x, 8);
            sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, _mm512_and_si512(y, low)));
            sum = _mm512_add_epi32(sum, _mm512_madd_epi16(odd, _mm512_srli_epi16(y, 8)));
        }
        _mm512_store_si512(c[m], sum);
    }
}

#endif
