// What one decoding step hands to every kernel, and the parts that attention and feed-forward share.
//
// A kernel is a team: its exported function opens one parallel region, the functions named team_* split their work among
// its threads and end with a barrier unless they say otherwise.
#pragma once

#include <cmath>

#include "matrix.h"

// New tokens of several sequences, one sequence after the other. x: the residual stream [tokens, width], updated in place.
struct Step {
    float* x;
    const float* turn;        // cosine and sine by position and rotary pair
    const int64_t* position;  // [tokens]
    const int32_t* count;     // [sequences] new tokens of each
    const int32_t* start;     // [sequences] tokens that its cache already holds
    const int32_t* pages;     // [sequences, page_columns]
    int32_t tokens, sequences, page_columns, width, threads;
};

// One layer's two tensors [pages, page_size, ...]: FLOAT32 or BFLOAT16.
struct Cache {
    void* first;
    void* second;
    int32_t kind, page_size;
};

// Pointers to equally spaced rows.
static inline void rows_of(const float** to, const float* from, size_t count, size_t stride) {
    for (size_t i = 0; i < count; i++) to[i] = from + i * stride;
}

static inline void rms_norm(const float* x, const float* weight, float eps, size_t D, float* y) {
    floats squares = {};
    size_t d = 0;
    for (; d + LANES <= D; d += LANES) squares += load(x + d) * load(x + d);
    if (d < D) squares += load_part(x + d, D - d) * load_part(x + d, D - d);
    float factor = 1.0f / std::sqrt(sum(squares) / (float)D + eps);
    for (d = 0; d + LANES <= D; d += LANES) store(y + d, load(x + d) * factor * load(weight + d));
    if (d < D) store_part(y + d, load_part(x + d, D - d) * factor * load_part(weight + d, D - d), D - d);
}

static inline void team_norm(const Step& step, const float* weight, float eps, float* y) {
#pragma omp for schedule(static)
    for (int m = 0; m < step.tokens; m++)
        rms_norm(step.x + (size_t)m * step.width, weight, eps, step.width, y + (size_t)m * step.width);
}

// put(m, row, value) for every row of w and every vector; no barrier at the end.
template <class Put>
static inline void team_dots(const Matrix& w, const float* const* x, size_t M, Put put) {
    of_kind(w, [&](auto reader) {
        const size_t span = M > TOKENS ? 4 * ROWS : ROWS, rows = (size_t)w.rows, blocks = (rows + span - 1) / span;
#pragma omp for schedule(static) nowait
        for (size_t block = 0; block < blocks; block++) {
            size_t begin = block * span, end = begin + span < rows ? begin + span : rows;
            dots(reader, begin, end, x, M, (size_t)w.cols, put);
        }
    });
}

// y[m][row] = <x[m], w[row]> + bias[row]; no barrier at the end.
static inline void team_linear(const Matrix& w, const float* bias, const float* const* x, size_t M, float* y) {
    size_t N = (size_t)w.rows;
    team_dots(w, x, M, [=](size_t m, size_t row, float value) { y[m * N + row] = bias ? value + bias[row] : value; });
}

// Turns pairs by position, or `back`: (2i, 2i + 1), or (i, i + R / 2) if `split`.
static inline void rotate(float* x, const float* turn, size_t R, bool split, bool back = false) {
    for (size_t i = 0; i < R / 2; i++) {
        float* first = x + (split ? i : 2 * i);
        float* second = split ? first + R / 2 : first + 1;
        float a = *first, b = *second, cosine = turn[2 * i], sine = back ? -turn[2 * i + 1] : turn[2 * i + 1];
        *first = a * cosine - b * sine;
        *second = a * sine + b * cosine;
    }
}

static inline void write_cached(const Cache& cache, void* tensor, size_t offset, const float* from, size_t n) {
    if (cache.kind == BFLOAT16)
        for (size_t i = 0; i < n; i++) ((uint16_t*)tensor)[offset + i] = to_bfloat16(from[i]);
    else
        std::memcpy((float*)tensor + offset, from, n * sizeof(float));
}

// Calls f(reader of the first tensor, reader of the second), rows `stride` elements apart from an offset on.
template <class F>
static inline void of_cache(const Cache& cache, size_t stride1, size_t offset1, size_t stride2, size_t offset2, F f) {
    if (cache.kind == BFLOAT16)
        f(Bfloat16{(const uint16_t*)cache.first + offset1, stride1}, Bfloat16{(const uint16_t*)cache.second + offset2, stride2});
    else
        f(Float32{(const float*)cache.first + offset1, stride1}, Float32{(const float*)cache.second + offset2, stride2});
}
