// The router behind its logits, for training: every token's choices and their weights, and the gradient.
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
