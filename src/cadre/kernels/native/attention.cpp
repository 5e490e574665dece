// Attention of new tokens over paged caches. Latent attention is absorbed (DeepSeek-V2 report, section 2.1.2): it reads the
// latents as they are. Positions are cut into chunks of fixed size whose results are joined in order (flash decoding), so
// the numbers depend neither on the batch nor on the number of threads. Chunks are worked off in waves, and joined after
// each: what memory they take does not grow with the context.
#include <algorithm>

#include "layout.h"
#include "step.h"

constexpr int CHUNK = 256;                // positions
constexpr int SPAN = 16;                  // tokens of a sequence that read a chunk together
constexpr size_t WAVE = (size_t)1 << 20;  // floats of partial results a thread

struct LatentLayer {
    const float *norm, *q_a_norm, *kv_a_norm;
    Matrix q_a, q, kv_a, kv_b, o;  // q_a.data is null without a query rank; q is q_proj or q_b_proj
    const float *q_a_bias, *kv_a_bias, *o_bias;
    float eps, inner_eps, scale;
    int32_t heads, nope, rotary, value, latent, split;
};

struct GroupedLayer {
    const float *norm, *q_norm, *k_norm;  // the last two null without QK norm
    Matrix q, k, v, o;
    const float *q_bias, *k_bias, *v_bias, *o_bias;
    float eps, scale;
    int32_t heads, groups, width, rotary, together;  // together: QK norms are over all heads at once
};

LAYOUT(LatentLayer, norm, q_a_norm, kv_a_norm, q_a, q, kv_a, kv_b, o, q_a_bias, kv_a_bias, o_bias, eps, inner_eps, scale, heads,
        nope, rotary, value, latent, split)
LAYOUT(GroupedLayer, norm, q_norm, k_norm, q, k, v, o, q_bias, k_bias, v_bias, o_bias, eps, scale, heads, groups, width, rotary,
        together)
LAYOUT(Step, x, turn, position, count, start, pages, tokens, sequences, page_columns, width, threads)
LAYOUT(Cache, first, second, kind, page_size)

