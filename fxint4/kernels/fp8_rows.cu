// y = x W^T in fp8, for many rows of x and int4 tiles W, on Hopper's wgmma (sm_90a); see ring.cuh.
//
// x comes from quantize_rows.cu: e4m3 x8 with a scale for each row, and the sums of x8 over groups
// of columns. The codes of W are exact in e4m3: a byte 0 to 15 is read as code * 2^-9. So a weight
// (code - 8) * scale + zero needs no rounding:
//
//   y = scale_x * (sum over groups of 512 * scale * (sum of code * 2^-9 * x8)
//                                     + (zero - 8 * scale) * (sum of x8))
//
// The inner sum is left to the tensor cores for at most 128 columns, since their fp8 accumulator
// keeps some 13 bits, and is then added to sums in fp32. The second term is a small product in tf32,
// once for every 32 groups, when their scales and zeros are in the L2. A word of tiles, eight codes
// of one feature, becomes two registers of the left operand by masks alone, because x8 is permuted
// inside each 32 columns.
//
// Unless `lasting`, the kernel before the one that quantizes may write W: then this one waits before
// it reads W, too.

constexpr int X_ITEM = 1;
constexpr int PRODUCER_REGISTERS = 24;
constexpr int UNIT = 4;  // the sums of x8 of 4 steps and more begin at multiples of 16 bytes

#include "ring.cuh"

constexpr int SLICES = STEP / 32;                 // of 32 columns, for one wgmma each
constexpr int SUMMED = least(GROUP, STEP);        // columns that the tensor cores sum up
constexpr int PARTS = STEP / SUMMED;              // of a step
constexpr int SLICES_OF_PART = SLICES / PARTS;
constexpr int GROUPS_OF_PANEL = 128 / 4;          // sums of x8 in a panel, in rows of 128 bytes
constexpr int STEPS_OF_PANEL = GROUPS_OF_PANEL / PARTS;
static_assert(UNIT * PARTS % 4 == 0);

struct Buffers {
    const TensorMap *tiles, *params;
    const uint32_t* pairs;
    int n_padded;
};

// One thread keeps the ring filled: turns are steps, and after every STEPS_OF_PANEL of them, and
// after the last one, a panel of the sums of x8.
__device__ void load(const TensorMap* x, const TensorMap* x_sums, const Part<Buffers>& part,
                     uint32_t shared) {
    constexpr int ROUND = STEPS_OF_PANEL + 1;
    const int turns = part.steps + divide_up(part.steps, STEPS_OF_PANEL);
    auto is_step = [&](int turn) { return turn % ROUND < STEPS_OF_PANEL && turn < turns - 1; };
    auto k_of = [&](int turn) { return (part.first_step + turn - turn / ROUND) * STEP; };
    auto load_w = [&](int turn) {
        const Stage at = stage_of(turn);
        expect(shared + at.full, X_BYTES + (is_step(turn) ? W_BYTES + P_BYTES : 0));
        if (is_step(turn)) copy_w(part.features, k_of(turn), at, shared);
    };
    auto load_x = [&](int turn) {
        const Stage at = stage_of(turn);
        if (is_step(turn))
            copy_x(x, k_of(turn), part.first_row, at, shared);
        else
            copy(shared + at.x, x_sums, part.first_step * PARTS + turn / ROUND * GROUPS_OF_PANEL,
                 part.first_row, shared + at.full);
    };
    fill(turns, shared, load_w, load_x);
}

// Each starts the product of 64 features and ROWS rows.
__device__ void add_in_tf32(float (&sums)[ROWS / 2], const uint32_t (&w)[4], uint64_t x) {
    MULTIPLY("k8.f32.tf32.tf32", "eq", "");
}

__device__ void add_in_fp8(float (&sums)[ROWS / 2], const uint32_t (&w)[4], uint64_t x) {
    MULTIPLY("k32.f32.e4m3.e4m3", "eq", "");
}

__device__ void begin_in_fp8(float (&sums)[ROWS / 2], const uint32_t (&w)[4], uint64_t x) {
    MULTIPLY("k32.f32.e4m3.e4m3", "ne", "");
}

__device__ float scale_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float zero_of(uint32_t pair) { return __uint_as_float(pair & 0xffff0000); }

