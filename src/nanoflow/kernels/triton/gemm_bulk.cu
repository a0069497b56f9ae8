// Persistent matrix product out = x Wᵀ for sm_90a, in clusters of two blocks; compiled by `gemm_bulk.py`.
//
// The two blocks of a cluster work on row tiles above each other and share the tile of weights: each fetches half of it
// through the bulk copy engine (TMA) and sends it to both, so a third less is read from the L2 cache, and energy is what
// bounds this chip. Of a block's three warpgroups one thread fetches; the other two own 64 rows × 256 columns each.
// Results leave through shared memory, with SiLU · mul of interleaved columns, or added to what `out` held (which is
// fetched ahead).
//
// From the host: STAGES, GROUP (row tile pairs that share a column of weights at a time), IS_BF16, SILU_MUL, ACCUMULATE.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
struct alignas(64) TensorMap { char bytes[128]; };

constexpr int WARPGROUP = 128, CLUSTER = 2;
constexpr int TILE_M = 128, TILE_N = 256, TILE_K = 64;    // a row of a tile is 128 bytes: one swizzled line
constexpr int X_BYTES = TILE_M * 128, W_BYTES = TILE_N * 128, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int OUT_N = SILU_MUL ? TILE_N / 2 : TILE_N;
constexpr int BOXES = OUT_N / 64, BOX_BYTES = 64 * 128;   // a warpgroup's rows of 64 columns of the result
constexpr int RELEASES = 2 * CLUSTER;                     // warpgroups that read what a block fetched for a stage

struct Barriers { u64 full[STAGES], empty[STAGES], old_full, old_empty; };

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u64& barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(u64& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
__device__ __forceinline__ void arrive_at(u64& barrier, int block) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(&barrier)), "r"(block) : "memory");
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

