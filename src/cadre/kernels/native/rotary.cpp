// Rotary position embedding of whole rows of heads, or its gradient, in one pass over memory.
#include <cstring>

#include "vector.h"

// y[rows, heads, width] from x, whose rows are `stride` apart: of every head the pairs (i, i + turned / 2) are turned, or turned
// `back`, by the row's position, which is its number modulo `positions`; what lies beyond `turned` stays. turn[positions]
// [turned / 2] holds cosines and sines side by side.
extern "C" void cadre_rotary(const float* x, int64_t stride, const float* turn, int64_t rows, int64_t positions, int32_t heads,
                             int32_t width, int32_t turned, int32_t back, int32_t threads, float* y) {
    const size_t half = (size_t)turned / 2;
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch<float> memory;
        float *cosine = memory.of(2 * half), *sine = cosine + half;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const float* own = turn + (size_t)(row % positions) * turned;
            for (size_t i = 0; i < half; i++) {
                cosine[i] = own[2 * i];
                sine[i] = back ? -own[2 * i + 1] : own[2 * i + 1];
            }
            for (int32_t h = 0; h < heads; h++) {
                const float* from = x + row * stride + (int64_t)h * width;
                float* to = y + (row * heads + h) * width;
                by_vectors(half, [=](size_t i, auto n) {
                    const floats a = load_some(from + i, n), b = load_some(from + half + i, n);
                    const floats c = load_some(cosine + i, n), s = load_some(sine + i, n);
                    store_some(to + i, a * c - b * s, n);
                    store_some(to + half + i, a * s + b * c, n);
                });
                std::memcpy(to + turned, from + turned, (size_t)(width - turned) * sizeof(float));
            }
        }
    }
}
