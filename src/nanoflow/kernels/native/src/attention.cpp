// Causal paged attention, one entry point for decode and prefill: online softmax over blocks of 64 keys (Milakov and
// Gimelshein 2018; Dao et al. 2022), K and V read in place from pages laid out as the matrix kernel's panels.
//
// A page of one KV head holds, for bf16, K as [16-token group][e / 2][16][2] and V as [token pair][e][2]; for float32, K
// as [16-token group][e][16] and V as [token][e]. `e` is the head dim rounded up to 16, padding zero.
//
// A row's arithmetic depends on absolute key positions alone: blocks of 64 and spans of 512 keys start at multiples from
// 0, every span is summed on its own and folded in ascending order. So decode, prefill, any chunking and any division of
// spans over threads give the same bits. Blocks that are masked for a row leave its state exactly as it was.
#include "common.h"

namespace {

constexpr int64_t BLOCK = 64, SPAN = 512, GROUPS = BLOCK / LANES;
constexpr float LOWEST = -1e30f;

struct Attention {
    const void* q;
    int64_t ldq;
    const void* kv;
    int64_t page_tokens;
    const int32_t *query_start, *query_len, *context_len, *page_table;
    int64_t ld_table, n_requests;
    void* out;
    int64_t ldo, n_heads, n_kv_heads, head_dim;
    float scale;
    int64_t window;  // 0: none
};

struct Item {  // queries [q0, q1) of a request, one KV head, spans [s0, s1); partial < 0: write the result straight to out
    int32_t request, kv_head, q0, q1, s0, s1, partial;
};

// Running softmax of a tile of rows: maximum m (in units of log2), sum l, weighted values o (rows, e).
struct State {
    float *m, *l, *o;
};

// s[M][64] = q[M][e] · Kᵀ of four groups of 16 keys.
template <class D, int M>
NF_INLINE void scores(const typename D::T* q, int64_t ldq, const typename D::T* const* k_group, int64_t e, float* s) {
    typedef typename D::T T;
    vf acc[M][GROUPS] = {};
    const T *k0 = k_group[0], *k1 = k_group[1], *k2 = k_group[2], *k3 = k_group[3];
    for (int64_t i = 0; i < e; i += D::PAIR) {
        typename D::Packed b[GROUPS] = {D::load_packed(k0), D::load_packed(k1), D::load_packed(k2), D::load_packed(k3)};
        k0 += LANES * D::PAIR, k1 += LANES * D::PAIR, k2 += LANES * D::PAIR, k3 += LANES * D::PAIR;
        NF_UNROLL for (int m = 0; m < M; m++) {
            typename D::Packed v = D::spread(q + m * ldq + i);
            NF_UNROLL for (int p = 0; p < GROUPS; p++) acc[m][p] = D::dot(acc[m][p], v, b[p]);
        }
    }
    NF_UNROLL for (int m = 0; m < M; m++)
        NF_UNROLL for (int p = 0; p < GROUPS; p++) vstore(s + m * BLOCK + p * LANES, acc[m][p]);
}

// o[M][columns of P panels] = o · correction + p[M][64] · V over the first n_groups groups of 16 keys.
template <class D, int M, int P>
NF_INLINE void values(const typename D::T* p, const typename D::T* const* v_group, int n_groups, int64_t e, int64_t column,
                      const float* correction, float* o) {
    typedef typename D::T T;
    vf acc[M][P];
    NF_UNROLL for (int m = 0; m < M; m++)
        NF_UNROLL for (int c = 0; c < P; c++) acc[m][c] = vload(o + m * e + column + c * LANES) * correction[m];
    for (int g = 0; g < n_groups; g++) {
        const T* v = v_group[g] + column * D::PAIR;
        const T* a = p + g * LANES;
        for (int t = 0; t < LANES; t += D::PAIR, v += e * D::PAIR) {
            typename D::Packed b[P];
            NF_UNROLL for (int c = 0; c < P; c++) b[c] = D::load_packed(v + c * LANES * D::PAIR);
            NF_UNROLL for (int m = 0; m < M; m++) {
                typename D::Packed s = D::spread(a + m * BLOCK + t);
                NF_UNROLL for (int c = 0; c < P; c++) acc[m][c] = D::dot(acc[m][c], s, b[c]);
            }
        }
    }
    NF_UNROLL for (int m = 0; m < M; m++)
        NF_UNROLL for (int c = 0; c < P; c++) vstore(o + m * e + column + c * LANES, acc[m][c]);
}

// One block of keys for M rows. low/high: first visible key of each row and one past the last, relative to the block.
template <class D, int M>
__attribute__((noinline)) void block_rows(const typename D::T* q, int64_t e, const typename D::T* const* k_group,
                                          const typename D::T* const* v_group, int n_groups, const int32_t* low,
                                          const int32_t* high, float scale_log2, State st) {
    alignas(64) float s[M * BLOCK];
    alignas(64) typename D::T p[M * BLOCK];
    float correction[M];
    scores<D, M>(q, e, k_group, e, s);
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int m = 0; m < M; m++) {
        vf x[GROUPS];
        NF_UNROLL for (int g = 0; g < GROUPS; g++) x[g] = vload(s + m * BLOCK + g * LANES) * scale_log2;
        if (low[m] > 0 || high[m] < BLOCK)
            NF_UNROLL for (int g = 0; g < GROUPS; g++) {
                vi key = lane + int32_t(g * LANES);
                x[g] = (key >= low[m]) & (key < high[m]) ? x[g] : vset(-__builtin_inff());
            }
        float old = st.m[m];
        float top = std::max(old, hmax(vmax(vmax(x[0], x[1]), vmax(x[2], x[3]))));
        NF_UNROLL for (int g = 0; g < GROUPS; g++) {
            x[g] = vexp2<D::EXP2_DEGREE>(x[g] - top);
            D::store(p + m * BLOCK + g * LANES, x[g]);
        }
        correction[m] = top == old ? 1.0f : vexp2<6>(vset(old - top))[0];
        float sum = hsum((x[0] + x[1]) + (x[2] + x[3]));
        st.l[m] = __builtin_fmaf(st.l[m], correction[m], sum);
        st.m[m] = top;
    }
    int64_t c = 0;
    for (; c + 4 * LANES <= e; c += 4 * LANES) values<D, M, 4>(p, v_group, n_groups, e, c, correction, st.o);
    for (; c < e; c += LANES) values<D, M, 1>(p, v_group, n_groups, e, c, correction, st.o);
}

