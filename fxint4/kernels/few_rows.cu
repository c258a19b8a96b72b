// y = x W^T for at most 8 rows of x and int4 tiles W; sm_80 and newer.
//
// The tensor cores multiply W x^T (mma.m16n8k16). The words that a thread loads of two tiles are
// exactly its part of their left operand. So W goes from global memory to registers, where few
// instructions unpack it, and nowhere else. x goes through shared memory.
//
// Weights are not rounded: the tensor cores multiply codes, plus an offset that unpacking leaves,
// and the fp32 sums of a group get its scale and zero. With q' = offset + q,
//     sum ((q - 8) scale + zero) x = scale (sum q' x - sum (offset + 8) x) + zero sum x;
// the last two sums are an mma of their own, whose left operand is constant.
//
// The warps of a block that have the same features take steps of 128 columns of k in turn. What
// they summed is added in shared memory, in a fixed order.
//
// Macros (-D), besides those of tiles.cuh:
//   SUBTILES      subtiles of 16 features that a warp multiplies
//   WARPS_N       warps side by side along the features: 1 or 2
//   WARPS_K       warps that share the sum over k; at most 15 if WARPS_N is 2
//   PREFETCH      steps of W and x that are loaded while another is multiplied
//   BLOCKS        blocks that a multiprocessor must have registers for
// A block has 32 * WARPS_N * WARPS_K threads and SHARED_BYTES of dynamic shared memory. As a
// programmatic dependent launch, it reads W before the previous kernel has ended, and waits for the
// end before it touches x or y.

#include "tiles.cuh"

constexpr int ROWS = 8;
constexpr int THREADS = 32 * WARPS_N * WARPS_K;
constexpr int FEATURES = 16 * SUBTILES * WARPS_N;       // of a block
constexpr int TILES = 2 * SUBTILES;                     // of 8 features, that a warp multiplies
constexpr int LOADS = WORDS / HALF_INNER;               // k tiles in a step; one load reads each
constexpr int FOLDS = GROUP < STEP ? STEP / GROUP : 1;  // groups in a step
constexpr int FOLD_WORDS = WORDS / FOLDS;
constexpr int STAGES = PREFETCH + 1;

constexpr int X_ROW_BYTES = 2 * STEP;
constexpr int X_STEP_BYTES = ROWS * X_ROW_BYTES;
constexpr int X_STAGE_BYTES = WARPS_K * X_STEP_BYTES;
constexpr int SUM_PITCH = FEATURES + 4;  // floats; 4 more, or threads would meet in the same banks
constexpr int X_BYTES = STAGES * X_STAGE_BYTES;
constexpr int SUM_BYTES = 4 * WARPS_K * ROWS * SUM_PITCH;
constexpr int SHARED_BYTES = X_BYTES > SUM_BYTES ? X_BYTES : SUM_BYTES;

static_assert(SHARED_BYTES <= 227 * 1024, "no GPU has more");
static_assert(WARPS_N == 1 || (WARPS_N == 2 && WARPS_K <= 15), "15 barriers beside 0");

// --- inline assembly -----------------------------------------------------------------------------

// sums[feature, row] += codes[feature, k] * x[row, k] of 16 features, 8 rows, 16 columns.
__device__ void multiply(float (&sums)[4], const uint32_t (&codes)[4], uint32_t x0, uint32_t x1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." DTYPE "." DTYPE ".f32"
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "r"(x0), "r"(x1));
}

// Every word of W is read once, so it must not evict x from the L1 cache.
#define LOAD "ld.global.nc.L1::no_allocate.L2::256B"
__device__ void load_words(uint32_t* words, const uint32_t* from) {
#if HALF_INNER == 4
    asm volatile(LOAD ".v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(from));
#elif HALF_INNER == 2
    asm volatile(LOAD ".v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
#else
    asm volatile(LOAD ".u32 %0, [%1];" : "=r"(words[0]) : "l"(from));
#endif
}

__device__ uint32_t load_param(const uint32_t* from) {
    uint32_t param;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(param) : "l"(from));
    return param;
}

// Right operands: 4 times 8 columns of 8 rows of x, whose 16-byte chunks the lanes point to.
__device__ void load_matrices(uint32_t (&xs)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(xs[0]), "=r"(xs[1]), "=r"(xs[2]), "=r"(xs[3]) : "r"(from) : "memory");
}

// Starts to copy the first `bytes` of 16 into shared memory, and zeros for the rest.
__device__ void copy(uint32_t to, const T* from, uint32_t bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last `latest` groups of this thread's copies are done.
template <int latest>
__device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(latest) : "memory");
}

// Waits until all warps with the same warp_k are here.
__device__ void wait_for_warps(uint32_t barrier) {
    if (WARPS_N == 1)
        __syncwarp();
    else
        asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(32 * WARPS_N) : "memory");
}

