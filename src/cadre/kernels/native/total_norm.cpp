// The norm of many tensors together, in one pass over memory.
#include <algorithm>
#include <cmath>
#include <vector>

#include "layout.h"
#include "vector.h"

struct Span {
    const float* data;
    int64_t count;
};

LAYOUT(Span, data, count)

namespace {

constexpr int64_t CHUNK = 1 << 14;  // elements that a thread takes at a time

float squares_of(const float* x, int64_t count) {
    constexpr int CHAINS = 4;  // an addition need not wait for the one before
    floats sums[CHAINS] = {};
    int64_t i = 0;
    for (; i + CHAINS * LANES <= count; i += CHAINS * LANES)
        for (int n = 0; n < CHAINS; n++) {
            const floats v = load(x + i + n * LANES);
            sums[n] += v * v;
        }
    by_vectors(count - i, [&](int64_t j, auto n) {
        const floats v = load_some(x + i + j, n);
        sums[0] += v * v;
    });
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace

// The root of the sum of all squares; the same whatever the number of threads.
extern "C" double cadre_total_norm(const Span* spans, int64_t count, int32_t threads) {
    std::vector<Span> chunks;
    for (const Span* span = spans; span < spans + count; span++)
        for (int64_t i = 0; i < span->count; i += CHUNK) chunks.push_back({span->data + i, std::min(CHUNK, span->count - i)});
    std::vector<float> squares(chunks.size());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t i = 0; i < chunks.size(); i++) squares[i] = squares_of(chunks[i].data, chunks[i].count);
    double total = 0;
    for (float square : squares) total += square;
    return std::sqrt(total);
}
