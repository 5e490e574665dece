// Weight matrices of four kinds, and their two products with a few rows of float32.
//
// Every output is one accumulator that walks its row in order, whatever is computed beside it: a token's numbers do not
// depend on the batch it is in. What meets a matrix of bfloat16 is rounded to bfloat16, too, where the processor multiplies that.
#pragma once

#include <type_traits>

#include "words.h"

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

// [rows, cols], `stride` elements between rows. INT8: scale float32 [rows]. INT4: groups of 32 columns in 16 bytes, byte i
// holds column i low and column i + 16 high; a number names an entry of `table` [16]; scale bfloat16 [rows, stride / 32].
struct Matrix {
    const void* data;
    const void* scale;
    const float* table;
    int64_t rows, cols, stride;
    int32_t kind;
};

// LINE: elements in a cache line.
struct Float32 {
    static constexpr size_t LINE = 16;
    const float* data;
    size_t stride;
    floats at(size_t row, size_t k) const { return load(data + row * stride + k); }
    floats part(size_t row, size_t k, size_t n) const { return load_part(data + row * stride + k, n); }
    float factor(size_t) const { return 1.0f; }
    const void* address(size_t row, size_t k) const { return data + row * stride + k; }
};

struct Bfloat16 {
    static constexpr size_t LINE = 32;
    const uint16_t* data;
    size_t stride;
    floats at(size_t row, size_t k) const { return widen(read<halves>(data + row * stride + k)); }
    floats part(size_t row, size_t k, size_t n) const { return widen(read_part<halves>(data + row * stride + k, n)); }
    float factor(size_t) const { return 1.0f; }
    const uint16_t* address(size_t row, size_t k) const { return data + row * stride + k; }
};

#if defined(CADRE_BFLOAT16)
template <class W>
constexpr bool in_words = std::is_same_v<W, Bfloat16>;
#else
template <class W>
constexpr bool in_words = false;
#endif

struct Int8 {
    static constexpr size_t LINE = 64;
    const int8_t* data;
    const float* scale;
    size_t stride;
    floats at(size_t row, size_t k) const { return widen(read<bytes>(data + row * stride + k)); }
    floats part(size_t row, size_t k, size_t n) const { return widen(read_part<bytes>(data + row * stride + k, n)); }
    float factor(size_t row) const { return scale[row]; }
    const void* address(size_t row, size_t k) const { return data + row * stride + k; }
};

struct Int4 {
    static constexpr size_t LINE = 128;
    const uint8_t* data;
    const uint16_t* scale;
    const float* table;
    size_t stride;
    // All 32 columns of a group.
    void group(size_t row, size_t k, floats* to) const {
        size_t number = row * (stride / 32) + k / 32;
        floats factor = all(from_bfloat16(scale[number]));
        for (int i = 0; i < 16 / LANES; i++) {
            ints index = widen(read<ubytes>(data + number * 16 + i * LANES));
            to[i] = level(index) * factor;
            to[i + 16 / LANES] = level(index >> 4) * factor;
        }
    }
    floats at(size_t row, size_t k) const {
        size_t number = row * (stride / 32) + k / 32;
        ints index = widen(read<ubytes>(data + number * 16 + k % 16));
        return level(k % 32 >= 16 ? index >> 4 : index) * all(from_bfloat16(scale[number]));
    }
    // The table's entries at the low four bits.
    floats level(ints index) const {
#if defined(__AVX512F__)
        return (floats)_mm512_permutexvar_ps((__m512i)index, (__m512)load(table));
#elif defined(__AVX2__)
        __m256 low = _mm256_permutevar8x32_ps((__m256)load(table), (__m256i)index);  // by the lowest three bits
        __m256 high = _mm256_permutevar8x32_ps((__m256)load(table + 8), (__m256i)index);
        return (floats)_mm256_blendv_ps(low, high, (__m256)(index << 28));  // by the sign
#else
        floats value;
        for (int i = 0; i < LANES; i++) value[i] = table[index[i] & 15];
        return value;
#endif
    }
    // Rows are padded to whole groups; what lies beyond the last column meets zeros.
    floats part(size_t row, size_t k, size_t) const { return at(row, k); }
    float factor(size_t) const { return 1.0f; }
    const void* address(size_t row, size_t k) const { return data + (row * stride + k) / 2; }
};