__device__ __forceinline__ void fetch_box(u32 to, const TensorMap* map, int column, int row, u64& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(shared_address(&barrier)) : "memory");
}
__device__ __forceinline__ void fetch_box_for_both(u32 to, const TensorMap* map, int column, int row, u64& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;"
        ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(shared_address(&barrier)), "h"((u16)3) : "memory");
}
__device__ __forceinline__ void store_box(const TensorMap* map, int column, int row, u32 from) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
        ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void warpgroup_barrier(int id) {
    asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

// How the matrix units find a tile in shared memory: 128-byte swizzle, 1024 bytes from 8 rows to the next 8.
__device__ __forceinline__ u64 descriptor(u32 at) {
    return (u64)((at & 0x3FFFF) >> 4) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void pending() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Registers that an asynchronous product wrote: no use of them may move across this line.
__device__ __forceinline__ void settle(float (&c)[128]) {
#pragma unroll
    for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(c[i]) :: "memory");
}

#if IS_BF16
#define TYPES "bf16.bf16"
#else
#define TYPES "f16.f16"
#endif
#define F8(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define F32(c, i) F8(c, i), F8(c, i + 8), F8(c, i + 16), F8(c, i + 24)
#define NAMES \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63," \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
    "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// acc (64 × 256) = or += x (64 × 16) · w (256 × 16)ᵀ, both from shared memory
__device__ __forceinline__ void multiply(float (&acc)[128], u64 x, u64 w, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPES " {" NAMES "}, %128, %129, p, 1, 1, 0, 0;\n}"
        : F32(acc, 0), F32(acc, 32), F32(acc, 64), F32(acc, 96) : "l"(x), "l"(w), "r"(add));
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
#if IS_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}
__device__ __forceinline__ void add_packed(float& low, float& high, u32 both) {
#if IS_BF16
    low += __uint_as_float(both << 16);
    high += __uint_as_float(both & 0xFFFF0000);
#else
    float l, h;
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}" : "=f"(l), "=f"(h) : "r"(both));
    low += l, high += h;
#endif
}
__device__ __forceinline__ float silu_mul(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

// A cluster's tiles: down the pairs of row tiles of a group, then the next column.
struct Tiles {
    int n_pairs, n_columns;
    __device__ __forceinline__ int count() const { return n_pairs * n_columns; }
    __device__ __forceinline__ void place(int tile, int& pair, int& column) const {
        const int per_group = GROUP * n_columns, first = tile / per_group * GROUP;
        const int height = min(n_pairs - first, GROUP), rest = tile % per_group;
        pair = first + rest % height, column = rest / height;
    }
};

// One thread: tiles of x and of the weights into the ring, half of the weights for both blocks.
__device__ void fetch(const Tiles& tiles, int n_steps, int rank, const TensorMap* x_map, const TensorMap* w_map, Barriers& bar, u32 ring) {
    int stage = 0;
    u32 parity = 1;  // the first pass over an empty ring does not wait
    for (int tile = blockIdx.x / CLUSTER; tile < tiles.count(); tile += gridDim.x / CLUSTER) {
        int pair, column;
        tiles.place(tile, pair, column);
        const int row = (pair * CLUSTER + rank) * TILE_M, w_row = column * TILE_N + rank * (TILE_N / 2);
        for (int step = 0; step < n_steps; ++step) {
            const u32 x_at = ring + stage * STAGE_BYTES, w_at = x_at + X_BYTES + rank * (W_BYTES / 2);
            wait(bar.empty[stage], parity);
            expect(bar.full[stage], STAGE_BYTES);
            fetch_box(x_at, x_map, step * TILE_K, row, bar.full[stage]);
            fetch_box_for_both(w_at, w_map, step * TILE_K, w_row, bar.full[stage]);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
}

// One thread: what `out` holds, a tile ahead of its sum.
__device__ void fetch_old(const Tiles& tiles, int rank, const TensorMap* out_map, Barriers& bar, u32 staging) {
    u32 parity = 1;
    for (int tile = blockIdx.x / CLUSTER; tile < tiles.count(); tile += gridDim.x / CLUSTER, parity ^= 1) {
        int pair, column;
        tiles.place(tile, pair, column);
        wait(bar.old_empty, parity);
        expect(bar.old_full, 2 * BOXES * BOX_BYTES);
        for (int box = 0; box < 2 * BOXES; ++box)
            fetch_box(staging + box * BOX_BYTES, out_map, column * OUT_N + box % BOXES * 64,
                      (pair * CLUSTER + rank) * TILE_M + box / BOXES * 64, bar.old_full);
    }
}

// A warpgroup's 64 × 256 sums to its boxes of the result.
__device__ __forceinline__ void stage_result(float (&acc)[128], u32 boxes) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % WARPGROUP / 32;
#if SILU_MUL
    // A thread has every fourth column of a row; neighbours swap halves so that each has two columns side by side.
    const int row = warp * 16 + lane / 4, odd = lane & 1;
    const int offset = odd ? 8 + (lane % 4 - 1) * 2 : lane % 4 * 2;
#pragma unroll
    for (int chunk = 0; chunk < 16; ++chunk) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            const float* c = acc + chunk * 8 + lower * 2;
            const float here = silu_mul(c[0], c[1]), next = silu_mul(c[4], c[5]);
            const float swapped = __shfl_xor_sync(0xFFFFFFFF, odd ? here : next, 1);
            const u32 both = odd ? pack(swapped, next) : pack(here, swapped);
            const int r = row + lower * 8;
            const u32 at = boxes + chunk / 8 * BOX_BYTES + r * 128 + ((chunk ^ r) & 7) * 16 + offset;
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(both) : "memory");
        }
    }
#else
    const int row = warp * 16 + lane % 16, right = lane / 16;