// total ← total combined with part, for `rows` rows; kept out of line so that every caller rounds alike.
__attribute__((noinline)) void fold(int64_t rows, int64_t e, State total, const float* pm, const float* pl, const float* po) {
    for (int64_t r = 0; r < rows; r++) {
        float top = std::max(total.m[r], pm[r]);
        float a = vexp2<6>(vset(total.m[r] - top))[0], b = vexp2<6>(vset(pm[r] - top))[0];
        total.l[r] = __builtin_fmaf(total.l[r], a, pl[r] * b);
        total.m[r] = top;
        for (int64_t c = 0; c < e; c += LANES) {
            vf part = vload(po + r * e + c) * b;
            asm volatile("" : "+m"(part));  // the product is rounded before the sum, in every caller
            vstore(total.o + r * e + c, vload(total.o + r * e + c) * a + part);
        }
    }
}

void clear(int64_t rows, int64_t e, State st) {
    std::fill(st.m, st.m + rows, LOWEST);
    std::fill(st.l, st.l + rows, 0.0f);
    memset(st.o, 0, size_t(rows * e) * sizeof(float));
}

template <class D>
struct Worker {
    typedef typename D::T T;
    const Attention& a;
    int64_t e, group, page_stride, v_offset;

    explicit Worker(const Attention& args) : a(args) {
        e = (a.head_dim + LANES - 1) / LANES * LANES;
        group = a.n_heads / a.n_kv_heads;
        v_offset = a.n_kv_heads * a.page_tokens * e;
        page_stride = 2 * v_offset;
    }

    const T* group_of_keys(int64_t request, int64_t kv_head, int64_t key) const {
        int64_t page = a.page_table[request * a.ld_table + key / a.page_tokens];
        return (const T*)a.kv + page * page_stride + (kv_head * a.page_tokens + key % a.page_tokens) * e;
    }

    static size_t state_floats(int64_t rows, int64_t e) { return size_t(rows * (e + 2)); }
    static State state_at(float* p, int64_t rows, int64_t e) { return {p + rows * e, p + rows * (e + 1), p}; }

