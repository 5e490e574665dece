// What products are made of. A word is what one lane multiplies at a time: a float, or two floats rounded to bfloat16 (to the
// nearest even) that lie one after the other along the sum. Sums are float32 in either.
#pragma once

#include <algorithm>

#include "vector.h"

enum class Factors : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

struct FloatWords {
    typedef float word;
    typedef floats words;
    static constexpr size_t FACTORS = 1;
    static words load(const word* from) { return ::load(from); }
    static void store(word* to, words v) { ::store(to, v); }
    static void store_along(word* to, floats v) { ::store(to, v); }  // the words of one vector
    static floats add_product(floats sum, word a, words b) { return sum + a * b; }
#if defined(__AVX512F__)
    // Up to 16 words of a row of which n factors are left; beyond it zeros.
    static words along(const float* from, size_t n) { return load_part(from, std::min<size_t>(n, 16)); }
    // Words of up to 16 rows that lie side by side, n are left.
    static words across(const float* from, const float*, size_t n, bool) { return along(from, n); }
#endif
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define CADRE_BFLOAT16 1
struct Bfloat16Words {
    typedef uint32_t word;
    typedef ::words words;
    static constexpr size_t FACTORS = 2;
    static words load(const word* from) { return read<words>(from); }
    static void store(word* to, words v) { std::memcpy(to, &v, sizeof v); }
    static void store_along(word* to, floats v) {
        const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
        std::memcpy(to, &halves, sizeof halves);
    }
    static floats add_product(floats sum, word a, words b) {
        return add_product(sum, (words)_mm512_set1_epi32((int)a), b);
    }
    static floats add_product(floats sum, words a, words b) {
        return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    // Two vectors, one after the other.
    static words join(floats first, floats second) { return (words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
    // Two vectors, or what `join` made of them, lane beside lane.
    static words zip(floats first, floats second) { return zip(join(first, second)); }
    static words zip(words joined) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                               19, 3, 18, 2, 17, 1, 16, 0);
        return (words)_mm512_permutexvar_epi16(order, (__m512i)joined);
    }
    static words along(const float* from, size_t n) {
        return join(load_part(from, std::min<size_t>(n, 16)), n <= 16 ? floats{} : load_part(from + 16, std::min<size_t>(n - 16, 16)));
    }
    // The same of factors that are rounded already.
    static words along(const uint16_t* from, size_t n) {
        return (words)_mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : ~0u, from);
    }
    // `last`: a zero takes the place of the row that would follow.
    static words across(const float* first, const float* second, size_t n, bool last) {
        n = std::min<size_t>(n, 16);
        return zip(load_part(first, n), last ? floats{} : load_part(second, n));
    }
    static words across(const uint16_t* first, const uint16_t* second, size_t n, bool last) {
        const __mmask16 some = n < 16 ? first_lanes(n) : (__mmask16)~0u;
        const __m512i joined = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(some, first));
        return zip((words)_mm512_inserti64x4(joined, _mm256_maskz_loadu_epi16(last ? 0 : some, second), 1));
    }
};
#endif

struct Nothing {
    void operator()() const {}
};

// sum[m][n] += over k of a[m * a_row + k * a_col] * b[k * b_row + n], k counting words, n vectors of lanes. `beside` is called
// once a word.
template <class Kind, int HIGH, int WIDE, class Word = typename Kind::word, class Beside = Nothing>
static inline __attribute__((always_inline)) void add_products(floats (&sum)[HIGH][WIDE], const Word* a, size_t a_row, size_t a_col,
                                                               size_t depth, const Word* b, size_t b_row, Beside&& beside = Beside()) {
    for (size_t k = 0; k < depth; k++, a += a_col, b += b_row) {
        beside();
        typename Kind::words with[WIDE];
#pragma GCC unroll 3
        for (int n = 0; n < WIDE; n++) {
            with[n] = Kind::load(b + n * LANES);
#if defined(__AVX2__) && !defined(__AVX512F__)
            asm("" : "+x"(with[n]));  // GCC would load it again for each row, and loads are what these processors are short of
#endif
        }
#pragma GCC unroll 8
        for (int m = 0; m < HIGH; m++) {
            const Word row = a[m * a_row];
#pragma GCC unroll 3
            for (int n = 0; n < WIDE; n++) sum[m][n] = Kind::add_product(sum[m][n], row, with[n]);
        }
    }
}
