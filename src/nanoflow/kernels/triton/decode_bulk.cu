// Paged decode attention with the bulk copy engine (TMA) of sm_90 and newer; compiled at run time by `decode_bulk.py`.
//
// A block is one warp, a worker of its own: it owns one KV head and a run of keys (work_lists.DecodePlanner) and a ring of
// STAGES shared-memory buffers of KEYS keys and values, so there is no barrier among warps. The ring is refilled across the borders of
// requests, with page ids, items and queries fetched ahead, so that copies never wait for an address. Scores are
// computed transposed (keys are the matrix unit's 16 rows, query heads its 8 columns): half the padding of the usual way.
//
// From the host: DIM, GROUP, N_KV, PAGE_TOKENS, KEYS, STAGES, BLOCKS_PER_SM, IS_BF16, HAS_WINDOW.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
struct alignas(64) TensorMap { char bytes[128]; };

constexpr int HEAD_TILES = (GROUP + 7) / 8;              // query heads in eights
constexpr int KEY_TILES = KEYS / 16;
constexpr int DIM_TILES = DIM / 16;
constexpr int HALVES = DIM / 64;                         // a swizzled row holds 64 elements
constexpr int BOX = KEYS < PAGE_TOKENS ? KEYS : PAGE_TOKENS;
constexpr int BOX_BYTES = BOX * 128;
constexpr int COPIES = KEYS / BOX * HALVES;              // of keys; as many of values
constexpr int KEY_BYTES = KEYS * DIM * 2;
constexpr int STAGE_BYTES = 2 * KEY_BYTES;
constexpr int ITEM_INTS = 8;
constexpr float LOWEST = -1.0e30f;
static_assert(2 * COPIES <= 32, "one lane issues one copy");

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void wait_full(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra out;\nbra again;\nout:\n}"
        ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3}], [%4], %5;"
        ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(0x12F0000000000000ull)  // evict first
        : "memory");
}

__device__ __forceinline__ void load_matrices(u32 (&a)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&a)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if IS_BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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

__device__ __forceinline__ u32 transposed(u32 a) {
    u32 t;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(a));
    return t;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Byte offset in a stage of the 16-byte chunk `chunk` of key `row`: the copy engine swizzles chunks within 128 bytes.
__device__ __forceinline__ u32 chunk_offset(int row, int chunk) {
    return row / BOX * (BOX_BYTES * HALVES) + chunk / 8 * BOX_BYTES + row % BOX * 128 + ((chunk ^ row) & 7) * 16;
}

// The same for chunk 2 d of rows 16 k + (a lane's row below 16), given the lane's address for d = k = 0.
__device__ __forceinline__ u32 tile_address(u32 lane_at, int k, int d) {
    const u32 tile = k * 16 / BOX * (BOX_BYTES * HALVES) + d / 4 * BOX_BYTES + k * 16 % BOX * 128;
    return (lane_at ^ (d % 4 * 32)) + tile;
}

struct Item { int row, pages, key, end, lowest, partial; };

struct Lists {
    const int* items;
    const int* pages;
    int last, window, lane;

    __device__ __forceinline__ Item item(int nth) const {
        Item it = {0, 0, 0, 0, 0, -1};
        if (nth < last) {
            const int* at = items + nth * ITEM_INTS;
            it = {__ldg(at), __ldg(at + 1), __ldg(at + 2), __ldg(at + 3), 0, __ldg(at + 5)};
#if HAS_WINDOW
            it.lowest = max(__ldg(at + 4) - window, 0);
            it.key = max(it.key, it.lowest / KEYS * KEYS);
#endif
        }
        return it;
    }
    // 32 page ids from the item's page `from`, one a lane; 0 beyond the item's keys.
    __device__ __forceinline__ int page_ids(const Item& it, int from) const {
        return (from + lane) * PAGE_TOKENS < it.end ? __ldg(pages + it.pages + from + lane) : 0;
    }
};

// Fills the ring: where the next keys are, with everything it needs fetched one step ahead.
struct Producer {
    Lists lists;
    const TensorMap* map;
    int head, nth, base, ids, ids_more, ids_next;
    Item now, next, after;

