// Linear layers. A result element is one float32 sum that runs over k in order, whatever the tile it is computed in, so
// a row's result does not depend on the other rows of the batch. Few rows stream the weights at memory speed; many
// rows reuse a 64-column group from the L2 cache while the next group is prefetched.
#include "gemm.h"

namespace {

template <class D>
struct Panels {  // P adjacent panels of one group, and where the next weights to be read lie
    const typename D::T* w;
    int64_t stride, k;
    const char* next;
};

// Bias, sum with `out`, one rounding. `acc` holds `rows` rows of 16 · P float32 sums.
template <class D>
__attribute__((noinline)) void store_tile(const LinearArgs& a, int64_t row0, int rows, int64_t column0, int columns, const float* acc) {
    typedef typename D::T T;
    for (int m = 0; m < rows; m++, acc += columns) {
        const int64_t row = row0 + m;
        for (int c = 0; c < columns; c += LANES) {
            const int64_t column = column0 + c, left = a.n - column;
            if (left >= LANES) {
                vf v = vload(acc + c);
                if (a.bias) v += a.bias_f32 ? vload((const float*)a.bias + column) : D::load((const T*)a.bias + column);
                if (a.out_f32) {
                    float* out = (float*)a.out + row * a.ldo + column;
                    vstore(out, a.accumulate ? vload(out) + v : v);
                } else {
                    T* out = (T*)a.out + row * a.ldo + column;
                    D::store(out, a.accumulate ? D::load(out) + v : v);
                }
                continue;
            }
            for (int64_t i = 0; i < left; i++) {
                float v = acc[c + i];
                if (a.bias) v += a.bias_f32 ? ((const float*)a.bias)[column + i] : D::get((const T*)a.bias + column + i);
                if (a.out_f32) {
                    float* out = (float*)a.out + row * a.ldo + column + i;
                    *out = a.accumulate ? *out + v : v;
                } else {
                    T* out = (T*)a.out + row * a.ldo + column + i;
                    D::put(out, a.accumulate ? D::get(out) + v : v);
                }
            }
        }
    }
}

// M rows × P panels. LINES cache lines of `next` are prefetched a k step.
template <class D, int M, int P, int LINES>
void tile(const LinearArgs& a, int64_t row, int64_t panel, const Panels<D>& panels) {
    typedef typename D::T T;
    const T* x = (const T*)a.x + row * a.ldx;
    const T* w = panels.w;
    const char* next = panels.next;
    const int64_t ldx = a.ldx, stride = panels.stride, steps = a.k / D::PAIR;
    vf acc[M][P] = {};
    auto step = [&](auto spread) __attribute__((always_inline)) {
        typename D::Packed b[P];
        NF_UNROLL for (int p = 0; p < P; p++) b[p] = D::load_packed(w + p * LANES * D::PAIR);
        NF_UNROLL for (int m = 0; m < M; m++) {
            typename D::Packed v = spread(x + m * ldx);
            NF_UNROLL for (int p = 0; p < P; p++) acc[m][p] = D::dot(acc[m][p], v, b[p]);
        }
    };
    for (int64_t k = 0; k < steps; k++) {
        NF_UNROLL for (int i = 0; i < LINES; i++) __builtin_prefetch(next + 64 * i, 0, 2);
        next += 64 * LINES;
        step([](const T* p) { return D::spread(p); });
        w += stride;
        x += D::PAIR;
    }
    if (D::PAIR == 2 && (a.k & 1)) step([](const T* p) { return D::spread_last(p); });
    float sums[M * P * LANES];
    NF_UNROLL for (int m = 0; m < M; m++)
        NF_UNROLL for (int p = 0; p < P; p++) vstore(sums + (m * P + p) * LANES, acc[m][p]);
    store_tile<D>(a, row, M, panel * LANES, P * LANES, sums);
}

template <class D, int P, int LINES>
void tile_rows(int m, const LinearArgs& a, int64_t row, int64_t panel, const Panels<D>& panels) {
    switch (m) {
        case 1: return tile<D, 1, P, LINES>(a, row, panel, panels);
        case 2: return tile<D, 2, P, LINES>(a, row, panel, panels);
        case 3: return tile<D, 3, P, LINES>(a, row, panel, panels);
#if defined(__AVX512F__)
        case 4: return tile<D, 4, P, LINES>(a, row, panel, panels);
        case 5: return tile<D, 5, P, LINES>(a, row, panel, panels);
        case 6: return tile<D, 6, P, LINES>(a, row, panel, panels);
#endif
    }
}

template <class D>
void tile_any(int m, int p, bool prefetch, const LinearArgs& a, int64_t row, int64_t panel, const Panels<D>& panels) {
    switch (p) {
        case 1: return tile_rows<D, 1, 0>(m, a, row, panel, panels);
        case 2: return tile_rows<D, 2, 0>(m, a, row, panel, panels);
#if defined(__AVX512F__)
        case 3: return tile_rows<D, 3, 0>(m, a, row, panel, panels);
        case 4:
            if (prefetch) return tile_rows<D, 4, 2>(m, a, row, panel, panels);
            return tile_rows<D, 4, 0>(m, a, row, panel, panels);
#endif
    }
}

template <class D>
void block(const LinearArgs& a, int64_t row0, int64_t row1, int64_t panel0, int64_t panel1) {
    typedef typename D::T T;
    const int64_t n_tiles = (row1 - row0 + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t panel = panel0; panel < panel1;) {
        Panels<D> panels;
        panels.k = a.k;
        panels.w = (const T*)a.w + panel_offset<D>(a.n, a.k, panel, panels.stride);
        int64_t group_end = (panel / GROUP_PANELS + 1) * GROUP_PANELS;
        int p = int(std::min<int64_t>({TILE_PANELS, group_end - panel, panel1 - panel}));
        const int64_t step_bytes = panels.stride * int64_t(sizeof(T)), steps = a.k / D::PAIR;
        const char* next = (const char*)panels.w + steps * step_bytes;
        for (int64_t t = 0; t < n_tiles; t++) {
            int64_t r0 = row0 + (row1 - row0) * t / n_tiles, r1 = row0 + (row1 - row0) * (t + 1) / n_tiles;
            // The group's successor follows it in memory: two tiles fetch half of it each; a single tile runs ahead of itself.
            panels.next = n_tiles == 1 ? (const char*)panels.w + 2048 : next + t * steps * 128;
            tile_any<D>(int(r1 - r0), p, t < 2, a, r0, panel, panels);
        }
        panel += p;
    }
}

// Cost of a grid cell in row × panel units: narrow tiles are dearer, and each panel costs as much to fetch as two rows.
double cell_cost(int64_t rows, int64_t panels) {
    constexpr double EDGE[4] = {0.0, 1.6, 2.4, 3.2};
    return double(rows + 2) * (double(panels / 4 * 4) + EDGE[panels % 4]);
}

}  // namespace

