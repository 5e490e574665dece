// Products by packed panels (Goto, van de Geijn: Anatomy of High-Performance Matrix Multiplication, 2008): both operands are
// copied, rounded on the way if asked to, into the order in which a tile of c reads them. Elements of c are summed in the same
// order whatever is computed beside them.
#include "gemm.h"

#include <cstdlib>

#if defined(__AVX512BW__)

namespace {

constexpr size_t ROWS = 8;    // of a tile: ROWS x WIDEST sums and what they meet fit the registers
constexpr size_t WIDEST = 3;  // vectors of a tile's row
constexpr size_t DEPTH = 256;  // words of a panel's row
constexpr size_t TALL = 256, BROAD = 512;  // rows of a and columns of b packed at a time: both stay in the second-level cache
constexpr size_t APART = 16;  // words between the rows of a packed a beyond their length: rows must not share cache sets

// The processor does not foresee which of indexed rows is next. `left`: rows from this one on.
void prefetch(const Operand& from, size_t row, size_t left, size_t columns) {
    constexpr size_t EARLY = 12, LINE = 16;
    if (from.halves) columns = (columns + 1) / 2;
    if (from.index && left > EARLY)
        for (size_t i = 0; i < columns; i += LINE) __builtin_prefetch(from.row(row + EARLY) + i);
}

// Calls f with the pointers as what they are: to floats, or of `halves` to bfloat16.
template <class Kind, class F, class... Pointer>
void as_they_lie(const Operand& from, F f, Pointer... pointer) {
    if constexpr (Kind::FACTORS == 2)
        if (from.halves) return f((const uint16_t*)pointer...);
    f(pointer...);
}

// Of `rows` rows that lie one after the other along K, their first `factors` factors: to[row][word], rows `stride` words apart.
template <class Kind>
void pack_along(const Operand& from, size_t rows, size_t factors, typename Kind::word* to, size_t stride) {
    constexpr size_t STEP = 16 * Kind::FACTORS;
    for (size_t r = 0; r < rows; r++) {
        prefetch(from, r, rows - r, factors);
        auto pack = [&](auto row) {
            for (size_t k = 0; k < factors; k += STEP) Kind::store(to + r * stride + k / Kind::FACTORS, Kind::along(row + k, factors - k));
        };
        as_they_lie<Kind>(from, pack, from.row(r));
    }
}

// The same of rows that lie side by side: to[word][row], words `stride` apart, whole vectors of rows.
template <class Kind>
void pack_across(const Operand& from, size_t rows, size_t factors, typename Kind::word* to, size_t stride) {
    for (size_t k = 0; k < factors; k += Kind::FACTORS, to += stride) {
        const bool last = k + 1 == factors;
        prefetch(from, k, factors - k, rows);
        if (!last) prefetch(from, k + 1, factors - k - 1, rows);
        auto pack = [&](auto first, auto second) {
            for (size_t r = 0; r < rows; r += 16) Kind::store(to + r, Kind::across(first + r, second + r, rows - r, last));
        };
        as_they_lie<Kind>(from, pack, from.row(k), from.row(last ? k : k + 1));
    }
}

// The same of rows that lie one after the other along K.
template <class Kind>
void pack_turned(const Operand& from, size_t rows, size_t factors, typename Kind::word* to, size_t stride) {
    constexpr size_t STEP = 16 * Kind::FACTORS;
    const size_t words = (factors + Kind::FACTORS - 1) / Kind::FACTORS;
    for (size_t r = 0; r < rows; r += 16)
        for (size_t k = 0; k < factors; k += STEP) {
            typename Kind::words x[16];
            // So many short stretches are more than the processor follows by itself.
            if (r + 32 <= rows)
                for (size_t i = 16; i < 32; i++) {
                    const float* next = from.from(0, k).row(r + i);
                    __builtin_prefetch(next);
                    if (STEP > 16 && !from.halves) __builtin_prefetch(next + 16);
                }
            for (size_t i = 0; i < 16; i++) {
                x[i] = typename Kind::words{};
                if (r + i >= rows) continue;
                as_they_lie<Kind>(from, [&](auto row) { x[i] = Kind::along(row + k, factors - k); }, from.row(r + i));
            }
            turn(x);
            const size_t first = k / Kind::FACTORS, count = std::min<size_t>(16, words - first);
            for (size_t i = 0; i < count; i++) Kind::store(to + (first + i) * stride + r, x[i]);
        }
}

// c's tile of HIGH rows and WIDE vectors, of which the last has `tail` columns. a[row][word] (or [word][row] if ACROSS) and
// b[word][column].
template <class Kind, int HIGH, int WIDE, bool ACROSS>
void tile(const typename Kind::word* a, size_t a_stride, const typename Kind::word* b, size_t words, float* c, size_t c_stride, int tail, float keep, float scale,
          Ahead& ahead) {
    floats sum[HIGH][WIDE] = {};
    add_products<Kind>(sum, a, ACROSS ? 1 : a_stride, ACROSS ? a_stride : 1, words, b, WIDE * 16, Ahead::Fetching(ahead));
#pragma GCC unroll 8
    for (int m = 0; m < HIGH; m++)
#pragma GCC unroll 3
        for (int n = 0; n < WIDE; n++) {
            const int some = n + 1 < WIDE ? LANES : tail;
            float* to = c + m * c_stride + n * 16;
            floats value = scale == 1.0f ? sum[m][n] : sum[m][n] * scale;
            if (keep != 0.0f) value += keep * load_some(to, some);
            store_some(to, value, some);
        }
}

template <class Kind, int WIDE, bool ACROSS>
void column_of_tiles(size_t rows, const typename Kind::word* a, size_t a_stride, const typename Kind::word* b, size_t words, float* c, size_t c_stride, int tail,
                     float keep, float scale, Ahead& ahead) {
    const size_t step = ACROSS ? 1 : a_stride;
    size_t m = 0;
    auto tiles = [&](auto high) {
        for (; m + high <= rows; m += high)
            tile<Kind, high, WIDE, ACROSS>(a + m * step, a_stride, b, words, c + m * c_stride, c_stride, tail, keep, scale, ahead);
    };
    tiles(std::integral_constant<int, ROWS>());
    tiles(std::integral_constant<int, 4>());
    tiles(std::integral_constant<int, 2>());
    tiles(std::integral_constant<int, 1>());
}

// How many vectors the next of b's panels has, if `left` are left: no lone one beside full ones, whose sums would wait for each
// other.
size_t panel_width(size_t left) { return left == 4 ? 2 : std::min(left, WIDEST); }

template <class Kind>
void multiply_packed(size_t M, size_t N, size_t K, Operand a, Operand b, float* c, size_t c_stride, float keep, float scale,
                     Ahead& ahead) {
    static thread_local Scratch<typename Kind::word> memory;
    // Of weights of bfloat16, which are read once for few rows, half as many: they lie in the cache beside those that are fetched
    // meanwhile.
    const size_t broad = b.halves && b.turned && !b.index ? BROAD / 2 : BROAD;
    constexpr size_t FACTORS = DEPTH * Kind::FACTORS, STRIDE = std::max(DEPTH, TALL) + APART;
    typename Kind::word* a_packed = memory.of(TALL * STRIDE + BROAD * DEPTH + 16 * DEPTH);
    typename Kind::word* b_packed = a_packed + TALL * STRIDE;
    // Rows of bfloat16 whose pairs are words already.
    const bool lies_packed = Kind::FACTORS == 2 && a.halves && !a.turned && !a.index && a.stride % 2 == 0 && K % 2 == 0;
    if (K == 0)
        for (size_t m = 0; m < M; m++)
            for (size_t n = 0; n < N; n++) c[m * c_stride + n] = keep == 0.0f ? 0.0f : keep * c[m * c_stride + n];
    for (size_t k = 0; k < K; k += FACTORS, keep = 1.0f) {
        const size_t factors = std::min(FACTORS, K - k), words = (factors + Kind::FACTORS - 1) / Kind::FACTORS;
        for (size_t n = 0; n < N; n += broad) {
            const size_t columns = std::min(broad, N - n), vectors = (columns + 15) / 16;
            typename Kind::word* panel = b_packed;
            for (size_t v = 0, wide; v < vectors; v += wide, panel += wide * 16 * words) {
                wide = panel_width(vectors - v);
                const size_t first = n + v * 16, count = std::min(wide * 16, N - first);
                if (b.turned) pack_turned<Kind>(b.from(first, k), count, factors, panel, wide * 16);
                else pack_across<Kind>(b.from(k, first), count, factors, panel, wide * 16);
            }
            for (size_t m = 0; m < M; m += TALL) {
                const size_t rows = std::min(TALL, M - m);
                const typename Kind::word* a_words = a_packed;
                size_t stride = a.turned ? TALL + APART : (words + 15) / 16 * 16 + APART;
                if (lies_packed) a_words = (const typename Kind::word*)a.from(m, k).data, stride = a.stride / Kind::FACTORS;
                else if (a.turned) pack_across<Kind>(a.from(k, m), rows, factors, a_packed, stride);
                else pack_along<Kind>(a.from(m, k), rows, factors, a_packed, stride);
                if (m + rows < M) {
                    ahead.block(a, m + rows, k, std::min(TALL, M - m - rows), factors);
                } else if (n + columns < N) {
                    ahead.block(b.transposed(), n + columns, k, std::min(broad, N - n - columns), factors);
                    if (M > TALL) ahead.block(a, 0, k, TALL, factors);
                } else if (k + factors < K) {
                    const size_t next = std::min(FACTORS, K - k - factors);
                    ahead.block(a, 0, k + factors, std::min(TALL, M), next);
                    ahead.block(b.transposed(), 0, k + factors, std::min(broad, N), next);
                }
                panel = b_packed;
                for (size_t v = 0, wide; v < vectors; v += wide, panel += wide * 16 * words) {
                    wide = panel_width(vectors - v);
                    const size_t first = n + v * 16;
                    const int tail = (int)(std::min(wide * 16, N - first) - (wide - 1) * 16);
                    auto tiles = [&](auto width, auto across) {
                        column_of_tiles<Kind, width, across>(rows, a_words, stride, panel, words, c + m * c_stride + first, c_stride, tail,
                                                             keep, scale, ahead);
                    };
                    auto of_width = [&](auto width) { a.turned ? tiles(width, std::true_type()) : tiles(width, std::false_type()); };
                    if (wide == 3) of_width(std::integral_constant<int, 3>());
                    else if (wide == 2) of_width(std::integral_constant<int, 2>());
                    else of_width(std::integral_constant<int, 1>());
                }
            }
        }
    }
}

}  // namespace

