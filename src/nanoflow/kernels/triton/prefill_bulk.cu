// Paged causal prefill attention for sm_90a: warp-specialised, asynchronous matrix units; compiled by `prefill_bulk.py`.
//
// One block a multiprocessor works through query tiles (work_lists.PrefillPlanner). Of its three warpgroups one only
// fetches: one warp copies pages of keys and one pages of values through the bulk copy engine (TMA) into rings of STAGES
// tiles, the other two fetch the queries of the next tile. The other two warpgroups own 64 rows each: they start the next tile's
// scores and this tile's weighted values together, and do the softmax of one while the matrix units do the other.
// Rows of a tile are query · GROUP + head of the group, so that all heads of a KV head share what is copied.
//
// From the host: DIM (64 or 128), GROUP, N_KV, PAGE_TOKENS, STAGES, IS_BF16, HAS_WINDOW.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
struct alignas(64) TensorMap { char bytes[128]; };

constexpr int ROWS = 128, KEYS = 128, WARPGROUP = 128;
constexpr int HALVES = DIM / 64;                         // a swizzled row holds 64 elements
constexpr int HALF_BYTES = 128 * 128;                    // 128 rows of 64 elements
constexpr int TILE_BYTES = HALVES * HALF_BYTES;
constexpr int BOX = KEYS < PAGE_TOKENS ? KEYS : PAGE_TOKENS;
constexpr int COPIES = KEYS / BOX * HALVES;              // of a tile of keys or values
static_assert(COPIES <= 32, "one lane issues one copy");
constexpr int TILE_INTS = 4;
constexpr int Q_BUFFERS = 2;
constexpr int LOADERS = 64;                              // threads that fetch queries
constexpr int WORKERS = 8;                               // warps that compute: each tells when it has read a buffer
constexpr float LOWEST = -1.0e30f;

struct Barriers { u64 q_full[Q_BUFFERS], q_empty[Q_BUFFERS], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES]; };
struct Tile { int row, queries, position, pages; };

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u64& barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(u64& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
__device__ __forceinline__ void expect(u64& barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u64& barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra out;\nbra again;\nout:\n}"
        ::"r"(shared_address(&barrier)), "r"(parity) : "memory");
}

__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int column, int row, u64& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(shared_address(&barrier)) : "memory");
}

// How the matrix units find a tile in shared memory: 128-byte swizzle, `lead` and `stride` in bytes.
__device__ __forceinline__ u64 descriptor(u32 at, u32 lead, u32 stride) {
    return (u64)((at & 0x3FFFF) >> 4) | (u64)(lead >> 4) << 16 | (u64)(stride >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void pending() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Registers that an asynchronous product wrote or read: no use of them may move across this line.
template <int N> __device__ __forceinline__ void settle(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i]) :: "memory");
}
template <int N> __device__ __forceinline__ void settle(u32 (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(c[i]) :: "memory");
}

#if IS_BF16
#define TYPES "bf16.bf16"
#else
#define TYPES "f16.f16"
#endif
#define F8(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define F32(c, i) F8(c, i), F8(c, i + 8), F8(c, i + 16), F8(c, i + 24)
#define NAMES32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES64 NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// score (64 × 128) = or += queries (64 × 16) · keys (128 × 16)ᵀ, both from shared memory
__device__ __forceinline__ void multiply_keys(float (&score)[64], u64 queries, u64 keys, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " {" NAMES64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
        : F32(score, 0), F32(score, 32) : "l"(queries), "l"(keys), "r"(add));
}

// acc (64 × DIM) += probabilities (64 × 16, registers) · values (16 × DIM, shared memory)
#if DIM == 128
__device__ __forceinline__ void multiply_values(float (&acc)[64], const u32* p, u64 values) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " {" NAMES64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
        : F32(acc, 0), F32(acc, 32) : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(values));
}
#else
__device__ __forceinline__ void multiply_values(float (&acc)[32], const u32* p, u64 values) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " {" NAMES32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
        : F32(acc, 0) : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(values));
}
#endif

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
#if IS_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

