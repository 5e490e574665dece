// The experts' SwiGLU with gradients: each block of an expert's rows is gathered, multiplied and activated while it lies in the
// cache, and what comes out is added up per token in a fixed order, so that results never depend on which thread came first.
#include <algorithm>
#include <memory>
#include <new>

#include "gemm.h"
#include "layout.h"
#include "matrix.h"

// Rows sorted by expert: row r is a copy of token `token[r]`, and token t owns the rows row[t * choices ...], weighted. Without
// `token` rows are tokens as they are, nothing is weighted, and `row` and `weight` are not looked at. Rows beyond the sum of `load`
// are nobody's: choices that count for nothing.
struct ExpertsTraining {
    const float* x;  // [tokens, hidden]
    const int64_t *token, *row, *load;
    const float* weight;              // [tokens, choices]
    const float *gate, *up, *down;    // of the first expert: [width, hidden] twice, [hidden, width]; unused with the next two
    // Or null. Forward only, of quantized matrices: all experts' rows, gate first; multiplied as bfloat16.
    const Matrix *quantized_gate_up, *quantized_down;
    void* inner;                      // [rows, 2 * width] gate and up of every row, for the gradient, as wide as factors; null: not kept
    float* y;                         // [rows, hidden] room for the experts' outputs; unused without `token`
    float* out;                       // [tokens, hidden]
    int64_t tokens, rows, hidden, width, experts, choices;
    int64_t further;                  // elements from one expert's gate (and up) to the next one's
    Factors factors;
    int32_t halves;                   // whether the three matrices are of bfloat16: forward only
    int32_t adds;                     // with `token`: whether the outputs of tokens, backward their gradients, add to what is there
    int32_t threads;
};

struct ExpertsGradient {
    const float* out;
    float *x, *weight, *gate, *up, *down;  // as the operands; x or the three matrices may be null: not wanted
    float *x_rows, *weight_rows;           // room: [rows, hidden], and twice [rows]; unused without `token`
};

LAYOUT(ExpertsTraining, x, token, row, load, weight, gate, up, down, quantized_gate_up, quantized_down, inner, y, out, tokens,
        rows, hidden, width, experts, choices, further, factors, halves, adds, threads)
LAYOUT(ExpertsGradient, out, x, weight, gate, up, down, x_rows, weight_rows)

