// The kernels of the CUDA mover, compiled at start by NVRTC (cuda_mover.py). No headers.
//
// Pieces are strided: source and target have an array of start addresses (one a piece) and a table of row offsets that all
// pieces share; a row is cut into units of unit_bytes. The arrays of addresses are in host memory: who reads them reads
// neighbours together, and ahead of need.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Shape {
    u32 pieces, rows, row_bytes, unit_bytes, units_per_row;
};

struct Unit {
    u64 source, target;
    u32 bytes;
};

__device__ __forceinline__ Unit unit_at(u32 index, const Shape& shape, const u64* sources, const u64* targets,
                                        const i64* source_rows, const i64* target_rows) {
    u32 part = index % shape.units_per_row;
    u32 row_index = index / shape.units_per_row;
    u32 row = row_index % shape.rows;
    u32 piece = row_index / shape.rows;
    u32 offset = part * shape.unit_bytes;
    Unit unit;
    unit.source = sources[piece] + source_rows[row] + offset;
    unit.target = targets[piece] + target_rows[row] + offset;
    unit.bytes = min(shape.unit_bytes, shape.row_bytes - offset);
    return unit;
}

#if __CUDA_ARCH__ >= 900
// Each warp keeps `slots` units in flight through shared memory with bulk asynchronous copies, which need no registers and
// next to no issue slots: a few SMs saturate NVLink, and the others compute undisturbed. One lane of a warp issues the
// copies, about one a microsecond, so small units want more warps. Addresses and row_bytes are multiples of 16.

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

#define LAG 4          // stores that may still read their slot when the slot behind them is refilled
#define MAX_SLOTS 64
#define TABLE 128      // > MAX_SLOTS + 32 units looked ahead
#define MAX_WARPS 4

extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS) move_bulk(Shape shape, u32 total, u32 slots, const u64* sources,
                                                            const u64* targets, const i64* source_rows,
                                                            const i64* target_rows) {
    extern __shared__ __align__(128) unsigned char buffers[];
    __shared__ __align__(8) u64 all_barriers[MAX_WARPS][MAX_SLOTS];
    __shared__ Unit tables[MAX_WARPS][TABLE];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    u32 all = gridDim.x * warps, self = blockIdx.x * warps + warp;
    u32 first = self * (total / all) + min(self, total % all), count = total / all + (self < total % all);
    u64* barriers = all_barriers[warp];
    Unit* table = tables[warp];
    unsigned char* buffer = buffers + (u64)warp * slots * shape.unit_bytes;
    for (u32 slot = lane; slot < slots; slot += 32)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barriers[slot])));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();

    u32 loads = 0, known = 0;

    for (u32 done = 0; done < count; ++done) {
        // fill all slots at first, then the slot whose store was issued LAG steps ago
        u32 wanted = done == 0 ? min(slots, count) : done < LAG ? loads : min(done - LAG + 1 + slots, count);
        if (wanted > loads) {
            if (done >= LAG && lane == 0) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LAG - 1) : "memory");
            while (loads < wanted) {
                if (loads >= known) {
                    __syncwarp();
                    if (known + lane < count)
                        table[(known + lane) % TABLE] = unit_at(first + known + lane, shape, sources, targets,
                                                                source_rows, target_rows);
                    known += 32;
                    __syncwarp();
                }
                if (lane == 0) {
                    const Unit& unit = table[loads % TABLE];
                    u32 slot = loads % slots, barrier = shared_address(&barriers[slot]);
                    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(unit.bytes)
                                 : "memory");
                    asm volatile(
                        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                            shared_address(buffer + (u64)slot * shape.unit_bytes)),
                        "l"(unit.source), "r"(unit.bytes), "r"(barrier)
                        : "memory");
                }
                ++loads;
            }
        }
        if (lane == 0) {
            const Unit& unit = table[done % TABLE];
            u32 slot = done % slots, phase = (done / slots) & 1, barrier = shared_address(&barriers[slot]), ready = 0;
            while (!ready)
                asm volatile(
                    "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                    : "=r"(ready)
                    : "r"(barrier), "r"(phase)
                    : "memory");
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(unit.target),
                         "r"(shared_address(buffer + (u64)slot * shape.unit_bytes)), "r"(unit.bytes)
                         : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
    }
    if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
