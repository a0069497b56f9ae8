// Token choice: one or two passes over a row for greedy and plain temperature; with top-k, top-p or min-p first the
// lowest score that survives is found by radix selection, then the Gumbel-max runs over what is kept.
//
// Scores are (logit - max) / temperature, so at most 0; the bits of |score| order them as unsigned integers, the best
// first. Ties with the last kept score are kept. Noise: see kernels/noise.py, which states the hash.
#include <cmath>

#include "common.h"

namespace {

constexpr float INF = __builtin_inff();

struct Sampling {
    const float* logits;
    int64_t ld, n_rows, n_vocab;
    const float* temperature;
    const int32_t* top_k;
    const float *top_p, *min_p;
    const int64_t* keys;
    int32_t* out;
};

struct Best {
    float value;
    int32_t index;
    void take(Best o) {
        if (o.value > value || (o.value == value && o.index < index)) *this = o;
    }
};

vi lanes() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

NF_INLINE vu fmix32(vu h) {
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}
NF_INLINE vf gumbel(vi index, uint32_t k0, uint32_t k1) {
    vu h = fmix32(fmix32((vu)index * 0x9E3779B1u + k0) ^ k1);
    vf u = (__builtin_convertvector((vi)(h >> 9), vf) + 0.5f) * 1.1920928955078125e-07f;
    return -vlog(-vlog(u));
}

// Largest f(i) over [begin, end), the first index where it is reached. f maps an index vector to values.
template <class F>
NF_INLINE Best search(int64_t begin, int64_t end, F f) {
    vf value = vset(-INF);
    vi index = vi{} + int32_t(begin);
    for (int64_t i = begin; i < end; i += LANES) {
        vi at = lanes() + int32_t(i);
        vf v = f(i, at);
        if (i + LANES > end) v = at < int32_t(end) ? v : vset(-INF);
        vi better = v > value;
        value = better ? v : value;
        index = better ? at : index;
    }
    Best best{value[0], index[0]};
    for (int l = 1; l < LANES; l++) best.take({value[l], index[l]});
    return best;
}

// The same over a whole row, divided among threads; a maximum does not depend on the division.
template <class F>
Best search_row(int64_t n, int threads, F f) {
    if (threads <= 1) return search(0, n, f);
    Best all{-INF, INT32_MAX};
    parallel(threads, [&](int thread, int n_threads) {
        int64_t c0, c1;
        share((n + LANES - 1) / LANES, thread, n_threads, c0, c1);
        if (c0 >= c1) return;
        Best mine = search(c0 * LANES, std::min(n, c1 * LANES), f);
#pragma omp critical(nf_sampling)
        all.take(mine);
    });
    return all;
}

NF_INLINE vf load_part(const float* p, int64_t left) {
    if (left >= LANES) return vload(p);
    vf v = vset(-INF);
    memcpy(&v, p, size_t(left) * 4);
    return v;
}

NF_INLINE uint32_t order(float score) {
    uint32_t u;
    memcpy(&u, &score, 4);
    return u & 0x7fffffffu;
}

// Smallest order value t such that the weight of all scores with order <= t reaches `wanted`; weight(i) of score i.
template <class W>
uint32_t select(const float* scores, int64_t n, double wanted, W weight, double* mass, int32_t* list) {
    constexpr int SHIFT[3] = {20, 10, 0}, BINS[3] = {2048, 1024, 1024};
    uint32_t prefix = 0;
    int64_t n_list = n;
    double below = 0.0;
    for (int level = 0; level < 3; level++) {
        std::fill(mass, mass + BINS[level], 0.0);
        for (int64_t j = 0; j < n_list; j++) {
            int64_t i = level ? list[j] : j;
            mass[order(scores[i]) >> SHIFT[level] & uint32_t(BINS[level] - 1)] += weight(i);
        }
        int bin = -1, last = 0;
        for (int b = 0; b < BINS[level] && bin < 0; b++) {
            if (mass[b] > 0.0) last = b;
            if (mass[b] > 0.0 && below + mass[b] >= wanted) bin = b;
            else below += mass[b];
        }
        if (bin < 0) bin = last, below -= mass[last];  // rounding left the sum a hair short: take the last
        prefix |= uint32_t(bin) << SHIFT[level];
        int64_t kept = 0;
        for (int64_t j = 0; j < n_list; j++) {
            int64_t i = level ? list[j] : j;
            if (int(order(scores[i]) >> SHIFT[level] & uint32_t(BINS[level] - 1)) == bin) list[kept++] = int32_t(i);
        }
        n_list = kept;
    }
    return prefix;
}

// Scores of a row and the order value of the worst that is kept.
uint32_t threshold(const Sampling& a, int64_t r, float* scores, float* weights, double* mass, int32_t* list) {
    uint32_t limit = 0x7f800000u;
    if (a.top_k[r] > 0 && a.top_k[r] < a.n_vocab)
        limit = select(scores, a.n_vocab, a.top_k[r], [](int64_t) { return 1.0; }, mass, list);
    if (a.top_p[r] < 1.0f) {
        double total = 0.0;
        for (int64_t i = 0; i < a.n_vocab; i += LANES) {
            vf s = load_part(scores + i, a.n_vocab - i), w = vexp(s);
            w = ((vi)s & 0x7fffffff) <= int32_t(limit) ? w : vf{};
            vstore(weights + i, w);
            total += double(hsum(w));
        }
        limit = std::min(limit, select(scores, a.n_vocab, double(a.top_p[r]) * total, [&](int64_t i) { return double(weights[i]); },
                                       mass, list));
    }
    if (a.min_p[r] > 0.0f) limit = std::min(limit, order(std::log(a.min_p[r])));
    return limit;
}

void sample_row(const Sampling& a, int64_t r, int threads) {
    const float* logits = a.logits + r * a.ld;
    const int64_t n = a.n_vocab;
    const float temperature = a.temperature[r];
    Best top = search_row(n, threads, [&](int64_t i, vi) __attribute__((always_inline)) { return load_part(logits + i, n - i); });
    if (temperature <= 0.0f || !(top.value > -INF)) {
        a.out[r] = top.index < n ? top.index : 0;
        return;
    }
    const uint32_t k0 = uint32_t(a.keys[r]), k1 = uint32_t(uint64_t(a.keys[r]) >> 32);
    if ((a.top_k[r] <= 0 || a.top_k[r] >= n) && a.top_p[r] >= 1.0f && a.min_p[r] <= 0.0f) {
        a.out[r] = search_row(n, threads, [&](int64_t i, vi at) __attribute__((always_inline)) {
                       return (load_part(logits + i, n - i) - top.value) / temperature + gumbel(at, k0, k1);
                   }).index;
        return;
    }
    const int64_t padded = (n + LANES - 1) / LANES * LANES;
    float* scores = (float*)scratch(4, size_t(padded) * 12 + 2048 * 8);
    float* weights = scores + padded;
    double* mass = (double*)(weights + padded);
    int32_t* list = (int32_t*)(mass + 2048);
    for (int64_t i = 0; i < n; i += LANES) vstore(scores + i, (load_part(logits + i, n - i) - top.value) / temperature);
    const int32_t limit = int32_t(threshold(a, r, scores, weights, mass, list));
    a.out[r] = search(0, n, [&](int64_t i, vi at) __attribute__((always_inline)) {
                   vf s = vload(scores + i);
                   vi kept = ((vi)s & 0x7fffffff) <= limit;
                   typedef int64_t v8 __attribute__((vector_size(64)));
                   v8 any = (v8)kept;
                   if (!(any[0] | any[1] | any[2] | any[3] | any[4] | any[5] | any[6] | any[7])) return vset(-INF);
                   return kept ? s + gumbel(at, k0, k1) : vset(-INF);
               }).index;
}

}  // namespace

NF_EXPORT void nf_sample(const float* logits, int64_t ld, int64_t n_rows, int64_t n_vocab, const float* temperature,
                         const int32_t* top_k, const float* top_p, const float* min_p, const int64_t* keys, int32_t* out) {
    const Sampling a{logits, ld, n_rows, n_vocab, temperature, top_k, top_p, min_p, keys, out};
    const int threads = threads_for(double(n_rows) * double(n_vocab), 1e4);
    if (n_rows < threads) {
        for (int64_t r = 0; r < n_rows; r++) sample_row(a, r, threads);
        return;
    }
    int64_t next = 0;
    parallel(threads, [&](int, int) {
        for (int64_t r; (r = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < n_rows;) sample_row(a, r, 1);
    });
}

// For tests: the Gumbel noise of a key.
NF_EXPORT void nf_gumbel(int64_t key, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += LANES) {
        vf g = gumbel(lanes() + int32_t(i), uint32_t(key), uint32_t(uint64_t(key) >> 32));
        memcpy(out + i, &g, size_t(std::min<int64_t>(LANES, n - i)) * 4);
    }
}