template <class D>
void linear(const LinearArgs& a) {
    if (a.m <= 0 || a.n <= 0) return;
    const int64_t panels = n_panels(a.n);
    int threads = threads_for(double(a.m) * double(a.n) * double(a.k), 60e3);
    int best_rows = 1;
    double best_cost = 1e300;
    for (int by_rows = 1; by_rows <= threads; by_rows++) {
        if (threads % by_rows || by_rows > a.m) continue;
        int by_panels = threads / by_rows;
        double cost = cell_cost((a.m + by_rows - 1) / by_rows, (panels + by_panels - 1) / by_panels);
        if (cost < best_cost * 0.98) best_cost = cost, best_rows = by_rows;
    }
    const int by_panels = threads / best_rows;
    const int64_t unit = panels >= 16 * by_panels ? GROUP_PANELS : 1;
    parallel(threads, [&](int thread, int n_threads) {
        for (int cell = thread; cell < threads; cell += n_threads) {
            int64_t row0, row1, panel0, panel1;
            share(a.m, cell / by_panels, best_rows, row0, row1);
            share((panels + unit - 1) / unit, cell % by_panels, by_panels, panel0, panel1);
            block<D>(a, row0, row1, panel0 * unit, std::min(panel1 * unit, panels));
        }
    });
}
template void linear<F32>(const LinearArgs&);
template void linear<BF16>(const LinearArgs&);

