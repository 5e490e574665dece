// Causal attention over whole sequences and its gradient, the scores a block at a time and never kept (FlashAttention-2,
// arXiv 2307.08691). Keys and values of a head are packed once into panels, so that every product is one small kernel.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "gemm.h"
#include "layout.h"
#include "step.h"

// [batch, positions, heads, width] seen through element strides; the batch stride is positions * token.
struct Heads {
    float* data;
    int64_t token, head;
};

// The queries are those of the last `queries` of `length` positions. q: `nope` columns, then `rotary` ones. k: `nope` columns; its
// rotary ones are k_rotary, one for all heads (rotary 0: none). With `turn`, the kernel turns the rotary ones by position.
struct CausalAttention {
    Heads q, k, v, k_rotary, out;
    float* log_sum;        // [batch, heads, queries]: log of the softmax's denominator
    const float* turn;     // cosine and sine by position and rotary pair, or null
    const int32_t* first;  // [batch, queries] the first position that one sees; null: position 0
    float* peak;           // [batch, heads]: a head's largest logit; null: not wanted
    float scale;
    int32_t batch, queries, length, heads, groups, nope, rotary, value, split;
    Factors factors;
    int32_t threads;
};

// As its operands; k_rotary: [batch, length, groups, rotary], to be summed over groups.
struct CausalGradient {
    Heads out, q, k, v, k_rotary;
};

LAYOUT(Heads, data, token, head)
LAYOUT(CausalAttention, q, k, v, k_rotary, out, log_sum, turn, first, peak, scale, batch, queries, length, heads, groups, nope,
        rotary, value, split, factors, threads)
LAYOUT(CausalGradient, out, q, k, v, k_rotary)