// Waits until all products are summed, and orders reads of these sums after that.
__device__ void wait_for(float (&sums)[ROWS / 2]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : SUMS : : "memory");
}

// Adds the least weights, zero - 8 * scale, of some groups times their sums of x8, a panel at `x`.
__device__ void multiply_sums(Sums& sums, int first_group, int end, const Part<Buffers>& part,
                              uint64_t x) {
    constexpr int SLICES_OF_PANEL = GROUPS_OF_PANEL / 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Buffers& w = part.features.weight.buffers;
    const int feature =
        part.features.first + warp / 4 * SUBTILES * 64 + warp % 4 * 16 + lane / 4;
    auto group_of = [&](int i, int j) { return first_group + lane % 4 + i * 8 + j / 2 * 4; };
    uint32_t least[SUBTILES][SLICES_OF_PANEL][4];
    // All loads, of what there is, before the first is waited for.
#pragma unroll
    for (int s = 0; s < SUBTILES; ++s)
#pragma unroll
        for (int i = 0; i < SLICES_OF_PANEL; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int group = min(group_of(i, j), end - 1) * SUMMED / GROUP;
                const int column = min(feature + s * 64 + j % 2 * 8, w.n_padded - 1);
                least[s][i][j] = __ldg(w.pairs + (uint64_t)group * w.n_padded + column);
            }
#pragma unroll
    for (int s = 0; s < SUBTILES; ++s)
#pragma unroll
        for (int i = 0; i < SLICES_OF_PANEL; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const uint32_t pair = least[s][i][j];
                const float weight = fmaf(-8, scale_of(pair), zero_of(pair));
                uint32_t bits;
                asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(weight));
                least[s][i][j] = group_of(i, j) < end ? bits : 0;
            }
    begin_of_products();
#pragma unroll
    for (int s = 0; s < SUBTILES; ++s)
#pragma unroll
        for (int i = 0; i < SLICES_OF_PANEL; ++i)
            add_in_tf32(sums[s], least[s][i], x + i * 32 / 16);
    end_of_products();
#pragma unroll
    for (int s = 0; s < SUBTILES; ++s) wait_for(sums[s]);
}

// The left operand of 32 columns from two words, of tiles one below the other.
__device__ void unpack(uint32_t (&w)[4], const uint32_t (&words)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = words[i % 2] >> (i / 2 * 4) & 0x0f0f0f0f;
}

// What a thread reads of W for 64 features of a step.
struct Read {
    uint32_t words[WORDS][2];
    float scales[GROUPS][2];
};

// A stage of the ring, and the parity of its barriers.
struct Place {
    int stage;
    uint32_t parity;
};

__device__ Place after(Place at) {
    const bool last = at.stage + 1 == STAGES;
    return {last ? 0 : at.stage + 1, at.parity ^ last};
}

