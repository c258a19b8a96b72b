// y = x W^T for many rows of x and int4 tiles W, on Hopper's wgmma (sm_90a).
//
// The tensor cores multiply W x^T. Each warpgroup unpacks 64 out features at a time into the
// registers of the left operand, whose layout is that of the tiles; x is the right operand, in
// shared memory. While the tensor cores multiply 16 columns, the next 16 are unpacked. A thread of
// one more warpgroup keeps a ring of stages filled through tensor maps, which read zeros beyond a
// matrix. The sum over K may be split among the blocks of a cluster, which add their parts through
// each other's shared memory, in a fixed order.
//
// Macros (-D), besides those of tiles.cuh:
//   ROWS           rows of x of a block: 64, 128, 192 or 256
//   WARPGROUPS     warpgroups that multiply
//   SUBTILES       subtiles of 64 features that a warpgroup multiplies
//   SPLITS         blocks that share the sum over k
//   STAGES         stages of the ring
//   BLOCKS_PER_SM  blocks that a multiprocessor must have registers for
// The launch: SPLITS * ceil(M / ROWS) * (sum over weights of ceil(n / FEATURES)) blocks of THREADS
// threads and SHARED_BYTES of dynamic shared memory; k_padded is at least SPLITS * STEP. As a
// programmatic dependent launch, it reads W before the previous kernel has ended, and waits for the
// end before it reads x or writes y.

#include "tiles.cuh"

__device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__device__ constexpr int most(int a, int b) { return a > b ? a : b; }

constexpr int FEATURES = 64 * WARPGROUPS * SUBTILES;  // of a block
constexpr int CONSUMERS = 128 * WARPGROUPS;           // threads that multiply
constexpr int THREADS = CONSUMERS + 128;              // registers are given to whole warpgroups
constexpr int REGISTERS = least(65536 / (BLOCKS_PER_SM * THREADS) / 8 * 8, 248);
constexpr int PRODUCER_REGISTERS = 40;
constexpr int CONSUMER_REGISTERS =
    least((REGISTERS * THREADS - PRODUCER_REGISTERS * 128) / CONSUMERS / 8 * 8, 240);
constexpr int SLICES = STEP / 16;               // of 16 columns, for one wgmma each
constexpr int IN_FLIGHT = 2;                    // slices that are being multiplied
constexpr int PANELS = STEP / 64;               // of x, with 64 columns: rows of 128 bytes
constexpr int GROUPS = divide_up(STEP, GROUP);  // that a step reads

// Shared memory: the rings of x, words and parameters. At the end the sums take their place.
constexpr int X_BYTES = ROWS * STEP * 2;
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

// a * b + c of two values at a time.
__device__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t sum;
    asm("fma.rn." DTYPE "x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
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
#define SHAPE "m64n64k16"
#define OPERANDS "{" TO_30 "%30, %31}, {%32, %33, %34, %35}, %36"
#define SUMS SUMS32(0)
#elif ROWS == 128
#define SHAPE "m64n128k16"
#define OPERANDS "{" TO_60 "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68"
#define SUMS SUMS32(0), SUMS32(32)
#elif ROWS == 192
#define SHAPE "m64n192k16"
#define OPERANDS "{" TO_90 "%90, %91, %92, %93, %94, %95}, {%96, %97, %98, %99}, %100"
#define SUMS SUMS32(0), SUMS32(32), SUMS32(64)
#else
#define SHAPE "m64n256k16"
#define OPERANDS                                                                               \
    "{" TO_120 "%120, %121, %122, %123, %124, %125, %126, %127}, {%128, %129, %130, %131}, %132"
#define SUMS SUMS32(0), SUMS32(32), SUMS32(64), SUMS32(96)
#endif

// Starts sums[feature, row] += w[feature, k] * x[row, k] of 64 features, ROWS rows, 16 columns.
__device__ void multiply(float (&sums)[ROWS / 2], const uint32_t (&w)[4], uint64_t x) {
    asm volatile("{.reg .pred add; setp.eq.u32 add, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." DTYPE "." DTYPE " " OPERANDS
                 ", add, 1, 1, 0;}"
                 : SUMS : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x));
}

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

// --- the parts of the kernel ---------------------------------------------------------------------

// The offsets of a step in shared memory: its stage of the ring, and its barriers.
struct Stage {
    uint32_t x, words, params, full, empty;
};

__device__ Stage stage_of(int step) {
    const uint32_t stage = step % STAGES, barrier = BARRIERS + 8 * stage;
    return {stage * X_BYTES, W_RING + stage * W_BYTES, P_RING + stage * P_BYTES, barrier,
            barrier + 8 * STAGES};
}

struct Buffers {
    const TensorMap *tiles, *params;
};

