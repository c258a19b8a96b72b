// Code that the kernels for many rows share, on Hopper (sm_90a): y = x W^T, where the tensor cores
// multiply W x^T.
//
// W is the left operand, unpacked into registers, whose layout is that of the tiles; x is the right
// one, in shared memory. A thread of one more warpgroup keeps a ring of stages filled through tensor
// maps, which read zeros beyond a matrix. The sum over K may be split among the blocks of a cluster,
// which add their parts through each other's shared memory, in a fixed order.
//
// Macros (-D), besides those of tiles.cuh:
//   ROWS           rows of x of a block: 64, 128, 192 or 256
//   WARPGROUPS     warpgroups that multiply
//   SUBTILES       subtiles of 64 features that a warpgroup multiplies
//   SPLITS         blocks that share the sum over k
//   STAGES         stages of the ring
//   BLOCKS_PER_SM  blocks that a multiprocessor must have registers for
// Constants, defined before this file is included:
//   X_ITEM              bytes of an item of x
//   PRODUCER_REGISTERS  of a thread that loads
//   UNIT                steps that a block may not share with another
// The launch: SPLITS * ceil(M / ROWS) * (sum over weights of ceil(n / FEATURES)) blocks of THREADS
// threads and SHARED_BYTES of dynamic shared memory; with several splits k_padded is at least
// SPLITS * UNIT * STEP. As a programmatic dependent launch, it reads W before the previous kernel has
// ended, and waits for the end before it reads x or writes y.

#pragma once

#include "tiles.cuh"

__device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__device__ constexpr int most(int a, int b) { return a > b ? a : b; }

constexpr int FEATURES = 64 * WARPGROUPS * SUBTILES;  // of a block
constexpr int CONSUMERS = 128 * WARPGROUPS;           // threads that multiply
constexpr int THREADS = CONSUMERS + 128;              // registers are given to whole warpgroups
constexpr int REGISTERS = least(65536 / (BLOCKS_PER_SM * THREADS) / 8 * 8, 248);
constexpr int CONSUMER_REGISTERS =
    least((REGISTERS * THREADS - PRODUCER_REGISTERS * 128) / CONSUMERS / 8 * 8, 240);
constexpr int PANEL = 128 / X_ITEM;             // columns of x: rows of 128 bytes
constexpr int PANELS = STEP / PANEL;            // of a step
constexpr int GROUPS = divide_up(STEP, GROUP);  // that a step reads

// Shared memory: the rings of x, words and parameters. At the end the sums take their place.
constexpr int X_BYTES = ROWS * STEP * X_ITEM;
constexpr int W_BYTES = FEATURES * STEP / 2;
constexpr int P_BYTES = FEATURES * GROUPS * 4;
constexpr int W_RING = STAGES * X_BYTES;
constexpr int P_RING = W_RING + STAGES * W_BYTES;
constexpr int RINGS_BYTES = P_RING + STAGES * P_BYTES;
constexpr int SUM_PITCH = FEATURES + 4;  // floats; 4 more, or threads would meet in the same banks
constexpr int BARRIERS = most(RINGS_BYTES, ROWS * SUM_PITCH * 4);
[[maybe_unused]] constexpr int SHARED_BYTES = BARRIERS + 16 * STAGES;

struct alignas(64) TensorMap {
    uint64_t words[16];
};

// --- inline assembly -----------------------------------------------------------------------------

// An mbarrier that this many arrivals complete.
__device__ void make_barrier(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes new barriers visible to the copies, too.
__device__ void end_of_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives; the barrier also waits until copies have brought so many bytes.
__device__ void expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                 ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until a barrier completes for the 1st, 3rd, .. time (parity 0), or 2nd, 4th, .. (parity 1).
__device__ void wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                 "@!done bra again;}" ::"r"(barrier), "r"(parity) : "memory");
}

// Starts to copy a box of a matrix; zeros where it goes beyond the matrix.
__device__ void copy(uint32_t to, const TensorMap* from, int column, int row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(from), "r"(column), "r"(row), "r"(barrier) : "memory");
}

template <int registers>
__device__ void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// The operands of wgmma: ROWS / 2 sums, four registers of the left operand, and the descriptor.
#define TEN(t)                                           \
    "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, " \
    "%" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define TO_30 TEN() TEN(1) TEN(2)