// Calls f with the reader of the matrix's kind: f is compiled once for each.
template <class F>
static inline void of_kind(const Matrix& w, F f) {
    switch (w.kind) {
        case FLOAT32: return f(Float32{(const float*)w.data, (size_t)w.stride});
        case BFLOAT16: return f(Bfloat16{(const uint16_t*)w.data, (size_t)w.stride});
        case INT8: return f(Int8{(const int8_t*)w.data, (const float*)w.scale, (size_t)w.stride});
        default: return f(Int4{(const uint8_t*)w.data, (const uint16_t*)w.scale, w.table, (size_t)w.stride});
    }
}

// Rows [begin, end) as bfloat16, one after the other.
static inline void narrow_rows(const Matrix& w, size_t begin, size_t end, uint16_t* to) {
    of_kind(w, [&](auto reader) {
        const size_t K = w.cols;
        for (size_t row = begin; row < end; row++, to += K) {
            const floats factor = all(reader.factor(row));
            size_t k = 0;
            if constexpr (std::is_same_v<decltype(reader), Int4>)
                for (; k + 32 <= K; k += 32) {
                    floats wide[32 / LANES];
                    reader.group(row, k, wide);
                    for (int i = 0; i < 32 / LANES; i++) store_some(to + k + i * LANES, wide[i], LANES);
                }
            for (; k + LANES <= K; k += LANES) store_some(to + k, reader.at(row, k) * factor, LANES);
            if (k < K) store_some(to + k, reader.part(row, k, K - k) * factor, (int)(K - k));
        }
    });
}

// out[m * NR + n] = <x[m], w[row + n]> over K columns. `ahead`: the next rows of w are not in cache yet.
template <int MR, int NR, class W>
__attribute__((noinline)) static void dot_tile(const W& w, size_t row, const float* const* x, size_t K, bool ahead, float* out) {
    floats acc[MR][NR] = {};
    size_t k = 0;
    if constexpr (std::is_same_v<W, Int4>) {
        for (; k + 32 <= K; k += 32) {
#pragma GCC unroll 8
            for (int n = 0; n < NR; n++) {
                floats wide[32 / LANES];
                w.group(row + n, k, wide);
#pragma GCC unroll 8
                for (int m = 0; m < MR; m++)
                    for (int i = 0; i < 32 / LANES; i++) acc[m][n] += wide[i] * load(x[m] + k + i * LANES);
            }
            if (ahead && k % W::LINE == 0)
                for (int n = 0; n < NR; n++) __builtin_prefetch(w.address(row + NR + n, k));
        }
#if defined(CADRE_BFLOAT16)
    } else if constexpr (in_words<W>) {
        auto line = [&](auto narrow, auto wide) {
            words with[NR];
#pragma GCC unroll 8
            for (int n = 0; n < NR; n++) with[n] = narrow(w.address(row + n, k));
            if (ahead)
                for (int n = 0; n < NR; n++) __builtin_prefetch(w.address(row + NR + n, k));
#pragma GCC unroll 8
            for (int m = 0; m < MR; m++) {
                const words xm = wide(x[m] + k);
#pragma GCC unroll 8
                for (int n = 0; n < NR; n++) acc[m][n] = Bfloat16Words::add_product(acc[m][n], xm, with[n]);
            }
        };
        for (; k + W::LINE <= K; k += W::LINE)
            line([](const uint16_t* from) { return read<words>(from); },
                 [](const float* from) { return Bfloat16Words::join(load(from), load(from + LANES)); });
        if (k < K) {
            const size_t rest = K - k;
            line([=](const uint16_t* from) { return Bfloat16Words::along(from, rest); },
                 [=](const float* from) { return Bfloat16Words::along(from, rest); });
            k = K;
        }
#endif
    } else {
        for (; k + LANES <= K; k += LANES) {
            floats wide[NR];
#pragma GCC unroll 8
            for (int n = 0; n < NR; n++) wide[n] = w.at(row + n, k);
            // Rows are too short for the processor to see the stream coming: ask for the next tile's.
            if (ahead && k % W::LINE == 0)
                for (int n = 0; n < NR; n++) __builtin_prefetch(w.address(row + NR + n, k));
#pragma GCC unroll 8
            for (int m = 0; m < MR; m++) {
                floats xm = load(x[m] + k);
#pragma GCC unroll 8
                for (int n = 0; n < NR; n++) acc[m][n] += wide[n] * xm;
            }
        }
    }
    for (; k < K; k += LANES) {
        size_t rest = K - k < LANES ? K - k : LANES;
        for (int n = 0; n < NR; n++) {
            floats wide = w.part(row + n, k, rest);
            for (int m = 0; m < MR; m++) acc[m][n] += wide * load_part(x[m] + k, rest);
        }
    }
    for (int m = 0; m < MR; m++) {
        if constexpr (NR % 4 == 0)
            for (int n = 0; n < NR; n += 4) sum4(acc[m][n], acc[m][n + 1], acc[m][n + 2], acc[m][n + 3], out + m * NR + n);
        else
            for (int n = 0; n < NR; n++) out[m * NR + n] = sum(acc[m][n]);
        for (int n = 0; n < NR; n++) out[m * NR + n] *= w.factor(row + n);
    }
}