namespace {

// Rows at a time: what they need fits the second-level cache. More of them, backward, where the gradient of the matrices does
// not fit it either and is read and written once a block.
constexpr int64_t BLOCK = 256, BLOCK_SMALL = 128;
int64_t block_back(size_t D, size_t F) { return 3 * D * F > (1 << 20) ? BLOCK : BLOCK_SMALL; }
constexpr int64_t LEAST_SLICE = 1024;  // rows for which a gradient of their own is worth adding up
constexpr size_t CHUNK = 2048;
constexpr int64_t FEW = 96;  // rows for which matrices of bfloat16 are better multiplied as they lie than packed

// Rounded tokens, and gradients of their outputs.
thread_local Scratch<uint16_t> rounded, rounded_back;

struct Task {
    int64_t expert, begin, end;
    float* sums;  // where its gradient of the three matrices goes; null: to the gradient itself
};

// An expert whose rows were cut, and how many slices there are beyond the first.
struct Cut {
    int64_t expert, further;
};

// Rows cut into blocks of about equal size, at most one and a half times the size wished for.
struct Blocks {
    int64_t begin, rows, count;
    Blocks(int64_t begin, int64_t end, int64_t block)
        : begin(begin), rows(end - begin), count(std::max<int64_t>(1, (rows + block / 2) / block)) {}
    static constexpr int64_t most(int64_t block) { return 3 * block / 2; }
    int64_t start(int64_t i) const { return begin + rows * i / count; }
};

void gather(const float* x, const int64_t* token, int64_t count, size_t D, float* to) {
    constexpr int64_t EARLY = 4;  // the processor does not foresee which row is next
    constexpr size_t LINE = 16;
    for (int64_t i = 0; i < count; i++, to += D) {
        if (i + EARLY < count)
            for (size_t d = 0; d < D; d += LINE) __builtin_prefetch(x + token[i + EARLY] * D + d);
        std::memcpy(to, x + token[i] * D, D * sizeof(float));
    }
}

inline __attribute__((always_inline)) floats sigmoid(floats x) {
    const floats s = reciprocal(1.0f + exponential(-x));
    return x < all(-87.0f) ? floats{} : s;  // e^87 is as large as `exponential` gets, and times -1e38 not small
}

// `keep(i, v, n)` is given all of `inner`, element i on.
template <class Keep>
void activate(const float* inner, int64_t count, size_t F, float* h, Keep keep) {
    for (int64_t i = 0; i < count; i++, inner += 2 * F, h += F)
        by_vectors(F, [=](size_t f, auto n) {
            floats g = load_some(inner + f, n), u = load_some(inner + F + f, n);
            store_some(h + f, g * sigmoid(g) * u, n);
            keep(i * 2 * F + f, g, n), keep(i * 2 * F + F + f, u, n);
        });
}

// From the gradient d_h of the activations (to be multiplied by each row's weight) the gradient of gate and up, the weighted
// activations, and each row's <activations, d_h>.
template <class T>
void activate_back(const T* inner, const float* d_h, const float* weight, int64_t count, size_t F, float* d_inner, float* h,
                   float* along) {
    for (int64_t i = 0; i < count; i++, inner += 2 * F, d_inner += 2 * F, d_h += F, h += F) {
        const float w = weight ? weight[i] : 1.0f;
        floats sums = {};
        by_vectors(F, [&](size_t f, auto n) {
            floats g = load_some(inner + f, n), u = load_some(inner + F + f, n), d = load_some(d_h + f, n);
            floats s = sigmoid(g), silu = g * s, a = silu * u;
            sums += a * d;
            d *= w;
            store_some(h + f, a * w, n);
            store_some(d_inner + f, d * u * (s + silu * (1.0f - s)), n);
            store_some(d_inner + F + f, d * silu, n);
        });
        if (along) along[i] = sum(sums);
    }
}

std::vector<int64_t> starts_of(const ExpertsTraining& e) {
    std::vector<int64_t> start(e.experts + 1, 0);
    for (int64_t i = 0; i < e.experts; i++) start[i + 1] = start[i] + e.load[i];
    return start;
}

// Of one expert: as they lie, or of quantized ones what they stand for, until the thread asks for another expert's.
struct Matrices {
    Operand gate, up, down;
    Matrices(const ExpertsTraining& e, int64_t expert) {
        if (e.quantized_down) {
            static thread_local Scratch<uint16_t> memory;
            const size_t D = e.hidden, F = e.width;
            uint16_t* to = memory.of(3 * F * D);
            narrow_rows(*e.quantized_gate_up, expert * 2 * F, (expert + 1) * 2 * F, to);
            narrow_rows(*e.quantized_down, expert * D, (expert + 1) * D, to + 2 * F * D);
            auto matrix = [](const uint16_t* data, size_t columns) { return Operand{(const float*)data, columns, false, nullptr, true}; };
            gate = matrix(to, D), up = matrix(to + F * D, D), down = matrix(to + 2 * F * D, F);
            return;
        }
        auto matrix = [&](const float* first, size_t row, size_t columns) {
            return Operand{first, columns, false, nullptr, e.halves != 0}.from(row, 0);
        };
        const size_t inward = expert * e.further / e.hidden;
        gate = matrix(e.gate, inward, e.hidden), up = matrix(e.up, inward, e.hidden);
        down = matrix(e.down, expert * e.hidden, e.width);
    }
};

// What a task will read first of its matrices; of quantized ones, which are read from end to end, nothing.
Operand gate_of(const ExpertsTraining& e, const Task& task) { return e.quantized_down ? Operand{} : Matrices(e, task.expert).gate; }

// Rows of the tokens [tokens, hidden] whose copies are rows `begin` on; copied to `copies` where the product cannot gather them.
Operand rows_of(const ExpertsTraining& e, const Operand& tokens, int64_t begin, int64_t count, float* copies) {
    const size_t D = e.hidden;
    if (!e.token) return tokens.from(begin, 0);
    if (ours(e.factors)) return {tokens.data, D, false, e.token + begin, tokens.halves};
    gather(tokens.data, e.token + begin, count, D, copies);
    return {copies, D};
}

// All tokens as they lie; of those that several rows are copies of, rounded ones, lest each copy be rounded.
Operand tokens_of(const ExpertsTraining& e, const float* tokens, Scratch<uint16_t>& memory) {
    const size_t D = e.hidden;
    if (e.choices == 1 || e.factors == Factors::FLOAT32 || !ours(e.factors)) return {tokens, D};
    uint16_t* to = memory.of(e.tokens * D);
#pragma omp parallel for num_threads(e.threads) schedule(static)
    for (int64_t t = 0; t < e.tokens; t++)
        by_vectors(D, [=](size_t d, auto n) { store_some(to + t * D + d, load_some(tokens + t * D + d, n), n); });
    return {(const float*)to, D, false, nullptr, true};
}

// Fetch meanwhile what a product packs first of a matrix of so many rows.
void first_of(Ahead& ahead, const Operand& matrix, size_t high) {
    ahead.rows(matrix, std::min<size_t>(high, 512), std::min<size_t>(matrix.stride, 512));
}

// Fetch meanwhile what a block of rows begins with, copies of `tokens`, and the `high` rows of the matrices that multiply it.
void expect(Ahead& ahead, const ExpertsTraining& e, const Operand& tokens, int64_t begin, int64_t end, Operand matrices = {}, size_t high = 0) {
    const size_t D = e.hidden, count = end - begin;
    if (e.token) ahead.rows({tokens.data, D, false, e.token + begin, tokens.halves}, count, D);
    else ahead.rows(tokens.from(begin, 0), count, D);
    first_of(ahead, matrices, high);
}

#if defined(CADRE_BFLOAT16)
// to[c][r] = from[r][c].
void transpose(const float* from, size_t rows, size_t columns, float* to, size_t stride) {
    for (size_t c = 0; c < columns; c += 16)
        for (size_t r = 0; r < rows; r += 16) {
            const int high = (int)std::min<size_t>(16, rows - r), wide = (int)std::min<size_t>(16, columns - c);
            floats x[16] = {};
            for (int i = 0; i < high; i++) x[i] = load_some(from + (r + i) * columns + c, wide);
            turn(x);
            for (int i = 0; i < wide; i++) store_some(to + (c + i) * stride + r, x[i], high);
        }
}

// The same turned around: matrices times columns of tokens, which are packed instead of the larger matrices.
void forward_few(const ExpertsTraining& e, const Operand& tokens, const Task& task, const Task* then) {
    static thread_local Scratch<> memory;
    Ahead ahead;
    const Multiply multiply{e.factors, &ahead};
    const size_t D = e.hidden, F = e.width, count = task.end - task.begin;
    const Operand x = rows_of(e, tokens, task.begin, count, nullptr).transposed();
    float* inner = memory.of(count * (3 * F + D));
    float *h = inner + count * 2 * F, *y = h + count * F;
    const Matrices own(e, task.expert);
    multiply(F, count, D, own.gate, x, inner, count);
    first_of(ahead, own.down, D);
    multiply(F, count, D, own.up, x, inner + F * count, count);
    activate(inner, 1, F * count, h, [](size_t, floats, int) {});
    if (then) expect(ahead, e, tokens, then->begin, then->end, gate_of(e, *then), F);
    multiply(D, count, F, own.down, {h, count}, y, count);
    transpose(y, D, count, (e.token ? e.y : e.out) + task.begin * D, D);
}
#endif

// `then`: the task that this thread will probably have next, or null.
void forward(const ExpertsTraining& e, const Operand& tokens, const Task& task, const Task* then) {
#if defined(CADRE_BFLOAT16)
    if ((e.halves || e.quantized_down) && !e.inner && task.end - task.begin <= FEW) return forward_few(e, tokens, task, then);
#endif
    static thread_local Scratch<> memory;
    Ahead ahead;
    const Multiply multiply{e.factors, &ahead};
    const size_t D = e.hidden, F = e.width;
    constexpr size_t most = Blocks::most(BLOCK);
    const bool in_place = e.inner && e.factors == Factors::FLOAT32;
    float* h = memory.of(most * (in_place ? F : 3 * F) + (e.token ? most * D : 0));
    float* copies = h + most * (in_place ? F : 3 * F);
    const Matrices own(e, task.expert);
    const Operand gate = own.gate.transposed(), up = own.up.transposed(), down = own.down.transposed();
    const bool joined = up.data == gate.at(F * D);
    const Blocks blocks(task.begin, task.end, BLOCK);
    for (int64_t i = 0; i < blocks.count; i++) {
        const int64_t begin = blocks.start(i), end = blocks.start(i + 1);
        const size_t count = end - begin;
        float* inner = in_place ? (float*)e.inner + begin * 2 * F : h + most * F;
        const Operand x = rows_of(e, tokens, begin, count, copies);
        if (i == 0) first_of(ahead, down, D);
        if (joined) {
            multiply(count, 2 * F, D, x, gate, inner, 2 * F);
        } else {
            multiply(count, F, D, x, gate, inner, 2 * F);
            multiply(count, F, D, x, up, inner + F, 2 * F);
        }
        if (!e.inner || in_place) {
            activate(inner, count, F, h, [](size_t, floats, int) {});
        } else {
            uint16_t* kept = (uint16_t*)e.inner + begin * 2 * F;
            activate(inner, count, F, h, [=](size_t i, floats v, int n) { store_some(kept + i, v, n); });
        }
        if (i + 1 < blocks.count) {
            expect(ahead, e, tokens, end, blocks.start(i + 2));
        } else if (then) {
            const Blocks next(then->begin, then->end, BLOCK);
            expect(ahead, e, tokens, then->begin, next.start(1), gate_of(e, *then), 2 * F);
        }
        multiply(count, D, F, {h, F}, down, (e.token ? e.y : e.out) + begin * D, D);
    }
}

struct Sums {
    float *gate, *up, *down;
};

void backward(const ExpertsTraining& e, const ExpertsGradient& d, const Operand& tokens, const Operand& d_tokens, const Task& task,
              const Task* then) {
    static thread_local Scratch<> memory;
    Ahead ahead;
    const Multiply multiply{e.factors, &ahead};
    const size_t D = e.hidden, F = e.width;
    const int64_t block = block_back(D, F);
    const size_t most = Blocks::most(block);
    float* d_inner = memory.of(most * (4 * F + (e.token ? 2 * D : 0)));
    float* d_h = d_inner + most * 2 * F;
    float* h = d_h + most * F;
    float* copies = h + most * F;
    const int64_t in = task.expert * e.further, out = task.expert * (int64_t)(F * D);
    const float *gate = e.gate + in, *up = e.up + in, *down = e.down + out;
    const bool joined = up == gate + F * D;
    Sums to = {};
    if (task.sums) to = {task.sums, task.sums + F * D, task.sums + 2 * F * D};
    else if (d.gate) to = {d.gate + in, d.up + in, d.down + out};
    const bool joined_sums = joined && to.up == to.gate + F * D;

    const Blocks blocks(task.begin, task.end, block);
    for (int64_t i = 0; i < blocks.count; i++) {
        const int64_t begin = blocks.start(i);
        const size_t count = blocks.start(i + 1) - begin;
        const Operand d_out = rows_of(e, d_tokens, begin, count, copies);
        const size_t line = e.factors == Factors::FLOAT32 ? 2 * F : F;  // floats that a row of `inner` takes
        ahead.rows({(const float*)e.inner + begin * line, line}, count, line);
        if (i == 0) ahead.rows({gate, D}, 2 * F, D);
        if (d.gate) expect(ahead, e, tokens, begin, blocks.start(i + 1));
        multiply(count, F, D, d_out, {down, F}, d_h, F);
        const float* weight = e.token ? d.weight_rows + begin : nullptr;
        float* along = e.token ? d.weight_rows + e.rows + begin : nullptr;
        const size_t first = begin * 2 * F;
        if (e.factors == Factors::FLOAT32) activate_back((float*)e.inner + first, d_h, weight, count, F, d_inner, h, along);
        else activate_back((uint16_t*)e.inner + first, d_h, weight, count, F, d_inner, h, along);
        if (d.x) {
            float* d_x = (e.token ? d.x_rows : d.x) + begin * D;
            if (joined) {
                multiply(count, D, 2 * F, {d_inner, 2 * F}, {gate, D}, d_x, D);
            } else {
                multiply(count, D, F, {d_inner, 2 * F}, {gate, D}, d_x, D);
                multiply(count, D, F, {d_inner + F, 2 * F}, {up, D}, d_x, D, true);
            }
        }
        if (i + 1 < blocks.count) {
            expect(ahead, e, d_tokens, blocks.start(i + 1), blocks.start(i + 2));
        } else if (then) {
            const Blocks next(then->begin, then->end, block);
            expect(ahead, e, d_tokens, then->begin, next.start(1), {e.down + then->expert * (int64_t)(F * D), F}, D);
        }
        if (!d.gate) continue;
        const Operand x = rows_of(e, tokens, begin, count, copies + most * D);
        multiply(D, F, count, d_out.transposed(), {h, F}, to.down, F, i > 0);
        if (joined_sums) {
            multiply(2 * F, D, count, {d_inner, 2 * F, true}, x, to.gate, D, i > 0);
        } else {
            multiply(F, D, count, {d_inner, 2 * F, true}, x, to.gate, D, i > 0);
            multiply(F, D, count, {d_inner + F, 2 * F, true}, x, to.up, D, i > 0);
        }
    }
}

// out[t] = the sum of the token's rows below `end`, weighted if there are weights; `adds`: and what was there.
void team_add_up(const ExpertsTraining& e, const float* rows, int64_t end, const float* weight, float* out) {
    const size_t D = e.hidden;
    const int64_t K = e.choices;
    const bool adds = e.adds;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < e.tokens; t++) {
        const int64_t* row = e.row + t * K;
        if (t + 2 < e.tokens)
            for (int64_t k = 0; k < K; k++)
                for (size_t d = 0; d < D; d += 16) __builtin_prefetch(rows + row[2 * K + k] * D + d);
        by_vectors(D, [=](size_t d, auto n) {
            floats sums = {};
            for (int64_t k = 0; k < K; k++) {
                if (row[k] >= end) continue;
                floats v = load_some(rows + row[k] * D + d, n);
                sums += weight ? v * weight[t * K + k] : v;
            }
            store_some(out + t * D + d, adds ? sums + load_some(out + t * D + d, n) : sums, n);
        });
    }
}

