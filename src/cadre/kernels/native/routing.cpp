// The router behind its logits, for training: every token's choices and their weights, what balance losses ask, and gradients.
#include "layout.h"
#include "router.h"

struct Routing {
    const float* logit;  // [tokens, experts]
    Router router;
    float* score;     // [tokens, experts]
    int64_t* expert;  // [tokens, top_k]
    float* weight;    // [tokens, top_k]
    int64_t tokens;
    int32_t threads;
};

struct RoutingGradient {
    const float *weight, *score;  // either may be null: no gradient came
    float* logit;
};

LAYOUT(Router, correction, experts, top_k, groups, top_groups, sigmoid, normed, scaling)
LAYOUT(Routing, logit, router, score, expert, weight, tokens, threads)
LAYOUT(RoutingGradient, weight, score, logit)

namespace {

void route_back(const Routing& routing, const RoutingGradient& d, int64_t t) {
    const Router& r = routing.router;
    const int64_t E = r.experts;
    const float* score = routing.score + t * E;
    float* to = d.logit + t * E;
    if (d.score) std::copy_n(d.score + t * E, E, to);
    else std::fill(to, to + E, 0.0f);
    if (d.weight) {
        const int64_t* expert = routing.expert + t * r.top_k;
        const float* d_weight = d.weight + t * r.top_k;
        float total = 0.0f, along = 0.0f;
        for (int k = 0; k < r.top_k; k++) total += score[expert[k]], along += d_weight[k] * score[expert[k]];
        const float factor = r.normed ? r.scaling / (total + TINY) : r.scaling;
        const float mean = r.normed ? along / (total + TINY) : 0.0f;
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
    for (int64_t t = 0; t < routing->tokens; t++) {
        const int64_t all = t * routing->router.experts, own = t * routing->router.top_k;
        route(routing->router, routing->logit + all, routing->score + all, routing->expert + own, routing->weight + own);
    }
}

extern "C" void cadre_routing_gradient(const Routing* routing, const RoutingGradient* gradient) {
#pragma omp parallel for num_threads(routing->threads) schedule(static)
    for (int64_t t = 0; t < routing->tokens; t++) route_back(*routing, *gradient, t);
}

// The `count` experts of greatest logits of each token, [tokens, count].
extern "C" void cadre_top_experts(const float* logit, int64_t tokens, int64_t experts, int64_t count, int32_t threads, int64_t* expert) {
    const int64_t vectors = vectors_of(experts);
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch<> memory;
        float* wanted = memory.of(vectors * LANES);
        std::fill(wanted, wanted + vectors * LANES, -INFINITY);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            std::copy_n(logit + t * experts, experts, wanted);
            for (int64_t k = 0; k < count; k++) {
                const int64_t e = std::min(best_of(wanted, vectors), experts - 1);
                wanted[e] = -INFINITY, expert[t * count + k] = e;
            }
        }
    }
}

// met[t] = <frequency, score[t]> / sum(score[t]), the frequencies [experts] being those of the token's stretch of `length` tokens;
// total[t]: that sum.
extern "C" void cadre_balance_terms(const float* score, const float* frequency, int64_t tokens, int64_t experts, int64_t length,
                                    int32_t threads, float* met, float* total) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const float *own = score + t * experts, *with = frequency + t / length * experts;
        floats sums = {}, dots = {};
        by_vectors(experts, [&](int64_t e, auto n) {
            const floats v = load_some(own + e, n);
            sums += v, dots += v * load_some(with + e, n);
        });
        total[t] = sum(sums);
        met[t] = sum(dots) / total[t];
    }
}

// The gradient of score, from that of met.
extern "C" void cadre_balance_terms_gradient(const float* frequency, const float* met, const float* total, const float* d_met,
                                             int64_t tokens, int64_t experts, int64_t length, int32_t threads, float* d_score) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const float *with = frequency + t / length * experts, factor = d_met[t] / total[t], mean = met[t];
        float* to = d_score + t * experts;
        by_vectors(experts, [=](int64_t e, auto n) { store_some(to + e, (load_some(with + e, n) - mean) * factor, n); });
    }
}
