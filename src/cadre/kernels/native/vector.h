// Vectors of the machine's width, through the compiler's vector extensions: one source for AVX-512, AVX2, NEON and SSE.
// Intrinsics only where compilers make poor code of them: widening narrow types and adding up lanes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef uint8_t ubytes __attribute__((vector_size(LANES)));

template <class V, class T>
static inline V read(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// The first n < LANES elements, then zeros.
template <class V, class T>
static inline V read_part(const T* from, size_t n) {
    V v = {};
    std::memcpy(&v, from, n * sizeof(T));
    return v;
}

static inline floats load(const float* from) { return read<floats>(from); }
static inline void store(float* to, floats v) { std::memcpy(to, &v, sizeof v); }
#if defined(__AVX512F__)
static inline __mmask16 first_lanes(size_t n) { return (__mmask16)((1u << n) - 1); }
static inline floats load_part(const float* from, size_t n) { return (floats)_mm512_maskz_loadu_ps(first_lanes(n), from); }
static inline void store_part(float* to, floats v, size_t n) { _mm512_mask_storeu_ps(to, first_lanes(n), (__m512)v); }
#else
static inline floats load_part(const float* from, size_t n) { return read_part<floats>(from, n); }
static inline void store_part(float* to, floats v, size_t n) { std::memcpy(to, &v, n * sizeof(float)); }
#endif
static inline floats all(float x) { return x - floats{}; }
static inline ints lane_numbers() {
    alignas(64) static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return read<ints>(numbers);
}

// Calls f(first element, how many) for n elements: whole vectors (a constant LANES), then the rest.
template <class F>
static inline void by_vectors(size_t n, F f) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) f(i, std::integral_constant<int, LANES>());
    if (i < n) f(i, (int)(n - i));
}

static inline floats load_some(const float* from, int n) { return n == LANES ? load(from) : load_part(from, n); }
static inline void store_some(float* to, floats v, int n) { n == LANES ? store(to, v) : store_part(to, v, n); }

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);  // a NaN stays one
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(__AVX512F__)
static inline floats widen(halves v) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
}
static inline floats widen(bytes v) { return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v)); }
static inline ints widen(ubytes v) { return (ints)_mm512_cvtepu8_epi32((__m128i)v); }
#elif defined(__AVX2__)
static inline floats widen(halves v) { return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16); }
static inline __m128i eight(const void* v) { return _mm_loadl_epi64((const __m128i*)v); }
static inline floats widen(bytes v) { return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(&v))); }
static inline ints widen(ubytes v) { return (ints)_mm256_cvtepu8_epi32(eight(&v)); }
#else
static inline floats widen(halves v) { return (floats)(__builtin_convertvector(v, words) << 16); }
static inline floats widen(bytes v) { return __builtin_convertvector(__builtin_convertvector(v, ints), floats); }
static inline ints widen(ubytes v) { return __builtin_convertvector(v, ints); }
#endif

// Of bfloat16.
static inline floats load_some(const uint16_t* from, int n) { return widen(n == LANES ? read<halves>(from) : read_part<halves>(from, n)); }
// To bfloat16, the nearest even one; a NaN stays one.
static inline void store_some(uint16_t* to, floats v, int n) {
#if defined(__AVX512BF16__)
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
#else
    uint16_t narrow[LANES];
    for (int i = 0; i < n; i++) narrow[i] = to_bfloat16(v[i]);
#endif
    n == LANES ? std::memcpy(to, &narrow, sizeof narrow) : std::memcpy(to, &narrow, n * sizeof *to);
}

#if defined(__AVX512F__)
// Transposes 16 vectors of 16 words.
template <class V>
static inline void turn(V (&v)[16]) {
    __m512i x[16];
    for (int i = 0; i < 16; i++) x[i] = (__m512i)v[i];
    __m512i y[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        y[i] = _mm512_unpacklo_epi64(a, c), y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d), y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88), b = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88), d = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
        x[i] = _mm512_shuffle_i32x4(a, c, 0x88), x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) v[i] = (V)x[i];
}
#endif

// The sums of four vectors' lanes. Always in the same order, so that a sum never depends on what is computed beside it.
static inline void sum4(floats a, floats b, floats c, floats d, float* to) {
#if defined(__AVX512F__)
    __m512 x = (__m512)a, y = (__m512)b, z = (__m512)c, w = (__m512)d;
    __m512 xy = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));  // x0+x2 y0+y2 x1+x3 y1+y3, four times
    __m512 zw = _mm512_add_ps(_mm512_unpacklo_ps(z, w), _mm512_unpackhi_ps(z, w));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(xy, zw, 0x44), _mm512_shuffle_ps(xy, zw, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
    auto half = [](floats v) { return _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1)); };
    const __m128 x = half(a), y = half(b), z = half(c), w = half(d);
    const __m128 xy = _mm_add_ps(_mm_unpacklo_ps(x, y), _mm_unpackhi_ps(x, y));  // x0+x2 y0+y2 x1+x3 y1+y3
    const __m128 zw = _mm_add_ps(_mm_unpacklo_ps(z, w), _mm_unpackhi_ps(z, w));
    _mm_storeu_ps(to, _mm_add_ps(_mm_movelh_ps(xy, zw), _mm_movehl_ps(zw, xy)));
#else
    const floats v[4] = {a, b, c, d};
    for (int n = 0; n < 4; n++) {
        float x[LANES];
        std::memcpy(x, &v[n], sizeof x);
        for (int half = LANES / 2; half > 0; half /= 2)
            for (int i = 0; i < half; i++) x[i] += x[i + half];
        to[n] = x[0];
    }
#endif
}

static inline float sum(floats v) {
    float to[4];
    sum4(v, v, v, v, to);
    return to[0];
}

static inline float largest(floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
    __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
#else
    float x[LANES];
    std::memcpy(x, &v, sizeof v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
#endif
}

// 1 / x to about 1 unit in the last place, for x that neither is nor nearly is infinite or zero.
static inline floats reciprocal(floats x) {
#if defined(__AVX512F__)
    floats y = (floats)_mm512_rcp14_ps((__m512)x);
    return y * (2.0f - x * y);  // a division takes as long as all of e^x
#else
    return 1.0f / x;
#endif
}

static inline floats square_root(floats x) {
#if defined(__AVX512F__)
    return (floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (floats)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// e^x to about 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients of Cephes' expf).
static inline floats exponential(floats x) {
    x = x < all(-87.0f) ? all(-87.0f) : x;
    x = x > all(88.0f) ? all(88.0f) : x;
    const floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    floats shifted = x * 1.44269504088896341f + shift;
    floats n = shifted - shift;
    floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
    floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (floats)((words)p + ((words)shifted << 23));
}

static inline float from_bfloat16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Nothing can be thrown out of a team of threads, nor out of what Python calls.
[[noreturn]] inline void out_of_memory() {
    std::fputs("cadre: this machine has not enough memory for that: use a smaller model, batch or sequence\n", stderr);
    std::_Exit(1);
}

// Scratch that grows and is never given back: one per use and thread, so that a step allocates nothing. It begins at a cache
// line: a vector that crosses two costs two loads.
template <class T = float>
struct Scratch {
    static constexpr size_t LINE = 64;
    std::vector<T> kept;
    T* of(size_t size) {
        size += LINE / sizeof(T);
        if (kept.size() < size) grow(size);
        return (T*)(((uintptr_t)kept.data() + LINE - 1) / LINE * LINE);
    }

private:
    void grow(size_t size) {
        std::vector<T>().swap(kept);
        try {
            kept.resize(size);
        } catch (const std::bad_alloc&) {
            out_of_memory();
        }
    }
};