bool ours(Factors factors) {
    // The BLAS of torch's x86 builds (MKL) takes its AVX-512 paths on Intel's processors only.
    static const bool slow_blas = __builtin_cpu_is("amd");
    if (factors == Factors::FLOAT32) return slow_blas;
#if defined(CADRE_BFLOAT16)
    return true;
#else
    return false;
#endif
}

void multiply_ours(size_t M, size_t N, size_t K, Operand a, Operand b, float* c, size_t c_stride, float keep, float scale,
                   Factors factors, Ahead* ahead) {
    Ahead own;
    Ahead& next = ahead ? *ahead : own;
#if defined(CADRE_BFLOAT16)
    if (factors == Factors::BFLOAT16) return multiply_packed<Bfloat16Words>(M, N, K, a, b, c, c_stride, keep, scale, next);
#endif
    multiply_packed<FloatWords>(M, N, K, a, b, c, c_stride, keep, scale, next);
}

#else

bool ours(Factors) { return false; }
void multiply_ours(size_t, size_t, size_t, Operand, Operand, float*, size_t, float, float, Factors, Ahead*) {}

#endif

// Whether there is a kernel of ours for such products here that is faster than what torch has for float32.
extern "C" int32_t cadre_multiplies(int32_t factors) { return ours((Factors)factors); }