// --- the kernel ----------------------------------------------------------------------------------

struct Buffers {
    const uint32_t *tiles, *params;
    int n_padded;
};

// A thread's part of one step of W.
struct Step {
    uint32_t words[TILES][WORDS];
    uint32_t params[TILES];  // of one group; neighbouring lanes have the others
};

// The left operand, offset + code, of 16 columns: the first or second half of the 32 columns of two
// words, of tiles one below the other. The 7 bits of bf16's mantissa have room for one code, with
// offset 128. The 10 bits of fp16's have room for two neighbours, with offsets 256 and 16, and one
// shift serves both. (Without a shift the offset would be 1024. The larger the offset, the more of
// an fp32 sum is lost.)
__device__ void unpack(uint32_t (&codes)[4], uint32_t upper, uint32_t lower, int half) {
#if DTYPE_FP16
    upper = half ? upper >> 6 : upper << 2;
    lower = half ? lower >> 6 : lower << 2;
    codes[0] = pick<0x003c003c, 0x5c005c00>(upper);
    codes[1] = pick<0x003c003c, 0x5c005c00>(lower);
    codes[2] = pick<0x03c003c0, 0x4c004c00>(upper);
    codes[3] = pick<0x03c003c0, 0x4c004c00>(lower);
#else
    codes[0] = pick<0x000f000f, 0x43004300>(upper >> (8 * half));
    codes[1] = pick<0x000f000f, 0x43004300>(lower >> (8 * half));
    codes[2] = pick<0x000f000f, 0x43004300>(upper >> (8 * half + 4));
    codes[3] = pick<0x000f000f, 0x43004300>(lower >> (8 * half + 4));
#endif
}

// The left operand that sums x in rows 0 to 7, and (offset + 8) x in rows 8 to 15.
#if DTYPE_FP16
__device__ constexpr uint32_t ONES[4] = {0x3c003c00, 0x5c205c20, 0x3c003c00, 0x4e004e00};
#else
__device__ constexpr uint32_t ONES[4] = {0x3f803f80, 0x43084308, 0x3f803f80, 0x43084308};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
few_rows(const T* x, const uint32_t* tiles0, const uint32_t* params0,
         const uint32_t* tiles1, const uint32_t* params1,
         const uint32_t* tiles2, const uint32_t* params2,
         const uint32_t* tiles3, const uint32_t* params3, T* y,
         int n0, int n1, int n2, int n3,
         int n_padded0, int n_padded1, int n_padded2, int n_padded3, int M, int K, int k_padded) {
    extern __shared__ __align__(256) unsigned char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
    const int steps = divide_up(K, STEP);

    launch_dependents();

    const Weight<Buffers> weights[4] = {{{tiles0, params0, n_padded0}, n0},
                                        {{tiles1, params1, n_padded1}, n1},
                                        {{tiles2, params2, n_padded2}, n2},
                                        {{tiles3, params3, n_padded3}, n3}};
    const auto features = features_of(blockIdx.x, FEATURES, weights);
    const Buffers buffers = features.weight.buffers;

    // Beyond the last tile or group, the last one is read: its products are not stored, or times 0.
    const int last_tile = buffers.n_padded / 8 - 1;
    const int last_k_tile = k_padded / (32 * HALF_INNER) - 1;
    const int last_group = k_padded / GROUP - 1;
    const uint32_t* tile_words[TILES];
    uint32_t param_at[TILES];  // offset in a group
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        const int tile = min(features.first / 8 + warp_n * TILES + t, last_tile);
        tile_words[t] = kept(buffers.tiles + (size_t)tile * (uint32_t)k_padded + lane * HALF_INNER);
        param_at[t] = 8 * tile + lane / 4;
    }
    auto load_w = [&](Step& w, int step) {
        if (step >= steps) return;
#pragma unroll
        for (int load = 0; load < LOADS; ++load) {
            const int from = min(step * LOADS + load, last_k_tile) * (32 * HALF_INNER);
#pragma unroll
            for (int t = 0; t < TILES; ++t)
                load_words(&w.words[t][load * HALF_INNER], tile_words[t] + from);
        }
        const uint32_t group = min(step * STEP / GROUP + lane % FOLDS, last_group);
#pragma unroll
        for (int t = 0; t < TILES; ++t)
            w.params[t] = load_param(buffers.params + (group * buffers.n_padded + param_at[t]));
    };

    // x of a step lies as [ROWS, STEP]. The 16-byte chunks of a row are permuted by the row number,
    // so that ldmatrix finds those of 8 rows in different banks. 16 neighbouring threads copy one
    // row, because the same chunk of several rows would share banks of the L1 cache. Rows from M on
    // stay uninitialized: no other row's sums see them.
    constexpr int ROWS_AT_ONCE = 2 * WARPS_N;
    const uint32_t x_shared = address(shared) + warp_k * X_STEP_BYTES;
    const int row = 2 * warp_n + lane / 16, chunk = lane % 16;
    const uint32_t x_to = kept(x_shared + row * X_ROW_BYTES + 16 * (chunk ^ row));
    const T* x_from = kept(x + (size_t)row * (uint32_t)K + 8 * chunk);
    const int rows_left = M - row, k_left = kept(K - 8 * chunk);
    const int apart = kept(ROWS_AT_ONCE * K);
    auto load_x = [&](int stage, int step) {
        const T* from = x_from + step * STEP;
        const uint32_t bytes = step * STEP < k_left ? 16 : 0;  // zeros beyond K
        const int rows = step < steps ? rows_left : 0;
#pragma unroll
        for (int r = 0; r < ROWS; r += ROWS_AT_ONCE, from += apart)
            if (r < rows)
                copy((x_to ^ (16 * r)) + stage * X_STAGE_BYTES + r * X_ROW_BYTES, from, bytes);
        end_of_copies();
    };

    float sums[SUBTILES][4] = {};
    const int x_row = lane % 8;
    const uint32_t x_lane = kept(x_shared + x_row * X_ROW_BYTES + 16 * ((lane / 8) ^ x_row));
    auto multiply_step = [&](const Step& w, int stage) {
#pragma unroll
        for (int fold = 0; fold < FOLDS; ++fold) {
            float code_sums[SUBTILES][4] = {}, x_sums[4] = {};
#pragma unroll
            for (int word = fold * FOLD_WORDS; word < (fold + 1) * FOLD_WORDS; ++word) {
                uint32_t xs[4];  // 8 rows, 4 times 8 columns
                load_matrices(xs, (x_lane + stage * X_STAGE_BYTES) ^ (64 * word));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    multiply(x_sums, ONES, xs[2 * half], xs[2 * half + 1]);
#pragma unroll
                    for (int s = 0; s < SUBTILES; ++s) {
                        uint32_t codes[4];
                        unpack(codes, w.words[2 * s][word], w.words[2 * s + 1][word], half);
                        multiply(code_sums[s], codes, xs[2 * half], xs[2 * half + 1]);
                    }
                }
            }
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                uint32_t param = w.params[t];
                if (FOLDS > 1) param = __shfl_sync(0xffffffff, param, lane / 4 * 4 + fold);
                const float scale = __uint_as_float(param << 16);
                const float zero = __uint_as_float(param & 0xffff0000);
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    const int i = t % 2 * 2 + odd;
                    float& sum = sums[t / 2][i];
                    sum = zero * x_sums[odd] + sum;
                    sum = scale * (code_sums[t / 2][i] - x_sums[2 + odd]) + sum;
                }
            }
        }
    };

    Step w[STAGES];