namespace {

template <class D>
void pack(const typename D::T* src, int64_t n, int64_t k, typename D::T* dst) {
    const int64_t panels = n_panels(n);
    parallel(threads_for(double(n) * double(k), 1e5), [&](int thread, int n_threads) {
        int64_t p0, p1;
        share(panels, thread, n_threads, p0, p1);
        for (int64_t panel = p0; panel < p1; panel++) {
            int64_t stride;
            typename D::T* out = dst + panel_offset<D>(n, k, panel, stride);
            for (int64_t kp = 0; kp < packed_k(k, D::PAIR); kp += D::PAIR, out += stride)
                for (int i = 0; i < LANES; i++)
                    for (int j = 0; j < D::PAIR; j++) {
                        bool inside = panel * LANES + i < n && kp + j < k;
                        out[i * D::PAIR + j] = inside ? src[(panel * LANES + i) * k + kp + j] : typename D::T(0);
                    }
        }
    });
}

template <class D, class Out>
void gather_rows(const int32_t* ids, int64_t m, const typename D::T* w, int64_t n, int64_t k, typename Out::T* out, int64_t ldo) {
    parallel(threads_for(double(m) * double(k), 2e4), [&](int thread, int n_threads) {
        int64_t r0, r1;
        share(m, thread, n_threads, r0, r1);
        for (int64_t r = r0; r < r1; r++) {
            int64_t id = ids[r], stride;
            if (id < 0 || id >= n) id = 0;
            const typename D::T* src = w + panel_offset<D>(n, k, id / LANES, stride) + id % LANES * D::PAIR;
            for (int64_t i = 0; i < k; i++) Out::put(out + r * ldo + i, D::get(src + i / D::PAIR * stride + i % D::PAIR));
        }
    });
}

}  // namespace

// flags of nf_linear: 1 accumulate, 2 out is float32, 4 bias is float32
#define NF_LINEAR(NAME, D)                                                                                              \
    NF_EXPORT void nf_linear_##NAME(const void* x, int64_t ldx, int64_t m, const void* w, int64_t n, int64_t k,         \
                                    const void* bias, void* out, int64_t ldo, int64_t flags) {                          \
        linear<D>({x, ldx, m, w, n, k, bias, bool(flags & 4), out, ldo, bool(flags & 2), bool(flags & 1)});             \
    }                                                                                                                   \
    NF_EXPORT int64_t nf_packed_size_##NAME(int64_t n, int64_t k) { return n_panels(n) * LANES * packed_k(k, D::PAIR); } \
    NF_EXPORT void nf_pack_##NAME(const void* src, int64_t n, int64_t k, void* dst) {                                   \
        pack<D>((const D::T*)src, n, k, (D::T*)dst);                                                                    \
    }                                                                                                                   \
    NF_EXPORT void nf_embed_##NAME(const int32_t* ids, int64_t m, const void* w, int64_t n, int64_t k, void* out,        \
                                   int64_t ldo, int64_t out_f32) {                                                      \
        if (out_f32) return gather_rows<D, F32>(ids, m, (const D::T*)w, n, k, (float*)out, ldo);                        \
        gather_rows<D, D>(ids, m, (const D::T*)w, n, k, (D::T*)out, ldo);                                               \
    }
NF_LINEAR(f32, F32)
NF_LINEAR(bf16, BF16)