    void run(const Item& item, float* partials, size_t slot_floats) const {
        const int64_t rows = (item.q1 - item.q0) * group;
        const int64_t padded = (rows + 15) / 16 * 16;
        const size_t n_state = (state_floats(padded, e) + 15) / 16 * 16;
        float* memory = (float*)scratch(0, (2 * n_state + size_t(2 * padded)) * 4 + size_t(padded * e) * sizeof(T));
        State part = state_at(memory, padded, e), total = state_at(memory + n_state, padded, e);
        int32_t* low = (int32_t*)(memory + 2 * n_state);
        int32_t* high = low + padded;
        T* q = (T*)(high + padded);
        const int64_t context = a.context_len[item.request], first = context - a.query_len[item.request];
        load_queries(item, q);
        for (int64_t r = 0; r < rows; r++) {
            int64_t position = first + item.q0 + r / group;
            high[r] = int32_t(position + 1);
            low[r] = a.window ? int32_t(std::max<int64_t>(0, position + 1 - a.window)) : 0;
        }
        clear(rows, e, total);
        for (int64_t span = item.s0; span < item.s1; span++) {
            int64_t begin = std::max<int64_t>(span * SPAN, low[0] / BLOCK * BLOCK);
            int64_t end = std::min<int64_t>((span + 1) * SPAN, high[rows - 1]);
            if (begin >= end && item.partial < 0) continue;
            clear(rows, e, part);
            for (int64_t key = begin; key < end; key += BLOCK) one_block(item, key, end, rows, q, low, high, part);
            if (item.partial >= 0) {
                float* slot = partials + size_t(item.partial) * slot_floats;
                memcpy(slot, part.o, size_t(rows * e) * 4);
                memcpy(slot + rows * e, part.m, size_t(rows) * 4);
                memcpy(slot + rows * (e + 1), part.l, size_t(rows) * 4);
                return;
            }
            fold(rows, e, total, part.m, part.l, part.o);
        }
        write(item, total);
    }

    void load_queries(const Item& item, T* q) const {
        const int64_t start = a.query_start[item.request] + item.q0;
        for (int64_t r = 0; r < (item.q1 - item.q0) * group; r++) {
            const T* src = (const T*)a.q + (start + r / group) * a.ldq + (item.kv_head * group + r % group) * a.head_dim;
            memcpy(q + r * e, src, size_t(a.head_dim) * sizeof(T));
            memset(q + r * e + a.head_dim, 0, size_t(e - a.head_dim) * sizeof(T));
        }
    }

    void one_block(const Item& item, int64_t key, int64_t end, int64_t rows, const T* q, const int32_t* low,
                   const int32_t* high, State part) const {
        const T *k_group[GROUPS], *v_group[GROUPS];
        const int n_groups = int(std::min<int64_t>(GROUPS, (end - key + LANES - 1) / LANES));
        for (int g = 0; g < GROUPS; g++) {
            k_group[g] = group_of_keys(item.request, item.kv_head, key + (g < n_groups ? g : 0) * LANES);
            v_group[g] = k_group[g] + v_offset;
        }
        if (rows <= 2 * TILE_ROWS) prefetch(item, key + BLOCK, end);
        const float scale_log2 = a.scale * 1.44269504f;
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            const int m = int(std::min<int64_t>(TILE_ROWS, rows - r));
            if (high[r + m - 1] <= key || low[r] >= key + BLOCK) continue;
            int32_t lo[TILE_ROWS], hi[TILE_ROWS];
            for (int i = 0; i < m; i++) lo[i] = low[r + i] - int32_t(key), hi[i] = high[r + i] - int32_t(key);
            State st = {part.m + r, part.l + r, part.o + r * e};
            const T* qr = q + r * e;
            switch (m) {
                case 1: block_rows<D, 1>(qr, e, k_group, v_group, n_groups, lo, hi, scale_log2, st); break;
                case 2: block_rows<D, 2>(qr, e, k_group, v_group, n_groups, lo, hi, scale_log2, st); break;
                case 3: block_rows<D, 3>(qr, e, k_group, v_group, n_groups, lo, hi, scale_log2, st); break;
#if defined(__AVX512F__)
                case 4: block_rows<D, 4>(qr, e, k_group, v_group, n_groups, lo, hi, scale_log2, st); break;
                case 5: block_rows<D, 5>(qr, e, k_group, v_group, n_groups, lo, hi, scale_log2, st); break;
                case 6: block_rows<D, 6>(qr, e, k_group, v_group, n_groups, lo, hi, scale_log2, st); break;
#endif
            }
        }
    }

    void prefetch(const Item& item, int64_t key, int64_t end) const {
        for (int g = 0; g < GROUPS && key < end; g++, key += LANES) {
            const char* k = (const char*)group_of_keys(item.request, item.kv_head, key);
            const char* v = k + v_offset * int64_t(sizeof(T));
            for (int64_t i = 0; i < e * LANES * int64_t(sizeof(T)); i += 64) {
                __builtin_prefetch(k + i, 0, 3);
                __builtin_prefetch(v + i, 0, 3);
            }
        }
    }

    void write(const Item& item, State total) const {
        const int64_t start = a.query_start[item.request] + item.q0;
        for (int64_t r = 0; r < (item.q1 - item.q0) * group; r++) {
            T* dst = (T*)a.out + (start + r / group) * a.ldo + (item.kv_head * group + r % group) * a.head_dim;
            const float inverse = total.l[r] > 0.0f ? 1.0f / total.l[r] : 0.0f;
            const float* o = total.o + r * e;
            int64_t c = 0;
            for (; c + LANES <= a.head_dim; c += LANES) D::store(dst + c, vload(o + c) * inverse);
            for (; c < a.head_dim; c++) D::put(dst + c, o[c] * inverse);
        }
    }

    void combine(const Item& item, int64_t n_spans, const float* partials, size_t slot_floats) const {
        const int64_t rows = (item.q1 - item.q0) * group, padded = (rows + 15) / 16 * 16;
        State total = state_at((float*)scratch(0, state_floats(padded, e) * 4), padded, e);
        clear(rows, e, total);
        for (int64_t s = 0; s < n_spans; s++) {
            const float* slot = partials + size_t(item.partial + s) * slot_floats;
            fold(rows, e, total, slot + rows * e, slot + rows * (e + 1), slot);
        }
        write(item, total);
    }
};

