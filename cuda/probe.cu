/* The probe on the device: sums over keys and values, figures of queries, profiles of rows (csrc/probe.h says
 * what for). Every sum has one order, so that two calls choose alike.
 */
#include "probe.h"

enum { THREADS = 128, WARPS = THREADS / 32, CHUNK = 4 * ADA_CUDA_BLOCK /* keys of a block of threads */ };

namespace {

ADA_DEVICE const char *row_at(const ada_cu_array &a, int b, int h, int64_t row) {
    return (const char *)a.data + b * a.stride[0] + h * a.stride[1] + row * a.stride[2];
}

ADA_DEVICE float number(const char *row, const ada_cu_array &a, int dtype, int i) {
    return ada_element<float>(row + i * a.stride[3], dtype);
}

ADA_DEVICE bool is_looked_at(const ada_probe_head &head, int64_t j) {
    return j >= head.first && j < head.end &&
           (j / ADA_CUDA_BLOCK - head.first / ADA_CUDA_BLOCK) % head.step == 0;
}

ADA_DEVICE float sum_of_warp(float x) {
    for (int lanes = 16; lanes; lanes /= 2) x += ada_shuffle_xor(x, lanes);
    return x;
}

ADA_DEVICE float most_of_warp(float x) {
    for (int lanes = 16; lanes; lanes /= 2) x = fmaxf(x, ada_shuffle_xor(x, lanes));
    return x;
}

/* Of a chunk of keys: sums of the columns of K and V, largest magnitudes of V's; squared norms of values. */
ADA_KERNEL(THREADS, 1) sum_columns(ADA_ARGS(ada_probe_args) a) {
    const ada_cu_params &p = a.p;
    const ada_probe_head head = a.heads[ada_block() / a.chunks];
    const int b = head.head / p.G, g = head.head % p.G;
    const int64_t first = ada_block() % a.chunks * (int64_t)CHUNK,
                  last = first + CHUNK < p.S ? first + CHUNK : p.S;
    float *to = a.partials + ada_block() * (int64_t)(p.D + 2 * p.E);
    for (int d = ada_thread(); d < p.D; d += THREADS) {
        float sum = 0;
        for (int64_t j = first; j < last; j++)
            if (is_looked_at(head, j)) sum += number(row_at(p.key, b, g, j), p.key, p.dtype, d);
        to[d] = sum;
    }
    for (int e = ada_thread(); e < p.E; e += THREADS) {
        float sum = 0, most = 0;
        for (int64_t j = first; j < last; j++) {
            if (!is_looked_at(head, j)) continue;
            const float x = number(row_at(p.value, b, g, j), p.value, p.dtype, e);
            sum += x;
            most = !(fabsf(x) <= most) ? fabsf(x) : most; /* NaN stays */
        }
        to[p.D + e] = sum, to[p.D + p.E + e] = most;
    }
    float *value2 = a.value2 + head.head * (int64_t)p.S;
    for (int64_t j = first + ada_thread() / 32; j < last; j += WARPS) {
        float sum = 0;
        if (is_looked_at(head, j)) {
            const char *row = row_at(p.value, b, g, j);
            for (int e = ada_thread() % 32; e < p.E; e += 32) {
                const float x = number(row, p.value, p.dtype, e);
                sum += x * x;
            }
        }
        sum = sum_of_warp(sum);
        if (ada_thread() % 32 == 0) value2[j] = sum;
    }
}

/* Chunks in order. */
ADA_KERNEL(THREADS, 1) merge_columns(ADA_ARGS(ada_probe_args) a) {
    const ada_cu_params &p = a.p;
    const int width = p.D + 2 * p.E;
    const float *from = a.partials + ada_block() * (int64_t)a.chunks * width;
    float *means = a.means + a.heads[ada_block()].head * (int64_t)p.D;
    for (int c = ada_thread(); c < width; c += THREADS) {
        float sum = 0;
        for (int i = 0; i < a.chunks; i++) {
            const float x = from[i * (int64_t)width + c];
            sum = c < p.D + p.E ? sum + x : !(x <= sum) ? x : sum;
        }
        if (c < p.D)
            means[c] = sum / fmaxf(a.heads[ada_block()].count, 1);
        else
            a.value_sums[ada_block() * 2 * (int64_t)p.E + c - p.D] = sum;
    }
}

/* With the means: squared deviations of columns, squared norms of keys, the largest of each block. */
ADA_KERNEL(THREADS, 1) sum_deviations(ADA_ARGS(ada_probe_args) a) {
    float *const most_of = ada_shared_at<float>(0); /* [CHUNK] */
    const ada_cu_params &p = a.p;
    const ada_probe_head head = a.heads[ada_block() / a.chunks];
    const int b = head.head / p.G, g = head.head % p.G;
    const int64_t first = ada_block() % a.chunks * (int64_t)CHUNK,
                  last = first + CHUNK < p.S ? first + CHUNK : p.S;
    const float *means = a.means + head.head * (int64_t)p.D;
    float *to = a.partials + ada_block() * (int64_t)(p.D + 1);
    for (int d = ada_thread(); d < p.D; d += THREADS) {
        float sum = 0;
        const float mean = means[d];
        for (int64_t j = first; j < last; j++) {
            if (!is_looked_at(head, j)) continue;
            const float x = number(row_at(p.key, b, g, j), p.key, p.dtype, d) - mean;
            sum += x * x;
        }
        to[d] = sum;
    }
    for (int64_t j = first + ada_thread() / 32; j < first + CHUNK; j += WARPS) {
        float sum = 0, most = 0;
        if (j < last && is_looked_at(head, j)) {
            const char *row = row_at(p.key, b, g, j);
            for (int d = ada_thread() % 32; d < p.D; d += 32) {
                const float x = number(row, p.key, p.dtype, d) - means[d];
                sum += x * x, most = fmaxf(most, fabsf(x));
            }
        }
        sum = sum_of_warp(sum), most = most_of_warp(most);
        if (ada_thread() % 32) continue;
        most_of[j - first] = most;
        if (j < last) a.norm2[head.head * (int64_t)p.S + j] = sum;
    }
    ada_sync();
    if (ada_thread()) return;
    float largest2 = 0; /* over keys */
    for (int64_t j = first; j < last; j += ADA_CUDA_BLOCK) {
        float most = 0;
        int keys = 0;
        for (int64_t i = j; i < last && i < j + ADA_CUDA_BLOCK; i++) {
            most = fmaxf(most, most_of[i - first]);
            keys += is_looked_at(head, i);
        }
        a.largest[head.head * (int64_t)a.blocks + j / ADA_CUDA_BLOCK] = most;
        largest2 += most * most * (float)keys;
    }
    to[p.D] = largest2;
}

ADA_KERNEL(THREADS, 1) merge_deviations(ADA_ARGS(ada_probe_args) a) {
    const ada_cu_params &p = a.p;
    const float *from = a.partials + ada_block() * (int64_t)a.chunks * (p.D + 1);
    for (int d = ada_thread(); d <= p.D; d += THREADS) {
        float sum = 0;
        for (int i = 0; i < a.chunks; i++) sum += from[i * (int64_t)(p.D + 1) + d];
        if (d < p.D)
            a.variances[a.heads[ada_block()].head * (int64_t)p.D + d] =
                sum / fmaxf(a.heads[ada_block()].count, 1);
        else
            a.largest2[ada_block()] = sum;
    }
}

/* A warp per row of the key head's queries. */
ADA_KERNEL(THREADS, 1) spread_rows(ADA_ARGS(ada_probe_args) a) {
    const ada_cu_params &p = a.p;
    const int shared = p.H / p.G, lane = ada_thread() % 32;
    const int64_t index = ada_block() % a.row_blocks * (int64_t)WARPS + ada_thread() / 32;
    const ada_probe_head head = a.heads[ada_block() / a.row_blocks];
    if (index >= (int64_t)shared * p.T) return;
    const int b = head.head / p.G, g = head.head % p.G, h = g * shared + (int)(index / p.T);
    const int row = (int)(index % p.T);
    const char *query = row_at(p.query, b, h, row);
    const float *variances = a.variances + head.head * (int64_t)p.D,
                *means = a.means + head.head * (int64_t)p.D;
    float spread = 0, above[ADA_CUDA_HEAVY] = {0};
    for (int d = lane; d < p.D; d += 32) {
        const float q = number(query, p.query, p.dtype, d);
        spread += q * q * variances[d];
        for (int c = 0; c < ADA_CUDA_HEAVY; c++)
            if (c < head.heavies)
                above[c] += q * (number(row_at(p.key, b, g, head.heavy[c]), p.key, p.dtype, d) - means[d]);
    }
    spread = sum_of_warp(spread);
    const ada_span span = ada_visible(p, ada_sequence_of(p, b), row);
    const float keys = span.end > span.first ? (float)(span.end - span.first) : 1, scale = (float)p.scale;
    float crowd = 0;
    for (int c = 0; c < head.heavies; c++) {
        float sum = 0; /* indexed at compile time */
        for (int i = 0; i < ADA_CUDA_HEAVY; i++) sum = i == c ? above[i] : sum;
        const float log_weight = scale * sum_of_warp(sum) - scale * scale * spread / 2;
        const float weight = fminf(expf(fminf(log_weight, 80)) / keys, 1);
        crowd += head.share[c] * weight * weight;
    }
    if (lane) return;
    const int64_t at = ((int64_t)b * p.H + h) * p.T + row;
    a.spread[at] = spread, a.heavy[at] = crowd;
}

ADA_DEVICE ada_cuda_figures figures_of(const ada_probe_args &a, int head, int row) {
    const ada_cu_params &p = a.p;
    const int64_t key_head = head / p.H * p.G + head % p.H / (p.H / p.G);
    const char *query = row_at(p.query, head / p.H, head % p.H, row);
    const float *variances = a.variances + key_head * p.D, *means = a.means + key_head * p.D;
    ada_cuda_figures f = {0, 0, 0, 0};
    for (int d = ada_thread() % 32; d < p.D; d += 32) {
        const float x = number(query, p.query, p.dtype, d), x2 = x * x;
        f.spread += x2 * variances[d];
        f.by_mean += x2 * means[d] * means[d];
        f.norm2 += x2;
        f.most = fmaxf(f.most, fabsf(x));
    }
    f.spread = sum_of_warp(f.spread), f.by_mean = sum_of_warp(f.by_mean);
    f.norm2 = sum_of_warp(f.norm2), f.most = most_of_warp(f.most);
    return f;
}

ADA_KERNEL(THREADS, 1) figure_rows(ADA_ARGS(ada_probe_args) a) {
    const int64_t i = ada_block() * (int64_t)WARPS + ada_thread() / 32;
    if (i >= a.rows) return;
    const ada_cuda_figures f = figures_of(a, a.pairs[2 * i], a.pairs[2 * i + 1]);
    if (ada_thread() % 32 == 0) a.figures[i] = f;
}

/* ---- profiles ---- */

enum { GROUP = 8, GROUPS = THREADS / GROUP, SUMS = 12, OF_BLOCK = ADA_CUDA_BLOCK / (32 / GROUP) };

/* What a warp knows of a row. */
typedef struct {
    double sum[SUMS];
    int64_t visible;
    float most;
} warp_sums;

/* A score with all options, and the scaled product alone; false where the key is hidden. */
ADA_DEVICE bool score_of(const ada_cu_params &p, const ada_sequence &sequence, int b, int h, int t, int j,
                         float product, float *score) {
    float s = product;
    if (p.softcap != 0) s = (float)p.softcap * tanhf(s / (float)p.softcap);
    if (p.alibi_slopes) {
        const int64_t distance = sequence.offset + t - j;
        s -= (float)p.alibi_slopes[b * p.alibi_stride[0] + h * p.alibi_stride[1]] *
             (float)(distance < 0 ? -distance : distance);
    }
    bool visible = true;
    if (p.mask.data) {
        const char *at = ada_mask_row(p, b, h, t) + j * p.mask.stride[3];
        const float add = p.mask_dtype == ADA_CU_BOOL ? 0 : ada_mask_value<float>(p, at);
        visible = p.mask_dtype == ADA_CU_BOOL ? *at != 0 : !(add == -INFINITY);
        s += add;
    }
    *score = s;
    return visible;
}

/* A block per row: warps take blocks of keys in turn, eight lanes share a key. o and lse are known. */
ADA_KERNEL(THREADS, 1) profile_rows(ADA_ARGS(ada_probe_args) a) {
    const ada_cu_params &p = a.p;
    const int head = a.pairs[2 * ada_block()], t = a.pairs[2 * ada_block() + 1];
    const int b = head / p.H, h = head % p.H, g = h / (p.H / p.G), warp = ada_thread() / 32;
    const int lane = ada_thread() % 32, group = lane / GROUP, c = lane % GROUP;
    const int64_t key_head = (int64_t)b * p.G + g;
    const ada_sequence sequence = ada_sequence_of(p, b);
    const ada_span span = ada_visible(p, sequence, t);
    const char *query = row_at(p.query, b, h, t);
    const double *own = a.o + ada_block() * (int64_t)p.E;
    const uint64_t random = p.drop_below ? ada_dropout_row(p, b, h, t) : 0;
    const float end = (float)a.lse[ada_block()], kept = (float)(1 - p.dropout_p);
    float out2 = 0;
    for (int e = 0; e < p.E; e++) out2 += (float)(own[e] * own[e]);
    double sum[SUMS] = {0};
    float most = -INFINITY;
    int64_t visible = 0;
    for (int first = span.first / ADA_CUDA_BLOCK + warp; first * ADA_CUDA_BLOCK < span.end; first += WARPS) {
        const float step = a.largest[key_head * a.blocks + first];
        float part[SUMS] = {0}, mass = 0;
        for (int i = 0; i < OF_BLOCK; i++) {
            const int j = first * ADA_CUDA_BLOCK + i * (32 / GROUP) + group;
            const bool there = j >= span.first && j < span.end;
            float dot = 0, with_out = 0, score = 0;
            if (there) {
                const char *key = row_at(p.key, b, g, j), *value = row_at(p.value, b, g, j);
                for (int d = c; d < p.D; d += GROUP)
                    dot += number(query, p.query, p.dtype, d) * number(key, p.key, p.dtype, d);
                for (int e = c; e < p.E; e += GROUP)
                    with_out += (float)own[e] * number(value, p.value, p.dtype, e);
            }
            for (int lanes = 1; lanes < GROUP; lanes *= 2) {
                dot += ada_shuffle_xor(dot, lanes);
                with_out += ada_shuffle_xor(with_out, lanes);
            }
            dot *= (float)p.scale;
            if (!there || c || !score_of(p, sequence, b, h, t, j, dot, &score)) continue;
            visible++;
            most = fmaxf(most, score);
            part[10] += dot, part[11] += dot * dot;
            if (p.drop_below && ada_dropped(p, random, j)) continue;
            const float w = expf(score - end) / kept, w2 = w * w;
            const float value2 = a.value2[key_head * p.S + j], norm2 = a.norm2[key_head * p.S + j];
            const float d = fmaxf(value2 - 2 * with_out + out2, 0);
            mass += w;
            part[0] += w2 * d, part[1] += w2 * d * norm2, part[2] += w2 * d * step * step;
            part[3] += w2, part[4] += w2 * norm2, part[5] += w2 * step * step;
            part[6] += w2 * value2, part[7] += w * value2;
            if (w > 0) part[8] += w * logf(w);
        }
        mass = sum_of_warp(mass);
        if (lane == 0 && mass > 0) part[9] = mass * logf(mass);
        for (int i = 0; i < SUMS; i++) sum[i] += (double)part[i];
    }
    for (int i = 0; i < SUMS; i++)
        for (int lanes = 16; lanes; lanes /= 2) sum[i] += ada_shuffle_xor(sum[i], lanes);
    for (int lanes = 16; lanes; lanes /= 2) visible += ada_shuffle_xor(visible, lanes);
    most = most_of_warp(most);
    warp_sums *const of_warp = ada_shared_at<warp_sums>(0); /* [WARPS] */
    if (lane == 0) {
        for (int i = 0; i < SUMS; i++) of_warp[warp].sum[i] = sum[i];
        of_warp[warp].most = most, of_warp[warp].visible = visible;
    }
    const ada_cuda_figures figures = figures_of(a, head, t);
    ada_sync();
    if (ada_thread()) return;
    for (int w = 1; w < WARPS; w++) {
        for (int i = 0; i < SUMS; i++) sum[i] += of_warp[w].sum[i];
        most = fmaxf(most, of_warp[w].most), visible += of_warp[w].visible;
    }
    const double *s = sum;
    ada_cuda_profile x = {};
    x.figures = figures;
    x.out2 = out2, x.p2d = s[0], x.p2d_norm = s[1], x.p2d_step = s[2], x.p2 = s[3], x.p2_norm = s[4];
    x.p2_step = s[5], x.p2v = s[6], x.pv = s[7], x.entropy = -s[8], x.block_entropy = -s[9];
    x.reference = visible ? most : 0, x.score_sum = s[10], x.score_square = s[11];
    x.visible = visible;
    a.profiles[ada_block()] = x;
}

} // namespace