namespace {

// Rows of a tile of queries, with 2 vectors a row, and of a tile of keys, with WIDEST: sums and what they meet fit the registers.
constexpr int ROWS_AT_ONCE = LANES == 16 ? 8 : LANES == 8 ? 6 : 4, KEYS_AT_ONCE = LANES == 16 ? 8 : 4, WIDEST = LANES == 8 ? 3 : 2;
constexpr int PANEL = 2 * LANES;
constexpr int QUERIES = 96;  // of a block
constexpr int KEYS = 256;    // of a block, forward
constexpr int KEYS_BACK = 64;
constexpr size_t LINE = 16;  // floats of a cache line
static_assert(QUERIES % ROWS_AT_ONCE == 0 && PANEL % KEYS_AT_ONCE == 0, "tiles end where blocks do");

size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// c[m][n] (+)= sum_k a[m * a_row + k * a_col] * b[k * b_row + n] for HIGH rows and WIDE vectors, k counting words. `next`,
// here and below: what to fetch meanwhile.
template <class Kind, int HIGH, int WIDE, class Word = typename Kind::word>
__attribute__((noinline)) void tile(const Word* a, size_t a_row, size_t a_col, size_t depth, const Word* b, size_t b_row, float* c,
                                    size_t c_row, bool add, Ahead& next) {
    floats sum[HIGH][WIDE] = {};
    add_products<Kind>(sum, a, a_row, a_col, depth, b, b_row, Ahead::Fetching(next));
#pragma GCC unroll 8
    for (int m = 0; m < HIGH; m++)
#pragma GCC unroll 3
        for (int n = 0; n < WIDE; n++) {
            float* to = c + m * c_row + n * LANES;
            store(to, add ? load(to) + sum[m][n] : sum[m][n]);
        }
}

// A block of weights: query i sees the keys up to i + ahead. Tiles in which no query sees a key are skipped.
//
// c[i][j] = <a[i], b[j]> for `rows` queries and `cols` keys; b in panels of PANEL keys, each [depth, PANEL].
template <class Kind, class Word = typename Kind::word>
void scores(const Word* a, size_t a_row, size_t rows, size_t depth, const Word* b, size_t cols, int64_t ahead, float* c, Ahead& next) {
    for (size_t n = 0; n < cols; n += PANEL, b += depth * PANEL)
        for (size_t m = 0; m < rows; m += ROWS_AT_ONCE)
            if ((int64_t)n < (int64_t)(m + ROWS_AT_ONCE) + ahead)
                tile<Kind, ROWS_AT_ONCE, 2>(a + m * a_row, a_row, 1, depth, b, PANEL, c + m * cols + n, cols, false, next);
}

// How many of `keys` keys the products of query i's tile look at, in whole vectors.
int reach_of(size_t i, int64_t ahead, size_t keys) {
    const int64_t last = (int64_t)(i / ROWS_AT_ONCE + 1) * ROWS_AT_ONCE + ahead;
    return last <= 0 ? 0 : (int)std::min(keys, up((size_t)last, LANES));
}

// Calls add(vectors, m, n) for tiles of HIGH rows and up to MOST vectors. None of a lone vector beside full ones, if it can be
// helped: its sums would wait for each other.
template <int HIGH, int MOST, class Add>
void by_columns(size_t cols, size_t rows, Add add) {
    for (size_t n = 0, wide; n < cols; n += wide * LANES) {
        const size_t left = (cols - n) / LANES;
        wide = left == MOST + 1 ? 2 : std::min<size_t>(left, MOST);
        for (size_t m = 0; m < rows; m += HIGH) {
            if (wide == MOST) add(std::integral_constant<int, MOST>(), m, n);
            else if (wide == 2) add(std::integral_constant<int, 2>(), m, n);
            else add(std::integral_constant<int, 1>(), m, n);
        }
    }
}

// c[i] += sum_j weight[i][j] * b[j] over the keys that query i sees: words along j in both.
template <class Kind, class Word = typename Kind::word>
void gather(const Word* weight, size_t queries, size_t keys, int64_t ahead, const Word* b, size_t width, float* c,
            Ahead& next) {
    constexpr size_t F = Kind::FACTORS;
    by_columns<ROWS_AT_ONCE, 2>(width, queries, [=, &next](auto wide, size_t m, size_t n) {
        const int64_t depth = std::min((int64_t)keys, (int64_t)(m + ROWS_AT_ONCE) + ahead);
        if (depth > 0)
            tile<Kind, ROWS_AT_ONCE, wide>(weight + m * (keys / F), keys / F, 1, up((size_t)depth, F) / F, b + n, width, c + m * width + n, width, true, next);
    });
}

// c[j] += sum_i weight[i][j] * b[i] over the queries that see key j: words along i in both.
template <class Kind, class Word = typename Kind::word>
void scatter(const Word* weight, size_t queries, size_t keys, int64_t ahead, const Word* b, size_t width, float* c,
            Ahead& next) {
    constexpr size_t F = Kind::FACTORS;
    by_columns<KEYS_AT_ONCE, WIDEST>(width, keys, [=, &next](auto wide, size_t m, size_t n) {
        const size_t i = (size_t)std::max((int64_t)0, (int64_t)m - ahead) / F;
        if (i < queries / F)
            tile<Kind, KEYS_AT_ONCE, wide>(weight + i * keys + m, 1, keys, queries / F - i, b + i * width + n, width, c + m * width + n, width, true, next);
    });
}

// The words of whole vectors along rows: n floats, a multiple of two vectors. `to` may be `from` itself where words are floats.
template <class Kind, class Word = typename Kind::word>
void into_words(const float* from, size_t n, Word* to) {
    if constexpr (Kind::FACTORS > 1)
        for (size_t i = 0; i < n; i += 2 * LANES, to += LANES) Kind::store(to, Kind::join(load(from + i), load(from + i + LANES)));
}

// The words down columns: of rows [count, wide], whole vectors, to [count / FACTORS, wide].
template <class Kind, class Word = typename Kind::word>
void into_columns(const float* from, size_t count, size_t wide, Word* to) {
    if constexpr (Kind::FACTORS > 1)
        for (size_t t = 0; t < count; t += 2, from += 2 * wide)
            for (size_t k = 0; k < wide; k += LANES, to += LANES) Kind::store(to, Kind::zip(load(from + k), load(from + wide + k)));
}

// Room for the words of `n` floats: there where the floats are, or at `room`, which then begins behind it.
template <class Kind, class Word = typename Kind::word>
Word* words_of(float* floats_there, size_t n, float*& room) {
    if constexpr (Kind::FACTORS == 1) return floats_there;
    else {
        Word* words = (Word*)room;
        room += n / Kind::FACTORS;
        return words;
    }
}

// `from` is padded to whole vectors, `to` is not.
void scaled(const float* from, float factor, size_t n, float* to) {
    by_vectors(n, [=](size_t i, auto some) { store_some(to + i, load(from + i) * factor, some); });
}

// One head of one sequence: widths padded to vectors, lengths to whole panels, all padding zero.
struct Shape {
    const CausalAttention& c;
    size_t N, R, K, V;  // nope, rotary, query-key and value width
    size_t wide_k, wide_v, queries, length, past, padded;

