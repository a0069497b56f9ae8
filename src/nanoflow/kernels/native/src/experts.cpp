// Mixture of experts: route in float32, group tokens by expert, one matrix product per used expert and projection, sum
// in ascending expert order and round once. The products are the batch-invariant ones of gemm.cpp.
#include <cmath>

#include "gemm.h"

namespace {

struct Experts {
    const void* x;
    int64_t ldx, n_tokens, d, f;
    const void* router;
    int64_t n_experts, n_active;
    bool normalise;
    const void* const* gate_up;
    const void* const* down;
    void* out;
    int64_t ldo;
    bool out_f32;
};

// Choose the n_active likeliest experts of a row of router logits (ties: the lower index) and their weights.
void route(float* logits, int64_t n_experts, int64_t n_active, bool normalise, int32_t* chosen, float* weight) {
    float top = *std::max_element(logits, logits + n_experts), sum = 0.0f, kept = 0.0f;
    for (int64_t i = 0; i < n_experts; i++) sum += logits[i] = std::exp(logits[i] - top);
    for (int64_t j = 0; j < n_active; j++) {
        int64_t best = std::max_element(logits, logits + n_experts) - logits;
        chosen[j] = int32_t(best);
        kept += weight[j] = logits[best] / sum;
        logits[best] = -1.0f;
    }
    if (normalise)
        for (int64_t j = 0; j < n_active; j++) weight[j] /= kept;
}

template <class D>
void activate(const typename D::T* gate_up, int64_t rows, int64_t f, typename D::T* out) {
    parallel(threads_for(double(rows) * double(f), 2e4), [&](int thread, int n_threads) {
        int64_t r0, r1;
        share(rows, thread, n_threads, r0, r1);
        for (int64_t r = r0; r < r1; r++) {
            const typename D::T *gate = gate_up + r * 2 * f, *up = gate + f;
            int64_t i = 0;
            for (; i + LANES <= f; i += LANES) {
                vf g = D::load(gate + i);
                D::store(out + r * f + i, g / (vexp(-g) + 1.0f) * D::load(up + i));
            }
            for (; i < f; i++) {
                float g = D::get(gate + i);
                D::put(out + r * f + i, g / (vexp(vset(-g))[0] + 1.0f) * D::get(up + i));
            }
        }
    });
}

template <class D>
void experts(const Experts& a) {
    typedef typename D::T T;
    const int64_t n_pairs = a.n_tokens * a.n_active;
    auto out_get = [&](int64_t at) { return a.out_f32 ? ((const float*)a.out)[at] : D::get((const T*)a.out + at); };
    if (n_pairs <= 0) return;
    float* logits = (float*)scratch(0, size_t(a.n_tokens * a.n_experts + a.n_tokens * a.d + n_pairs) * 4);
    float* total = logits + a.n_tokens * a.n_experts;
    float* weight = total + a.n_tokens * a.d;
    int32_t* chosen = (int32_t*)scratch(1, size_t(2 * n_pairs + a.n_experts + 1) * 4);
    int32_t *order = chosen + n_pairs, *start = order + n_pairs;
    linear<D>({a.x, a.ldx, a.n_tokens, a.router, a.n_experts, a.d, nullptr, false, logits, a.n_experts, true, false});
    std::fill(start, start + a.n_experts + 1, 0);
    for (int64_t t = 0; t < a.n_tokens; t++) {
        route(logits + t * a.n_experts, a.n_experts, a.n_active, a.normalise, chosen + t * a.n_active, weight + t * a.n_active);
        for (int64_t j = 0; j < a.n_active; j++) start[chosen[t * a.n_active + j] + 1]++;
        for (int64_t i = 0; i < a.d; i++) total[t * a.d + i] = out_get(t * a.ldo + i);
    }
    int64_t most = 0;
    for (int64_t i = 0; i < a.n_experts; i++) most = std::max<int64_t>(most, start[i + 1]), start[i + 1] += start[i];
    for (int64_t i = 0; i < n_pairs; i++) order[start[chosen[i]]++] = int32_t(i);  // afterwards start[i] is the end of expert i
    T* rows = (T*)scratch(2, size_t(most * (a.d + 3 * a.f)) * sizeof(T));
    T *gate_up = rows + most * a.d, *act = gate_up + most * 2 * a.f;
    float* result = (float*)scratch(3, size_t(most * a.d) * 4);
    for (int64_t i = 0, begin = 0; i < a.n_experts; begin = start[i], i++) {
        const int64_t m = start[i] - begin;
        if (!m || !a.gate_up[i]) continue;  // an expert that another rank holds
        for (int64_t j = 0; j < m; j++)
            memcpy(rows + j * a.d, (const T*)a.x + order[begin + j] / a.n_active * a.ldx, size_t(a.d) * sizeof(T));
        linear<D>({rows, a.d, m, a.gate_up[i], 2 * a.f, a.d, nullptr, false, gate_up, 2 * a.f, false, false});
        activate<D>(gate_up, m, a.f, act);
        linear<D>({act, a.f, m, a.down[i], a.d, a.f, nullptr, false, result, a.d, true, false});
        for (int64_t j = 0; j < m; j++) {
            float* sum = total + order[begin + j] / a.n_active * a.d;
            const float w = weight[order[begin + j]];
            for (int64_t c = 0; c < a.d; c++) sum[c] += result[j * a.d + c] * w;
        }
    }
    for (int64_t t = 0; t < a.n_tokens; t++)
        for (int64_t i = 0; i < a.d; i++) {
            const int64_t at = t * a.ldo + i;
            if (a.out_f32) ((float*)a.out)[at] = total[t * a.d + i];
            else D::put((T*)a.out + at, total[t * a.d + i]);
        }
}

}  // namespace

#define NF_EXPERTS(NAME, D)                                                                                               \
    NF_EXPORT void nf_experts_##NAME(const void* x, int64_t ldx, int64_t n_tokens, int64_t d, int64_t f, const void* router, \
                                     int64_t n_experts, int64_t n_active, int64_t normalise, const void* const* gate_up,  \
                                     const void* const* down, void* out, int64_t ldo, int64_t out_f32) {                  \
        experts<D>({x, ldx, n_tokens, d, f, router, n_experts, n_active, bool(normalise), gate_up, down, out, ldo,        \
                    bool(out_f32)});                                                                                      \
    }
NF_EXPERTS(f32, F32)
NF_EXPERTS(bf16, BF16)
