// Root-mean-square norm with its gradient, each in one pass over memory.
#include <cmath>
#include <memory>

#include "vector.h"

namespace {

struct Sizes {
    int64_t rows, width;
    int threads;
    int64_t first(int thread) const { return rows * thread / threads; }
};

}  // namespace

// y = x * scale * weight with scale = 1 / sqrt(mean(x^2) + eps) of each row, kept in scale[rows]. Rows of x are `stride` apart.
extern "C" void cadre_norm_training(const float* x, int64_t stride, const float* weight, float eps, int64_t rows, int64_t width,
                                    int32_t threads, float* y, float* scale) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const float* from = x + i * stride;
        float* to = y + i * width;
        floats squares = {};
        by_vectors(width, [&](int64_t d, auto n) {
            floats v = load_some(from + d, n);
            squares += v * v;
        });
        const float s = scale[i] = 1.0f / std::sqrt(sum(squares) / (float)width + eps);
        by_vectors(width, [=](int64_t d, auto n) {
            store_some(to + d, load_some(from + d, n) * s * load_some(weight + d, n), n);
        });
    }
}

// The gradient of x [rows, width] and of weight, from that of y (rows `d_stride` apart).
extern "C" void cadre_norm_training_gradient(const float* x, int64_t stride, const float* weight, const float* scale,
                                             const float* d_y, int64_t d_stride, int64_t rows, int64_t width, int32_t threads,
                                             float* d_x, float* d_weight) {
    const Sizes sizes{rows, width, threads};
    std::unique_ptr<float[]> sums(new float[(size_t)threads * width]());
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        float* own = sums.get() + thread * width;
        for (int64_t i = sizes.first(thread); i < sizes.first(thread + 1); i++) {
            const float *from = x + i * stride, *d = d_y + i * d_stride;
            const float s = scale[i];
            floats dots = {};
            by_vectors(width, [&](int64_t j, auto n) {
                floats v = load_some(d + j, n) * load_some(from + j, n);
                dots += v * load_some(weight + j, n);
                store_some(own + j, load_some(own + j, n) + v * s, n);
            });
            const float along = sum(dots) * s * s * s / (float)width;
            float* to = d_x + i * width;
            by_vectors(width, [=](int64_t j, auto n) {
                store_some(to + j, load_some(d + j, n) * load_some(weight + j, n) * s - load_some(from + j, n) * along, n);
            });
        }
    }
    for (int64_t j = 0; j < width; j++) {
        float total = 0.0f;
        for (int thread = 0; thread < threads; thread++) total += sums[thread * width + j];
        d_weight[j] = total;
    }
}