template <class D>
void attention(const Attention& a) {
    const Worker<D> worker(a);
    const int64_t tile_queries = std::max<int64_t>(1, 96 / worker.group);
    int64_t n_whole = 0;
    double work = 0;
    for (int64_t r = 0; r < a.n_requests; r++) {
        n_whole += (a.query_len[r] + tile_queries - 1) / tile_queries * a.n_kv_heads;
        work += double(a.query_len[r]) * a.context_len[r] * double(a.n_heads * worker.e);
    }
    const int threads = threads_for(work, 50e3);
    const bool divide = threads > 1 && n_whole < 4 * threads;  // few items: give spans of one item to several threads
    int64_t n_items = 0, n_partials = 0;
    size_t slot_floats = 0;
    Item* items = nullptr;
    for (int pass = 0; pass < 2; pass++) {  // count, then fill
        if (pass) items = (Item*)scratch(1, size_t(n_items + 1) * sizeof(Item));
        n_items = n_partials = 0;
        for (int64_t r = 0; r < a.n_requests; r++) {
            const int64_t len = a.query_len[r], first = a.context_len[r] - len, n_tiles = (len + tile_queries - 1) / tile_queries;
            for (int64_t t = n_tiles - 1; t >= 0; t--) {  // late queries see most keys: longest items first
                const int64_t q0 = t * tile_queries, q1 = std::min(len, q0 + tile_queries);
                const int64_t s0 = a.window ? std::max<int64_t>(0, first + q0 + 1 - a.window) / SPAN : 0;
                const int64_t s1 = (first + q1 + SPAN - 1) / SPAN;
                const bool split = divide && s1 - s0 > 1;
                slot_floats = std::max(slot_floats, worker.state_floats((q1 - q0) * worker.group, worker.e));
                for (int64_t h = 0; h < a.n_kv_heads; h++)
                    for (int64_t s = s0; s < (split ? s1 : s0 + 1); s++, n_items++) {
                        if (pass)
                            items[n_items] = {int32_t(r), int32_t(h), int32_t(q0), int32_t(q1), int32_t(s),
                                              int32_t(split ? s + 1 : s1), int32_t(split ? n_partials : -1)};
                        n_partials += split;
                    }
            }
        }
    }
    float* partials = n_partials ? (float*)scratch(2, size_t(n_partials) * slot_floats * 4) : nullptr;
    int64_t next = 0;
    parallel(threads, [&](int, int) {
        for (;;) {
            int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (i >= n_items) break;
            worker.run(items[i], partials, slot_floats);
        }
    });
    for (int64_t i = 0; i < n_items && n_partials;) {
        int64_t j = i + 1;
        while (j < n_items && items[i].partial >= 0 && items[j].request == items[i].request &&
               items[j].kv_head == items[i].kv_head && items[j].q0 == items[i].q0)
            j++;
        if (items[i].partial >= 0) worker.combine(items[i], j - i, partials, slot_floats);
        i = j;
    }
}

}  // namespace

#define NF_ATTENTION(NAME, D)                                                                                             \
    NF_EXPORT void nf_attention_##NAME(const void* q, int64_t ldq, const void* kv, int64_t page_tokens,                   \
                                       const int32_t* query_start, const int32_t* query_len, const int32_t* context_len,  \
                                       const int32_t* page_table, int64_t ld_table, int64_t n_requests, void* out,        \
                                       int64_t ldo, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, float scale,   \
                                       int64_t window) {                                                                  \
        attention<D>({q, ldq, kv, page_tokens, query_start, query_len, context_len, page_table, ld_table, n_requests,     \
                      out, ldo, n_heads, n_kv_heads, head_dim, scale, window});                                           \
    }
NF_ATTENTION(f32, F32)
NF_ATTENTION(bf16, BF16)
