/* Checks and benchmarks every kernel in kernels.def that this CPU can run: one line per kernel.
 *
 * Each kernel, the scalar ones too, must stay within a derived bound of a computation in long double; any two
 * then agree within the sum of their bounds. A new kernel of a standing slot needs nothing here, a new slot a
 * generator and a row in `generators`. Link it with the kernels' objects and cpu.c; ADA_BUILD_AVX2 and
 * ADA_BUILD_AVX512 say which of them there are.
 */
#ifdef __clang__
#    include "../../adaattn/bench/roofline.c"
#else
#    pragma GCC push_options
#    pragma GCC optimize("O3", "fp-contract=fast") /* roofline.c needs both to reach the peak */
#    include "../../adaattn/bench/roofline.c"
#    pragma GCC pop_options
#endif
#include "check_backward.h"
#include "check_narrow.h"

#include <signal.h>

#define ADA_KERNEL(slot, isa, needs) ADA_IF_##isa(ada_##slot##_fn ada_##slot##_##isa;)
#include "../../csrc/kernels.def"
#undef ADA_KERNEL

static kernel kernels[] = {
#define ADA_KERNEL(op, set, mask)                                                                            \
    ADA_IF_##set({.slot = #op, .isa = #set, .needs = mask, .run = (function)ada_##op##_##set}, )
#include "../../csrc/kernels.def"
#undef ADA_KERNEL
};
enum { N_KERNELS = sizeof kernels / sizeof *kernels };

