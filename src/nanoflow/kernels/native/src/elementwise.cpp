// Normalisation, rotary embedding with the append to KV pages, and SiLU · up: small work that is bound by memory.
#include <cmath>

#include "common.h"

namespace {

// Sum of squares in a fixed order, so that a row's result is the same in every batch.
template <class D>
float inverse_rms(const typename D::T* x, int64_t n, float eps) {
    vf sum = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = D::load(x + i);
        sum += v * v;
    }
    float total = hsum(sum);
    for (; i < n; i++) total += D::get(x + i) * D::get(x + i);
    return 1.0f / std::sqrt(total / float(n) + eps);
}

// X: element type of the input (the residual stream may be float32), D: of weight and output.
template <class X, class D>
void rms_norm(const typename X::T* x, int64_t ldx, const typename D::T* weight, typename D::T* out, int64_t ldo, int64_t rows,
              int64_t n, float eps) {
    parallel(threads_for(double(rows) * double(n), 3e4), [&](int thread, int n_threads) {
        int64_t r0, r1;
        share(rows, thread, n_threads, r0, r1);
        for (int64_t r = r0; r < r1; r++) {
            const typename X::T* xr = x + r * ldx;
            typename D::T* o = out + r * ldo;
            const float inverse = inverse_rms<X>(xr, n, eps);
            int64_t i = 0;
            for (; i + LANES <= n; i += LANES) D::store(o + i, X::load(xr + i) * inverse * D::load(weight + i));
            for (; i < n; i++) D::put(o + i, X::get(xr + i) * inverse * D::get(weight + i));
        }
    });
}

template <class D>
void silu_mul(const typename D::T* x, int64_t ldx, typename D::T* out, int64_t ldo, int64_t rows, int64_t f) {
    parallel(threads_for(double(rows) * double(f), 2e4), [&](int thread, int n_threads) {
        int64_t r0, r1;
        share(rows, thread, n_threads, r0, r1);
        for (int64_t r = r0; r < r1; r++) {
            const typename D::T *gate = x + r * ldx, *up = gate + f;
            typename D::T* o = out + r * ldo;
            int64_t i = 0;
            for (; i + LANES <= f; i += LANES) {
                vf g = D::load(gate + i);
                D::store(o + i, g / (vexp(-g) + 1.0f) * D::load(up + i));
            }
            for (; i < f; i++) {
                float g = D::get(gate + i);
                D::put(o + i, g / (vexp(vset(-g))[0] + 1.0f) * D::get(up + i));
            }
        }
    });
}

struct Rope {
    void* qkv;
    int64_t ld, n_tokens;
    const int32_t *positions, *slots;
    const float* cos_sin;
    void* kv;
    int64_t page_tokens, n_heads, n_kv_heads, head_dim;
    const void *q_norm, *k_norm;
    float eps;
};

// One head to `wide` in float32: normalised if `norm` is given, then its halves rotated against each other.
template <class D>
void rotate(const typename D::T* x, int64_t e, const float* cos_sin, const typename D::T* norm, float eps, float* wide) {
    const int64_t half = e / 2;
    const float inverse = norm ? inverse_rms<D>(x, e, eps) : 1.0f;
    for (int64_t i = 0; i < e; i++) wide[i] = norm ? D::get(x + i) * inverse * D::get(norm + i) : D::get(x + i);
    const float *cos = cos_sin, *sin = cos_sin + half;
    for (int64_t i = 0; i < half; i++) {
        const float a = wide[i], b = wide[half + i];
        wide[i] = a * cos[i] - b * sin[i];
        wide[half + i] = b * cos[i] + a * sin[i];
    }
}

template <class D>
void rope_token(const Rope& a, int64_t t, float* wide) {
    typedef typename D::T T;
    const int64_t e = a.head_dim, padded = (e + LANES - 1) / LANES * LANES;
    const float* cos_sin = a.cos_sin + int64_t(a.positions[t]) * e;
    T* q = (T*)a.qkv + t * a.ld;
    for (int64_t h = 0; h < a.n_heads; h++) {
        rotate<D>(q + h * e, e, cos_sin, (const T*)a.q_norm, a.eps, wide);
        for (int64_t i = 0; i < e; i++) D::put(q + h * e + i, wide[i]);
    }
    const int64_t slot = a.slots[t];
    if (slot < 0) return;
    const int64_t offset = slot % a.page_tokens, head_stride = a.page_tokens * padded, v_offset = a.n_kv_heads * head_stride;
    T* page = (T*)a.kv + slot / a.page_tokens * 2 * v_offset;
    for (int64_t h = 0; h < a.n_kv_heads; h++) {
        rotate<D>(q + (a.n_heads + h) * e, e, cos_sin, (const T*)a.k_norm, a.eps, wide);
        T* k = page + h * head_stride + offset / LANES * LANES * padded + offset % LANES * D::PAIR;
        for (int64_t i = 0; i < e; i++) D::put(k + i / D::PAIR * LANES * D::PAIR + i % D::PAIR, wide[i]);
        const T* src = q + (a.n_heads + a.n_kv_heads + h) * e;
        T* v = page + v_offset + h * head_stride + offset / D::PAIR * D::PAIR * padded + offset % D::PAIR;
        for (int64_t i = 0; i < e; i++) v[i * D::PAIR] = src[i];
    }
}

template <class D>
void rope_append(const Rope& a) {
    const double work = double(a.n_tokens) * double((a.n_heads + 2 * a.n_kv_heads) * a.head_dim);
    parallel(threads_for(work, 8e3), [&](int thread, int n_threads) {
        float* wide = (float*)scratch(3, size_t(a.head_dim) * 4);
        int64_t t0, t1;
        share(a.n_tokens, thread, n_threads, t0, t1);
        for (int64_t t = t0; t < t1; t++) rope_token<D>(a, t, wide);
    });
}

}  // namespace

#define NF_ELEMENTWISE(NAME, D)                                                                                            \
    NF_EXPORT void nf_rms_norm_##NAME(const void* x, int64_t ldx, const void* weight, void* out, int64_t ldo, int64_t rows, \
                                      int64_t n, float eps, int64_t x_f32) {                                               \
        if (x_f32) return rms_norm<F32, D>((const float*)x, ldx, (const D::T*)weight, (D::T*)out, ldo, rows, n, eps);      \
        rms_norm<D, D>((const D::T*)x, ldx, (const D::T*)weight, (D::T*)out, ldo, rows, n, eps);                           \
    }                                                                                                                      \
    NF_EXPORT void nf_silu_mul_##NAME(const void* x, int64_t ldx, void* out, int64_t ldo, int64_t rows, int64_t f) {       \
        silu_mul<D>((const D::T*)x, ldx, (D::T*)out, ldo, rows, f);                                                        \
    }                                                                                                                      \
    NF_EXPORT void nf_rope_append_##NAME(void* qkv, int64_t ld, int64_t n_tokens, const int32_t* positions,                \
                                         const int32_t* slots, const float* cos_sin, void* kv, int64_t page_tokens,        \
                                         int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, const void* q_norm,        \
                                         const void* k_norm, float eps) {                                                  \
        rope_append<D>({qkv, ld, n_tokens, positions, slots, cos_sin, kv, page_tokens, n_heads, n_kv_heads, head_dim,      \
                        q_norm, k_norm, eps});                                                                             \
    }
NF_ELEMENTWISE(f32, F32)
NF_ELEMENTWISE(bf16, BF16)
