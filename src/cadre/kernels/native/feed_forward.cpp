// The feed-forward half of a block: dense SwiGLU, or router, routed and shared experts (DeepSeek-V3 report, section 2.1.2).
// Also the small parts that stand alone: norm and one matrix.
#include <algorithm>

#include "layout.h"
#include "router.h"
#include "step.h"

struct DenseLayer {
    const float* norm;
    Matrix gate, up, down;
    float eps;
};

struct ExpertsLayer {
    const float* norm;
    Router router;
    Matrix router_weight, gate_up, down;  // rows [experts], [experts * 2 * width] (gate first), [experts * hidden]
    Matrix shared_gate, shared_up, shared_down;  // data null without shared experts
    float eps;
    int32_t width;
};

LAYOUT(Matrix, data, scale, table, rows, cols, stride, kind)
LAYOUT(DenseLayer, norm, gate, up, down, eps)
LAYOUT(ExpertsLayer, norm, router, router_weight, gate_up, down, shared_gate, shared_up, shared_down, eps, width)

namespace {

// Rows that pass one pair of matrices: an expert's tokens, or all tokens for a dense layer or the shared experts.
struct Job {
    const Matrix *gate, *up, *down;
    size_t gate_row, up_row, down_row, width;
    size_t first, count;  // its rows among `x`, `token` and `weight`
    size_t inner;         // where its inner activations begin
};

struct Jobs {
    std::vector<Job> list;
    std::vector<const float*> x, h;  // input and inner activation of each row
    std::vector<int32_t> token;
    std::vector<float> weight;
    std::vector<std::pair<int32_t, int32_t>> blocks;  // job and first inner row
    Scratch<> memory;
};

constexpr int BLOCK = 16;

void add_job(Jobs& jobs, Job job, size_t& inner) {
    job.first = jobs.x.size() - job.count;
    job.inner = inner;
    inner += job.count * job.width;
    for (size_t f = 0; f < job.width; f += BLOCK) jobs.blocks.push_back({(int32_t)jobs.list.size(), (int32_t)f});
    jobs.list.push_back(job);
}

void all_tokens(Jobs& jobs, const float* normed, const Step& step, const Matrix& gate, const Matrix& up, const Matrix& down,
                size_t& inner) {
    for (int m = 0; m < step.tokens; m++) {
        jobs.x.push_back(normed + (size_t)m * step.width);
        jobs.token.push_back(m);
        jobs.weight.push_back(1.0f);
    }
    add_job(jobs, {&gate, &up, &down, 0, 0, 0, (size_t)gate.rows, 0, (size_t)step.tokens, 0}, inner);
}

void clear(Jobs& jobs) {
    jobs.list.clear(), jobs.x.clear(), jobs.token.clear(), jobs.weight.clear(), jobs.blocks.clear();
}

void place_inner(Jobs& jobs, size_t inner) {
    float* memory = jobs.memory.of(inner);
    jobs.h.clear();
    for (const Job& job : jobs.list)
        for (size_t i = 0; i < job.count; i++) jobs.h.push_back(memory + job.inner + i * job.width);
}

// silu(gate x) * up x for 16 inner rows of one job.
void inner_block(Jobs& jobs, const Job& job, size_t begin) {
    static thread_local Scratch<> memory;
    size_t end = std::min(begin + BLOCK, job.width), D = (size_t)job.gate->cols;
    float* gate = memory.of(2 * job.count * BLOCK);
    float* up = gate + job.count * BLOCK;
    const float* const* x = jobs.x.data() + job.first;
    of_kind(*job.gate, [&](auto reader) {
        dots(reader, job.gate_row + begin, job.gate_row + end, x, job.count, D,
             [=](size_t m, size_t row, float v) { gate[m * BLOCK + row - job.gate_row - begin] = v; });
    });
    of_kind(*job.up, [&](auto reader) {
        dots(reader, job.up_row + begin, job.up_row + end, x, job.count, D,
             [=](size_t m, size_t row, float v) { up[m * BLOCK + row - job.up_row - begin] = v; });
    });
    for (size_t m = 0; m < job.count; m++) {
        float* h = const_cast<float*>(jobs.h[job.first + m]) + begin;
        for (size_t f = 0; f < end - begin; f += LANES) {
            size_t n = std::min((size_t)LANES, end - begin - f);
            floats g = load_part(gate + m * BLOCK + f, n), u = load_part(up + m * BLOCK + f, n);
            store_part(h + f, g / (1.0f + exponential(-g)) * u, n);
        }
    }
}

// x[token] += weight * down(h) for all jobs; each thread owns a range of rows, so that sums keep their order.
void team_down(Jobs& jobs, const Step& step) {
    const size_t D = step.width;
    float* x = step.x;
    const int blocks = (int)((D + BLOCK - 1) / BLOCK), spans = std::min(step.threads, blocks);
#pragma omp for schedule(static)
    for (int span = 0; span < spans; span++) {
        size_t begin = (size_t)span * blocks / spans * BLOCK, end = std::min(D, (size_t)(span + 1) * blocks / spans * BLOCK);
        for (const Job& job : jobs.list) {
            const int32_t* token = jobs.token.data() + job.first;
            const float* weight = jobs.weight.data() + job.first;
            of_kind(*job.down, [&](auto reader) {
                dots(reader, job.down_row + begin, job.down_row + end, jobs.h.data() + job.first, job.count, job.width,
                     [=](size_t m, size_t row, float v) { x[token[m] * D + row - job.down_row] += weight[m] * v; });
            });
        }
    }
}

void team_jobs(Jobs& jobs, const Step& step) {
    // Neighbouring blocks at a time: each fetches the next one's rows early. Few enough that no thread waits for long.
    const int chunk = std::clamp((int)jobs.blocks.size() / (16 * step.threads), 4, 16);
#pragma omp for schedule(dynamic, chunk)
    for (size_t i = 0; i < jobs.blocks.size(); i++) inner_block(jobs, jobs.list[jobs.blocks[i].first], jobs.blocks[i].second);
    team_down(jobs, step);
}

}  // namespace