#define REALS(op, make)                                                                                      \
    {#op "_f32", make, ADA_F32, ADA_F32}, { #op "_f64", make, ADA_F64, ADA_F64 }
#define HALF(op, make)                                                                                       \
    {#op "_f16", make, ADA_F32, ADA_F16}, { #op "_bf16", make, ADA_F32, ADA_BF16 }
#define NARROW(op, make)                                                                                     \
    {#op "_bf16", make, ADA_F32, ADA_BF16}, {#op "_i8", make, ADA_F32, CHECK_I8}, {                          \
#        op "_i16", make, ADA_F32, CHECK_I16                                                                 \
    }
static const struct {
    const char *slot;
    void (*make)(check *);
    ada_dtype real, element;
} generators[] = {
    REALS(pack, make_pack),
    REALS(scores, make_scores),
    REALS(softcap, make_softcap),
    REALS(reference, make_reference),
    REALS(weights, make_weights),
    REALS(scores_weights, make_scores_weights),
    REALS(values, make_values),
    REALS(unpack, make_unpack),
    REALS(row_weights, make_row_weights),
    REALS(product, make_product),
    REALS(backward, make_backward),
    REALS(row_scores, make_row_scores),
    HALF(row_scores, make_row_scores),
    {"row_scores_wide", make_row_scores, ADA_F64, ADA_F32},
    REALS(row_values, make_row_values),
    HALF(row_values, make_row_values),
    {"row_values_wide", make_row_values, ADA_F64, ADA_F32},
    {"code_products", make_code_products, ADA_F32, ADA_F32},
    {"page_rows", make_page_scores, ADA_F32, ADA_F32},
    {"page_scores", make_page_scores, ADA_F32, ADA_F32},
    {"page_values", make_page_values, ADA_F32, ADA_F32},
    HALF(load, make_load_half),
    HALF(store, make_store_half),
    {"dropout", make_dropout, ADA_F32, ADA_F32},
    {"units_begin", make_units, ADA_F32, ADA_F32},
    {"units_end", make_units, ADA_F32, ADA_F32},
    NARROW(scores, make_narrow_scores),
    NARROW(round, make_round),
    NARROW(values, make_narrow_values),
    {"weigh_bf16_bf16", make_weigh, ADA_F32, ADA_BF16},
    {"weigh_i8_bf16", make_weigh, ADA_F32, CHECK_I8},
    {"weigh_i8_i8", make_weigh, ADA_F32, CHECK_I8},
    {"weigh_i16_i16", make_weigh, ADA_F32, CHECK_I16},
    {"gauge_bf16", make_gauge, ADA_F32, ADA_BF16},
    {"gauge_i8", make_gauge, ADA_F32, CHECK_I8},
    {"gauge_i16", make_gauge, ADA_F32, CHECK_I16},
    NARROW(encode, make_encode),
    {"pair_bf16", make_pair, ADA_F32, ADA_BF16},
    {"turn_8", make_turn, ADA_F32, CHECK_U8},
    {"turn_16", make_turn, ADA_F32, CHECK_I16},
    {"turn_32", make_turn, ADA_F32, CHECK_I32},
    {"columns", make_columns, ADA_F32, ADA_F32},
    {"reach", make_reach, ADA_F32, ADA_F32},
    {"row_reach", make_row_reach, ADA_F32, ADA_F32},
    {"squares", make_squares, ADA_F32, ADA_F32},
    {"stand_in", make_stand_in, ADA_F32, ADA_F32},
    {"row_sums", make_row_sums, ADA_F32, ADA_F32},
    {"scale_channels", make_scale_channels, ADA_F32, ADA_F32},
};

static function run_beside(const check *c, const char *slot) {
    for (const kernel *k = kernels; k < kernels + N_KERNELS; k++)
        if (strcmp(k->slot, slot) == 0 && strcmp(k->isa, c->kernels[c->running]->isa) == 0) return k->run;
    return NULL;
}

static void switch_units(const check *c, const char *slot) {
    const function run = run_beside(c, slot);
    if (run) ((ada_units_begin_fn *)run)();
}

static struct {
    const char *only, *isa;
    uint64_t seed;
    int cases;
    bool bench, list;
} options = {.seed = 1, .cases = 300};

static check current;

/* A signal in a kernel: nothing can be rescued, but what it was doing can be told. */
static void crashed(int number) {
    const kernel *k = current.kernels[current.running < 0 ? 0 : current.running];
    printf("%s %s: seed %" PRIu64 ", case %d (%s): %s: beyond a buffer, or without its alignment\n", k->slot,
           k->isa, current.seed, current.index, current.shape, strsignal(number));
    fflush(stdout);
    _exit(1);
}

static void start_case(check *c, int index) {
    uint64_t state = c->seed * 0x9E3779B97F4A7C15u + (uint64_t)index;
    for (const char *s = c->kernels[0]->slot; *s; s++) state = state * 31 + (unsigned char)*s;
    c->random = state;
    c->random = random_bits(c);
    c->index = index;
    c->shape[0] = '\0';
    c->running = -1;
    c->expected = 0, c->any_result = false, c->without = 0;
    c->flops = c->bytes = 0, c->walks = false, c->start = 0;
    c->style = c->bench || chance(c, 0.6) ? PLAIN : chance(c, 0.5) ? SCALES : SPECIALS;
    c->low = -20, c->high = 20;
    if (c->style == SPECIALS) c->low = uniform(c, -14, -3);
    if (c->style == SCALES && chance(c, 0.5)) {
        c->low = log2(c->limit.least);
        c->high = -log2(c->limit.normal) - (chance(c, 0.5) ? 1 : 20);
    }
}

/* What the machine can do at best, per ns: flops of this kind, or bytes from memory; 0: no such limit. */
static double measure_peak(const check *c) {
    static char *memory;
    if (c->flops > 0) return roofline_peak(0, 1, 2e-3) * (c->real == ADA_F64 ? 0.5e-9 : 1e-9);
    if (!c->walks) return 0;
    if (!memory) memory = memset(malloc(WALK_BYTES), 1, WALK_BYTES);
    return WALK_BYTES * 1e-9 / roofline_read(memory, memory + WALK_BYTES / 2, WALK_BYTES / 2, 16384, 1, 1);
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double samples[SAMPLES]) {
    qsort(samples, SAMPLES, sizeof *samples, compare);
    return samples[SAMPLES / 2];
}

static void print_bench(check *c) {
    double scalar = 0, peak = median(c->peaks);
    for (int i = 0; i < c->n_kernels; i++) {
        kernel *k = c->kernels[i];
        double ns = median(k->ns), work = c->flops > 0 ? c->flops : c->bytes;
        if (i == 0) scalar = ns;
        if (options.isa && strcmp(options.isa, k->isa) != 0) continue;
        printf("%-18s %-8s %10.1f ns %7.1fx scalar", k->slot, k->isa, ns, scalar / ns);
        if (work > 0) printf("  %6.1f %s/s", work / ns, c->flops > 0 ? "GFLOP" : "GB");
        if (peak > 0) printf(", %5.1f %% of %.1f", 100 * work / ns / peak, peak);
        puts("");
    }
}

/* The kernels of a slot that this CPU can run; a benchmark compares them with the scalar one. */
static void find_kernels(check *c, const char *slot) {
    for (kernel *k = kernels; k < kernels + N_KERNELS; k++) {
        if (strcmp(k->slot, slot) != 0) continue;
        bool runs = (k->needs & ~ada_cpu_isa()) == 0;
        bool wanted = !options.isa || strcmp(k->isa, options.isa) == 0 || (options.bench && k->needs == 0);
        if (options.list) printf("%-18s %-8s%s\n", k->slot, k->isa, runs ? "" : " (not on this CPU)");
        if (c->n_kernels == MAX_KERNELS) abort();
        if (runs && wanted) c->kernels[c->n_kernels++] = k;
    }
}

/* False when the slot has no generator. */
static bool run_slot(check *c, const char *slot) {
    for (size_t g = 0; g < sizeof generators / sizeof *generators; g++) {
        if (strcmp(generators[g].slot, slot) != 0) continue;
        c->seed = options.seed;
        c->bench = options.bench;
        c->real = generators[g].real, c->element = generators[g].element;
        c->limit = c->real == ADA_F64 ? limits_f64 : limits_f32;
        for (int i = 0; i < (c->bench ? 1 : options.cases); i++) {
            start_case(c, i);
            generators[g].make(c);
            free_buffers(c);
        }
        return true;
    }
    return false;
}

static bool parse(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(name, "--bench") == 0)
            options.bench = true;
        else if (strcmp(name, "--list") == 0)
            options.list = true;
        else if (value && strcmp(name, "--only") == 0)
            options.only = value, i++;
        else if (value && strcmp(name, "--isa") == 0)
            options.isa = value, i++;
        else if (value && strcmp(name, "--seed") == 0)
            options.seed = strtoull(value, NULL, 0), i++;
        else if (value && strcmp(name, "--cases") == 0)
            options.cases = atoi(value), i++;
        else
            return false;
    }
    return true;
}

