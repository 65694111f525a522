/* The host's side of caches on a device and of merging, and their kernels: tokens into pages, pages that are
 * closed, opened again, copied and read.
 *
 * What a kernel must know of sequences comes with its launch, so that nothing is waited for.
 */
#include "host.h"
#include "pages.cuh"

namespace ada_cuda {

namespace {

enum { THREADS = 128, WARPS = THREADS / 32, SEQUENCES = 96 /* of a launch */ };

ada_cu_pages pages_of(const ada_cuda_store *s) {
    ada_cu_pages pages = {};
    pages.table = (const uint64_t *)s->table, pages.columns = s->columns, pages.dtype = s->dtype;
    for (int side = 0; side < 2; side++) {
        pages.closed.row[side] = ada_cuda_row_bytes(s->dtype, s->widths[side]);
        pages.closed.head[side] = ada_cuda_head_bytes(s->dtype, s->widths[side]);
        pages.open.row[side] = ada_cuda_row_bytes(ADA_F32, s->widths[side]);
        pages.open.head[side] = ada_cuda_head_bytes(ADA_F32, s->widths[side]);
    }
    pages.closed.at[1] = s->G * pages.closed.head[0], pages.open.at[1] = s->G * pages.open.head[0];
    return pages;
}

/* Some sequences of a cache, and arrays of their tokens: (B, G, rows, widths[side]). */
struct Tokens {
    ada_cu_pages pages;
    ada_cu_array array[2];
    int64_t rows;
    int32_t dtype[2], G, widths[2], first, n; /* sequences first ... first + n - 1 */
    int32_t most;                             /* pages that are looked at of each */
    int32_t B;
    float *scales;
    int64_t length[SEQUENCES], count[SEQUENCES];
};

Tokens tokens_of(const ada_cuda_store *s, const ada_array *key, const ada_array *value) {
    Tokens t = {};
    t.pages = pages_of(s), t.B = (int32_t)s->B, t.G = (int32_t)s->G;
    const ada_array *const arrays[2] = {key, value};
    for (int side = 0; side < 2; side++) {
        t.widths[side] = (int32_t)s->widths[side];
        if (!arrays[side]) continue;
        t.array[side] = array_of(arrays[side]), t.dtype[side] = arrays[side]->dtype;
        t.rows = arrays[side]->shape[2];
    }
    return t;
}

ADA_DEVICE char *token_at(const Tokens &a, int side, int b, int g, int64_t i) {
    const ada_cu_array &x = a.array[side];
    return (char *)x.data + b * x.stride[0] + g * x.stride[1] + i * x.stride[2];
}

/* Of a block for each page of a head's side. */
typedef struct {
    int at, b, g, side;
    int64_t page;
} page_place;

ADA_DEVICE page_place place_of_block(const Tokens &a) {
    int64_t index = ada_block();
    page_place w;
    w.side = (int)(index % 2), index /= 2;
    w.page = index % a.most, index /= a.most;
    w.g = (int)(index % a.G), w.at = (int)(index / a.G), w.b = a.first + w.at;
    return w;
}

/* Page `page` of a sequence of so many tokens, which is full where that matters. */
ADA_DEVICE ada_kept_page kept_page(const Tokens &a, int b, int g, int side, int64_t page, int64_t tokens) {
    const ada_sequence s = {0, b, (int)tokens};
    return ada_page_of(a.pages, s, g, side, (int)page);
}

/* ---- tokens that come ---- */

/* A warp for each token of a head: to its page, or, of int8, to the open one, if it ends there. */
ADA_KERNEL(THREADS, 1) store_tokens(ADA_ARGS(Tokens) a) {
    int64_t index = ada_block() * (int64_t)WARPS + ada_thread() / 32;
    if (index >= (int64_t)a.n * a.G * a.rows) return;
    const int64_t i = index % a.rows;
    const int g = (int)(index / a.rows % a.G), at = (int)(index / a.rows / a.G), b = a.first + at;
    const int64_t token = a.length[at] + i, all = a.length[at] + a.count[at];
    if (i >= a.count[at]) return;
    if (a.pages.dtype == ADA_CU_I8 && token / ADA_CU_PAGE < all / ADA_CU_PAGE) return;
    for (int side = 0; side < 2; side++) {
        const ada_kept_page page = kept_page(a, b, g, side, token / ADA_CU_PAGE, all);
        const char *const from = token_at(a, side, b, g, i);
        char *const to = (char *)page.at + token % ADA_CU_PAGE * page.row;
        const int dtype = a.pages.dtype == ADA_CU_I8 ? ADA_CU_F32 : a.pages.dtype;
        const int size = dtype == ADA_CU_F32 ? 4 : 2;
        for (int d = ada_thread() % 32; d < a.widths[side]; d += 32)
            ada_store_element(to + d * size, dtype,
                              ada_element<float>(from + d * a.array[side].stride[3], a.dtype[side]));
    }
}

/* Rows of a page that becomes full: those of the open one, then new ones. */
ADA_DEVICE float row_of_full(const Tokens &a, const page_place &w, const ada_kept_page &open, int64_t page,
                             int row, int d) {
    const int64_t i = page * ADA_CU_PAGE + row - a.length[w.at];
    if (i < 0) return ((const float *)(open.at + row * open.row))[d];
    return ada_element<float>(token_at(a, w.side, w.b, w.g, i) + d * a.array[w.side].stride[3],
                              a.dtype[w.side]);
}

/* Bytes of a page, as csrc/cache.c makes them, bit for bit; a number that is not finite makes the scale NaN.
 */
ADA_KERNEL(THREADS, 1) close_pages(ADA_ARGS(Tokens) a) {
    const page_place w = place_of_block(a);
    const int64_t page = a.length[w.at] / ADA_CU_PAGE + w.page, all = a.length[w.at] + a.count[w.at];
    if (page >= all / ADA_CU_PAGE) return;
    const int width = a.widths[w.side];
    const ada_kept_page open = kept_page(a, w.b, w.g, w.side, 0, 0);
    const ada_kept_page to = kept_page(a, w.b, w.g, w.side, page, all);
    uint16_t *const means = (uint16_t *)(to.at + ADA_CU_PAGE * to.row + 16);
    const float most_bf16 = 3.3895313892515355e38f;
    double largest = 0;
    bool finite = true;
    for (int d = ada_thread(); d < width; d += THREADS) {
        double sum = 0;
        for (int r = 0; r < ADA_CU_PAGE; r++) sum += (double)row_of_full(a, w, open, page, r, d);
        const float mean = fminf(fmaxf((float)(sum / ADA_CU_PAGE), -most_bf16), most_bf16);
        means[d] = (uint16_t)ada_pack_bf16(mean, 0);
        const double centre = (double)ada_from_bf16(means[d]);
        for (int r = 0; r < ADA_CU_PAGE; r++) {
            const double distance = fabs((double)row_of_full(a, w, open, page, r, d) - centre);
            largest = distance > largest ? distance : largest;
            finite &= distance < (double)ADA_INF;
        }
    }
    if (!finite) largest = (double)ADA_NAN;
    double *const each = ada_shared_at<double>(0);
    each[ada_thread()] = largest;
    ada_sync();
    for (int i = 0; i < THREADS; i++) largest = each[i] <= largest || largest != largest ? largest : each[i];
    const float scale = (float)(largest / 127);
    if (ada_thread() == 0) *(float *)(to.at + ADA_CU_PAGE * to.row) = scale;
    const double steps = scale > 0 ? 1 / (double)scale : 0;
    for (int d = ada_thread(); d < width; d += THREADS) {
        const double centre = (double)ada_from_bf16(means[d]);
        for (int r = 0; r < ADA_CU_PAGE; r++) {
            const double code = rint(((double)row_of_full(a, w, open, page, r, d) - centre) * steps);
            const int near = code > 127 ? 127 : code > -127 ? (int)code : -127;
            ((uint8_t *)to.at)[r * to.row + d] = (uint8_t)(128 + near);
        }
    }
}

/* ---- pages ---- */

/* The open page becomes what the bytes of page length[at] of sequence count[at] are worth. */
ADA_KERNEL(THREADS, 1) reopen_pages(ADA_ARGS(Tokens) a) {
    const page_place w = place_of_block(a);
    const int b = (int)a.count[w.at];
    const ada_kept_page from = kept_page(a, b, w.g, w.side, a.length[w.at], INT32_MAX);
    const ada_kept_page open = kept_page(a, b, w.g, w.side, 0, 0);
    for (int d = ada_thread(); d < a.widths[w.side]; d += THREADS)
        for (int r = 0; r < ADA_CU_PAGE; r++)
            ((float *)(open.at + r * open.row))[d] = (float)ada_kept_element<double>(from, ADA_CU_I8, r, d);
}

/* Tokens of a page to arrays; zeros behind the last one. */
ADA_KERNEL(THREADS, 1) read_pages(ADA_ARGS(Tokens) a) {
    const page_place w = place_of_block(a);
    const int64_t first = w.page * ADA_CU_PAGE, length = a.length[w.at];
    const ada_kept_page page = kept_page(a, w.b, w.g, w.side, w.page, length);
    const int width = a.widths[w.side], dtype = a.dtype[w.side];
    if (a.scales && ada_thread() == 0 && page.bytes)
        a.scales[(((int64_t)w.side * a.B + w.b) * a.G + w.g) * (a.pages.columns - 1) + w.page] =
            ada_page_scale(page);
    for (int r = ada_thread() / 32; r < ADA_CU_PAGE && first + r < a.rows; r += WARPS) {
        char *const to = token_at(a, w.side, w.b, w.g, first + r);
        for (int d = ada_thread() % 32; d < width; d += 32) {
            const double x = first + r < length ? ada_kept_element<double>(page, a.pages.dtype, r, d) : 0;
            ada_store_element(to + d * a.array[w.side].stride[3], dtype, x);
        }
    }
}

struct Addresses {
    enum { MOST = 240 };
    uint64_t *table; /* NULL: pages are copied */
    int64_t words;   /* of 16 bytes, of a page */
    int32_t n;
    uint64_t to[MOST], from[MOST];
};

ADA_KERNEL(THREADS, 1) set_addresses(ADA_ARGS(Addresses) a) {
    for (int i = ada_thread(); i < a.n; i += THREADS) a.table[a.to[i]] = a.from[i];
}

ADA_KERNEL(THREADS, 1) copy_pages(ADA_ARGS(Addresses) a) {
    typedef ada_vector<uint32_t, 4> word;
    const word *const from = (const word *)(uintptr_t)a.from[ada_block()];
    word *const to = (word *)(uintptr_t)a.to[ada_block()];
    for (int64_t i = ada_thread(); i < a.words; i += THREADS) to[i] = from[i];
}

/* ---- arrays ---- */

struct Arrays {
    ada_cu_array to, from;
    int64_t n[4], total;
    int32_t to_dtype, from_dtype;
};

ADA_KERNEL(THREADS, 1) convert_elements(ADA_ARGS(Arrays) a) {
    for (int64_t i = ada_block() * (int64_t)THREADS + ada_thread(); i < a.total;
         i += (int64_t)ada_blocks() * THREADS) {
        int64_t rest = i, to = 0, from = 0;
        for (int d = 3; d >= 0; d--) {
            to += rest % a.n[d] * a.to.stride[d], from += rest % a.n[d] * a.from.stride[d];
            rest /= a.n[d];
        }
        ada_store_element((char *)a.to.data + to, a.to_dtype,
                          ada_element<double>((const char *)a.from.data + from, a.from_dtype));
    }
}

struct Merged {
    ada_cu_array out[3], lse[3]; /* of one side, of the other, of both */
    int32_t dtype, H, T, E;
    int64_t rows;
};

/* A warp for each row, as csrc/merge.c. */
ADA_KERNEL(THREADS, 1) merge_rows(ADA_ARGS(Merged) a) {
    const int64_t row = ada_block() * (int64_t)WARPS + ada_thread() / 32;
    if (row >= a.rows) return;
    const int64_t t = row % a.T, h = row / a.T % a.H, b = row / a.T / a.H;
    const int lse_dtype = a.dtype == ADA_CU_F64 ? ADA_CU_F64 : ADA_CU_F32;
    const double none = -(double)ADA_INF;
    double lse[2], weight[2] = {0, 0}, whole = none;
    for (int i = 0; i < 2; i++)
        lse[i] = ada_element<double>((const char *)a.lse[i].data + b * a.lse[i].stride[0] +
                                         h * a.lse[i].stride[1] + t * a.lse[i].stride[2],
                                     lse_dtype);
    if (!(lse[0] == none && lse[1] == none)) {
        const double m = lse[0] > lse[1] ? lse[0] : lse[1];
        for (int i = 0; i < 2; i++) weight[i] = exp(lse[i] - m);
        const double mass = weight[0] + weight[1];
        for (int i = 0; i < 2; i++) weight[i] /= mass;
        whole = m + log(mass);
    }
    char *at[3];
    for (int i = 0; i < 3; i++)
        at[i] =
            (char *)a.out[i].data + b * a.out[i].stride[0] + h * a.out[i].stride[1] + t * a.out[i].stride[2];
    for (int e = ada_thread() % 32; e < a.E; e += 32) {
        double sum = 0;
        for (int i = 0; i < 2; i++) /* a side that saw no key says nothing, not even NaN */
            if (lse[i] != none)
                sum += weight[i] * ada_element<double>(at[i] + e * a.out[i].stride[3], a.dtype);
        ada_store_element(at[2] + e * a.out[2].stride[3], a.dtype, sum);
    }
    if (ada_thread() % 32 == 0)
        ada_store_element((char *)a.lse[2].data + b * a.lse[2].stride[0] + h * a.lse[2].stride[1] +
                              t * a.lse[2].stride[2],
                          lse_dtype, whole);
}

/* Groups of sequences that a launch can tell of. */
int32_t fill_group(Tokens *t, int64_t first, int64_t all, const int64_t *length, const int64_t *count) {
    t->first = (int32_t)first, t->n = (int32_t)(all - first < SEQUENCES ? all - first : (int64_t)SEQUENCES);
    for (int i = 0; i < t->n; i++) {
        t->length[i] = length[first + i];
        if (count) t->count[i] = count[first + i];
    }
    return t->n;
}

} // namespace

int merge(int device, uintptr_t stream, const ada_merge_problem *m, ada_cuda_failure *failure) {
    ON_DEVICE(device);
    const int64_t *shape = m->out_a.shape;
    Merged a = {{array_of(&m->out_a), array_of(&m->out_b), array_of(&m->out)},
                {array_of(&m->lse_a), array_of(&m->lse_b), array_of(&m->lse)},
                m->out_a.dtype,
                (int32_t)shape[1],
                (int32_t)shape[2],
                (int32_t)shape[3],
                shape[0] * shape[1] * shape[2]};
    TRY(ada_launch(merge_rows, ada_divide_up(a.rows, WARPS), THREADS, 0, stream_of(stream), a));
    return 0;
}

int convert(int device, uintptr_t stream, const ada_array *to, const ada_array *from,
            ada_cuda_failure *failure) {
    ON_DEVICE(device);
    Arrays a = {array_of(to), array_of(from), {}, 1, to->dtype, from->dtype};
    for (int d = 0; d < 4; d++) a.total *= a.n[d] = from->shape[d];
    const int64_t blocks = ada_divide_up(a.total, 4 * THREADS);
    TRY(ada_launch(convert_elements, blocks < 4096 ? blocks : 4096, THREADS, 0, stream_of(stream), a));
    return 0;
}

void use_store(ada_cuda_call *call, const ada_cuda_store *store) { call->params.pages = pages_of(store); }

int store_set(int device, uintptr_t stream, void *table, const int64_t *at, const uint64_t *address,
              int64_t n, ada_cuda_failure *failure) {
    ON_DEVICE(device);
    for (int64_t first = 0; first < n; first += Addresses::MOST) {
        Addresses a;
        a.table = (uint64_t *)table;
        a.n = (int32_t)(n - first < Addresses::MOST ? n - first : (int64_t)Addresses::MOST);
        for (int i = 0; i < a.n; i++) a.to[i] = (uint64_t)at[first + i], a.from[i] = address[first + i];
        TRY(ada_launch(set_addresses, 1, THREADS, 0, stream_of(stream), a));
    }
    return 0;
}

int store_copy(int device, uintptr_t stream, const uint64_t *to, const uint64_t *from, int64_t n,
               int64_t bytes, ada_cuda_failure *failure) {
    ON_DEVICE(device);
    for (int64_t first = 0; first < n; first += Addresses::MOST) {
        Addresses a;
        a.words = bytes / 16;
        a.n = (int32_t)(n - first < Addresses::MOST ? n - first : (int64_t)Addresses::MOST);
        for (int i = 0; i < a.n; i++) a.to[i] = to[first + i], a.from[i] = from[first + i];
        TRY(ada_launch(copy_pages, a.n, THREADS, 0, stream_of(stream), a));
    }
    return 0;
}

int store_append(int device, uintptr_t stream, const ada_cuda_store *store, const ada_array *key,
                 const ada_array *value, const int64_t *lengths, const int64_t *counts,
                 ada_cuda_failure *failure) {
    ON_DEVICE(device);
    Tokens t = tokens_of(store, key, value);
    for (int64_t first = 0; first < store->B; first += t.n) {
        fill_group(&t, first, store->B, lengths, counts);
        t.most = 0;
        for (int i = 0; i < t.n && store->dtype == ADA_I8; i++) {
            const int64_t full = (t.length[i] + t.count[i]) / ADA_PAGE - t.length[i] / ADA_PAGE;
            t.most = full > t.most ? (int32_t)full : t.most;
        }
        if (t.most)
            TRY(ada_launch(close_pages, 2 * (int64_t)t.n * t.G * t.most, THREADS, THREADS * 8,
                           stream_of(stream), t));
        TRY(ada_launch(store_tokens, ada_divide_up(t.n * t.G * t.rows, WARPS), THREADS, 0, stream_of(stream),
                       t));
    }
    return 0;
}

int store_reopen(int device, uintptr_t stream, const ada_cuda_store *store, const int64_t *sequences,
                 const int64_t *pages, int64_t n, ada_cuda_failure *failure) {
    ON_DEVICE(device);
    Tokens t = tokens_of(store, nullptr, nullptr);
    t.most = 1;
    for (int64_t first = 0; first < n; first += t.n) {
        fill_group(&t, first, n, pages, sequences);
        TRY(ada_launch(reopen_pages, 2 * (int64_t)t.n * t.G, THREADS, 0, stream_of(stream), t));
    }
    return 0;
}

int store_read(int device, uintptr_t stream, const ada_cuda_store *store, const int64_t *lengths,
               const ada_array *key, const ada_array *value, float *scales, ada_cuda_failure *failure) {
    ON_DEVICE(device);
    Tokens t = tokens_of(store, key, value);
    t.scales = scales;
    t.most = (int32_t)ada_divide_up(t.rows, ADA_PAGE);
    for (int64_t first = 0; first < store->B; first += t.n) {
        fill_group(&t, first, store->B, lengths, nullptr);
        TRY(ada_launch(read_pages, 2 * (int64_t)t.n * t.G * t.most, THREADS, 0, stream_of(stream), t));
    }
    return 0;
}

int captured(int device, uintptr_t stream, bool *captured, ada_cuda_failure *failure) {
    ON_DEVICE(device);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamIsCapturing(stream_of(stream), &status);
    /* Of the legacy stream while another one is captured that it would wait for. */
    const bool implied = error == cudaErrorStreamCaptureImplicit;
    if (implied) cudaGetLastError();
    if (!implied) TRY(error);
    *captured = implied || status != cudaStreamCaptureStatusNone;
    return 0;
}

} // namespace ada_cuda