namespace {

// One chunk of one span of a sequence's tokens (and group): its queries' partial result.
struct Task {
    int sequence, token, ahead, count, begin, end, group;  // token: the span's first; ahead: of how many of the sequence
    size_t partial;                                        // its first row among the wave's partial results
};

struct Tasks {
    std::vector<Task> list;
    std::vector<size_t> wave;   // where each begins, and the end
    std::vector<size_t> span;   // of each token
    std::vector<size_t> first;  // [span * groups + group]: its first task, and the end
    size_t partials = 0;        // rows of the largest wave
};

// `queries`: rows of one token in one task. `width`: floats of a partial result.
void cut(const Step& step, int groups, int queries, size_t width, Tasks& tasks) {
    tasks.list.clear(), tasks.wave.assign(1, 0), tasks.span.clear(), tasks.first.clear();
    tasks.partials = 0;
    const size_t most = step.threads * WAVE / width;
    size_t rows = 0, spans = 0;
    for (int b = 0, token = 0; b < step.sequences; token += step.count[b++])
        for (int ahead = 0; ahead < step.count[b]; ahead += SPAN, spans++) {
            const int count = std::min(SPAN, step.count[b] - ahead), seen = step.start[b] + ahead + count;
            for (int g = 0; g < groups; g++) {
                tasks.first.push_back(tasks.list.size());
                for (int begin = 0; begin < seen; begin += CHUNK) {
                    const size_t own = (size_t)count * queries;
                    if (rows && rows + own > most) tasks.wave.push_back(tasks.list.size()), rows = 0;
                    tasks.list.push_back({b, token + ahead, ahead, count, begin, std::min(begin + CHUNK, seen), g, rows});
                    rows += own;
                    tasks.partials = std::max(tasks.partials, rows);
                }
            }
            tasks.span.insert(tasks.span.end(), count, spans);
        }
    tasks.first.push_back(tasks.list.size());
    tasks.wave.push_back(tasks.list.size());
}

size_t slot(const Step& step, const Cache& cache, int sequence, int64_t position) {
    size_t page = step.pages[(size_t)sequence * step.page_columns + position / cache.page_size];
    return page * cache.page_size + position % cache.page_size;
}

// f(first slot, first position, how many) for each run of positions that lie one after the other. Pages of an odd size stay apart:
// which positions are multiplied in pairs must not depend on where their pages lie.
template <class F>
void by_run(const Step& step, const Cache& cache, const Task& task, F f) {
    const int32_t* pages = step.pages + (size_t)task.sequence * step.page_columns;
    for (int p = task.begin; p < task.end;) {
        int page = p / cache.page_size;
        size_t first = slot(step, cache, task.sequence, p);
        if (cache.page_size % 2 == 0)
            while ((page + 1) * cache.page_size < task.end && pages[page + 1] == pages[page] + 1) page++;
        int stop = std::min((page + 1) * cache.page_size, task.end);
        f(first, p, stop - p);
        p = stop;
    }
}

// Scores to e^(score - peak) in place; positions after the token's own count nothing. Returns peak and sum.
void soften(float* score, int n, float scale, float* peak, float* total) {
    if (n <= 0) {
        *peak = -INFINITY, *total = 0.0f;
        return;
    }
    floats high = all(-INFINITY);
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        floats v = load(score + i) * scale;
        store(score + i, v);
        high = v > high ? v : high;
    }
    float top = largest(high);
    for (; i < n; i++) {
        score[i] *= scale;
        top = score[i] > top ? score[i] : top;
    }
    floats sums = {};
    for (i = 0; i + LANES <= n; i += LANES) {
        floats v = exponential(load(score + i) - top);
        store(score + i, v);
        sums += v;
    }
    float rest = 0.0f;
    if (i < n) {
        floats v = exponential(load_part(score + i, n - i) - top);
        store_part(score + i, v, n - i);
        for (int j = i; j < n; j++) rest += score[j];
    }
    *peak = top, *total = sum(sums) + rest;
}

// Attention of one task: Q query rows (token-major) against its positions. readers: keys by position. score(row set) is
// made by `product`, which adds <query, key> into score[row][position - begin].
template <class Value, class Product>
void attend(const Step& step, const Cache& cache, const Task& task, int per_token, float scale, const Value& value, size_t C,
            float* peak, float* total, float* out, Product product) {
    static thread_local Scratch<float> scores;
    static thread_local Scratch<const float*> pointers;
    static thread_local Scratch<float*> targets;
    int Q = task.count * per_token, n = task.end - task.begin;
    float* score = scores.of((size_t)Q * CHUNK);
    const float** weight = pointers.of(Q);
    float** target = targets.of(Q);
    product(score);
    for (int q = 0; q < Q; q++) {
        int own = step.start[task.sequence] + task.ahead + q / per_token + 1 - task.begin;  // positions that this token sees
        int seen = own < n ? own : n;
        soften(score + (size_t)q * CHUNK, seen, scale, peak + q, total + q);
        for (int i = seen < 0 ? 0 : seen; i < n; i++) score[(size_t)q * CHUNK + i] = 0.0f;
        target[q] = out + (size_t)q * C;
        std::memset(target[q], 0, C * sizeof(float));
    }
    by_run(step, cache, task, [&](size_t row, int position, int count) {
        rows_of(weight, score + (position - task.begin), Q, CHUNK);
        sums(value, row, count, weight, Q, 0, C, target);
    });
}

// What the waves of one pass share. peak, total, partial: by row of a wave; top, sum, out: of each query row so far.
struct Joined {
    const Tasks& tasks;
    const float *peak, *total, *partial;
    float *top, *sum, *out;
    size_t C;

