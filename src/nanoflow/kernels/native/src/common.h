// What every kernel shares: a 16-lane float vector that lowers to AVX-512, AVX2 or NEON, element types, exp and log,
// per-thread scratch memory and the parallel region.
//
// Element types are structs (`F32`, `BF16`) that name the storage type and how many consecutive k values sit side by
// side in a packed weight (PAIR). BF16 packs pairs because one AVX512-BF16 instruction multiplies pairs of each lane.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NF_EXPORT extern "C" __attribute__((visibility("default")))
#define NF_UNROLL _Pragma("GCC unroll 8")
#define NF_INLINE inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_PANELS = 4;  // 24 accumulators of 32 registers
#else
constexpr int TILE_ROWS = 3, TILE_PANELS = 2;  // 6 accumulators of two (AVX2) or four (NEON) registers each
#endif
constexpr int GROUP_PANELS = 4;  // panels stored side by side: one stream of 64 columns

static NF_INLINE vf vset(float x) { return x - vf{}; }
static NF_INLINE vf vload(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
static NF_INLINE void vstore(float* p, vf v) { memcpy(p, &v, sizeof v); }
static NF_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

// a · b + c with one rounding where the processor can. Contraction by the compiler is off (see build.py): it would fuse
// in one tile shape and not in another, and a row's result would depend on the batch.
static NF_INLINE vf vfma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    memcpy(&c, z, 64);
    return c;
#elif defined(__aarch64__)
    float32x4_t x[4], y[4], z[4];
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int i = 0; i < 4; i++) z[i] = vfmaq_f32(z[i], x[i], y[i]);
    memcpy(&c, z, 64);
    return c;
#else
    return a * b + c;
#endif
}

static NF_INLINE float hmax(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
#endif
}
static NF_INLINE float hsum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = v[i] + v[i + 8];
    for (int n = 4; n; n /= 2)
        for (int i = 0; i < n; i++) s[i] += s[i + n];
    return s[0];
#endif
}