// Adds the products over all steps.
__device__ void multiply_steps(Sums& sums, const uint8_t* rings, const Part<Buffers>& part,
                               int k_padded) {
    const uint32_t shared = address(rings);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_tile = warp / 4 * SUBTILES * 8 + warp % 4 * 2;
    const int words_at = kept(first_tile * STEP + lane * HALF_INNER);
    const int params_at = kept(first_tile * 8 + lane / 4);
    auto wait_at = [&](Place place) { wait(shared + stage_of(place.stage).full, place.parity); };
    auto read = [&](int stage, int s) {
        const Stage at = stage_of(stage);
        const uint32_t* from_words = (const uint32_t*)(rings + at.words) + words_at + s * 8 * STEP;
        const uint32_t* from_params = (const uint32_t*)(rings + at.params) + params_at + s * 64;
        Read found;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
            for (int i = 0; i < WORDS; ++i)
                found.words[i][t] =
                    from_words[t * STEP + i / HALF_INNER * 32 * HALF_INNER + i % HALF_INNER];
#pragma unroll
            for (int i = 0; i < GROUPS; ++i)
                found.scales[i][t] = 512 * scale_of(from_params[i * FEATURES + t * 8]);
        }
        return found;
    };

    Place place = {0, 0};
    for (int first = 0; first < part.steps; first += STEPS_OF_PANEL) {
        const int steps = min(STEPS_OF_PANEL, part.steps - first);
        wait_at(place);
        Read now = read(place.stage, 0);
        for (int left = steps; left > 0; --left) {
            const Stage at = stage_of(place.stage);
            const uint64_t x = descriptor(shared + at.x);
#pragma unroll
            for (int s = 0; s < SUBTILES; ++s) {
                Read next;
#pragma unroll
                for (int p = 0; p < PARTS; ++p) {
                    uint32_t w[SLICES_OF_PART][4];
                    float products[ROWS / 2];  // the first multiplication overwrites them
#pragma unroll
                    for (int i = 0; i < SLICES_OF_PART; ++i)
                        unpack(w[i], now.words[p * SLICES_OF_PART + i]);
                    begin_of_products();
                    const uint64_t from = x + p * SLICES_OF_PART * 32 / 16;
                    begin_in_fp8(products, w[0], from);
#pragma unroll
                    for (int i = 1; i < SLICES_OF_PART; ++i)
                        add_in_fp8(products, w[i], from + i * 32 / 16);
                    end_of_products();
                    // While the tensor cores multiply, the next words are loaded.
                    const bool last_part = p == PARTS - 1, last = last_part && s == SUBTILES - 1;
                    if (last) {
                        place = after(place);
                        if (left > 1) {
                            wait_at(place);
                            next = read(place.stage, 0);
                        }
                    } else if (last_part) {
                        next = read(place.stage, s + 1);
                    }
                    wait_for(products);
                    if (last && lane == 0) arrive(shared + at.empty);
#pragma unroll
                    for (int i = 0; i < ROWS / 2; ++i)
                        sums[s][i] = fmaf(products[i], now.scales[p * GROUPS / PARTS][i / 2 % 2],
                                          sums[s][i]);
                }
                now = next;
            }
        }
        const Stage at = stage_of(place.stage);
        wait_at(place);
        const int end = min((part.first_step + first + steps) * PARTS, k_padded / SUMMED);
        multiply_sums(sums, (part.first_step + first) * PARTS, end, part, descriptor(shared + at.x));
        if (lane == 0) arrive(shared + at.empty);
        place = after(place);
    }
}

// --- the kernel ----------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) __cluster_dims__(SPLITS, 1, 1)
fp8_rows(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap x_sums,
         const __grid_constant__ TensorMap tiles0, const __grid_constant__ TensorMap tiles1,
         const __grid_constant__ TensorMap tiles2, const __grid_constant__ TensorMap tiles3,
         const __grid_constant__ TensorMap params0, const __grid_constant__ TensorMap params1,
         const __grid_constant__ TensorMap params2, const __grid_constant__ TensorMap params3,
         const uint32_t* pairs0, const uint32_t* pairs1, const uint32_t* pairs2,
         const uint32_t* pairs3, const float* x_scales, T* y, int n0, int n1, int n2, int n3,
         int n_padded0, int n_padded1, int n_padded2, int n_padded3, int M, int k_padded,
         int lasting) {
    extern __shared__ __align__(1024) uint8_t rings[];
    const uint32_t shared = address(rings);
    const int thread = threadIdx.x;

    launch_dependents();
    if (!lasting) wait_for_kernel_before();

    const Weight<Buffers> weights[4] = {{{&tiles0, &params0, pairs0, n_padded0}, n0},
                                        {{&tiles1, &params1, pairs1, n_padded1}, n1},
                                        {{&tiles2, &params2, pairs2, n_padded2}, n2},
                                        {{&tiles3, &params3, pairs3, n_padded3}, n3}};
    const Part<Buffers> part = part_of(weights, M, k_padded);
    make_barriers(shared);

    if (thread >= CONSUMERS) {
        give_registers_back<PRODUCER_REGISTERS>();
        if (thread == CONSUMERS) load(&x, &x_sums, part, shared);
        __syncwarp();
        after_products();
        after_sums();
        after_reading();
    } else {
        take_registers<CONSUMER_REGISTERS>();
        Sums sums = {};
        multiply_steps(sums, rings, part, k_padded);
        wait_for_kernel_before();
        store(sums, rings, part, y, M, n0 + n1 + n2 + n3, x_scales);
    }
}