constexpr int ROWS = 8;    // rows of a matrix per tile for one vector; half as many for several
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int TOKENS = 2;  // vectors per tile: their accumulators, 4 of each, leave room in 16 registers
#else
constexpr int TOKENS = 6;  // in 32
#endif
// Vectors more than which make widening narrow rows beforehand pay.
template <class W>
constexpr size_t MANY = TOKENS == 2 && std::is_same_v<W, Int4> ? 4 : 12;

// How many of M vectors the next tile takes: 8 are 4 + 4, not 6 + 2.
static inline size_t share(size_t M) {
    size_t tiles = (M + TOKENS - 1) / TOKENS;
    return (M + tiles - 1) / tiles;
}

// Calls f with `some`, from 1 to TOKENS, as a type: it is compiled for each.
template <class F>
static inline void by_count(size_t some, F f) {
    switch (some) {
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        case 4: return f(std::integral_constant<int, 4>());
        case 5: return f(std::integral_constant<int, 5>());
        default: return f(std::integral_constant<int, TOKENS>());
    }
}

template <int NR, class W>
static inline void dot_some(const W& w, size_t row, const float* const* x, size_t some, size_t K, bool ahead, float* out) {
    by_count(some, [&](auto m) { dot_tile<m, NR>(w, row, x, K, ahead, out); });
}

// Rows [begin, end) of w times M vectors: put(m, row, value) for each product. Vectors outside, rows inside: a tile's
// vectors stay in the nearest cache while the rows pass.
template <class W, class Put>
static inline void dots_of(const W& w, size_t begin, size_t end, const float* const* x, size_t M, size_t K, Put put) {
    float out[TOKENS * 4 > ROWS ? TOKENS * 4 : ROWS];
    for (size_t m = 0, some; m < M; m += some) {
        some = share(M - m);
        size_t row = begin;
        if (M == 1) {
            for (; row + ROWS <= end; row += ROWS) {
                dot_tile<1, ROWS>(w, row, x, K, true, out);
                for (int n = 0; n < ROWS; n++) put(0, row + n, out[n]);
            }
        }
        for (; row + 4 <= end; row += 4) {
            dot_some<4>(w, row, x + m, some, K, m == 0, out);
            for (size_t i = 0; i < some; i++)
                for (int n = 0; n < 4; n++) put(m + i, row + n, out[i * 4 + n]);
        }
        for (; row < end; row++) {
            dot_some<1>(w, row, x + m, some, K, false, out);
            for (size_t i = 0; i < some; i++) put(m + i, row, out[i]);
        }
    }
}

// sums[m * 4 + n] += x[m] * w[n] over columns [from, from + depth), lane by lane; w: four wide rows from column `from` on.
template <int MR>
__attribute__((noinline)) static void wide_tile(const float* w, size_t stride, const float* const* x, size_t from, size_t depth,
                                                floats* sums) {
    floats acc[MR][4];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) acc[m][n] = sums[m * 4 + n];
    size_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
        floats wide[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) wide[n] = load(w + n * stride + k);
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
            floats xm = load(x[m] + from + k);
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++) acc[m][n] += wide[n] * xm;
        }
    }
    if (k < depth)
        for (int n = 0; n < 4; n++)
            for (int m = 0; m < MR; m++) acc[m][n] += load(w + n * stride + k) * load_part(x[m] + from + k, depth - k);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) sums[m * 4 + n] = acc[m][n];
}

