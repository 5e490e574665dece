// AdamW's step with moments of bfloat16, on many tensors: one pass over memory, 20 bytes a parameter.
#include <algorithm>
#include <vector>

#include "layout.h"
#include "vector.h"

// `count` elements of each. mean <- lerp(mean, gradient, 1 - beta1), square <- beta2 square + (1 - beta2) gradient^2, and
// weight <- keep * weight + rate * mean / (unbias * sqrt(square) + eps) by both as they are before they are rounded.
struct AdamWStep {
    float* weight;
    const float* gradient;
    uint16_t *mean, *square;
    int64_t count;
    float beta1, beta2, eps, keep, rate, unbias;
};

LAYOUT(AdamWStep, weight, gradient, mean, square, count, beta1, beta2, eps, keep, rate, unbias)

namespace {

constexpr int64_t CHUNK = 1 << 14;  // elements that a thread takes at a time

struct Chunk {
    const AdamWStep* of;
    int64_t start;
};

void step_chunk(const AdamWStep& of, int64_t start) {
    float* weight = of.weight + start;
    const float* gradient = of.gradient + start;
    uint16_t *mean = of.mean + start, *square = of.square + start;
    const float beta1 = of.beta1, beta2 = of.beta2, eps = of.eps, keep = of.keep, rate = of.rate, unbias = of.unbias;
    by_vectors(std::min(CHUNK, of.count - start), [=](size_t i, auto n) {
        const floats g = load_some(gradient + i, n), before = load_some(mean + i, n);
        const floats m = before + (g - before) * (1 - beta1);
        const floats v = load_some(square + i, n) * beta2 + g * g * (1 - beta2);
        store_some(mean + i, m, n);
        store_some(square + i, v, n);
        store_some(weight + i, load_some(weight + i, n) * keep + m * rate / (square_root(v) * unbias + eps), n);
    });
}

}  // namespace

extern "C" void cadre_adamw(const AdamWStep* all, int64_t count, int32_t threads) {
    std::vector<Chunk> chunks;
    for (const AdamWStep* of = all; of < all + count; of++)
        for (int64_t start = 0; start < of->count; start += CHUNK) chunks.push_back({of, start});
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t i = 0; i < chunks.size(); i++) step_chunk(*chunks[i].of, chunks[i].start);
}