struct Units {  // this block's units: there and back over the blocks, so that long and short ones even out
    const int* ints;
    int count;
    __device__ __forceinline__ int nth(int turn) const {
        const int n = gridDim.x, b = blockIdx.x;
        return turn * n + (turn & 1 ? n - 1 - b : b);
    }
    __device__ __forceinline__ Tile tile(int unit) const {
        const int* at = ints + 4 + unit / N_KV * TILE_INTS;
        return {__ldg(at), __ldg(at + 1), __ldg(at + 2), __ldg(at + 3)};
    }
};

// Keys of a tile of queries, in steps of KEYS: [first step, step after the last).
__device__ __forceinline__ int first_step(const Tile& t, int window) {
#if HAS_WINDOW
    return max(t.position - window + 1, 0) / KEYS;
#else
    return 0;
#endif
}
__device__ __forceinline__ int last_step(const Tile& t) { return (t.position + t.queries + KEYS - 1) / KEYS; }

// One warp: pages of keys (or, with `is_value`, of values) into their ring; page ids are read a step ahead.
__device__ void fetch_pages(const Units& units, const int* pages, const TensorMap* map, u64* full, u64* empty, u32 ring, int is_value, int window) {
    const int lane = threadIdx.x % 32, half = lane % HALVES, offset = lane / HALVES * BOX;
    int stage = 0;
    u32 parity = 1;  // the first pass over an empty ring does not wait
    for (int turn = 0, unit; (unit = units.nth(turn)) < units.count; ++turn) {
        const Tile t = units.tile(unit);
        const int head = unit % N_KV, last_key = t.position + t.queries - 1, end = last_step(t);
        int step = first_step(t, window);
        auto page_of = [&](int s) { return __ldg(pages + t.pages + min(s * KEYS + offset, last_key) / PAGE_TOKENS); };
        int page = page_of(step);
        for (; step < end; ++step) {
            const int next_page = page_of(step + 1);
            wait(empty[stage], parity);
            if (lane == 0) expect(full[stage], TILE_BYTES);
            __syncwarp();
            if (lane < COPIES) {
                const int row = ((page * 2 + is_value) * N_KV + head) * PAGE_TOKENS + (step * KEYS + offset) % PAGE_TOKENS;
                copy_box(ring + stage * TILE_BYTES + half * HALF_BYTES + offset * 128, map, half * 64, row, full[stage]);
            }
            page = next_page;
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
}

// Two warps: the queries of each tile into one of two buffers, zeros where the tile has fewer.
__device__ void fetch_queries(const Units& units, const u16* queries, long long q_stride, Barriers& bar, Tile* tiles, u32 q_buffers) {
    const int mine = threadIdx.x % WARPGROUP - 64;
    for (int turn = 0, unit; (unit = units.nth(turn)) < units.count; ++turn) {
        const Tile t = units.tile(unit);
        const int buffer = turn % Q_BUFFERS, head = unit % N_KV;
        wait(bar.q_empty[buffer], turn / Q_BUFFERS & 1 ^ 1);
        if (mine == 0) tiles[buffer] = t;
        for (int c = mine; c < ROWS * DIM / 8; c += LOADERS) {
            const int m = c / (DIM / 8), chunk = c % (DIM / 8), query = m / GROUP;
            const bool inside = query < t.queries;
            const u16* from = queries + (inside ? (t.row + query) * q_stride + (head * GROUP + m % GROUP) * DIM + chunk * 8 : 0);
            const u32 to = q_buffers + buffer * TILE_BYTES + chunk / 8 * HALF_BYTES + m * 128 + ((chunk ^ m) & 7) * 16;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
        }
        asm volatile("cp.async.wait_all;\nfence.proxy.async.shared::cta;" ::: "memory");
        arrive(bar.q_full[buffer]);
    }
}

// The two warpgroups take turns at starting products, so that one's softmax falls into the other's products.
__device__ __forceinline__ void wait_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(group + 1) : "memory"); }
__device__ __forceinline__ void give_turn(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(group + 1) : "memory"); }