// A block's part of y and of the sum over k.
struct Part {
    Features<Buffers> features;
    int first_row, first_step, steps;
};

// One thread keeps the ring filled.
__device__ void load(const TensorMap* x, const Part& part, uint32_t shared) {
    const Buffers w = part.features.weight.buffers;
    const int first = part.features.first;
    auto load_w = [&](int step) {
        const Stage at = stage_of(step);
        const uint32_t full = shared + at.full;
        const int k = (part.first_step + step) * STEP;
        expect(full, X_BYTES + W_BYTES + P_BYTES);
        copy(shared + at.words, w.tiles, k, first / 8, full);
        copy(shared + at.params, w.params, first, k / GROUP, full);
    };
    auto load_x = [&](int step) {
        const Stage at = stage_of(step);
        const int k = (part.first_step + step) * STEP;
#pragma unroll
        for (int i = 0; i < PANELS; ++i)
            copy(shared + at.x + i * ROWS * 128, x, k + i * 64, part.first_row, shared + at.full);
    };
    // The previous kernel may still be computing x, but never W.
    const int early = min(part.steps, STAGES);
    for (int step = 0; step < early; ++step) load_w(step);
    wait_for_kernel_before();
    for (int step = 0; step < early; ++step) load_x(step);
    for (int step = early; step < part.steps; ++step) {
        wait(shared + stage_of(step).empty, (step / STAGES - 1) % 2);
        load_w(step);
        load_x(step);
    }
}

// Scale and zero of a feature, each twice, in the dtype of x.
struct Parameters {
    uint32_t scale, zero;
};

__device__ Parameters parameters_of(uint32_t pair) {
#if DTYPE_FP16
    // Values beyond fp16 become its largest.
    const float scale = __uint_as_float(pair << 16), zero = __uint_as_float(pair & 0xffff0000);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(zero), "f"(scale));
    asm("min.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x7bff7bff));
    asm("max.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0xfbfffbff));
#endif
    return {__byte_perm(pair, 0, 0x1010), __byte_perm(pair, 0, 0x3232)};
}

// The weights of two neighbouring columns: pair i, 0 to 3, of a word. Pairs are 8 columns apart.
__device__ uint32_t weights_of(uint32_t word, int i, Parameters p) {
    uint32_t codes;
#if DTYPE_FP16
    // 1024 + code, or 1024 + 16 code where the code lies 4 bits higher, becomes code - 8.
    if (i % 2 == 0)
        codes = fma2(pick<0x000f000f, 0x64006400>(word >> (4 * i)), 0x3c003c00, 0xe408e408);
    else
        codes = fma2(pick<0x00f000f0, 0x64006400>(word >> (4 * i - 4)), 0x2c002c00, 0xd480d480);
#else
    // 128 + code becomes code - 8.
    codes = fma2(pick<0x000f000f, 0x43004300>(word >> (4 * i)), 0x3f803f80, 0xc308c308);
#endif
    return fma2(codes, p.scale, p.zero);
}

// The left operand of 16 columns: the first or second half of the 32 columns of two words, of tiles
// one below the other.
__device__ void unpack(uint32_t (&w)[4], const uint32_t (&words)[2], const Parameters (&p)[2],
                       int half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = weights_of(words[i % 2], 2 * half + i / 2, p[i % 2]);
}

// wgmma's descriptor of 16 columns of ROWS rows: K-major, rows of 128 bytes, swizzled by 8 rows.
__device__ uint64_t descriptor(uint32_t address) {
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | 1 << 16 | (address & 0x3ffff) >> 4;
}

using Sums = float[SUBTILES][ROWS / 2];

// A consumer's sums over all steps.
__device__ void multiply_steps(Sums& sums, const uint8_t* rings, int steps) {
    const uint32_t shared = address(rings);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_tile = warp / 4 * SUBTILES * 8 + warp % 4 * 2;
    const int words_at = kept(first_tile * STEP + lane * HALF_INNER);
    const int params_at = kept(first_tile * 8 + lane / 4);
    int step = 0;
    do {
        const Stage at = stage_of(step);
        wait(shared + at.full, step / STAGES % 2);
        const uint32_t* from_words = (const uint32_t*)(rings + at.words) + words_at;
        const uint32_t* from_params = (const uint32_t*)(rings + at.params) + params_at;
        const uint64_t x = descriptor(shared + at.x);
        uint32_t words[SUBTILES][WORDS][2];
        Parameters params[SUBTILES][GROUPS][2];
#pragma unroll
        for (int s = 0; s < SUBTILES; ++s)
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const int tile = 8 * s + t;
#pragma unroll
                for (int i = 0; i < WORDS; ++i)
                    words[s][i][t] = from_words[tile * STEP + i / HALF_INNER * 32 * HALF_INNER +
                                                i % HALF_INNER];
#pragma unroll
                for (int i = 0; i < GROUPS; ++i)
                    params[s][i][t] = parameters_of(from_params[i * FEATURES + tile * 8]);
            }
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice) {
            uint32_t w[SUBTILES][4];
#pragma unroll
            for (int s = 0; s < SUBTILES; ++s)
                unpack(w[s], words[s][slice / 2], params[s][slice * 16 / GROUP], slice % 2);
            begin_of_products();
            const int x_bytes = slice / 4 * ROWS * 128 + slice % 4 * 32;
#pragma unroll
            for (int s = 0; s < SUBTILES; ++s) multiply(sums[s], w[s], x + x_bytes / 16);
            end_of_products();
            // All but the last two slices are done: their registers are free again,
            wait_for_products<IN_FLIGHT>();
            // and at the second slice of a step, the stage of the previous step is free, too.
            if (slice == IN_FLIGHT - 1 && step > 0 && lane == 0)
                arrive(shared + stage_of(step - 1).empty);
        }
    } while (++step < steps);
    wait_for_products<0>();
}