// As `dots_of` for many vectors and rows of a narrow kind: a few rows at a time are widened once and not for every tile,
// and no more columns of them than stay in the nearest cache beside a tile's vectors.
template <class W, class Put>
static inline void wide_dots(const W& w, size_t begin, size_t end, const float* const* x, size_t M, size_t K, Put put) {
    constexpr size_t SPAN = 8, DEPTH = 512;
    static thread_local Scratch<> memory;
    const size_t tiles = (M + TOKENS - 1) / TOKENS;
    float* wide = memory.of(SPAN * DEPTH + SPAN * M * LANES);
    floats* sums = (floats*)(wide + SPAN * DEPTH);  // [two halves of the rows][M][4]
    for (size_t first = begin; first < end; first += SPAN) {
        const size_t rows = end - first < SPAN ? end - first : SPAN;
        std::memset((void*)sums, 0, SPAN * M * sizeof(floats));
        for (size_t from = 0; from < K; from += DEPTH) {
            const size_t depth = K - from < DEPTH ? K - from : DEPTH;
            for (size_t row = 0; row < SPAN; row++) {
                float* to = wide + row * DEPTH;
                if (row >= rows) {
                    std::memset(to, 0, depth * sizeof(float));
                    continue;
                }
                size_t k = 0;
                for (; k + LANES <= depth; k += LANES) store(to + k, w.at(first + row, from + k));
                if (k < depth) store(to + k, w.part(first + row, from + k, depth - k));
                for (size_t line = 0; line < depth; line += W::LINE) __builtin_prefetch(w.address(first + row + SPAN, from + line));
            }
            size_t m = 0;
            for (size_t tile = 0, some; tile < tiles; tile++, m += some) {
                some = share(M - m);
                for (size_t half = 0; half < SPAN / 4; half++) {
                    const float* four = wide + half * 4 * DEPTH;
                    floats* to = sums + (half * M + m) * 4;
                    by_count(some, [&](auto count) { wide_tile<count>(four, DEPTH, x + m, from, depth, to); });
                }
            }
        }
        for (size_t m = 0; m < M; m++)
            for (size_t row = 0; row < rows; row += 4) {
                const floats* four = sums + (row / 4 * M + m) * 4;
                float out[4];
                sum4(four[0], four[1], four[2], four[3], out);
                for (size_t n = 0; n < 4 && row + n < rows; n++) put(m, first + row + n, out[n] * w.factor(first + row + n));
            }
    }
}

// As `dots_of`, the faster way.
template <class W, class Put>
static inline void dots(const W& w, size_t begin, size_t end, const float* const* x, size_t M, size_t K, Put put) {
    if constexpr (!std::is_same_v<W, Float32> && !in_words<W>)
        if (M > MANY<W>) return wide_dots(w, begin, end, x, M, K, put);
    dots_of(w, begin, end, x, M, K, put);
}

// y[m][c] += sum over j of a[m][j] * w[row + j][c], for MR vectors and NV * LANES columns from c.
template <int MR, int NV, class W>
__attribute__((noinline)) static void sum_tile(const W& w, size_t row, size_t J, const float* const* a, size_t c, float* const* y) {
    floats acc[MR][NV];
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NV; n++) acc[m][n] = load(y[m] + c + n * LANES);
    for (size_t j = 0; j < J; j++) {
        floats wide[NV];
        float factor = w.factor(row + j);
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) wide[n] = w.at(row + j, c + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
            floats am = all(a[m][j] * factor);
#pragma GCC unroll 8
            for (int n = 0; n < NV; n++) acc[m][n] += am * wide[n];
        }
    }
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NV; n++) store(y[m] + c + n * LANES, acc[m][n]);
}

template <int NV, class W>
__attribute__((noinline)) static void sum_columns(const W& w, size_t row, size_t J, const float* const* a, size_t M, size_t c, float* const* y) {
    for (size_t m = 0, some; m < M; m += some) {
        some = share(M - m);
        by_count(some, [&](auto count) { sum_tile<count, NV>(w, row, J, a + m, c, y + m); });
    }
}