int ada_probe_chunks(int64_t keys) { return (int)((keys + CHUNK - 1) / CHUNK); }

cudaError_t ada_probe_keys_run(const ada_probe_args *a, int n, cudaStream_t stream) {
    const int64_t chunks = (int64_t)a->chunks * n;
    cudaError_t error = ada_launch(sum_columns, chunks, THREADS, 0, stream, *a);
    if (!error) error = ada_launch(merge_columns, n, THREADS, 0, stream, *a);
    if (!error) error = ada_launch(sum_deviations, chunks, THREADS, CHUNK * 4, stream, *a);
    return error ? error : ada_launch(merge_deviations, n, THREADS, 0, stream, *a);
}

cudaError_t ada_probe_spreads_run(ada_probe_args a, int n, cudaStream_t stream) {
    const int64_t rows = (int64_t)(a.p.H / a.p.G) * a.p.T;
    a.row_blocks = (int32_t)((rows + WARPS - 1) / WARPS);
    return ada_launch(spread_rows, (int64_t)a.row_blocks * n, THREADS, 0, stream, a);
}

cudaError_t ada_probe_figures_run(const ada_probe_args *a, cudaStream_t stream) {
    return ada_launch(figure_rows, (a->rows + WARPS - 1) / WARPS, THREADS, 0, stream, *a);
}

cudaError_t ada_probe_profiles_run(const ada_probe_args *a, cudaStream_t stream) {
    return ada_launch(profile_rows, a->rows, THREADS, WARPS * (int)sizeof(warp_sums), stream, *a);
}