#pragma unroll
    for (int pair = 0; pair < 16; ++pair) {
        const int chunk = pair * 2 + right;
        const u32 at = boxes + chunk / 8 * BOX_BYTES + row * 128 + ((chunk ^ row) & 7) * 16;
        float* c = acc + pair * 8;
#if ACCUMULATE
        u32 old[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(old[0]), "=r"(old[1]), "=r"(old[2]), "=r"(old[3]) : "r"(at) : "memory");
#pragma unroll
        for (int i = 0; i < 4; ++i) add_packed(c[2 * i], c[2 * i + 1], old[i]);
#endif
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                     ::"r"(at), "r"(pack(c[0], c[1])), "r"(pack(c[2], c[3])), "r"(pack(c[4], c[5])), "r"(pack(c[6], c[7])) : "memory");
    }
#endif
}

// One warpgroup: products of its 64 rows, tile after tile.
__device__ void compute(const Tiles& tiles, int n_steps, int rank, const TensorMap* out_map, Barriers& bar, u32 ring, u32 staging) {
    const int group = threadIdx.x / WARPGROUP - 1, warp = threadIdx.x % WARPGROUP / 32;
    const bool releases = threadIdx.x % 32 == 0 && warp < CLUSTER, stores = threadIdx.x % WARPGROUP == 0;
    const u32 boxes = staging + group * BOXES * BOX_BYTES;
    float acc[128];
    int stage = 0;
    u32 parity = 0, old_parity = 0;
    for (int tile = blockIdx.x / CLUSTER; tile < tiles.count(); tile += gridDim.x / CLUSTER) {
        int before = 0;
        for (int step = 0; step < n_steps; ++step) {
            const u32 x_at = ring + stage * STAGE_BYTES;
            const u64 x = descriptor(x_at + group * 64 * 128), w = descriptor(x_at + X_BYTES);
            wait(bar.full[stage], parity);
            fence();
#pragma unroll
            for (int k = 0; k < TILE_K / 16; ++k) multiply(acc, x + 2 * k, w + 2 * k, step | k);
            commit();
            if (step > 0) {
                pending<1>();
                if (releases) arrive_at(bar.empty[before], warp);
            }
            before = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        pending<0>();
        settle(acc);
        if (releases) arrive_at(bar.empty[before], warp);
#if ACCUMULATE
        wait(bar.old_full, old_parity);
        old_parity ^= 1;
#else
        warpgroup_barrier(1 + group);  // the boxes were read: their last reader is here
#endif
        stage_result(acc, boxes);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        warpgroup_barrier(1 + group);
        if (stores) {
            int pair, column;
            tiles.place(tile, pair, column);
            for (int box = 0; box < BOXES; ++box)
                store_box(out_map, column * OUT_N + box * 64, (pair * CLUSTER + rank) * TILE_M + group * 64, boxes + box * BOX_BYTES);
            asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
#if ACCUMULATE
            arrive(bar.old_empty);
#endif
        }
        __syncwarp();
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(3 * WARPGROUP, 1) gemm_bulk(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
    const __grid_constant__ TensorMap out_map, int n_rows, int n_columns, int depth) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ Barriers bar;
    const u32 ring = (shared_address(shared) + 1023) / 1024 * 1024, staging = ring + STAGES * STAGE_BYTES;
    const int rank = blockIdx.x % CLUSTER, n_steps = (depth + TILE_K - 1) / TILE_K;
    const Tiles tiles = {(n_rows + CLUSTER * TILE_M - 1) / (CLUSTER * TILE_M), (n_columns + TILE_N - 1) / TILE_N};
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) barrier_init(bar.full[s], 1), barrier_init(bar.empty[s], RELEASES);
        barrier_init(bar.old_full, 1), barrier_init(bar.old_empty, 2);
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
    }
    __syncthreads();
    cluster_barrier();
    if (threadIdx.x < WARPGROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) fetch(tiles, n_steps, rank, &x_map, &w_map, bar, ring);
#if ACCUMULATE
        if (threadIdx.x == 32) fetch_old(tiles, rank, &out_map, bar, staging);
#endif
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        compute(tiles, n_steps, rank, &out_map, bar, ring, staging);
    }
    cluster_barrier();  // the other block may still send here
}