// c[M, N] = a[M, K] b[K, N] + keep * c by all threads, each with a share of c.
extern "C" void cadre_product(const float* a, int64_t a_stride, int32_t a_turned, const float* b, int64_t b_stride, int32_t b_turned,
                              int32_t b_halves, int64_t M, int64_t N, int64_t K, float keep, int32_t factors, int32_t threads, float* c, int64_t c_stride) {
    const Multiply multiply{(Factors)factors};
    const Operand all_a{a, (size_t)a_stride, a_turned != 0}, all_b{b, (size_t)b_stride, b_turned != 0, nullptr, b_halves != 0};
    // As square as may be: a thread packs what it reads of both operands.
    int64_t down = 1;
    for (int64_t d = 1; d <= threads; d++)
        if (threads % d == 0 && std::abs(M / d - N / (threads / d)) < std::abs(M / down - N / (threads / down))) down = d;
    const int64_t beside = threads / down;
    auto cut = [](int64_t n, int64_t i, int64_t parts) { return std::min(n, (n * i / parts + 15) / 16 * 16); };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < down * beside; part++) {
        const int64_t m = cut(M, part / beside, down), n = cut(N, part % beside, beside);
        const int64_t rows = cut(M, part / beside + 1, down) - m, columns = cut(N, part % beside + 1, beside) - n;
        if (rows <= 0 || columns <= 0) continue;
        multiply(rows, columns, K, a_turned ? all_a.from(0, m) : all_a.from(m, 0), b_turned ? all_b.from(n, 0) : all_b.from(0, n),
                 c + m * c_stride + n, c_stride, keep);
    }
}
