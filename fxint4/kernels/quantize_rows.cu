// x in e4m3 for fp8_rows.cu: each row over its largest magnitude, and sums over groups of columns.
//
// One block for each row, a thread for each 32 columns, or CHUNKS times as many. In each 32 columns,
// the one at 16a + 8h + 2t + b (a, h, b: 0 or 1; t: 0 to 3) goes to 16h + 4t + 2b + a: there the
// masked halves of a word of tiles expect it (fp8_rows.cu).
//
// Macros (-D), besides those of tiles.cuh, of which GROUP is that of the sums, 32, 64 or 128:
//   CHUNKS  chunks of 32 columns for a thread
// The launch: M blocks of at most 512 threads, a multiple of 32.

#include "tiles.cuh"

constexpr float LARGEST = 448, LEAST_SCALE = 1e-12f;

// The larger one, NaN if either is.
__device__ float larger(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

__device__ uint32_t larger2(uint32_t a, uint32_t b) {
    uint32_t c;
    asm("max.NaN." DTYPE "x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

__device__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000); }

// Two numbers in e4m3, the first in the lower byte.
__device__ uint32_t in_e4m3(float first, float second) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(pair) : "f"(first), "f"(second));
    return pair;
}

// Sums of two numbers in fp16, in which those of e4m3 are exact.
__device__ uint32_t add2(uint32_t a, uint32_t b) {
    uint32_t sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}

// The sum of four numbers in e4m3. One rounding to fp16 is as coarse as that of all sums to tf32.
__device__ float sum_of(uint32_t four) {
    uint32_t low, high;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}"
        : "=r"(low), "=r"(high) : "r"(four));
    float a, b;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(a), "=f"(b) : "r"(add2(low, high)));
    return a + b;
}

extern "C" __global__ void __launch_bounds__(512)
quantize_rows(const T* x, uint8_t* x8, float* scales, float* sums, int K, int columns,
              int all_sums) {
    __shared__ float of_warps[32];
    const uint64_t row = blockIdx.x;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

    launch_dependents();
    wait_for_kernel_before();

    uint32_t pairs[CHUNKS][16], most = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int k = (c * blockDim.x + thread) * 32 + i * 8;
            const uint4 four = k < K ? *(const uint4*)(x + row * K + k) : make_uint4(0, 0, 0, 0);
            const uint32_t each[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                pairs[c][i * 4 + j] = each[j];
                most = larger2(most, each[j] & 0x7fff7fff);
            }
        }
    float largest = larger(low(most), high(most));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
        largest = larger(largest, __shfl_xor_sync(~0u, largest, lanes));
    if (lane == 0) of_warps[warp] = largest;
    __syncthreads();
    largest = lane < blockDim.x / 32 ? of_warps[lane] : 0;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
        largest = larger(largest, __shfl_xor_sync(~0u, largest, lanes));
    const float scale = larger(largest / LARGEST, LEAST_SCALE), inverse = 1 / scale;
    if (thread == 0) scales[row] = scale;

#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int chunk = c * blockDim.x + thread;
        uint32_t out[8];
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t a = pairs[c][i], b = pairs[c][8 + i];
            out[i] = in_e4m3(low(a) * inverse, low(b) * inverse) |
                     in_e4m3(high(a) * inverse, high(b) * inverse) << 16;
            sum += sum_of(out[i]);
        }
        if (chunk * 32 < columns) {
            uint4* to = (uint4*)(x8 + row * columns + chunk * 32);
            to[0] = make_uint4(out[0], out[1], out[2], out[3]);
            to[1] = make_uint4(out[4], out[5], out[6], out[7]);
        }
#pragma unroll
        for (int lanes = 1; lanes < GROUP / 32; lanes *= 2)
            sum += __shfl_xor_sync(~0u, sum, lanes);
        const int group = chunk / (GROUP / 32);
        if (chunk % (GROUP / 32) == 0 && group < all_sums) {
            uint32_t bits;
            asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(sum));
            ((uint32_t*)sums)[row * all_sums + group] = bits;
        }
    }
}
