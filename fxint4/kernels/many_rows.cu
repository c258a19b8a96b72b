// y = x W^T for many rows of x and int4 tiles W, on Hopper's wgmma (sm_90a); see ring.cuh.
//
// Each warpgroup unpacks 64 out features at a time into the registers of the left operand. While the
// tensor cores multiply 16 columns, the next 16 are unpacked.

constexpr int X_ITEM = 2;
constexpr int PRODUCER_REGISTERS = 40;
constexpr int UNIT = 1;

#include "ring.cuh"

constexpr int SLICES = STEP / 16;  // of 16 columns, for one wgmma each
constexpr int IN_FLIGHT = 2;       // slices that are being multiplied

// a * b + c of two values at a time.
__device__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t sum;
    asm("fma.rn." DTYPE "x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// Starts sums[feature, row] += w[feature, k] * x[row, k] of 64 features, ROWS rows, 16 columns.
__device__ void multiply(float (&sums)[ROWS / 2], const uint32_t (&w)[4], uint64_t x) {
    MULTIPLY("k16.f32." DTYPE "." DTYPE, "eq", ", 0");
}

struct Buffers {
    const TensorMap *tiles, *params;
};

// One thread keeps the ring filled.
__device__ void load(const TensorMap* x, const Part<Buffers>& part, uint32_t shared) {
    auto load_w = [&](int step) {
        const Stage at = stage_of(step);
        expect(shared + at.full, X_BYTES + W_BYTES + P_BYTES);
        copy_w(part.features, (part.first_step + step) * STEP, at, shared);
    };
    auto load_x = [&](int step) {
        copy_x(x, (part.first_step + step) * STEP, part.first_row, stage_of(step), shared);
    };
    fill(part.steps, shared, load_w, load_x);
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
    const Part<Buffers> part = part_of(weights, M, k_padded);
    make_barriers(shared);

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
        store(sums, rings, part, y, M, n0 + n1 + n2 + n3);
    }
}