// The slices of rows that threads take: an expert's rows are cut where they would keep one thread busy for too
// long while others wait, all of them into about so many parts, but no slice into fewer than `least` rows.
std::vector<Task> slices_of(const ExpertsTraining& e, int64_t parts, int64_t least) {
    const std::vector<int64_t> start = starts_of(e);
    const int64_t most = std::max(least, (e.rows + parts - 1) / parts);
    std::vector<Task> tasks;
    for (int64_t i = 0; i < e.experts; i++) {
        const int64_t rows = e.load[i], slices = (rows + most - 1) / most;
        for (int64_t s = 0; s < slices; s++)
            tasks.push_back({i, start[i] + rows * s / slices, start[i] + rows * (s + 1) / slices, nullptr});
    }
    return tasks;
}

void largest_first(std::vector<Task>& tasks) {
    auto larger = [](const Task& a, const Task& b) { return a.end - a.begin > b.end - b.begin; };
    std::stable_sort(tasks.begin(), tasks.end(), larger);
}

// What the thread that works on task i will do next if all take equally long.
const Task* after(const std::vector<Task>& tasks, size_t i, size_t threads) {
    return i + threads < tasks.size() ? &tasks[i + threads] : nullptr;
}

}  // namespace

extern "C" void cadre_use_sgemm(void* sgemm) { blas_sgemm = (Sgemm*)sgemm; }

