// Newton-Schulz iterations on a batch of matrices, each by one thread and in its own cache: as many small products as these
// have are spent on overhead where they run as batched products over all matrices at once.
#include <algorithm>
#include <cmath>

#include "gemm.h"
#include "vector.h"

namespace {

const Multiply multiply;

// to [cols, rows] = the transpose of from [rows, cols].
void transpose(const float* from, size_t rows, size_t cols, float* to) {
    constexpr size_t TILE = 16;
    for (size_t r = 0; r < rows; r += TILE)
        for (size_t c = 0; c < cols; c += TILE)
            for (size_t i = r; i < std::min(rows, r + TILE); i++)
                for (size_t j = c; j < std::min(cols, c + TILE); j++) to[j * rows + i] = from[i * cols + j];
}

float norm_of(const float* x, size_t n) {
    floats squares = {};
    by_vectors(n, [&](size_t i, auto some) {
        floats v = load_some(x + i, some);
        squares += v * v;
    });
    return std::sqrt(sum(squares));
}

// c[m, m] = scale * a b + keep * c where that is symmetric: three quarters are multiplied, the rest mirrored. b_of(column): b's
// columns from that one on.
template <class Columns>
void symmetric(size_t m, size_t k, const float* a, size_t a_stride, Columns b_of, float* c, float keep, float scale) {
    const size_t half = m / 2 / 8 * 8;
    if (half) multiply(m, half, k, {a, a_stride}, b_of(0), c, m, keep, scale);
    multiply(m - half, m - half, k, {a + half * a_stride, a_stride}, b_of(half), c + half * m + half, m, keep, scale);
    for (size_t i = 0; i < half; i++)
        for (size_t j = half; j < m; j++) c[i * m + j] = c[j * m + i];
}

void orthogonalize(const float* from, size_t rows, size_t cols, int steps, const float* coefficient, float* to) {
    static thread_local Scratch<> memory;
    const size_t m = std::min(rows, cols), n = std::max(rows, cols);
    float* x = memory.of(2 * m * n + 2 * m * m);
    float *next = x + m * n, *gram = next + m * n, *poly = gram + m * m;
    const bool turned = rows > cols;
    if (turned) transpose(from, rows, cols, x);
    else std::copy_n(from, m * n, x);
    const float scale = 1.0f / (norm_of(x, m * n) + 1e-7f);
    by_vectors(m * n, [=](size_t i, auto some) { store_some(x + i, load_some(x + i, some) * scale, some); });
    for (int step = 0; step < steps; step++) {
        symmetric(m, n, x, n, [=](size_t j) { return Operand{x + j * n, n, true}; }, gram, 0.0f, 1.0f);
        std::copy_n(gram, m * m, poly);
        symmetric(m, m, gram, m, [=](size_t j) { return Operand{gram + j, m}; }, poly, coefficient[1], coefficient[2]);
        std::copy_n(x, m * n, next);
        multiply(m, n, m, {poly, m}, {x, n}, next, n, coefficient[0]);
        std::swap(x, next);
    }
    if (turned) transpose(x, cols, rows, to);
    else std::copy_n(x, m * n, to);
}

}  // namespace

// from, to: [batch, rows, cols]. coefficient: a, b, c of x <- a x + (b g + c g g) x with g = x x^T.
extern "C" void cadre_orthogonalize(const float* from, int64_t batch, int64_t rows, int64_t cols, int32_t steps, const float* coefficient,
                                    int32_t threads, float* to) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < batch; i++)
        orthogonalize(from + i * rows * cols, rows, cols, steps, coefficient, to + i * rows * cols);
}