extern "C" void cadre_dense(const DenseLayer* layer, const Step* step) {
    static thread_local Scratch<> memory;
    static thread_local Jobs kept;
    Jobs& jobs = kept;
    float* normed = memory.of((size_t)step->tokens * step->width);
    size_t inner = 0;
    clear(jobs);
    all_tokens(jobs, normed, *step, layer->gate, layer->up, layer->down, inner);
    place_inner(jobs, inner);
#pragma omp parallel num_threads(step->threads)
    {
        team_norm(*step, layer->norm, layer->eps, normed);
        team_jobs(jobs, *step);
    }
}

// load: int64 [experts], counted up, or null. choice: int32 [tokens, top_k], the experts of each token.
extern "C" void cadre_experts(const ExpertsLayer* layer, const Step* step, int64_t* load, int32_t* choice) {
    const ExpertsLayer& e = *layer;
    const size_t M = step->tokens, D = step->width, E = e.router.experts, K = e.router.top_k;
    static thread_local Scratch<> memory;
    static thread_local Scratch<const float*> pointers;
    static thread_local Scratch<size_t> numbers;
    static thread_local Jobs kept;
    Jobs& jobs = kept;
    float* normed = memory.of(M * (D + 2 * E + K));
    float *logit = normed + M * D, *score = logit + M * E, *weight = score + M * E;
    const float** rows = pointers.of(M);
    rows_of(rows, normed, M, D);
    size_t* begin = numbers.of(E + 1);

#pragma omp parallel num_threads(step->threads)
    {
        team_norm(*step, e.norm, e.eps, normed);
        team_linear(e.router_weight, nullptr, rows, M, logit);
#pragma omp barrier
#pragma omp for schedule(static)
        for (size_t m = 0; m < M; m++) route(e.router, logit + m * E, score + m * E, choice + m * K, weight + m * K);
#pragma omp single
        {
            clear(jobs);
            std::fill(begin, begin + E + 1, 0);
            for (size_t i = 0; i < M * K; i++) begin[choice[i] + 1]++;
            for (size_t i = 0; i < E; i++) begin[i + 1] += begin[i];
            size_t inner = 0;
            std::vector<int32_t> order(M * K);
            std::vector<size_t> next(begin, begin + E);
            for (size_t i = 0; i < M * K; i++) order[next[choice[i]]++] = (int32_t)i;
            for (size_t i = 0; i < E; i++) {
                size_t count = begin[i + 1] - begin[i];
                if (load) load[i] += (int64_t)count;
                if (count == 0) continue;
                for (size_t r = begin[i]; r < begin[i + 1]; r++) {
                    jobs.x.push_back(rows[order[r] / K]);
                    jobs.token.push_back(order[r] / (int32_t)K);
                    jobs.weight.push_back(weight[order[r]]);
                }
                size_t F = e.width;
                add_job(jobs, {&e.gate_up, &e.gate_up, &e.down, i * 2 * F, i * 2 * F + F, i * D, F, 0, count, 0}, inner);
            }
            if (e.shared_gate.data)
                all_tokens(jobs, normed, *step, e.shared_gate, e.shared_up, e.shared_down, inner);
            place_inner(jobs, inner);
        }
        team_jobs(jobs, *step);
    }
}

// y [tokens, width] = the norm of x.
extern "C" void cadre_norm(const float* weight, float eps, const Step* step, float* y) {
#pragma omp parallel num_threads(step->threads)
    team_norm(*step, weight, eps, y);
}

// y [tokens, w.rows] = x w^T for x [tokens, w.cols].
extern "C" void cadre_linear(const Matrix* w, const float* x, int64_t tokens, int32_t threads, float* y) {
    static thread_local Scratch<const float*> pointers;
    const float** rows = pointers.of(tokens);
    rows_of(rows, x, tokens, (size_t)w->cols);
#pragma omp parallel num_threads(threads)
    team_linear(*w, nullptr, rows, tokens, y);
}

// All of w as bfloat16.
extern "C" void cadre_narrow(const Matrix* w, int32_t threads, uint16_t* to) {
    constexpr int64_t ROWS = 16;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < w->rows; row += ROWS) narrow_rows(*w, row, std::min(row + ROWS, w->rows), to + row * w->cols);
}
