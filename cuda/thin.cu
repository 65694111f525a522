/* Heads that leave out blocks of keys: lists of what is left are made and walked on the device. */
#include "host.h"
#include "lists.h"

namespace ada_cuda {

namespace {

/* Bytes that lists may take: heads of longer ones are computed some at a time. */
const int64_t MOST_LISTS = (int64_t)2 << 30;

int64_t tiles_of(const ada_cu_params &p) { return ada_divide_up(p.T, ada_cu_list_rows(&p)); }
int64_t blocks_of(const ada_cu_params &p) { return ada_divide_up(p.S, ADA_LIST_BLOCK); }

/* 0: no head can leave out blocks. */
int64_t heads_at_once(const ada_cu_params &p) {
    if (!ada_cu_list_rows(&p)) return 0;
    return MOST_LISTS / (tiles_of(p) * (1 + blocks_of(p)) * (int64_t)sizeof(int32_t));
}

/* Results in the host's memory. */
template <class T> struct Host {
    T *data = nullptr;
    ~Host() { free(data); }
    int fetch(const ada_cuda_call *call, const void *from, size_t n, ada_cuda_failure *failure) {
        data = (T *)malloc(n * sizeof *data);
        if (!data) return failed(cudaErrorMemoryAllocation, "malloc", failure);
        return ada_cuda::fetch(call->stream, data, from, n * sizeof *data, failure);
    }
};

/* Lists on the device, and what the host may be told of them. */
class Lists {
  public:
    Lists(const ada_cuda_call *of, const ada_cu_params &params, int64_t n, int32_t tiles)
        : call(of), heads(of->stream), centres(of->stream), figures(of->stream), values(of->stream),
          counts(of->stream), lists(of->stream) {
        a.p = params;
        a.n = (int32_t)n, a.rows = ada_cu_list_rows(&params);
        a.tiles = (int32_t)tiles_of(params);
        a.looked = tiles && tiles < a.tiles ? tiles : a.tiles;
        a.blocks = (int32_t)blocks_of(params), a.chunks = (params.D + 7) / 8;
    }

    /* kept: the lists themselves are wanted, not their sizes alone. */
    int make(const ada_cuda_thin *thin, bool kept, ada_cuda_failure *failure) {
        const size_t n = (size_t)a.n, key_heads = (size_t)a.p.B * (size_t)a.p.G, blocks = (size_t)a.blocks;
        TRY(heads.allocate(n * sizeof(ada_thin_head)));
        TRY(centres.allocate(key_heads * blocks * (size_t)a.chunks * 16));
        TRY(figures.allocate(key_heads * blocks * sizeof(ada_block_figures)));
        TRY(values.allocate(key_heads * sizeof(ada_value_figures)));
        TRY(counts.allocate(n * (size_t)a.looked * 3 * sizeof(int32_t)));
        if (kept) TRY(lists.allocate(n * (size_t)a.tiles * (1 + blocks) * sizeof(int32_t)));
        ada_thin_head *const narrow = (ada_thin_head *)malloc(n * sizeof *narrow);
        if (!narrow) return failed(cudaErrorMemoryAllocation, "malloc", failure);
        for (size_t i = 0; i < n; i++)
            narrow[i] = {(int32_t)thin[i].head, (float)thin[i].absolute, (float)thin[i].relative,
                         (float)thin[i].most};
        const cudaError_t status =
            send_words(heads.data, narrow, (int64_t)(n * sizeof *narrow), call->stream);
        free(narrow);
        TRY(status);
        a.heads = (const ada_thin_head *)heads.data, a.lists = (int32_t *)lists.data;
        a.counts = (int32_t *)counts.data, a.centres = (uint16_t *)centres.data;
        a.figures = (ada_block_figures *)figures.data, a.values = (ada_value_figures *)values.data;
        TRY(ada_lists_run(&a, call->stream));
        return 0;
    }