    // Joins to query row `to` those chunks in [begin, end) that are its own, in their order. group: span * groups + group;
    // row: the query's among a task's.
    void row(size_t begin, size_t end, size_t group, size_t row, size_t to) const {
        const size_t first = tasks.first[group], last = tasks.first[group + 1];
        if (last <= begin || end <= first) return;
        float* y = out + to * C;
        if (begin <= first) {
            top[to] = -INFINITY, sum[to] = 0.0f;
            std::memset(y, 0, C * sizeof(float));
        }
        for (size_t i = std::max(begin, first); i < std::min(end, last); i++) {
            const size_t at = tasks.list[i].partial + row;
            if (peak[at] == -INFINITY) continue;  // the token sees none of it
            const float high = std::fmax(top[to], peak[at]), fade = std::exp(top[to] - high), share = std::exp(peak[at] - high);
            const float* part = partial + at * C;
            for (size_t c = 0; c < C; c++) y[c] = y[c] * fade + share * part[c];
            sum[to] = sum[to] * fade + share * total[at];
            top[to] = high;
        }
        if (end >= last)
            for (size_t c = 0; c < C; c++) y[c] /= sum[to];
    }
};

}  // namespace

extern "C" void cadre_latent_attention(const LatentLayer* layer, const Cache* cache, const Step* step) {
    const LatentLayer& a = *layer;
    const size_t M = step->tokens, D = step->width, H = a.heads, N = a.nope, R = a.rotary, V = a.value, C = a.latent;
    const size_t QK = N + R, rank = a.q_a.data ? a.q_a.rows : 0;
    static thread_local Scratch<> memory;
    static thread_local Scratch<const float*> pointers;
    static thread_local Tasks tasks;
    cut(*step, 1, (int)H, C + 2, tasks);
    const size_t P = tasks.partials;
    float* normed = memory.of(M * (D + 2 * rank + H * QK + (C + R) + 2 * H * C + H * V + 2 * H) + P * (C + 2));
    float *lower = normed + M * D, *query = lower + 2 * M * rank, *kv = query + M * H * QK, *absorbed = kv + M * (C + R);
    float *mixed = absorbed + M * H * C, *value = mixed + M * H * C, *partial = value + M * H * V;
    float *peak = partial + P * C, *total = peak + P, *top = total + P, *sum = top + M * H;
    const float** normed_rows = pointers.of(3 * M + 2 * M * H);
    const float **lower_rows = normed_rows + M, **value_rows = lower_rows + M;
    const float **latent_rows = value_rows + M, **rotary_rows = latent_rows + M * H;
    rows_of(normed_rows, normed, M, D);
    rows_of(lower_rows, lower + M * rank, M, rank);
    rows_of(value_rows, value, M, H * V);
    rows_of(latent_rows, absorbed, M * H, C);
    rows_of(rotary_rows, query + N, M * H, QK);
    const Tasks& work = tasks;
    const Joined joined{work, peak, total, partial, top, sum, mixed, C};
    float* x = step->x;

#pragma omp parallel num_threads(step->threads)
    {
        team_norm(*step, a.norm, a.eps, normed);
        team_linear(a.kv_a, a.kv_a_bias, normed_rows, M, kv);
        if (rank) {
            team_linear(a.q_a, a.q_a_bias, normed_rows, M, lower);
#pragma omp barrier
#pragma omp for schedule(static)
            for (size_t m = 0; m < M; m++)
                rms_norm(lower + m * rank, a.q_a_norm, a.inner_eps, rank, lower + (M + m) * rank);
        }
        team_linear(a.q, nullptr, rank ? lower_rows : normed_rows, M, query);
#pragma omp barrier
#pragma omp for schedule(static)
        for (size_t m = 0; m < M; m++) {
            const float* turn = step->turn + step->position[m] * R;
            float* own = kv + m * (C + R);
            rms_norm(own, a.kv_a_norm, a.inner_eps, C, own);
            rotate(own + C, turn, R, a.split);
            size_t at = slot(*step, *cache, work.list[work.first[work.span[m]]].sequence, step->position[m]);
            write_cached(*cache, cache->first, at * C, own, C);
            write_cached(*cache, cache->second, at * R, own + C, R);
            for (size_t h = 0; h < H; h++) rotate(query + (m * H + h) * QK + N, turn, R, a.split);
            std::memset(absorbed + m * H * C, 0, H * C * sizeof(float));
        }
        of_kind(a.kv_b, [&](auto reader) {
            constexpr size_t BLOCK = 8 * LANES;
            const size_t blocks = (C + BLOCK - 1) / BLOCK;
            static thread_local Scratch<const float*> from;
            static thread_local Scratch<float*> to;
            const float** q = from.of(M);
            float** y = to.of(M);
#pragma omp for schedule(static)
            for (size_t i = 0; i < H * blocks; i++) {
                size_t h = i / blocks, begin = i % blocks * BLOCK, end = begin + BLOCK < C ? begin + BLOCK : C;
                for (size_t m = 0; m < M; m++) q[m] = query + (m * H + h) * QK, y[m] = absorbed + (m * H + h) * C;
                sums(reader, h * (N + V), N, q, M, begin, end, y);
            }
        });
        for (size_t w = 0; w + 1 < work.wave.size(); w++) {
            const size_t begin = work.wave[w], end = work.wave[w + 1];
#pragma omp for schedule(dynamic)
            for (size_t i = begin; i < end; i++) {
                const Task& task = work.list[i];
                size_t row = task.token * H, Q = task.count * H;
                of_cache(*cache, C, 0, R, 0, [&](auto latent, auto rotary) {
                    attend(*step, *cache, task, (int)H, a.scale, latent, C, peak + task.partial, total + task.partial,
                           partial + task.partial * C, [&](float* score) {
                        by_run(*step, *cache, task, [&](size_t key, int position, int count) {
                            float* to = score + (position - task.begin);
                            dots(latent, key, key + count, latent_rows + row, Q, C,
                                 [=](size_t q, size_t at, float s) { to[q * CHUNK + at - key] = s; });
                            dots(rotary, key, key + count, rotary_rows + row, Q, R,
                                 [=](size_t q, size_t at, float s) { to[q * CHUNK + at - key] += s; });
                        });
                    });
                });
            }
            const size_t low = work.list[begin].token, high = work.list[end - 1].token + work.list[end - 1].count;
#pragma omp for schedule(static)
            for (size_t i = low * H; i < high * H; i++) {
                const size_t group = work.span[i / H], token = work.list[work.first[group]].token;
                joined.row(begin, end, group, i - token * H, i);
            }
        }
        of_kind(a.kv_b, [&](auto reader) {
            const size_t blocks = (V + ROWS - 1) / ROWS;
            static thread_local Scratch<const float*> from;
            const float** o = from.of(M);
#pragma omp for schedule(static)
            for (size_t i = 0; i < H * blocks; i++) {
                size_t h = i / blocks, begin = i % blocks * ROWS, end = begin + ROWS < V ? begin + ROWS : V;
                size_t base = h * (N + V) + N;
                for (size_t m = 0; m < M; m++) o[m] = mixed + (m * H + h) * C;
                dots(reader, base + begin, base + end, o, M, C,
                     [=, to = value](size_t m, size_t at, float v) { to[(m * H + h) * V + at - base] = v; });
            }
        });
        team_dots(a.o, value_rows, M, [=, &a](size_t m, size_t d, float v) {
            x[m * D + d] += a.o_bias ? v + a.o_bias[d] : v;
        });
    }
}

