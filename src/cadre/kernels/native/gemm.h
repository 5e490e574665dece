// Products of row-major float32 matrices on the calling thread: by kernels of ours (gemm.cpp) where those are faster, else
// through the BLAS that torch brought along.
#pragma once

#include "words.h"

typedef void Sgemm(const char* a_turned, const char* b_turned, const int32_t* m, const int32_t* n, const int32_t* k,
                   const float* alpha, const float* a, const int32_t* a_stride, const float* b, const int32_t* b_stride,
                   const float* beta, float* c, const int32_t* c_stride);

inline Sgemm* blas_sgemm = nullptr;  // set once, right after loading

// Rows apart by `stride` floats; `turned`: the matrix meant is the transpose of what lies there. With `index`, which only kernels
// of ours read, row i of what lies there is row index[i] of `data`.
struct Operand {
    const float* data;
    size_t stride;
    bool turned = false;
    const int64_t* index = nullptr;
    const float* row(size_t i) const { return data + (index ? (size_t)index[i] : i) * stride; }
    // From that row and column on.
    Operand from(size_t row, size_t column) const {
        return {data + column + (index ? 0 : row * stride), stride, turned, index ? index + row : nullptr};
    }
};

// Whether `multiply_ours` can make them on this machine and is the faster way; of bfloat16 only where the processor can.
bool ours(Factors factors);

void multiply_ours(size_t M, size_t N, size_t K, Operand a, Operand b, float* c, size_t c_stride, float keep, float scale, Factors factors);

// c[M, N] = scale * a[M, K] b[K, N] + keep * c; what c holds is not looked at if `keep` is 0. bfloat16 is asked for only where
// there are `ours` of it.
struct Multiply {
    Factors factors = Factors::FLOAT32;
    void operator()(size_t M, size_t N, size_t K, Operand a, Operand b, float* c, size_t c_stride, float keep = 0.0f,
                    float scale = 1.0f) const {
        if (ours(factors)) return multiply_ours(M, N, K, a, b, c, c_stride, keep, scale, factors);
        // Fortran's matrices lie by columns: seen so, each of ours is its transpose, and c^T = b^T a^T.
        const int32_t m = (int32_t)N, n = (int32_t)M, k = (int32_t)K;
        const int32_t a_stride = (int32_t)b.stride, b_stride = (int32_t)a.stride, to = (int32_t)c_stride;
        blas_sgemm(b.turned ? "T" : "N", a.turned ? "T" : "N", &m, &n, &k, &scale, b.data, &a_stride, a.data, &b_stride, &keep, c, &to);
    }
};