    int tell(ada_cuda_thin *thin, ada_picture *picture, ada_cuda_failure *failure) const {
        const size_t n = (size_t)a.n, n_counts = n * (size_t)a.looked * 3;
        const size_t n_values = (size_t)a.p.B * (size_t)a.p.G, list = 1 + (size_t)a.blocks;
        const size_t n_lists = picture ? n * (size_t)a.tiles * list : 0;
        Host<int32_t> count, lists_here;
        Host<ada_value_figures> value;
        if (count.fetch(call, counts.data, n_counts, failure)) return failure->code;
        if (value.fetch(call, values.data, n_values, failure)) return failure->code;
        if (picture && lists_here.fetch(call, lists.data, n_lists, failure)) return failure->code;
        for (size_t i = 0; i < n; i++) {
            int64_t listed = 0, visible = 0;
            for (int32_t t = 0; t < a.looked; t++) {
                const int32_t *of_tile = count.data + 3 * (i * (size_t)a.looked + (size_t)t);
                listed += of_tile[0], visible += of_tile[2] - of_tile[1];
                if (picture)
                    draw(picture, thin[i].head, t, of_tile,
                         lists_here.data + (i * (size_t)a.tiles + (size_t)t) * list + 1);
            }
            thin[i].kept = visible ? (double)listed / (double)visible : 1;
            thin[i].value_rms = (double)value.data[thin[i].head / (a.p.H / a.p.G)].rms;
        }
        return 0;
    }

    const int32_t *data() const { return a.lists; }

  private:
    /* A tile's blocks, in the rows of each of its ADA_CUDA_BLOCK queries. */
    void draw(ada_picture *to, int64_t head, int32_t tile, const int32_t *count, const int32_t *list) const {
        const int64_t parts = (a.p.T + ADA_CUDA_BLOCK - 1) / ADA_CUDA_BLOCK;
        const int64_t first = (int64_t)tile * a.rows / ADA_CUDA_BLOCK, end = first + a.rows / ADA_CUDA_BLOCK;
        for (int64_t part = first; part < end && part < parts; part++) {
            const int64_t at = (head * to->rows + part * to->rows / parts) * to->columns;
            for (int64_t j = count[1]; j < count[2]; j++) to->visible[at + j * to->columns / a.blocks]++;
            for (int32_t i = 0; i < count[0]; i++) to->kept[at + (int64_t)list[i] * to->columns / a.blocks]++;
        }
    }

    const ada_cuda_call *call;
    ada_lists_args a = {};
    Memory heads, centres, figures, values, counts, lists;
};

int execute_some(const ada_cuda_call *call, ada_cu_params c, ada_cuda_thin *heads, int64_t n, bool tell,
                 ada_picture *picture, ada_cuda_failure *failure) {
    Memory list(call->stream);
    int64_t *const wide = (int64_t *)malloc((size_t)n * sizeof *wide);
    if (!wide) return failed(cudaErrorMemoryAllocation, "malloc", failure);
    for (int64_t i = 0; i < n; i++) wide[i] = heads[i].head;
    int status = send_heads(call, wide, n, &list, &c, failure);
    free(wide);
    Lists lists(call, c, n, 0);
    if (!status) status = lists.make(heads, true, failure);
    c.lists = lists.data();
    if (!status) status = attend_here(call, &c, failure);
    return status || !tell ? status : lists.tell(heads, picture, failure);
}

} // namespace

bool leaves_out(const ada_cuda_call *call, ada_choice choice) {
    ada_cu_params c = call->params;
    return rung_of(call, choice, &c.rung) && heads_at_once(c);
}

int look_at_blocks(ada_cuda_call *call, ada_choice choice, ada_cuda_thin *heads, int64_t n, int32_t tiles,
                   ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    ada_cu_params c = call->params;
    if (!rung_of(call, choice, &c.rung) || !heads_at_once(c))
        return failed(cudaErrorNotSupported, "look_at_blocks", failure);
    Lists lists(call, c, n, tiles);
    const int status = lists.make(heads, false, failure);
    return status ? status : lists.tell(heads, nullptr, failure);
}

int execute_thin(ada_cuda_call *call, ada_choice choice, ada_cuda_thin *heads, int64_t n, bool tell,
                 ada_picture *picture, ada_cuda_failure *failure) {
    ON_DEVICE(call->problem.device);
    ada_cu_params c = call->params;
    const int64_t most = rung_of(call, choice, &c.rung) ? heads_at_once(c) : 0;
    if (!most) return failed(cudaErrorNotSupported, "execute_thin", failure);
    for (int64_t first = 0; first < n; first += most) {
        const int64_t now = n - first < most ? n - first : most;
        if (execute_some(call, c, heads + first, now, tell, picture, failure)) return failure->code;
    }
    return 0;
}

} // namespace ada_cuda