struct Softmax {  // of a thread's two rows; `sum` covers the thread's own columns until the end
    float top[2], sum[2];
};

// Scores to probabilities in place; returns by how much the rows' earlier results shrink.
__device__ __forceinline__ void softmax(float (&score)[64], Softmax& s, float (&shrink)[2], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float high = s.top[r];
#pragma unroll
        for (int i = 0; i < 32; ++i) high = fmaxf(high, score[i / 2 * 4 + r * 2 + i % 2]);
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        shrink[r] = exp2_fast((s.top[r] - high) * scale_log2);
        s.top[r] = high;
        const float offset = high * scale_log2;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            float& x = score[i / 2 * 4 + r * 2 + i % 2];
            x = exp2_fast(x * scale_log2 - offset);
            sum += x;
        }
        s.sum[r] = s.sum[r] * shrink[r] + sum;
    }
}

// Two warpgroups: attention of 64 rows each.
__device__ void attend(const Units& units, Barriers& bar, const Tile* tiles, u32 q_buffers, u32 k_ring, u32 v_ring,
                       u16* out, long long out_stride, float scale_log2, int window) {
    const int group = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, lane = threadIdx.x % 32;
    const int my_row = group * 64 + thread / 32 * 16 + lane / 4;  // and my_row + 8
    int k_stage = 0, v_stage = 0;
    if (group == 1) give_turn(0);
    u32 k_parity = 0, v_parity = 0;
    for (int turn = 0, unit; (unit = units.nth(turn)) < units.count; ++turn) {
        const int buffer = turn % Q_BUFFERS, head = unit % N_KV;
        wait(bar.q_full[buffer], turn / Q_BUFFERS & 1);
        const Tile t = tiles[buffer];
        const u32 q_at = q_buffers + buffer * TILE_BYTES + group * (64 * 128);
        const int end = last_step(t);
        const int position[2] = {t.position + my_row / GROUP, t.position + (my_row + 8) / GROUP};

        float score[64], acc[DIM / 2], shrink[2];
        u32 prob[32];
        Softmax rows = {{LOWEST, LOWEST}, {0.0f, 0.0f}};
#pragma unroll
        for (int i = 0; i < DIM / 2; ++i) acc[i] = 0.0f;

        auto start_scores = [&] {
            wait(bar.k_full[k_stage], k_parity);
            settle(score);
            fence();
            const u32 k_at = k_ring + k_stage * TILE_BYTES;
#pragma unroll
            for (int d = 0; d < DIM / 16; ++d) {
                const u32 along = d / 4 * HALF_BYTES + d % 4 * 32;
                multiply_keys(score, descriptor(q_at + along, 16, 1024), descriptor(k_at + along, 16, 1024), d > 0);
            }
            commit();
        };
        auto start_values = [&] {
            wait(bar.v_full[v_stage], v_parity);
            settle(acc), settle(prob);
            fence();
            const u32 v_at = v_ring + v_stage * TILE_BYTES;
#pragma unroll
            for (int k = 0; k < KEYS / 16; ++k)
                multiply_values(acc, prob + k * 4, descriptor(v_at + k * 2048, HALF_BYTES, 1024));
            commit();
        };
        auto free_keys = [&] {
            if (lane == 0) arrive(bar.k_empty[k_stage]);
            if (++k_stage == STAGES) k_stage = 0, k_parity ^= 1;
        };
        auto free_values = [&] {
            if (lane == 0) arrive(bar.v_empty[v_stage]);
            if (++v_stage == STAGES) v_stage = 0, v_parity ^= 1;
        };
        auto mask = [&](int step) {
            const int from = step * KEYS, last = from + KEYS - 1;
            bool whole = last <= t.position;
#if HAS_WINDOW
            whole = whole && from > t.position + t.queries - 1 - window;
#endif
            if (whole) return;
#pragma unroll
            for (int i = 0; i < 64; ++i) {
                const int key = from + i / 4 * 8 + lane % 4 * 2 + i % 2, at = position[i / 2 % 2];
#if HAS_WINDOW
                if (key > at || key <= at - window) score[i] = 2.0f * LOWEST;
#else
                if (key > at) score[i] = 2.0f * LOWEST;
#endif
            }
        };
        auto keep = [&] {
#pragma unroll
            for (int i = 0; i < 32; ++i) prob[i] = pack(score[i * 2], score[i * 2 + 1]);
        };

        int step = first_step(t, window);
        start_scores();
        pending<0>();
        settle(score);
        free_keys();
        mask(step);
        softmax(score, rows, shrink, scale_log2);
        keep();
        for (++step; step < end; ++step) {
            wait_turn(group);
            start_scores();
            start_values();
            give_turn(1 - group);
            pending<1>();
            settle(score);
            free_keys();
            mask(step);
            softmax(score, rows, shrink, scale_log2);
            settle(score);
            // Never so; but across a branch the compiler does not move the exponentials behind the wait.
            if (__any_sync(~0u, rows.sum[0] + rows.sum[1] < 0.0f)) return;
            pending<0>();
            settle(acc), settle(prob);
            free_values();
#pragma unroll
            for (int i = 0; i < DIM / 2; ++i) acc[i] *= shrink[i / 2 % 2];
            keep();
        }
        if (lane == 0) arrive(bar.q_empty[buffer]);
        start_values();
        pending<0>();
        settle(acc);
        free_values();

#pragma unroll
        for (int r = 0; r < 2; ++r) {
            rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 1);
            rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 2);
            const int m = my_row + r * 8, query = m / GROUP;
            if (query >= t.queries) continue;
            const float share = 1.0f / rows.sum[r];
            u16* to = out + (t.row + query) * out_stride + (head * GROUP + m % GROUP) * DIM + lane % 4 * 2;
#pragma unroll
            for (int d = 0; d < DIM / 8; ++d)
                *(u32*)(to + d * 8) = pack(acc[d * 4 + r * 2] * share, acc[d * 4 + r * 2 + 1] * share);
        }
    }
}

extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1) prefill_bulk(
    const __grid_constant__ TensorMap kv_map, const u16* queries, long long q_stride, const int* ints, const int* pages,
    u16* out, long long out_stride, float scale_log2, int window) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ Barriers bar;
    __shared__ Tile tiles[Q_BUFFERS];
    const u32 q_buffers = (shared_address(shared) + 1023) / 1024 * 1024;
    const u32 k_ring = q_buffers + Q_BUFFERS * TILE_BYTES, v_ring = k_ring + STAGES * TILE_BYTES;
    const Units units = {ints, ints[0] * N_KV};
    if (threadIdx.x == 0) {
        for (int b = 0; b < Q_BUFFERS; ++b) barrier_init(bar.q_full[b], LOADERS), barrier_init(bar.q_empty[b], WORKERS);
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(bar.k_full[s], 1), barrier_init(bar.k_empty[s], WORKERS);
            barrier_init(bar.v_full[s], 1), barrier_init(bar.v_empty[s], WORKERS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x < 32) fetch_pages(units, pages, &kv_map, bar.k_full, bar.k_empty, k_ring, 0, window);
        else if (threadIdx.x < 64) fetch_pages(units, pages, &kv_map, bar.v_full, bar.v_empty, v_ring, 1, window);
        else fetch_queries(units, queries, q_stride, bar, tiles, q_buffers);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        attend(units, bar, tiles, q_buffers, k_ring, v_ring, out, out_stride, scale_log2, window);
    }
}