#pragma unroll
    for (int i = 0; i < PREFETCH; ++i) load_w(w[i], warp_k + i * WARPS_K);
    wait_for_kernel_before();
#pragma unroll
    for (int i = 0; i < PREFETCH; ++i) load_x(i, warp_k + i * WARPS_K);

    for (int first = warp_k; first < steps; first += STAGES * WARPS_K) {
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            const int step = first + stage * WARPS_K, next = step + PREFETCH * WARPS_K;
            if (step >= steps) break;
            // This step's x has arrived, and all warps are done with the x that is replaced next.
            wait_for_copies<PREFETCH - 1>();
            wait_for_warps(warp_k + 1);
            load_x((stage + PREFETCH) % STAGES, next);
            load_w(w[(stage + PREFETCH) % STAGES], next);
            multiply_step(w[stage], stage);
        }
    }

    // The sums of all warps, [WARPS_K, ROWS, SUM_PITCH], take the place of x.
    wait_for_copies<0>();
    __syncthreads();
    float* parts = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            const int at = (warp_k * ROWS + lane % 4 * 2 + odd) * SUM_PITCH;
            parts[at + 8 * (warp_n * TILES + t) + lane / 4] = sums[t / 2][t % 2 * 2 + odd];
        }
    __syncthreads();
    const int N = n0 + n1 + n2 + n3;
#pragma unroll 1
    for (uint32_t e = threadIdx.x; e < M * FEATURES; e += THREADS) {
        const uint32_t m = e / FEATURES, feature = features.first + e % FEATURES;
        if (feature >= features.weight.n) continue;
        float sum = 0;
#pragma unroll
        for (int k = 0; k < WARPS_K; ++k) sum += parts[(k * ROWS + m) * SUM_PITCH + e % FEATURES];
        y[(size_t)m * N + features.column + feature] = rounded(sum);
    }
}