#define TO_60 TO_30 TEN(3) TEN(4) TEN(5)
#define TO_90 TO_60 TEN(6) TEN(7) TEN(8)
#define TO_120 TO_90 TEN(9) TEN(10) TEN(11)
#define SUMS4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)
#define SUMS32(i) SUMS16(i), SUMS16(i + 16)
#if ROWS == 64
#define SHAPE "m64n64"
#define OPERANDS "{" TO_30 "%30, %31}, {%32, %33, %34, %35}, %36"
#define SUMS SUMS32(0)
#elif ROWS == 128
#define SHAPE "m64n128"
#define OPERANDS "{" TO_60 "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68"
#define SUMS SUMS32(0), SUMS32(32)
#elif ROWS == 192
#define SHAPE "m64n192"
#define OPERANDS "{" TO_90 "%90, %91, %92, %93, %94, %95}, {%96, %97, %98, %99}, %100"
#define SUMS SUMS32(0), SUMS32(32), SUMS32(64)
#else
#define SHAPE "m64n256"
#define OPERANDS                                                                               \
    "{" TO_120 "%120, %121, %122, %123, %124, %125, %126, %127}, {%128, %129, %130, %131}, %132"
#define SUMS SUMS32(0), SUMS32(32), SUMS32(64), SUMS32(96)
#endif

// The body of a function of (float (&sums)[ROWS / 2], const uint32_t (&w)[4], uint64_t x), which
// starts sums[feature, row] += w[feature, k] * x[row, k] of 64 features, ROWS rows and the columns
// that the instruction's KIND tells, such as "k16.f32.bf16.bf16". TEST is "eq", or "ne" to overwrite
// the sums. TAIL tells of transposition, which 16-bit kinds alone have.
#define MULTIPLY(KIND, TEST, TAIL)                                                               \
    asm volatile("{.reg .pred add; setp." TEST ".u32 add, 0, 0;\n"                               \
                 "wgmma.mma_async.sync.aligned." SHAPE KIND " " OPERANDS ", add, 1, 1" TAIL ";}" \
                 : SUMS : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x))

// Orders earlier writes of registers before the products that read them.
__device__ void begin_of_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ void end_of_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all but the last `latest` groups of this warpgroup's products are summed.
template <int latest>
__device__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(latest) : "memory");
}

__device__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Barriers of all threads, also of those that only load. After the first, nobody reads the rings;
// after the second, all sums lie in shared memory; after the third, other blocks have read them.
__device__ void after_products() { __syncthreads(); }

__device__ void after_sums() {
    if (SPLITS > 1)
        wait_for_cluster();
    else
        __syncthreads();
}

__device__ void after_reading() {
    if (SPLITS > 1) wait_for_cluster();
}

// Loads from this address in the shared memory of another block of the cluster.
__device__ float4 load_of_block(uint32_t address, int rank) {
    float4 v;
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
    return v;
}

// --- the parts of the kernels --------------------------------------------------------------------

// The offsets of a step in shared memory: its stage of the ring, and its barriers.
struct Stage {
    uint32_t x, words, params, full, empty;
};

__device__ Stage stage_of(int step) {
    const uint32_t stage = step % STAGES, barrier = BARRIERS + 8 * stage;
    return {stage * X_BYTES, W_RING + stage * W_BYTES, P_RING + stage * P_BYTES, barrier,
            barrier + 8 * STAGES};
}

// A block's part of y and of the sum over k.
template <typename Buffers>
struct Part {
    Features<Buffers> features;
    int first_row, rank, first_step, steps;
};

template <typename Buffers>
__device__ Part<Buffers> part_of(const Weight<Buffers> (&weights)[4], int M, int k_padded) {
    const int rank = blockIdx.x % SPLITS, block = blockIdx.x / SPLITS;
    const int row_blocks = divide_up(M, ROWS), all_steps = divide_up(k_padded, STEP);
    auto first_step_of = [&](int rank) { return rank * all_steps / SPLITS / UNIT * UNIT; };
    const int first_step = first_step_of(rank);
    const int end = rank == SPLITS - 1 ? all_steps : first_step_of(rank + 1);
    return {features_of(block / row_blocks, FEATURES, weights), block % row_blocks * ROWS, rank,
            first_step, end - first_step};
}

// Begins the ring.
__device__ void make_barriers(uint32_t shared) {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            make_barrier(shared + stage_of(stage).full, 1);
            make_barrier(shared + stage_of(stage).empty, CONSUMERS / 32);
        }
        end_of_barriers();
    }
    __syncthreads();
}