// The consumers of a cluster add their sums, and each block stores some of the rows.
__device__ void store(const Sums& sums, uint8_t* rings, const Part& part, int rank, T* y, int M,
                      int N) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
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
    after_sums();

    constexpr int QUADS = FEATURES / 4, MINE = divide_up(ROWS, SPLITS);
    const int first = part.features.first, left = part.features.weight.n - first;
    T* const corner = y + (uint64_t)part.first_row * N + part.features.column + first;
    const bool aligned = N % 4 == 0 && (uint64_t)corner % 8 == 0;
    for (int quad = thread; quad < MINE * QUADS; quad += CONSUMERS) {
        const int row = rank * MINE + quad / QUADS, column = quad % QUADS * 4;
        if (row >= ROWS || part.first_row + row >= M) break;
        const int at = row * SUM_PITCH + column;
        float4 sum = SPLITS > 1 ? load_of_block(shared + 4 * at, 0) : *(const float4*)(parts + at);
#pragma unroll
        for (int split = 1; split < SPLITS; ++split) {
            const float4 more = load_of_block(shared + 4 * at, split);
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        T* to = corner + (uint64_t)row * N + column;
        const T out[4] = {rounded(sum.x), rounded(sum.y), rounded(sum.z), rounded(sum.w)};
        if (aligned && column + 4 <= left)
            *(uint2*)to = make_uint2(out[0] | out[1] << 16, out[2] | out[3] << 16);
        else
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (column + i < left) to[i] = out[i];
    }
    after_reading();
}

// --- the kernel ----------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) __cluster_dims__(SPLITS, 1, 1)
many_rows(const __grid_constant__ TensorMap x,
          const __grid_constant__ TensorMap tiles0, const __grid_constant__ TensorMap tiles1,
          const __grid_constant__ TensorMap tiles2, const __grid_constant__ TensorMap tiles3,
          const __grid_constant__ TensorMap params0, const __grid_constant__ TensorMap params1,
          const __grid_constant__ TensorMap params2, const __grid_constant__ TensorMap params3, T* y,
          int n0, int n1, int n2, int n3, int M, int k_padded) {
    extern __shared__ __align__(1024) uint8_t rings[];
    const uint32_t shared = address(rings);
    const int thread = threadIdx.x;

    launch_dependents();

    const Weight<Buffers> weights[4] = {{{&tiles0, &params0}, n0},
                                        {{&tiles1, &params1}, n1},
                                        {{&tiles2, &params2}, n2},
                                        {{&tiles3, &params3}, n3}};
    const int rank = blockIdx.x % SPLITS, block = blockIdx.x / SPLITS;
    const int row_blocks = divide_up(M, ROWS), all_steps = divide_up(k_padded, STEP);
    const int first_step = rank * all_steps / SPLITS;
    const Part part = {features_of(block / row_blocks, FEATURES, weights),
                       block % row_blocks * ROWS, first_step,
                       (rank + 1) * all_steps / SPLITS - first_step};

    if (thread == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            make_barrier(shared + stage_of(stage).full, 1);
            make_barrier(shared + stage_of(stage).empty, CONSUMERS / 32);
        }
        end_of_barriers();
    }
    __syncthreads();

    if (thread >= CONSUMERS) {
        give_registers_back<PRODUCER_REGISTERS>();
        if (thread == CONSUMERS) load(&x, part, shared);
        __syncwarp();
        after_products();
        after_sums();
        after_reading();
    } else {
        take_registers<CONSUMER_REGISTERS>();
        Sums sums = {};
        multiply_steps(sums, rings, part.steps);
        store(sums, rings, part, rank, y, M, n0 + n1 + n2 + n3);
    }
}