    explicit Shape(const CausalAttention& c)
        : c(c), N(c.nope), R(c.rotary), K(N + R), V(c.value), wide_k(up(K, LANES)), wide_v(up(V, LANES)), queries(c.queries),
          length(c.length), past(length - queries), padded(up(length, std::max(KEYS, KEYS_BACK))) {}

    // Of `count` positions from `from` on, of `positions` that the tensor has: rows of `wide` elements, zeros beyond.
    void rows(const Heads& x, size_t positions, int b, int h, size_t from, size_t count, size_t width, size_t wide, float* to) const {
        constexpr size_t EARLY = 8;  // the processor does not see that rows far apart are next
        const size_t stop = std::min(from + count, positions);
        for (size_t t = from; t < stop; t++, to += wide) {
            const float *row = x.data + ((size_t)b * positions + t) * x.token + h * x.head, *later = row + EARLY * x.token;
            for (size_t k = 0; k < width; k += LINE) __builtin_prefetch(later + k);
            size_t k = 0;
            for (; k + LANES <= width; k += LANES) store(to + k, load(row + k));
            if (k < width) store(to + k, load_part(row + k, width - k)), k += LANES;
            for (; k < wide; k += LANES) store(to + k, floats{});
        }
        std::fill(to, to + (from + count - stop) * wide, 0.0f);
    }

    // Fetch a head's rows meanwhile, to read or to write them.
    void expect(Ahead& next, const Heads& x, size_t positions, int b, int h, size_t width) const {
        next.rows({x.data + (size_t)b * positions * x.token + h * x.head, (size_t)x.token}, positions, width);
    }
    // What a group of heads begins with.
    void expect(Ahead& next, int b, int g) const {
        expect(next, c.k, length, b, g, N);
        expect(next, c.v, length, b, g, V);
        expect(next, c.q, queries, b, g * (c.heads / c.groups), K);
    }

    // Keys [padded, wide_k], turned.
    void keys(int b, int g, float* to) const {
        rows(c.k, length, b, g, 0, padded, N, wide_k, to);
        for (size_t t = 0; R && t < length; t++) {
            float* key = to + t * wide_k + N;
            std::copy_n(c.k_rotary.data + ((size_t)b * length + t) * c.k_rotary.token, R, key);
            if (c.turn) rotate(key, c.turn + t * R, R, c.split);
        }
    }

    void values(int b, int g, float* to) const { rows(c.v, length, b, g, 0, padded, V, wide_v, to); }

    // A block of queries, turned and scaled.
    void block(int b, int h, size_t from, float* to) const {
        rows(c.q, queries, b, h, from, QUERIES, K, wide_k, to);
        for (size_t i = 0; i < QUERIES && from + i < queries; i++) {
            float* q = to + i * wide_k;
            if (c.turn) rotate(q + N, c.turn + (past + from + i) * R, R, c.split);
            for (size_t k = 0; k < wide_k; k += LANES) store(q + k, load(q + k) * c.scale);
        }
    }