#if defined(CADRE_BFLOAT16)
// The same in words of two rows, for NV * 32 columns, or with `TAIL` for fewer than 32. a[m * stride + j / 2]: rounded, a zero
// beyond J.
template <int MR, int NV, bool TAIL>
__attribute__((noinline)) static void sum_word_tile(const Bfloat16& w, size_t row, size_t J, const uint32_t* a, size_t stride, size_t c,
                                                    size_t tail, float* const* y) {
    // Two rows interleaved by quarters: the low one has columns 0 to 3, 8 to 11 and so on.
    const __m512i low = _mm512_set_epi32(27, 26, 25, 24, 19, 18, 17, 16, 11, 10, 9, 8, 3, 2, 1, 0);
    const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 23, 22, 21, 20, 15, 14, 13, 12, 7, 6, 5, 4);
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    const __mmask16 some[2] = {first_lanes(std::min<size_t>(tail, 16)), first_lanes(tail < 16 ? 0 : tail - 16)};
    const __mmask32 columns = (1u << tail) - 1;
    floats acc[MR][NV][2];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
        for (int n = 0; n < NV; n++) {
            const float* from = y[m] + c + n * 32;
            const __m512 x = TAIL ? _mm512_maskz_loadu_ps(some[0], from) : _mm512_loadu_ps(from);
            const __m512 z = TAIL ? _mm512_maskz_loadu_ps(some[1], from + 16) : _mm512_loadu_ps(from + 16);
            acc[m][n][0] = (floats)_mm512_permutex2var_ps(x, low, z);
            acc[m][n][1] = (floats)_mm512_permutex2var_ps(x, high, z);
        }
    auto pair = [&](bool alone) {
        words with[NV][2];
#pragma GCC unroll 2
        for (int n = 0; n < NV; n++) {
            const uint16_t *one = w.address(row, c + n * 32), *other = one + w.stride;
            const __m512i x = TAIL ? _mm512_maskz_loadu_epi16(columns, one) : _mm512_loadu_si512(one);
            const __m512i z = alone ? __m512i{} : TAIL ? _mm512_maskz_loadu_epi16(columns, other) : _mm512_loadu_si512(other);
            with[n][0] = (words)_mm512_unpacklo_epi16(x, z), with[n][1] = (words)_mm512_unpackhi_epi16(x, z);
        }
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
            for (int n = 0; n < NV; n++)
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) acc[m][n][i] = Bfloat16Words::add_product(acc[m][n][i], a[m * stride], with[n][i]);
    };
    for (; J >= 2; J -= 2, row += 2, a++) pair(false);
    if (J) pair(true);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
        for (int n = 0; n < NV; n++) {
            float* to = y[m] + c + n * 32;
            const __m512 x = (__m512)acc[m][n][0], z = (__m512)acc[m][n][1];
            _mm512_mask_storeu_ps(to, TAIL ? some[0] : 0xffff, _mm512_permutex2var_ps(x, first, z));
            _mm512_mask_storeu_ps(to + 16, TAIL ? some[1] : 0xffff, _mm512_permutex2var_ps(x, second, z));
        }
}

static inline void sums_in_words(const Bfloat16& w, size_t row, size_t J, const float* const* a, size_t M, size_t begin, size_t end,
                                 float* const* y) {
    static thread_local Scratch<uint32_t> memory;
    const size_t stride = (J + 31) / 32 * 16;
    uint32_t* rounded = memory.of(M * stride);
    for (size_t m = 0; m < M; m++)
        for (size_t j = 0; j < J; j += 32) Bfloat16Words::store(rounded + m * stride + j / 2, Bfloat16Words::along(a[m] + j, J - j));
    auto columns = [&](size_t c, auto vectors, auto tail, size_t count) {
        for (size_t m = 0, some; m < M; m += some) {
            some = share(M - m);
            const uint32_t* with = rounded + m * stride;
            by_count(some, [&](auto tokens) { sum_word_tile<tokens, vectors, tail>(w, row, J, with, stride, c, count, y + m); });
        }
    };
    size_t c = begin;
    for (; c + 64 <= end; c += 64) columns(c, std::integral_constant<int, 2>(), std::false_type(), 0);
    if (c + 32 <= end) columns(c, std::integral_constant<int, 1>(), std::false_type(), 0), c += 32;
    if (c < end) columns(c, std::integral_constant<int, 1>(), std::true_type(), end - c);
}
#endif

// y[m][c] += sum over j < J of a[m][j] * w[row + j][c] for columns c from `begin` to `end`.
template <class W>
static inline void sums(const W& w, size_t row, size_t J, const float* const* a, size_t M, size_t begin, size_t end,
                        float* const* y) {
#if defined(CADRE_BFLOAT16)
    if constexpr (in_words<W>) return sums_in_words(w, row, J, a, M, begin, end, y);
#endif
    size_t c = begin;
    for (; c + 4 * LANES <= end; c += 4 * LANES) sum_columns<4>(w, row, J, a, M, c, y);
    for (; c + LANES <= end; c += LANES) sum_columns<1>(w, row, J, a, M, c, y);
    if (c == end) return;
    for (size_t m = 0; m < M; m++) {
        floats acc = load_part(y[m] + c, end - c);
        for (size_t j = 0; j < J; j++) acc += all(a[m][j] * w.factor(row + j)) * w.part(row + j, c, end - c);
        store_part(y[m] + c, acc, end - c);
    }
}