    __device__ __forceinline__ void begin(int first) {
        nth = first;
        now = lists.item(first);
        next = lists.item(first + 1);
        after = lists.item(first + 2);
        base = now.key / PAGE_TOKENS;
        ids = lists.page_ids(now, base);
        ids_more = lists.page_ids(now, base + 32);
        ids_next = lists.page_ids(next, next.key / PAGE_TOKENS);
    }
    __device__ __forceinline__ void fill(u32 stage, u32 barrier) {
        while (now.key >= now.end) {
            if (++nth >= lists.last) { nth = lists.last; return; }
            now = next;
            next = after;
            base = now.key / PAGE_TOKENS;
            ids = ids_next;
            ids_more = lists.page_ids(now, base + 32);
            ids_next = lists.page_ids(next, next.key / PAGE_TOKENS);
            after = lists.item(nth + 2);
        }
        if (now.key / PAGE_TOKENS >= base + 32) {
            base += 32;
            ids = ids_more;
            ids_more = lists.page_ids(now, base + 32);
        }
        const int lane = lists.lane;
        const int copy = lane % COPIES, is_value = lane / COPIES;  // lanes beyond 2 · COPIES copy nothing
        const int box = copy / HALVES, half = copy % HALVES;
        const int key = now.key + box * BOX;
        const int page = __shfl_sync(~0u, ids, (key / PAGE_TOKENS - base) & 31);
        if (lane == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(STAGE_BYTES) : "memory");
        __syncwarp();
        if (is_value < 2) {
            const int row = ((page * 2 + is_value) * N_KV + head) * PAGE_TOKENS + key % PAGE_TOKENS;
            copy_box(stage + is_value * KEY_BYTES + copy * BOX_BYTES, map, half * 64, row, barrier);
        }
        now.key += KEYS;
    }
};

// The queries of one item as the matrix unit's B operand: lane l holds head l / 4 and dims 2 (l % 4), + 1, of every eight.
__device__ __forceinline__ void load_queries(u32 (&q)[HEAD_TILES][DIM_TILES][2], const u16* row, int lane) {
#pragma unroll
    for (int t = 0; t < HEAD_TILES; ++t) {
        const int h = t * 8 + lane / 4;
#pragma unroll
        for (int d = 0; d < DIM_TILES; ++d)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                q[t][d][i] = h < GROUP ? __ldg((const u32*)(row + h * DIM + d * 16 + i * 8 + lane % 4 * 2)) : 0;
    }
}

