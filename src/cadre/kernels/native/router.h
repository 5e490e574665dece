// How a token's experts are chosen and weighted, from the router's logits (DeepSeek-V3 report, equations 12 to 16).
#pragma once

#include <algorithm>
#include <cmath>

#include "vector.h"

// correction: [experts], added to affinities for the choice only, or null.
struct Router {
    const float* correction;
    int64_t experts;
    int32_t top_k, groups, top_groups, sigmoid, normed;
    float scaling;
};

constexpr float TINY = 1e-20f;  // what keeps a sum of vanished affinities from dividing by 0

static inline int64_t vectors_of(int64_t n) { return (n + LANES - 1) / LANES; }

static inline int32_t smallest(ints v) {
#if defined(__AVX512F__)
    return _mm512_reduce_min_epi32((__m512i)v);
#endif
    int32_t x[LANES];
    std::memcpy(x, &v, sizeof v);
    return *std::min_element(x, x + LANES);
}

// The first of the largest of `count` whole vectors.
static inline int64_t best_of(const float* x, int64_t count) {
    floats best = load(x);
    ints place = lane_numbers();
    for (int64_t i = 1; i < count; i++) {
        floats v = load(x + i * LANES);
        ints better = v > best;
        best = better ? v : best;
        place = better ? lane_numbers() + (int32_t)(i * LANES) : place;
    }
    return smallest(best == all(largest(best)) ? place : INT32_MAX - ints{});
}

static inline void affinities(const Router& r, const float* logit, float* score) {
    const int64_t E = r.experts;
    if (r.sigmoid) {
        by_vectors(E, [=](int64_t e, auto n) {
            store_some(score + e, reciprocal(1.0f + exponential(-load_some(logit + e, n))), n);
        });
        return;
    }
    floats high = all(logit[0]);
    int64_t whole = 0;
    for (; whole + LANES <= E; whole += LANES) high = load(logit + whole) > high ? load(logit + whole) : high;
    float most = largest(high);
    for (; whole < E; whole++) most = std::max(most, logit[whole]);
    by_vectors(E, [=](int64_t e, auto n) { store_some(score + e, exponential(load_some(logit + e, n) - most), n); });
    floats sums = {};
    by_vectors(E, [&](int64_t e, auto n) { sums += load_some(score + e, n); });
    const float total = sum(sums);
    by_vectors(E, [=](int64_t e, auto n) { store_some(score + e, load_some(score + e, n) / total, n); });
}

// Closes (with minus infinity) all groups but the best: by their two best experts' sum, or by their best for a softmax.
static inline void close_groups(const Router& r, float* wanted, float* worth) {
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

// From the logits of a token to its affinities [experts], its choices, best first (of equals the first), and their weights.
template <class Number>
static inline void route(const Router& r, const float* logit, float* score, Number* expert, float* weight) {
    static thread_local Scratch<> memory;
    const int64_t E = r.experts, count = vectors_of(E);
    float* wanted = memory.of((count + vectors_of(r.groups)) * LANES);
    affinities(r, logit, score);
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
        expert[k] = (Number)e;
        total += weight[k] = score[e];
    }
    const float factor = all_of_them != all_of_them ? all_of_them : r.normed ? r.scaling / (total + TINY) : r.scaling;
    for (int k = 0; k < r.top_k; k++) weight[k] *= factor;
}