// Copies what a step reads of x, or of W.
__device__ void copy_x(const TensorMap* x, int k, int first_row, const Stage& at, uint32_t shared) {
#pragma unroll
    for (int i = 0; i < PANELS; ++i)
        copy(shared + at.x + i * ROWS * 128, x, k + i * PANEL, first_row, shared + at.full);
}

template <typename Buffers>
__device__ void copy_w(const Features<Buffers>& features, int k, const Stage& at, uint32_t shared) {
    const Buffers& w = features.weight.buffers;
    copy(shared + at.words, w.tiles, k, features.first / 8, shared + at.full);
    copy(shared + at.params, w.params, features.first, k / GROUP, shared + at.full);
}

// One thread keeps the ring filled, turn after turn; `load_w` and `load_x` start a turn's copies.
template <typename LoadW, typename LoadX>
__device__ void fill(int turns, uint32_t shared, LoadW load_w, LoadX load_x) {
    // The previous kernel may still be computing x, but never W.
    const int early = min(turns, STAGES);
    for (int turn = 0; turn < early; ++turn) load_w(turn);
    wait_for_kernel_before();
    for (int turn = 0; turn < early; ++turn) load_x(turn);
    for (int turn = early; turn < turns; ++turn) {
        wait(shared + stage_of(turn).empty, (turn / STAGES - 1) % 2);
        load_w(turn);
        load_x(turn);
    }
}

// wgmma's descriptor of 32 bytes of ROWS rows: K-major, rows of 128 bytes, swizzled by 8 rows.
__device__ uint64_t descriptor(uint32_t address) {
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | 1 << 16 | (address & 0x3ffff) >> 4;
}

using Sums = float[SUBTILES][ROWS / 2];
// The consumers of a cluster add their sums, and each block stores some of the rows; e4m3 x has a
// scale for each row.
template <typename Buffers>
__device__ void store(const Sums& sums, uint8_t* rings, const Part<Buffers>& part, T* y, int M, int N,
                      const float* x_scales = nullptr) {
    constexpr bool SCALED = X_ITEM == 1;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int rows = min(ROWS, M - part.first_row);
    const uint32_t shared = address(rings);
    float* parts = (float*)rings;
    after_products();
#pragma unroll
    for (int s = 0; s < SUBTILES; ++s)
#pragma unroll
        for (int i = 0; i < ROWS / 2; ++i) {
            const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
            const int column =
                (warp / 4 * SUBTILES + s) * 64 + warp % 4 * 16 + i / 2 % 2 * 8 + lane / 4;
            parts[row * SUM_PITCH + column] = sums[s][i];
        }
    if (SCALED && thread < rows)
        parts[thread * SUM_PITCH + FEATURES] = x_scales[part.first_row + thread];
    after_sums();

    constexpr int QUADS = FEATURES / 4, AT_ONCE = CONSUMERS / QUADS, MINE = divide_up(ROWS, SPLITS);
    const int first = part.features.first, left = part.features.weight.n - first;
    T* const corner = y + (uint64_t)part.first_row * N + part.features.column + first;
    const int column = thread % QUADS * 4, end = min((part.rank + 1) * MINE, rows);
    const bool whole = N % 4 == 0 && (uint64_t)corner % 8 == 0 && column + 4 <= left;
#pragma unroll 4
    for (int row = part.rank * MINE + thread / QUADS; row < end; row += AT_ONCE) {
        const int at = row * SUM_PITCH + column;
        float4 sum = SPLITS > 1 ? load_of_block(shared + 4 * at, 0) : *(const float4*)(parts + at);
#pragma unroll
        for (int split = 1; split < SPLITS; ++split) {
            const float4 more = load_of_block(shared + 4 * at, split);
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        const float scale = SCALED ? parts[row * SUM_PITCH + FEATURES] : 1;
        T* to = corner + (uint64_t)row * N + column;
        const T out[4] = {rounded(sum.x * scale), rounded(sum.y * scale), rounded(sum.z * scale),
                          rounded(sum.w * scale)};
        if (whole)
            *(uint2*)to = make_uint2(out[0] | out[1] << 16, out[2] | out[3] << 16);
        else
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (column + i < left) to[i] = out[i];
    }
    after_reading();
}