    // The first position that any query of the block sees, down to a whole block of keys.
    size_t first_key(int b, size_t from, size_t keys) const {
        if (!c.first) return 0;
        const int32_t* first = c.first + (size_t)b * queries;
        int32_t least = first[from];
        for (size_t t = from; t < std::min(from + QUERIES, queries); t++) least = std::min(least, first[t]);
        return (size_t)least / keys * keys;
    }

    // Which of a block's keys from `begin` on query t sees: [low, high).
    void seen(int b, size_t t, size_t begin, int reach, int& low, int& high) const {
        int first = c.first && t < queries ? c.first[(size_t)b * queries + t] : 0;
        low = std::max(0, first - (int)begin);
        high = (int)std::min((int64_t)reach, (int64_t)(past + t) - (int64_t)begin + 1);
    }
};

// Rows of words [count, wide] (column `width` and further unused) into panels [count / PANEL][width][PANEL].
template <class Word>
void into_panels(const Word* rows, size_t count, size_t wide, size_t width, Word* to) {
    for (size_t t = 0; t < count; t += PANEL, to += width * PANEL) {
#if defined(__AVX512F__)
        for (size_t j = 0; j < PANEL; j += 16)
            for (size_t k = 0; k < width; k += 16) {
                const size_t some = std::min<size_t>(16, width - k);
                __m512i x[16];
                for (size_t i = 0; i < 16; i++) x[i] = _mm512_maskz_loadu_epi32(first_lanes(some), rows + (t + j + i) * wide + k);
                turn(x);
                for (size_t i = 0; i < some; i++) _mm512_storeu_si512(to + (k + i) * PANEL + j, x[i]);
            }
#else
        for (size_t j = 0; j < PANEL; j++)
            for (size_t k = 0; k < width; k++) to[k * PANEL + j] = rows[(t + j) * wide + k];
#endif
    }
}

// Minus infinity (`hidden`) outside [low, high).
void hide(float* row, int n, int low, int high, float hidden) {
    for (int j = 0; j < n; j += LANES) {
        ints place = lane_numbers() + j;
        floats v = load(row + j);
        store(row + j, (place >= low) & (place < high) ? v : all(hidden));
    }
}

// `then`: the group that this thread will probably have next, counted over all sequences, or beyond them.
template <class Kind>
void forward(const Shape& s, int b, int g, int then) {
    typedef typename Kind::word Word;
    constexpr size_t F = Kind::FACTORS;
    static thread_local Scratch<> memory;
    const CausalAttention& c = s.c;
    const size_t all_k = s.padded * s.wide_k, all_v = s.padded * s.wide_v, deep_k = (s.K + F - 1) / F;
    float* rows = memory.of(3 * all_k + 2 * all_v + QUERIES * (2 * s.wide_k + 2 * KEYS + s.wide_v + 2));
    Word* panels = (Word*)(rows + all_k);
    float* values = rows + 2 * all_k;
    float* q = values + all_v;
    float* weight = q + QUERIES * s.wide_k;
    float* out = weight + QUERIES * KEYS;
    float *top = out + QUERIES * s.wide_v, *total = top + QUERIES, *room = total + QUERIES;
    Word* key_words = words_of<Kind>(rows, all_k, room);
    Word* value_words = words_of<Kind>(values, all_v, room);
    Word* q_words = words_of<Kind>(q, QUERIES * s.wide_k, room);
    Word* weight_words = words_of<Kind>(weight, QUERIES * KEYS, room);

    const int per_group = c.heads / c.groups;
    Ahead next;
    s.expect(next, c.out, s.queries, b, g * per_group, s.V);
    if (then < c.batch * c.groups) s.expect(next, then / c.groups, then % c.groups);

    s.keys(b, g, rows);
    into_words<Kind>(rows, all_k, key_words);
    into_panels(key_words, s.padded, s.wide_k / F, deep_k, panels);
    s.values(b, g, values);
    into_columns<Kind>(values, s.padded, s.wide_v, value_words);
    for (int h = g * per_group; h < (g + 1) * per_group; h++) {
        float peak = -INFINITY;
        for (size_t from = 0; from < s.queries; from += QUERIES) {
            const size_t count = std::min((size_t)QUERIES, s.queries - from), stop = s.past + from + count;
            const size_t tall = up(count, ROWS_AT_ONCE);
            s.block(b, h, from, q);
            into_words<Kind>(q, QUERIES * s.wide_k, q_words);
            std::fill(out, out + QUERIES * s.wide_v, 0.0f);
            std::fill(top, top + QUERIES, -INFINITY);
            std::fill(total, total + QUERIES, 0.0f);
            for (size_t begin = s.first_key(b, from, KEYS); begin < stop; begin += KEYS) {
                // Whole panels up to the last query's own position.
                const size_t keys = std::min((size_t)KEYS, up(stop - begin, PANEL));
                const int64_t ahead = (int64_t)(s.past + from) - (int64_t)begin;
                scores<Kind>(q_words, s.wide_k / F, tall, deep_k, panels + begin * deep_k, keys, ahead, weight, next);
                for (size_t i = 0; i < tall; i++) {
                    float* w = weight + i * keys;
                    Word* words = weight_words + i * (keys / F);
                    const int reach = reach_of(i, ahead, keys);
                    int low, high;
                    s.seen(b, from + i, begin, reach, low, high);
                    if (low > 0 || high < reach) hide(w, reach, low, high, -INFINITY);
                    floats most = all(top[i]);
                    for (int j = 0; j < reach; j += LANES) {
                        floats v = load(w + j);
                        most = v > most ? v : most;
                    }
                    const float now = largest(most);
                    if (now == -INFINITY && low >= high) {  // nothing seen yet
                        std::fill(words, words + reach / F, Word{});
                        continue;
                    }
                    floats sums = {};
                    for (int j = 0; j < reach; j += LANES) {
                        floats p = exponential(load(w + j) - now);
                        Kind::store_along(words + j / F, p);
                        sums += p;
                    }
                    if (now > top[i]) {
                        const float fade = exponential(all(top[i] - now))[0];
                        total[i] *= fade;
                        for (size_t v = 0; v < s.wide_v; v += LANES) {
                            float* o = out + i * s.wide_v + v;
                            store(o, load(o) * fade);
                        }
                        top[i] = now;
                    }
                    total[i] += sum(sums);
                }
                gather<Kind>(weight_words, tall, keys, ahead, value_words + begin / F * s.wide_v, s.wide_v, out, next);
            }
            for (size_t i = 0; i < count; i++) {
                float* to = c.out.data + ((size_t)b * s.queries + from + i) * c.out.token + h * c.out.head;
                const float share = 1.0f / total[i];
                scaled(out + i * s.wide_v, share, s.V, to);
                c.log_sum[((size_t)b * c.heads + h) * s.queries + from + i] = top[i] + std::log(total[i]);
                peak = std::max(peak, top[i]);
            }
        }
        if (c.peak) c.peak[(size_t)b * c.heads + h] = peak;
    }
}

template <class Kind>
void backward(const Shape& s, CausalGradient& d, int b, int g, int then) {
    typedef typename Kind::word Word;
    constexpr size_t F = Kind::FACTORS;
    static thread_local Scratch<> memory;
    const CausalAttention& c = s.c;
    constexpr size_t KEYS = KEYS_BACK;
    const size_t all_k = s.padded * s.wide_k, all_v = s.padded * s.wide_v, deep_k = (s.K + F - 1) / F, deep_v = (s.V + F - 1) / F;
    float* keys_rows = memory.of(4 * all_k + 3 * all_v + QUERIES * (4 * s.wide_k + 3 * s.wide_v + 4 * KEYS + 1));
    float* d_keys = keys_rows + all_k;
    Word* key_panels = (Word*)(d_keys + all_k);
    float* d_values = keys_rows + 3 * all_k;
    Word* value_panels = (Word*)(d_values + all_v);
    float* q = d_values + 2 * all_v;
    float* d_q = q + QUERIES * s.wide_k;
    float* d_out = d_q + QUERIES * s.wide_k;
    float* weight = d_out + QUERIES * s.wide_v;
    float* d_weight = weight + QUERIES * KEYS;
    float* along = d_weight + QUERIES * KEYS;  // of each query, <d_out, out>
    float* room = along + QUERIES;
    // Along the columns of a row for scores, down the columns of a matrix for sums over its rows.
    Word* key_words = words_of<Kind>(keys_rows, all_k, room);
    Word* value_words = words_of<Kind>(d_values, all_v, room);
    Word* q_words = words_of<Kind>(q, QUERIES * s.wide_k, room);
    Word* q_columns = words_of<Kind>(q, QUERIES * s.wide_k, room);
    Word* d_out_words = words_of<Kind>(d_out, QUERIES * s.wide_v, room);
    Word* d_out_columns = words_of<Kind>(d_out, QUERIES * s.wide_v, room);
    Word* weight_columns = words_of<Kind>(weight, QUERIES * KEYS, room);
    Word* d_weight_words = words_of<Kind>(d_weight, QUERIES * KEYS, room);
    Word* d_weight_columns = words_of<Kind>(d_weight, QUERIES * KEYS, room);

    const int per_group = c.heads / c.groups;
    Ahead next;
    s.expect(next, d.q, s.queries, b, g * per_group, s.K);
    s.expect(next, d.k, s.length, b, g, s.N);
    s.expect(next, d.v, s.length, b, g, s.V);
    if (then < c.batch * c.groups) {
        const int b = then / c.groups, g = then % c.groups;
        s.expect(next, b, g);
        s.expect(next, d.out, s.queries, b, g * per_group, s.V);
        s.expect(next, c.out, s.queries, b, g * per_group, s.V);
    }

    s.values(b, g, d_values);
    into_words<Kind>(d_values, all_v, value_words);
    into_panels(value_words, s.padded, s.wide_v / F, deep_v, value_panels);
    s.keys(b, g, keys_rows);
    into_words<Kind>(keys_rows, all_k, key_words);
    into_panels(key_words, s.padded, s.wide_k / F, deep_k, key_panels);
    into_columns<Kind>(keys_rows, s.padded, s.wide_k, key_words);
    std::fill(d_keys, d_keys + all_k, 0.0f);
    std::fill(d_values, d_values + all_v, 0.0f);
    for (int h = g * per_group; h < (g + 1) * per_group; h++)
        for (size_t from = 0; from < s.queries; from += QUERIES) {
            const size_t count = std::min((size_t)QUERIES, s.queries - from), stop = s.past + from + count;
            const size_t tall = up(count, ROWS_AT_ONCE);
            const float* log_sum = c.log_sum + ((size_t)b * c.heads + h) * s.queries + from;
            s.block(b, h, from, q);
            into_words<Kind>(q, QUERIES * s.wide_k, q_words);
            into_columns<Kind>(q, QUERIES, s.wide_k, q_columns);
            s.rows(d.out, s.queries, b, h, from, QUERIES, s.V, s.wide_v, d_out);
            into_words<Kind>(d_out, QUERIES * s.wide_v, d_out_words);
            into_columns<Kind>(d_out, QUERIES, s.wide_v, d_out_columns);
            for (size_t i = 0; i < count; i++) {
                const float* out = c.out.data + ((size_t)b * s.queries + from + i) * c.out.token + h * c.out.head;
                floats dot = {};
                by_vectors(s.V, [&](size_t v, auto n) { dot += load(d_out + i * s.wide_v + v) * load_some(out + v, n); });
                along[i] = sum(dot);
            }
            std::fill(d_q, d_q + QUERIES * s.wide_k, 0.0f);
            for (size_t begin = s.first_key(b, from, KEYS); begin < stop; begin += KEYS) {
                const size_t keys = std::min(KEYS, up(stop - begin, PANEL));
                const int64_t ahead = (int64_t)(s.past + from) - (int64_t)begin;
                scores<Kind>(q_words, s.wide_k / F, tall, deep_k, key_panels + begin * deep_k, keys, ahead, weight, next);
                scores<Kind>(d_out_words, s.wide_v / F, tall, deep_v, value_panels + begin * deep_v, keys, ahead, d_weight, next);
                for (size_t i = 0; i < tall; i++) {
                    float *w = weight + i * keys, *dw = d_weight + i * keys;
                    if (i >= count) {
                        std::fill(w, w + keys, 0.0f), std::fill(dw, dw + keys, 0.0f);
                        continue;
                    }
                    const int reach = reach_of(i, ahead, keys);
                    int low, high;
                    s.seen(b, from + i, begin, reach, low, high);
                    const floats less = all(log_sum[i]), mean = all(along[i]);
                    for (int j = 0; j < reach; j += LANES) {
                        floats p = exponential(load(w + j) - less);
                        store(w + j, p);
                        store(dw + j, p * (load(dw + j) - mean));
                    }
                    if (low > 0 || high < reach) hide(w, reach, low, high, 0.0f), hide(dw, reach, low, high, 0.0f);
                    if (F > 1) std::fill(w + reach, w + keys, 0.0f), std::fill(dw + reach, dw + keys, 0.0f);
                }
                into_columns<Kind>(weight, tall, keys, weight_columns);
                into_columns<Kind>(d_weight, tall, keys, d_weight_columns);
                into_words<Kind>(d_weight, tall * keys, d_weight_words);
                scatter<Kind>(weight_columns, tall, keys, ahead, d_out_columns, s.wide_v, d_values + begin * s.wide_v, next);
                scatter<Kind>(d_weight_columns, tall, keys, ahead, q_columns, s.wide_k, d_keys + begin * s.wide_k, next);
                gather<Kind>(d_weight_words, tall, keys, ahead, key_words + begin / F * s.wide_k, s.wide_k, d_q, next);
            }
            for (size_t i = 0; i < count; i++) {
                float* from_row = d_q + i * s.wide_k;
                float* to = d.q.data + ((size_t)b * s.queries + from + i) * d.q.token + h * d.q.head;
                if (c.turn) rotate(from_row + s.N, c.turn + (s.past + from + i) * s.R, s.R, c.split, true);
                scaled(from_row, c.scale, s.K, to);
            }
        }
    for (size_t t = 0; t < s.length; t++) {
        const size_t place = (size_t)b * s.length + t;
        float* key = d_keys + t * s.wide_k;
        std::copy_n(key, s.N, d.k.data + place * d.k.token + g * d.k.head);
        if (c.turn) rotate(key + s.N, c.turn + t * s.R, s.R, c.split, true);
        if (s.R) std::copy_n(key + s.N, s.R, d.k_rotary.data + place * d.k_rotary.token + g * d.k_rotary.head);
        std::copy_n(d_values + t * s.wide_v, s.V, d.v.data + place * d.v.token + g * d.v.head);
    }
}

}  // namespace

// f(a Kind) for the factors asked for.
template <class F>
void of_factors(Factors factors, F f) {
#if defined(CADRE_BFLOAT16)
    if (factors == Factors::BFLOAT16) return f(Bfloat16Words());
#endif
    f(FloatWords());
}

extern "C" void cadre_causal_attention(const CausalAttention* attention) {
    const Shape shape(*attention);
    const int groups = attention->groups, tasks = attention->batch * groups;
    of_factors(attention->factors, [&](auto kind) {
#pragma omp parallel for num_threads(attention->threads) schedule(dynamic)
        for (int task = 0; task < tasks; task++) forward<decltype(kind)>(shape, task / groups, task % groups, task + attention->threads);
    });
}

extern "C" void cadre_causal_attention_gradient(const CausalAttention* attention, CausalGradient* gradient) {
    const Shape shape(*attention);
    const int groups = attention->groups, tasks = attention->batch * groups;
    of_factors(attention->factors, [&](auto kind) {
#pragma omp parallel for num_threads(attention->threads) schedule(dynamic)
        for (int task = 0; task < tasks; task++) backward<decltype(kind)>(shape, *gradient, task / groups, task % groups, task + attention->threads);
    });
}