// Where the choices of tokens go when rows are sorted by expert, tokens in order within: row_TK, token_R and load_E.
extern "C" void cadre_sort_choices(const int64_t* expert, int64_t tokens, int64_t choices, int64_t experts, int64_t* row,
                                   int64_t* token, int64_t* load) {
    std::fill(load, load + experts, 0);
    for (int64_t i = 0; i < tokens * choices; i++) load[expert[i]]++;
    std::vector<int64_t> next(experts, 0);
    for (int64_t i = 1; i < experts; i++) next[i] = next[i - 1] + load[i - 1];
    for (int64_t t = 0, i = 0; t < tokens; t++)
        for (int64_t k = 0; k < choices; k++, i++) {
            row[i] = next[expert[i]]++;
            token[row[i]] = t;
        }
}

extern "C" void cadre_experts_training(const ExpertsTraining* experts) {
    const ExpertsTraining& e = *experts;
    const Operand tokens = tokens_of(e, e.x, rounded);
    std::vector<Task> tasks = slices_of(e, 4 * e.threads, BLOCK);
    largest_first(tasks);
    const int64_t end = starts_of(e).back();
#pragma omp parallel num_threads(e.threads)
    {
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tasks.size(); i++) forward(e, tokens, tasks[i], after(tasks, i, e.threads));
        if (e.token) team_add_up(e, e.y, end, e.weight, e.out);
    }
}

