/* The tilings of K1 that walk lists of blocks of keys: head sizes up to 128, without options. */
#define ADA_RUN ada_k1_run_listed
#include "k1_run.cuh"

/* 32 keys at a time leave registers for the list; pairs take 16 rows per warp. */
template <int W, bool BF16, int MR, int PARTS, int RESIDENT>
using listed =
    ada_tiling<BF16, W, 4, MR, 1, 32, false, false, RESIDENT, 80, PARTS, false, false, false, true>;

template <int W> static cudaError_t run_width(ada_k1_args &a, bool, cudaStream_t stream) {
    if constexpr (W > 128)
        return cudaErrorNotSupported;
    else if constexpr (W == 32)
        return run_width<64>(a, false, stream);
    else if (!ada_cu_list_rows(&a.p))
        return cudaErrorNotSupported;
    else if (a.p.rung == ADA_CU_SPLIT)
        return run<listed<W, false, 1, 2, 1>>(a, stream);
    else if (a.p.rung == ADA_CU_FP16)
        return run<listed<W, false, 2, 1, 2>>(a, stream);
    else
        return run<listed<W, true, 2, 1, 2>>(a, stream);
}

int ada_cu_list_rows(const ada_cu_params *p) {
    const bool split = p->rung == ADA_CU_SPLIT, half = p->rung == ADA_CU_FP16 || p->rung == ADA_CU_BFLOAT16;
    const bool options = p->mask.data || p->alibi_slopes || p->softcap != 0 || p->drop_below;
    if (!(split || half) || options || p->D > 128 || p->E > 128 || p->capability < 80 ||
        p->S > ADA_LIST_MOST_KEYS || ada_few_queries(p))
        return 0;
    return split ? 64 : 128;
}