extern "C" void cadre_grouped_attention(const GroupedLayer* layer, const Cache* cache, const Step* step) {
    const GroupedLayer& a = *layer;
    const size_t M = step->tokens, D = step->width, H = a.heads, G = a.groups, K = a.width, R = a.rotary, X = H / G;
    static thread_local Scratch<> memory;
    static thread_local Scratch<const float*> pointers;
    static thread_local Tasks tasks;
    cut(*step, (int)G, (int)X, K + 2, tasks);
    const size_t P = tasks.partials;
    float* normed = memory.of(M * (D + 2 * H * K + 2 * G * K + 2 * H) + P * (K + 2));
    float *query = normed + M * D, *key = query + M * H * K, *own = key + M * G * K, *mixed = own + M * G * K;
    float *partial = mixed + M * H * K, *peak = partial + P * K, *total = peak + P, *top = total + P, *sum = top + M * H;
    const float** normed_rows = pointers.of(2 * M);
    const float** mixed_rows = normed_rows + M;
    rows_of(normed_rows, normed, M, D);
    rows_of(mixed_rows, mixed, M, H * K);
    const Tasks& work = tasks;
    const Joined joined{work, peak, total, partial, top, sum, mixed, K};
    float* x = step->x;

#pragma omp parallel num_threads(step->threads)
    {
        team_norm(*step, a.norm, a.eps, normed);
        team_linear(a.k, a.k_bias, normed_rows, M, key);
        team_linear(a.v, a.v_bias, normed_rows, M, own);
        team_linear(a.q, a.q_bias, normed_rows, M, query);
#pragma omp barrier
#pragma omp for schedule(static)
        for (size_t m = 0; m < M; m++) {
            const float* turn = step->turn + step->position[m] * R;
            if (a.q_norm && a.together) {
                rms_norm(query + m * H * K, a.q_norm, a.eps, H * K, query + m * H * K);
                rms_norm(key + m * G * K, a.k_norm, a.eps, G * K, key + m * G * K);
            }
            for (size_t h = 0; h < H + G; h++) {
                bool is_query = h < H;
                float* head = is_query ? query + (m * H + h) * K : key + (m * G + h - H) * K;
                const float* norm = is_query ? a.q_norm : a.k_norm;
                if (norm && !a.together) rms_norm(head, norm, a.eps, K, head);
                rotate(head, turn, R, true);
            }
            size_t at = slot(*step, *cache, work.list[work.first[work.span[m] * G]].sequence, step->position[m]);
            write_cached(*cache, cache->first, at * G * K, key + m * G * K, G * K);
            write_cached(*cache, cache->second, at * G * K, own + m * G * K, G * K);
        }
        for (size_t w = 0; w + 1 < work.wave.size(); w++) {
            const size_t begin = work.wave[w], end = work.wave[w + 1];
#pragma omp for schedule(dynamic)
            for (size_t i = begin; i < end; i++) {
                const Task& task = work.list[i];
                static thread_local Scratch<const float*> from;
                size_t T = task.count, Q = T * X;
                const float** q = from.of(Q);
                for (size_t t = 0; t < T; t++) rows_of(q + t * X, query + ((task.token + t) * H + task.group * X) * K, X, K);
                of_cache(*cache, G * K, task.group * K, G * K, task.group * K, [&](auto keys, auto values) {
                    attend(*step, *cache, task, (int)X, a.scale, values, K, peak + task.partial, total + task.partial,
                           partial + task.partial * K, [&](float* score) {
                        by_run(*step, *cache, task, [&](size_t row, int position, int count) {
                            float* to = score + (position - task.begin);
                            dots(keys, row, row + count, q, Q, K,
                                 [=](size_t n, size_t at, float s) { to[n * CHUNK + at - row] = s; });
                        });
                    });
                });
            }
            const size_t low = work.list[begin].token, high = work.list[end - 1].token + work.list[end - 1].count;
#pragma omp for schedule(static)
            for (size_t i = low * H; i < high * H; i++) {
                const size_t m = i / H, h = i % H, group = work.span[m] * G + h / X;
                joined.row(begin, end, group, (m - work.list[work.first[group]].token) * X + h % X, i);
            }
        }
        team_dots(a.o, mixed_rows, M, [=, &a](size_t m, size_t d, float v) {
            x[m * D + d] += a.o_bias ? v + a.o_bias[d] : v;
        });
    }
}
