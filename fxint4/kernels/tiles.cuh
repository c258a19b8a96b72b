// Code that the kernels share which multiply by int4 tiles (fxint4/quant/tile_layout.py).
//
// Macros of each of them (-D):
//   DTYPE_FP16    dtype of x and y: 0 is bf16, 1 is fp16
//   GROUP         columns that share a scale and a zero: 32, 64, 128 or 256
//   HALF_INNER    inner_k_tiles / 2: 1, 2 or 4
//   WEIGHTS       1 to 4 weights, whose features lie side by side in y

#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef uint16_t T;  // the bits of bf16 or fp16

#if DTYPE_FP16
#define DTYPE "f16"
#else
#define DTYPE "bf16"
#endif

constexpr int STEP = 128;         // columns of k that are multiplied at a time
constexpr int WORDS = STEP / 32;  // that a thread has of these columns of a tile of 8 features

__device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// Buffers locate tiles and parameters: [groups, n_padded] bf16 pairs, scale low, zero high.
template <typename Buffers>
struct Weight {
    Buffers buffers;
    int n;
};

// The features of a block: of one weight, from `first` on. The weight begins at `column` of y.
template <typename Buffers>
struct Features {
    Weight<Buffers> weight;
    int first, column;
};

// Each weight has as many blocks of `size` features as it needs.
template <typename Buffers>
__device__ Features<Buffers> features_of(int block, int size, const Weight<Buffers> (&weights)[4]) {
    Features<Buffers> found = {weights[0], block * size, 0};
#pragma unroll
    for (int i = 1; i < WEIGHTS; ++i) {
        const int n = found.weight.n;
        if (found.first < n) break;
        found = {weights[i], found.first - divide_up(n, size) * size, found.column + n};
    }
    return found;
}

// --- inline assembly -----------------------------------------------------------------------------

// The same value, hidden from the compiler, which would otherwise compute it again for each step.
template <typename V>
__device__ V kept(V value) {
    if constexpr (sizeof(V) == 8)
        asm volatile("" : "+l"(value));
    else
        asm volatile("" : "+r"(value));
    return value;
}

// (bits & mask) | magic in one instruction; the compiler would take two.
template <uint32_t mask, uint32_t magic>
__device__ uint32_t pick(uint32_t bits) {
    uint32_t picked;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(picked) : "r"(bits), "n"(mask), "n"(magic));
    return picked;
}

__device__ T rounded(float sum) {
    T bits;
    asm("cvt.rn." DTYPE ".f32 %0, %1;" : "=h"(bits) : "f"(sum));
    return bits;
}

__device__ uint32_t address(const void* shared) {
    return (uint32_t)__cvta_generic_to_shared(shared);
}

// These two do nothing unless this kernel, or the one after it, is a programmatic dependent.
#if __CUDA_ARCH__ >= 900
__device__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ void launch_dependents() {}
__device__ void wait_for_kernel_before() {}
#endif