extern "C" void cadre_experts_training_gradient(const ExpertsTraining* experts, const ExpertsGradient* gradient) {
    const ExpertsTraining& e = *experts;
    const ExpertsGradient& d = *gradient;
    const Operand tokens = d.gate ? tokens_of(e, e.x, rounded) : Operand{}, d_tokens = tokens_of(e, d.out, rounded_back);
    const size_t matrix = e.hidden * e.width, room = 3 * matrix;
    const int64_t end = starts_of(e).back();
    std::vector<Task> tasks = slices_of(e, e.experts == 1 ? e.threads : 4 * e.threads, LEAST_SLICE);
    // Every slice but an expert's first needs room for its own gradient of the matrices.
    size_t rooms = 0;
    for (size_t i = 1; i < tasks.size(); i++) rooms += tasks[i].expert == tasks[i - 1].expert;
    // Uninitialised: only pages that are written cost anything.
    std::unique_ptr<float[]> sums(d.gate && rooms ? new (std::nothrow) float[rooms * room] : nullptr);
    if (d.gate && rooms && !sums) out_of_memory();
    std::vector<Cut> cuts;
    if (sums) {
        size_t next = 0;
        for (size_t i = 1; i < tasks.size(); i++)
            if (tasks[i].expert == tasks[i - 1].expert) {
                tasks[i].sums = sums.get() + room * next++;
                if (cuts.empty() || cuts.back().expert != tasks[i].expert) cuts.push_back({tasks[i].expert, 0});
                cuts.back().further++;
            }
    }
    largest_first(tasks);

#pragma omp parallel num_threads(e.threads)
    {
        if (e.token) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < e.tokens * e.choices; i++) d.weight_rows[e.row[i]] = e.weight[i];
        }
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < tasks.size(); i++) backward(e, d, tokens, d_tokens, tasks[i], after(tasks, i, e.threads));
        if (d.gate) {
#pragma omp for schedule(dynamic) nowait
            for (int64_t i = 0; i < e.experts; i++)
                if (!e.load[i]) {
                    std::fill_n(d.gate + i * e.further, matrix, 0.0f), std::fill_n(d.up + i * e.further, matrix, 0.0f);
                    std::fill_n(d.down + i * matrix, matrix, 0.0f);
                }
            const float* from = sums.get();
            for (const Cut& c : cuts) {
                float* to[3] = {d.gate + c.expert * e.further, d.up + c.expert * e.further, d.down + c.expert * matrix};
                for (int m = 0; m < 3; m++) {
#pragma omp for schedule(static) nowait
                    for (size_t i = 0; i < matrix; i += CHUNK)
                        for (int64_t s = 0; s < c.further; s++) {
                            const float* part = from + s * room + m * matrix;
                            for (size_t j = i; j < std::min(matrix, i + CHUNK); j++) to[m][j] += part[j];
                        }
                }
                from += c.further * room;
            }
        }
        if (e.token) {
            if (d.x) team_add_up(e, d.x_rows, end, nullptr, d.x);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < e.tokens * e.choices; i++)
                d.weight[i] = e.row[i] < end ? d.weight_rows[e.rows + e.row[i]] : 0.0f;
        }
    }
}