extern "C" __global__ void __launch_bounds__(32, BLOCKS_PER_SM) decode_bulk(
    const __grid_constant__ TensorMap kv_map, const u16* queries, long long q_stride, const int* ints, const int* pages,
    u16* out, long long out_stride, float* part, float* lse, float scale_log2, int window, int items_at) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int lane = threadIdx.x;
    const u32 ring = shared_address(shared), full = ring + STAGES * STAGE_BYTES;
    const int head = blockIdx.x % N_KV, slot = blockIdx.x / N_KV;
    const int first = ints[4 + slot], last = ints[5 + slot];
    if (first >= last) return;
    if (lane == 0) {
        for (int s = 0; s < STAGES; ++s)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * s) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();

    Producer producer;
    producer.lists = {ints + items_at, pages, last, window, lane};
    producer.map = &kv_map;
    producer.head = head;
    producer.begin(first);
    for (int s = 0; s < STAGES; ++s) producer.fill(ring + s * STAGE_BYTES, full + 8 * s);

    const Lists& lists = producer.lists;
    const u16* my_queries = queries + head * GROUP * DIM;
    Item next = lists.item(first), after = lists.item(first + 1);
    u32 q_next[HEAD_TILES][DIM_TILES][2];
    load_queries(q_next, my_queries + next.row * q_stride, lane);
    const u32 key_lane = chunk_offset(lane & 15, lane >> 4);
    const u32 value_lane = KEY_BYTES + chunk_offset((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
    u32 stage = 0, parity = 0;

    for (int nth = first; nth < last; ++nth) {
        const Item now = next;
        u32 q[HEAD_TILES][DIM_TILES][2];
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
            for (int d = 0; d < DIM_TILES; ++d) q[t][d][0] = q_next[t][d][0], q[t][d][1] = q_next[t][d][1];
        next = after;
        load_queries(q_next, my_queries + next.row * q_stride, lane);
        after = lists.item(nth + 2);

        float acc[HEAD_TILES][DIM_TILES][4] = {};
        float top[HEAD_TILES][2], sum[HEAD_TILES][2];
#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t) top[t][0] = top[t][1] = LOWEST, sum[t][0] = sum[t][1] = 0.0f;

        for (int key = now.key; key < now.end; key += KEYS) {
            const u32 at = ring + stage * STAGE_BYTES;
            wait_full(full + 8 * stage, parity);

            float score[KEY_TILES][HEAD_TILES][2][4] = {};
#pragma unroll
            for (int d = 0; d < DIM_TILES; ++d)
#pragma unroll
                for (int k = 0; k < KEY_TILES; ++k) {
                    u32 a[4];
                    load_matrices(a, tile_address(at + key_lane, k, d));
#pragma unroll
                    for (int t = 0; t < HEAD_TILES; ++t) multiply(score[k][t][d & 1], a, q[t][d][0], q[t][d][1]);
                }
            const bool ragged = key + KEYS > now.end || key < now.lowest;
            if (key + KEYS > now.end) {  // values beyond the end may be anything, not a number included
                for (int c = lane; c < (key + KEYS - now.end) * (DIM / 8); c += 32) {
                    const u32 chunk = at + KEY_BYTES + chunk_offset(now.end - key + c / (DIM / 8), c % (DIM / 8));
                    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(chunk), "r"(0) : "memory");
                }
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                __syncwarp();
            }
#pragma unroll
            for (int t = 0; t < HEAD_TILES; ++t) {
                float high[2] = {top[t][0], top[t][1]};
#pragma unroll
                for (int k = 0; k < KEY_TILES; ++k)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float& s = score[k][t][0][i];
                        s = (s + score[k][t][1][i]) * scale_log2;
                        if (ragged) {
                            const int mine = key + k * 16 + lane / 4 + i / 2 * 8;
                            if (mine >= now.end || mine < now.lowest) s = 2.0f * LOWEST;
                        }
                        high[i & 1] = fmaxf(high[i & 1], s);
                    }
#pragma unroll
                for (int far = 4; far < 32; far *= 2) {
                    high[0] = fmaxf(high[0], __shfl_xor_sync(~0u, high[0], far));
                    high[1] = fmaxf(high[1], __shfl_xor_sync(~0u, high[1], far));
                }
                if (__any_sync(~0u, high[0] > top[t][0] || high[1] > top[t][1])) {
                    const float shrink[2] = {exp2_fast(top[t][0] - high[0]), exp2_fast(top[t][1] - high[1])};
                    top[t][0] = high[0], top[t][1] = high[1];
                    sum[t][0] *= shrink[0], sum[t][1] *= shrink[1];
#pragma unroll
                    for (int d = 0; d < DIM_TILES; ++d)
#pragma unroll
                        for (int i = 0; i < 4; ++i) acc[t][d][i] *= shrink[i & 1];
                }
            }
#pragma unroll
            for (int k = 0; k < KEY_TILES; ++k) {
                u32 p[HEAD_TILES][2];
#pragma unroll
                for (int t = 0; t < HEAD_TILES; ++t) {
                    float prob[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        prob[i] = exp2_fast(score[k][t][0][i] - top[t][i & 1]);
                        sum[t][i & 1] += prob[i];
                    }
                    p[t][0] = transposed(pack(prob[0], prob[1]));
                    p[t][1] = transposed(pack(prob[2], prob[3]));
                }
#pragma unroll
                for (int d = 0; d < DIM_TILES; ++d) {
                    u32 a[4];
                    load_transposed(a, tile_address(at + value_lane, k, d));
#pragma unroll
                    for (int t = 0; t < HEAD_TILES; ++t) multiply(acc[t][d], a, p[t][0], p[t][1]);
                }
            }
            __syncwarp();
            producer.fill(at, full + 8 * stage);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }

#pragma unroll
        for (int t = 0; t < HEAD_TILES; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int far = 4; far < 32; far *= 2) sum[t][i] += __shfl_xor_sync(~0u, sum[t][i], far);
                const int h = t * 8 + lane % 4 * 2 + i;
                if (h >= GROUP) continue;
                const float share = sum[t][i] > 0.0f ? 1.0f / sum[t][i] : 0.0f;  // 0: a window that ends before this part
                const long long from = ((long long)now.partial * N_KV + head) * GROUP + h;
                u16* to = out + now.row * out_stride + (head * GROUP + h) * DIM;
#pragma unroll
                for (int d = 0; d < DIM_TILES; ++d)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const int dim = d * 16 + r * 8 + lane / 4;
                        const float result = acc[t][d][r * 2 + i] * share;
                        if (now.partial < 0) to[dim] = (u16)pack(result, 0.0f);
                        else part[from * DIM + dim] = result;
                    }
                if (now.partial >= 0 && lane < 4)
                    lse[from] = sum[t][i] > 0.0f ? top[t][i] + __log2f(sum[t][i]) : LOWEST;
            }
    }
}
