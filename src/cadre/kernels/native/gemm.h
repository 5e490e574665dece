// Products of row-major float32 matrices on the calling thread: by kernels of ours (gemm.cpp) where those are faster, else
// through the BLAS that torch brought along.
#pragma once

#include "words.h"

typedef void Sgemm(const char* a_turned, const char* b_turned, const int32_t* m, const int32_t* n, const int32_t* k,
                   const float* alpha, const float* a, const int32_t* a_stride, const float* b, const int32_t* b_stride,
                   const float* beta, float* c, const int32_t* c_stride);

inline Sgemm* blas_sgemm = nullptr;  // set once, right after loading

// Rows apart by `stride` elements; `turned`: the matrix meant is the transpose of what lies there. `index` and `halves` are for
// kernels of ours alone: row i of what lies there is row index[i] of `data`; its elements are bfloat16. Factors must be, too.
struct Operand {
    const float* data;
    size_t stride;
    bool turned = false;
    const int64_t* index = nullptr;
    bool halves = false;
    const float* at(size_t i) const { return halves ? (const float*)((const uint16_t*)data + i) : data + i; }
    const float* row(size_t i) const { return at((index ? (size_t)index[i] : i) * stride); }
    Operand transposed() const { return {data, stride, !turned, index, halves}; }
    // From that row and column on.
    Operand from(size_t row, size_t column) const {
        return {at(column + (index ? 0 : row * stride)), stride, turned, index ? index + row : nullptr, halves};
    }
};

// What will be read next, fetched a cache line at a time while products are made: memory would otherwise wait for arithmetic, and
// arithmetic for memory. In order of `rows` and `block`; what finds no place is not fetched.
class Ahead {
    static constexpr size_t LINE = 16, MOST = 12288, PLACES = 8;  // floats of a line; lines that may lie in the cache unused
    struct Part {
        Operand from;
        size_t count, lines;
    } parts_[PLACES];
    size_t part_ = 0, parts_end_ = 0, row_ = 0;

    // Where a row is, its lines. With nothing to fetch it stays at one line.
    struct Place {
        const float* at;
        size_t left, step;
    } place_;

    void rest() { part_ = parts_end_ = 0, place_ = {(const float*)this, SIZE_MAX, 0}; }
    void begin_row() { place_ = {parts_[part_].from.row(row_), parts_[part_].lines, LINE}; }
    // No call is made here: it is part of a loop whose sums fill the registers.
    void next_row() {
        if (++row_ == parts_[part_].count) {
            row_ = 0;
            if (++part_ == parts_end_) return rest();
        }
        begin_row();
    }

public:
    Ahead() { rest(); }
    // The first `count` rows that lie there, of each the first columns.
    void rows(const Operand& from, size_t count, size_t columns) {
        const size_t lines = ((from.halves ? (columns + 1) / 2 : columns) + LINE - 1) / LINE;
        if (!lines || !(count = std::min(count, MOST / lines)) || parts_end_ == PLACES) return;
        parts_[parts_end_++] = {from, count, lines};
        if (parts_end_ == 1) row_ = 0, begin_row();
    }
    // Of an operand so many rows from `first` on, of each so many factors from `k` on.
    void block(const Operand& from, size_t first, size_t k, size_t count, size_t factors) {
        if (from.turned) rows(from.from(k, first), factors, count);
        else rows(from.from(first, k), count, factors);
    }
    // Fetches a line each time it is called, as long as it lives.
    class Fetching {
        Ahead& ahead_;
        Place place_;

    public:
        explicit Fetching(Ahead& ahead) : ahead_(ahead), place_(ahead.place_) {}
        ~Fetching() { ahead_.place_ = place_; }
        void operator()() {
            __builtin_prefetch(place_.at, 0, 2);
            place_.at += place_.step;
            if (__builtin_expect(!--place_.left, 0)) ahead_.next_row(), place_ = ahead_.place_;
        }
    };
};

// Whether `multiply_ours` can make them on this machine and is the faster way; of bfloat16 only where the processor can.
bool ours(Factors factors);

void multiply_ours(size_t M, size_t N, size_t K, Operand a, Operand b, float* c, size_t c_stride, float keep, float scale, Factors factors,
                   Ahead* ahead);

// c[M, N] = scale * a[M, K] b[K, N] + keep * c; what c holds is not looked at if `keep` is 0. bfloat16 is asked for only where
// there are `ours` of it. `ahead`: what to fetch meanwhile, where these are ours.
struct Multiply {
    Factors factors = Factors::FLOAT32;
    Ahead* ahead = nullptr;
    void operator()(size_t M, size_t N, size_t K, Operand a, Operand b, float* c, size_t c_stride, float keep = 0.0f,
                    float scale = 1.0f) const {
        if (ours(factors)) return multiply_ours(M, N, K, a, b, c, c_stride, keep, scale, factors, ahead);
        // Fortran's matrices lie by columns: seen so, each of ours is its transpose, and c^T = b^T a^T.
        const int32_t m = (int32_t)N, n = (int32_t)M, k = (int32_t)K;
        const int32_t a_stride = (int32_t)b.stride, b_stride = (int32_t)a.stride, to = (int32_t)c_stride;
        blas_sgemm(b.turned ? "T" : "N", a.turned ? "T" : "N", &m, &n, &k, &scale, b.data, &a_stride, a.data, &b_stride, &keep, c, &to);
    }
};