#endif

// The same with plain loads, a warp a unit: for older GPUs (16-byte words) and for odd addresses and sizes (4-byte words).
template <typename Word>
__device__ __forceinline__ void move_plain(const Shape& shape, u32 total, const u64* sources, const u64* targets,
                                           const i64* source_rows, const i64* target_rows) {
    u32 lane = threadIdx.x % 32, warps = gridDim.x * (blockDim.x / 32);
    for (u32 index = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; index < total; index += warps) {
        Unit unit = unit_at(index, shape, sources, targets, source_rows, target_rows);
        const Word* source = (const Word*)unit.source;
        Word* target = (Word*)unit.target;
        u32 words = unit.bytes / sizeof(Word), at = lane;
        for (; at + 7 * 32 < words; at += 8 * 32) {
            Word held[8];
#pragma unroll
            for (u32 i = 0; i < 8; ++i) held[i] = source[at + i * 32];
#pragma unroll
            for (u32 i = 0; i < 8; ++i) target[at + i * 32] = held[i];
        }
        for (; at < words; at += 32) target[at] = source[at];
    }
}

extern "C" __global__ void move_words16(Shape shape, u32 total, const u64* sources, const u64* targets,
                                        const i64* source_rows, const i64* target_rows) {
    move_plain<uint4>(shape, total, sources, targets, source_rows, target_rows);
}

extern "C" __global__ void move_words4(Shape shape, u32 total, const u64* sources, const u64* targets,
                                       const i64* source_rows, const i64* target_rows) {
    move_plain<u32>(shape, total, sources, targets, source_rows, target_rows);
}

// sum(x_i * w_i) of the 32-bit words of each unit, see Mover.checksums. Sums are in host memory, which has no atomics.
__device__ __forceinline__ u64 weighed(u32 word, u32 index) { return (u64)word * ((index * 0x9E3779B1u) | 1u); }

extern "C" __global__ void checksum(Shape shape, u32 total, u32 wide, const u64* sources, const i64* source_rows,
                                    u64* sums) {
    u32 lane = threadIdx.x % 32, warps = gridDim.x * (blockDim.x / 32);
    u32 row_words = shape.row_bytes / 4;
    for (u32 index = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; index < total; index += warps) {
        u32 part = index % shape.units_per_row, row_index = index / shape.units_per_row;
        u32 row = row_index % shape.rows, piece = row_index / shape.rows, offset = part * shape.unit_bytes;
        u64 source = sources[piece] + source_rows[row] + offset;
        u32 words = min(shape.unit_bytes, shape.row_bytes - offset) / 4, first = row * row_words + offset / 4;
        u64 sum = 0;
        if (wide) {
            const uint4* data = (const uint4*)source;
            u32 quads = words / 4, at = lane;
            for (; at + 3 * 32 < quads; at += 4 * 32) {
                uint4 held[4];
#pragma unroll
                for (u32 i = 0; i < 4; ++i) held[i] = data[at + i * 32];
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    u32 n = first + (at + i * 32) * 4;
                    sum += weighed(held[i].x, n) + weighed(held[i].y, n + 1) + weighed(held[i].z, n + 2) +
                           weighed(held[i].w, n + 3);
                }
            }
            for (; at < quads; at += 32) {
                uint4 x = data[at];
                u32 n = first + at * 4;
                sum += weighed(x.x, n) + weighed(x.y, n + 1) + weighed(x.z, n + 2) + weighed(x.w, n + 3);
            }
        } else {
            const u32* data = (const u32*)source;
            for (u32 at = lane; at < words; at += 32) sum += weighed(data[at], first + at);
        }
        for (u32 step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
        if (lane == 0) sums[index] = sum;
    }
}
