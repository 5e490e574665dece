// Muon's step on many matrices, each by one thread and in its own cache: momentum, Newton-Schulz iterations and the update of
// the weights in one go. As many small products as these have are spent on overhead where they run as batched products over
// all matrices at once, and each pass over all parameters costs as much as their products.
#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"
#include "layout.h"
#include "vector.h"

// A batch of matrices [batch, rows, cols] that lie one behind the other. momentum <- lerp(momentum, gradient, 1 - beta), and the
// update u = lerp(gradient, momentum, beta); weight <- keep * weight + rate * orthogonalized(u).
struct MuonStep {
    float* weight;
    const float* gradient;
    float* momentum;
    int64_t batch, rows, cols;
    int32_t steps;
    float beta, keep, rate;
};

LAYOUT(MuonStep, weight, gradient, momentum, batch, rows, cols, steps, beta, keep, rate)

namespace {

float norm_of(const float* x, size_t n) {
    floats squares = {};
    by_vectors(n, [&](size_t i, auto some) {
        floats v = load_some(x + i, some);
        squares += v * v;
    });
    return std::sqrt(sum(squares));
}

// c[m, m] = scale * a b + keep * c where that is symmetric: three quarters are multiplied, the rest mirrored. a_of(row) and
// b_of(column): from that one on.
template <class Rows, class Columns>
void symmetric(const Multiply& multiply, size_t m, size_t k, Rows a_of, Columns b_of, float* c, float keep, float scale) {
    const size_t half = m <= 32 ? 0 : m / 2 / 16 * 16;
    if (half) multiply(m, half, k, a_of(0), b_of(0), c, m, keep, scale);
    multiply(m - half, m - half, k, a_of(half), b_of(half), c + half * m + half, m, keep, scale);
    for (size_t i = 0; i < half; i++)
        for (size_t j = half; j < m; j++) c[i * m + j] = c[j * m + i];
}

// Floats that `orthogonalize` works in.
size_t room(size_t rows, size_t cols) {
    const size_t m = std::min(rows, cols);
    return 2 * rows * cols + 2 * m * m;
}

// X <- a X + (b G + c G G) X with G = X X^T, from X of norm 1; of a tall X the same of its transpose, X <- a X + X (b G + c G G)
// with G = X^T X. x: [rows, cols] within `room` floats. Returns where the result lies.
float* orthogonalize(const Multiply& multiply, float* x, size_t rows, size_t cols, int steps, const float* coefficient) {
    const bool tall = rows > cols;
    const size_t size = rows * cols, m = std::min(rows, cols), n = std::max(rows, cols);
    float *next = x + size, *gram = next + size, *poly = gram + m * m;
    const float scale = 1.0f / (norm_of(x, size) + 1e-7f);
    by_vectors(size, [=](size_t i, auto some) { store_some(x + i, load_some(x + i, some) * scale, some); });
    for (int step = 0; step < steps; step++) {
        symmetric(
            multiply, m, n, [=](size_t i) { return tall ? Operand{x + i, cols, true} : Operand{x + i * cols, cols}; },
            [=](size_t j) { return tall ? Operand{x + j, cols} : Operand{x + j * cols, cols, true}; }, gram, 0.0f, 1.0f);
        std::copy_n(gram, m * m, poly);
        symmetric(
            multiply, m, m, [=](size_t i) { return Operand{gram + i * m, m}; }, [=](size_t j) { return Operand{gram + j, m}; }, poly,
            coefficient[1], coefficient[2]);
        std::copy_n(x, size, next);
        if (tall) multiply(rows, cols, m, {x, cols}, {poly, m}, next, cols, coefficient[0]);
        else multiply(rows, cols, m, {poly, m}, {x, cols}, next, cols, coefficient[0]);
        std::swap(x, next);
    }
    return x;
}

void step_matrix(const Multiply& multiply, const MuonStep& of, size_t which, const float* coefficient) {
    static thread_local Scratch<> memory;
    const size_t rows = of.rows, cols = of.cols, size = rows * cols;
    float* x = memory.of(room(rows, cols));
    float *weight = of.weight + which * size, *momentum = of.momentum + which * size;
    const float* gradient = of.gradient + which * size;
    const float beta = of.beta, keep = of.keep, rate = of.rate;
    by_vectors(size, [=](size_t i, auto some) {
        const floats g = load_some(gradient + i, some), before = load_some(momentum + i, some);
        const floats m = before + (g - before) * (1 - beta);
        store_some(momentum + i, m, some);
        store_some(x + i, m - (m - g) * (1 - beta), some);
    });
    const float* update = orthogonalize(multiply, x, rows, cols, of.steps, coefficient);
    by_vectors(size, [=](size_t i, auto some) {
        store_some(weight + i, keep * load_some(weight + i, some) + rate * load_some(update + i, some), some);
    });
}

}  // namespace

// All matrices of all batches. coefficient: a, b, c of the iteration.
extern "C" void cadre_muon(const MuonStep* all, int64_t count, const float* coefficient, int32_t factors, int32_t threads) {
    const Multiply multiply{(Factors)factors};
    std::vector<std::pair<const MuonStep*, int64_t>> matrices;
    for (int64_t i = 0; i < count; i++)
        for (int64_t which = 0; which < all[i].batch && all[i].rows && all[i].cols; which++) matrices.emplace_back(all + i, which);
    // The largest first: the threads then end together.
    std::stable_sort(matrices.begin(), matrices.end(),
                     [](auto a, auto b) { return a.first->rows * a.first->cols > b.first->rows * b.first->cols; });
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = 0; i < matrices.size(); i++) step_matrix(multiply, *matrices[i].first, matrices[i].second, coefficient);
}

// from, to: [batch, rows, cols].
extern "C" void cadre_orthogonalize(const float* from, int64_t batch, int64_t rows, int64_t cols, int32_t steps, const float* coefficient,
                                    int32_t factors, int32_t threads, float* to) {
    const Multiply multiply{(Factors)factors};
    const size_t size = rows * cols;
    if (!size) return;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < batch; i++) {
        static thread_local Scratch<> memory;
        float* x = memory.of(room(rows, cols));
        std::copy_n(from + i * size, size, x);
        std::copy_n(orthogonalize(multiply, x, rows, cols, steps, coefficient), size, to + i * size);
    }
}
