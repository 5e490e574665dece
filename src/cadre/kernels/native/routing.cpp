// The router behind its logits: affinities, the choice of experts and their weights, and the gradient (DeepSeek-V3 report,
// equations 12 to 16).
#include <algorithm>
#include <cmath>

#include "vector.h"

struct Routing {
    const float *logit, *correction;  // [tokens, experts]; [experts], added to affinities for the choice only, or null
    float* score;                     // [tokens, experts] affinities
    int64_t* expert;                  // [tokens, top_k] choices, best first; of equals the first
    float* weight;                    // [tokens, top_k]
    int64_t tokens, experts;
    int32_t top_k, groups, top_groups, sigmoid, normed;
    float scaling;
    int32_t threads;
};

struct RoutingGradient {
    const float *weight, *score;  // either may be null: no gradient came
    float* logit;
};

namespace {

constexpr float NOTHING = 1e-20f;  // what keeps a sum of vanished affinities from dividing by 0

int64_t vectors_of(int64_t n) { return (n + LANES - 1) / LANES; }

ints lanes() {
    alignas(64) static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return read<ints>(numbers);
}

int32_t smallest(ints v) {
#if defined(__AVX512F__)
    return _mm512_reduce_min_epi32((__m512i)v);
#endif
    int32_t x[LANES];
    std::memcpy(x, &v, sizeof v);
    return *std::min_element(x, x + LANES);
}

// The first of the largest of `count` whole vectors.
int64_t best_of(const float* x, int64_t count) {
    floats best = load(x);
    ints place = lanes();
    for (int64_t i = 1; i < count; i++) {
        floats v = load(x + i * LANES);
        ints better = v > best;
        best = better ? v : best;
        place = better ? lanes() + (int32_t)(i * LANES) : place;
    }
    return smallest(best == all(largest(best)) ? place : INT32_MAX - ints{});
}

void affinities(const Routing& r, const float* logit, float* score) {
    const int64_t E = r.experts;
    if (r.sigmoid) {
        by_vectors(E, [=](int64_t e, auto n) {
            store_some(score + e, reciprocal(1.0f + exponential(-load_some(logit + e, n))), n);
        });
        return;
    }
    const float most = *std::max_element(logit, logit + E);
    by_vectors(E, [=](int64_t e, auto n) { store_some(score + e, exponential(load_some(logit + e, n) - most), n); });
    floats sums = {};
    by_vectors(E, [&](int64_t e, auto n) { sums += load_some(score + e, n); });
    const float total = sum(sums);
    by_vectors(E, [=](int64_t e, auto n) { store_some(score + e, load_some(score + e, n) / total, n); });
}

// Closes (with minus infinity) all groups but the best: by their two best experts' sum, or by their best for a softmax.
void close_groups(const Routing& r, float* wanted, float* worth) {
    const int64_t size = r.experts / r.groups;
    for (int g = 0; g < r.groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t e = g * size; e < (g + 1) * size; e++) {
            const float v = wanted[e];
            if (v > first) second = first, first = v;
            else if (v > second) second = v;
        }
        worth[g] = r.sigmoid ? first + second : first;
    }
    std::fill(worth + r.groups, worth + vectors_of(r.groups) * LANES, -INFINITY);
    static thread_local std::vector<char> open;
    open.assign(r.groups, 0);
    for (int i = 0; i < r.top_groups; i++) {
        const int64_t g = std::min<int64_t>(best_of(worth, vectors_of(r.groups)), r.groups - 1);
        worth[g] = -INFINITY, open[g] = 1;
    }
    for (int g = 0; g < r.groups; g++)
        if (!open[g]) std::fill(wanted + g * size, wanted + (g + 1) * size, -INFINITY);
}

void route(const Routing& r, int64_t t) {
    static thread_local Scratch<> memory;
    const int64_t E = r.experts, count = vectors_of(E);
    float* wanted = memory.of((count + vectors_of(r.groups)) * LANES);
    float* score = r.score + t * E;
    affinities(r, r.logit + t * E, score);
    std::fill(wanted + (count - 1) * LANES, wanted + count * LANES, -INFINITY);
    by_vectors(E, [&](int64_t e, auto n) {
        floats v = load_some(score + e, n);
        store_some(wanted + e, r.correction ? v + load_some(r.correction + e, n) : v, n);
    });
    floats sums = {};
    by_vectors(E, [&](int64_t e, auto n) { sums += load_some(score + e, n); });
    const float all_of_them = sum(sums);  // NaN if any is: no comparison would choose that one, and the loss must tell
    if (r.groups > 1 && r.top_groups < r.groups) close_groups(r, wanted, wanted + count * LANES);
    float total = 0.0f;
    for (int k = 0; k < r.top_k; k++) {
        // Without a largest (NaN) any expert will do, as long as there is one of that number.
        const int64_t e = std::min(best_of(wanted, count), E - 1);
        wanted[e] = -INFINITY;
        r.expert[t * r.top_k + k] = e;
        total += r.weight[t * r.top_k + k] = score[e];
    }
    const float factor = all_of_them != all_of_them ? all_of_them : r.normed ? r.scaling / (total + NOTHING) : r.scaling;
    for (int k = 0; k < r.top_k; k++) r.weight[t * r.top_k + k] *= factor;
}

void route_back(const Routing& r, const RoutingGradient& d, int64_t t) {
    const int64_t E = r.experts;
    const float* score = r.score + t * E;
    float* to = d.logit + t * E;
    if (d.score) std::copy_n(d.score + t * E, E, to);
    else std::fill(to, to + E, 0.0f);
    if (d.weight) {
        const int64_t* expert = r.expert + t * r.top_k;
        const float* d_weight = d.weight + t * r.top_k;
        float total = 0.0f, along = 0.0f;
        for (int k = 0; k < r.top_k; k++) total += score[expert[k]], along += d_weight[k] * score[expert[k]];
        const float factor = r.normed ? r.scaling / (total + NOTHING) : r.scaling;
        const float mean = r.normed ? along / (total + NOTHING) : 0.0f;
        for (int k = 0; k < r.top_k; k++) to[expert[k]] += factor * (d_weight[k] - mean);
    }
    if (r.sigmoid) {
        by_vectors(E, [=](int64_t e, auto n) {
            floats v = load_some(score + e, n);
            store_some(to + e, load_some(to + e, n) * v * (1.0f - v), n);
        });
        return;
    }
    floats dots = {};
    by_vectors(E, [&](int64_t e, auto n) { dots += load_some(to + e, n) * load_some(score + e, n); });
    const float along = sum(dots);
    by_vectors(E, [=](int64_t e, auto n) { store_some(to + e, (load_some(to + e, n) - along) * load_some(score + e, n), n); });
}

}  // namespace

extern "C" void cadre_routing(const Routing* routing) {
#pragma omp parallel for num_threads(routing->threads) schedule(static)
    for (int64_t t = 0; t < routing->tokens; t++) route(*routing, t);
}

extern "C" void cadre_routing_gradient(const Routing* routing, const RoutingGradient* gradient) {
#pragma omp parallel for num_threads(routing->threads) schedule(static)
    for (int64_t t = 0; t < routing->tokens; t++) route_back(*routing, *gradient, t);
}