typedef uint16_t bf16_t;
static NF_INLINE float bf16_to_float(bf16_t h) {
    uint32_t u = uint32_t(h) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static NF_INLINE bf16_t float_to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16_t((u >> 16) | 0x40);
    return bf16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

struct F32 {
    typedef float T;
    typedef vf Packed;  // 16 columns at one k
    static constexpr int PAIR = 1;
    static constexpr int EXP2_DEGREE = 6;
    static NF_INLINE float get(const T* p) { return *p; }
    static NF_INLINE void put(T* p, float v) { *p = v; }
    static NF_INLINE vf load(const T* p) { return vload(p); }
    static NF_INLINE void store(T* p, vf v) { vstore(p, v); }
    static NF_INLINE Packed load_packed(const T* p) { return vload(p); }
    static NF_INLINE Packed spread(const T* p) { return vset(*p); }
    static NF_INLINE Packed spread_last(const T* p) { return vset(*p); }
    static NF_INLINE vf dot(vf acc, Packed a, Packed b) { return vfma(a, b, acc); }
};

struct BF16 {
    typedef bf16_t T;
    typedef vu Packed;  // 16 columns at k and k + 1
    static constexpr int PAIR = 2;
    static constexpr int EXP2_DEGREE = 5;
    static NF_INLINE float get(const T* p) { return bf16_to_float(*p); }
    static NF_INLINE void put(T* p, float v) { *p = float_to_bf16(v); }
    static NF_INLINE vf load(const T* p) {
        vh h;
        memcpy(&h, p, sizeof h);
        return (vf)(__builtin_convertvector(h, vu) << 16);
    }
    static NF_INLINE void store(T* p, vf v) {
        vu u = (vu)v;
        vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        vu nan = (u >> 16) | 0x40u;
        vh h = __builtin_convertvector((v == v) ? rounded : nan, vh);
        memcpy(p, &h, sizeof h);
    }
    static NF_INLINE Packed load_packed(const T* p) {
        vu v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static NF_INLINE Packed spread(const T* p) {
        uint32_t u;
        memcpy(&u, p, 4);
        return u - vu{};
    }
    static NF_INLINE Packed spread_last(const T* p) { return uint32_t(*p) - vu{}; }  // the pair (p[0], 0)
    static NF_INLINE vf dot(vf acc, Packed a, Packed b) {
#if defined(__AVX512BF16__)
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
        acc = vfma((vf)(a << 16), (vf)(b << 16), acc);
        return vfma((vf)(a & 0xffff0000u), (vf)(b & 0xffff0000u), acc);
#endif
    }
};

// 2^x; exactly 1 at 0, 0 below -126. The polynomial is Taylor's around 0 on [-0.5, 0.5]; degree 6 errs below 2e-7.
template <int DEGREE>
static NF_INLINE vf vexp2(vf x) {
    constexpr float C[7] = {1.0f, 0.693147180559945f, 0.240226506959101f, 0.0555041086648216f,
                            0.00961812910762848f, 0.00133335581464284f, 0.000154035303933816f};
    vf bounded = x < -126.0f ? vset(-126.0f) : x;
    bounded = bounded > 127.0f ? vset(127.0f) : bounded;
    vf shifted = bounded + 12582912.0f;  // 1.5 · 2^23: rounds to the nearest integer, which sits in the low bits
    vi n = (vi)shifted - 0x4b400000;
    vf f = bounded - (shifted - 12582912.0f);
    vf p = vset(C[DEGREE]);
    NF_UNROLL for (int i = DEGREE - 1; i >= 0; i--) p = vfma(p, f, vset(C[i]));
    vf result = (vf)((vi)p + (n << 23));
    return x < -126.0f ? vf{} : result;
}
static NF_INLINE vf vexp(vf x) {  // split of the argument keeps the relative error near one unit for large |x|
    constexpr float LOG2E = 1.44269504f;
    vf shifted = x * LOG2E + 12582912.0f;
    vf n = shifted - 12582912.0f;
    vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = vset(1.9875691500e-4f);
    p = vfma(p, r, vset(1.3981999507e-3f));
    p = vfma(p, r, vset(8.3334519073e-3f));
    p = vfma(p, r, vset(4.1665795894e-2f));
    p = vfma(p, r, vset(1.6666665459e-1f));
    p = vfma(p, r, vset(5.0000001201e-1f));
    p = vfma(p, r * r, r) + 1.0f;
    vf result = (vf)((vi)p + (((vi)shifted - 0x4b400000) << 23));
    result = x > 88.3f ? vset(__builtin_inff()) : result;
    return x < -87.3f ? vf{} : result;
}
static NF_INLINE vf vlog(vf x) {  // natural logarithm of positive normal numbers (Cephes logf)
    vi bits = (vi)x;
    vf e = __builtin_convertvector((bits >> 23) - 126, vf);
    vf m = (vf)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
    vi low = m < 0.707106781f;
    e = low ? e - 1.0f : e;
    m = (low ? m + m : m) - 1.0f;
    vf z = m * m;
    constexpr float C[9] = {7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                            -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
    vf y = vset(C[0]);
    for (int i = 1; i < 9; i++) y = vfma(y, m, vset(C[i]));
    y = y * m * z + e * -2.12194440e-4f - z * 0.5f;
    return m + y + e * 0.693359375f;
}

// Memory that lives as long as its thread and only grows; slots keep buffers of one kernel apart.
static inline void* scratch(int slot, size_t bytes) {
    struct Buffer {
        void* p = nullptr;
        size_t n = 0;
        ~Buffer() { free(p); }
    };
    static thread_local Buffer buffers[8];
    Buffer& b = buffers[slot];
    if (b.n < bytes) {
        free(b.p);
        b.n = (bytes * 5 / 4 + 4095) / 4096 * 4096;
        b.p = aligned_alloc(4096, b.n);
        if (!b.p) abort();
    }
    return b.p;
}

static inline int threads_for(double work, double work_per_thread) {
    double wanted = work / work_per_thread;
    int most = omp_get_max_threads();
    return wanted >= most ? most : std::max(1, int(wanted));
}

// In team.cpp: call(context, thread, n) on n threads, the calling one among them.
__attribute__((visibility("hidden"))) void run_team(int n, void (*call)(void*, int, int), void* context);

// Run f(thread, n_threads) on n threads of the calling thread's team.
template <class F>
static inline void parallel(int n, F f) {
    if (n <= 1) return f(0, 1);
    run_team(n, [](void* context, int thread, int n_threads) { (*(F*)context)(thread, n_threads); }, &f);
}

static inline void share(int64_t n, int thread, int n_threads, int64_t& begin, int64_t& end) {
    begin = n * thread / n_threads;
    end = n * (thread + 1) / n_threads;
}
