// Cross-entropy of rows of logits and its gradient, written over the logits.
#include <cmath>

#include "vector.h"

// loss[n] = weight[n] * -log softmax(logit[n])[target[n]]. With `gradient` the logits become the gradient of the losses' sum.
extern "C" void cadre_cross_entropy(float* logit, const int64_t* target, const float* weight, int64_t rows, int64_t words,
                                    int32_t gradient, int32_t threads, float* loss) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        float* row = logit + n * words;
        const float wanted = row[target[n]];
        floats tops = all(wanted);
        int64_t whole = 0;
        for (; whole + LANES <= words; whole += LANES) {
            floats v = load(row + whole);
            tops = v > tops ? v : tops;
        }
        float top = largest(tops);
        for (int64_t i = whole; i < words; i++) top = row[i] > top ? row[i] : top;
        floats sums = {};
        float total = 0.0f;
        by_vectors(words, [&](size_t i, auto count) {
            floats p = exponential(load_some(row + i, count) - top);
            if (gradient) store_some(row + i, p, count);
            if (count == LANES) sums += p;
            else
                for (int j = 0; j < count; j++) total += p[j];
        });
        total += sum(sums);
        loss[n] = weight[n] * (std::log(total) + top - wanted);
        if (!gradient) continue;
        const float share = weight[n] / total;
        by_vectors(words, [=](size_t i, auto count) { store_some(row + i, load_some(row + i, count) * share, count); });
        row[target[n]] -= weight[n];
    }
}