int main(int argc, char **argv) {
    if (!parse(argc, argv)) {
        fprintf(stderr, "usage: %s [--list] [--bench] [--only SLOT] [--isa NAME] [--seed N] [--cases N]\n",
                argv[0]);
        return 2;
    }
    signal(SIGSEGV, crashed);
    signal(SIGBUS, crashed);
    signal(SIGILL, crashed);
    if (options.bench) {
        puts("Medians. Peaks, measured in turn with the kernels: FMA out of registers, reading memory.");
        roofline_peak(0, 1, 0.1); /* the clock's way up */
    }
    static const char *const slots[] = {
#define SLOT(name) #name,
        ADA_SLOTS(SLOT)
#undef SLOT
    };
    int passed = 0, failed = 0;
    for (size_t s = 0; s < sizeof slots / sizeof *slots; s++) {
        if (options.only && strcmp(options.only, slots[s]) != 0) continue;
        current = (check){0};
        find_kernels(&current, slots[s]);
        if (options.list || current.n_kernels == 0) continue;
        bool known = run_slot(&current, slots[s]);
        if (known && options.bench) print_bench(&current);
        for (int i = 0; i < current.n_kernels; i++) {
            const kernel *k = current.kernels[i];
            bool good = known && !k->failed;
            passed += good, failed += !good;
            if (options.bench) continue;
            printf("%-18s %-8s ", k->slot, k->isa);
            if (good)
                printf("ok  largest error %.2f of its bound\n", k->worst);
            else
                puts(known ? "FAILED" : "FAILED: no generator for this slot");
        }
    }
    if (options.list) return 0;
    if (!options.bench) printf("%d passed, %d failed\n", passed, failed);
    return failed > 0 || passed == 0;
}
