// y = x W^T for many rows of x and int4 tiles W, on Hopper's wgmma (sm_90a).
//
// Computed as W x^T: each warpgroup unpacks 64 out features at a time into the registers of the left
// operand, whose layout is that of the tiles, and x is the right operand in shared memory. While the
// tensor cores multiply 16 columns, the next 16 are unpacked. One more warp keeps a ring of stages
// filled: x through a tensor map, whose rows and columns beyond x are zeros, tiles and parameters as
// they lie. The sum over K may be split among the blocks of a cluster, which add their parts through
// each other's shared memory, in a fixed order.
//
// Macros: ROWS of x a block (64, 128, 192, 256), WARPGROUPS that multiply, SUBTILES of 64 features each,
// STAGES of the ring, SPLITS along K, BLOCKS_PER_SM; DTYPE_FP16, GROUP, HALF_INNER, WEIGHTS. The
// launch: THREADS, SHARED_BYTES of dynamic shared memory, and SPLITS * ceil(M / ROWS) * (sum over
// weights of ceil(n / FEATURES)) blocks; k_padded is at least SPLITS * STEP.

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

__device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }

constexpr int STEP = 128;                            // columns a stage
constexpr int CONSUMERS = 128 * WARPGROUPS;          // threads that multiply
constexpr int THREADS = CONSUMERS + 128;             // registers are given to whole warpgroups
constexpr int REGISTERS = min_of(65536 / (BLOCKS_PER_SM * THREADS) / 8 * 8, 255 / 8 * 8);
constexpr int PRODUCER_REGISTERS = 24;
constexpr int CONSUMER_REGISTERS =
    min_of((REGISTERS * THREADS - PRODUCER_REGISTERS * 128) / CONSUMERS / 8 * 8, 240);
constexpr int FEATURES = 64 * WARPGROUPS * SUBTILES;
constexpr int IN_FLIGHT = 2;                         // products of 16 columns
constexpr int PANELS = STEP / 64;                    // of x: 64 columns, rows of 128 bytes
constexpr int WORDS = STEP / 32;                     // of a tile that a thread unpacks in a step
constexpr int GROUPS = (STEP + GROUP - 1) / GROUP;   // that a step reads
constexpr int X_BYTES = ROWS * STEP * 2;
constexpr int W_BYTES = FEATURES * STEP / 2;
constexpr int P_BYTES = FEATURES * GROUPS * 4;
constexpr int PITCH = FEATURES + 4;                  // of the sums in shared memory, free of bank conflicts
constexpr int W_RING = STAGES * X_BYTES, P_RING = W_RING + STAGES * W_BYTES;  // behind that of x
constexpr int RINGS_BYTES = P_RING + STAGES * P_BYTES, SUM_BYTES = ROWS * PITCH * 4;
constexpr int BARRIERS = RINGS_BYTES > SUM_BYTES ? RINGS_BYTES : SUM_BYTES;
[[maybe_unused]] constexpr int SHARED_BYTES = BARRIERS + 16 * STAGES;

struct alignas(64) TensorMap {
  uint64_t words[16];
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{.reg .pred done;\nagain: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// A box of a matrix; zeros where it has none.
__device__ __forceinline__ void copy(uint32_t to, const TensorMap* from, int column, int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
                   "r"(to), "l"(from), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(word), "r"(mask), "r"(bits));
  return r;
}

#if DTYPE_FP16
#define FMA2 "fma.rn.f16x2"
#define OPERANDS "f16.f16"
#else
#define FMA2 "fma.rn.bf16x2"
#define OPERANDS "bf16.bf16"
#endif

__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm(FMA2 " %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// Scale and zero of a feature, each twice, in the dtype of x.
struct Parameters {
  uint32_t scale, zero;
};

__device__ __forceinline__ Parameters parameters(uint32_t pair) {
#if DTYPE_FP16
  uint32_t scale = pair << 16, zero = pair & 0xffff0000, least = 0xfbfffbff, most = 0x7bff7bff;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(__uint_as_float(zero)), "f"(__uint_as_float(scale)));
  asm("min.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(most));
  asm("max.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(least));
#endif
  return {__byte_perm(pair, 0, 0x1010), __byte_perm(pair, 0, 0x3232)};
}

// Two weights of columns 2t and 2t + 1 of 8: code I of 4 pairs in a word.
template <int I>
__device__ __forceinline__ uint32_t weights(uint32_t word, Parameters p) {
#if DTYPE_FP16
  // 1024 + code, or 1024 + 16 * code where the code is 4 bits higher.
  uint32_t code = and_or(word >> (8 * (I / 2)), I % 2 ? 0x00f000f0 : 0x000f000f, 0x64006400);
  code = I % 2 ? fma2(code, 0x2c002c00, 0xd480d480) : fma2(code, 0x3c003c00, 0xe408e408);
#else
  uint32_t code = and_or(word >> (4 * I), 0x000f000f, 0x43004300);  // 128 + code
  code = fma2(code, 0x3f803f80, 0xc308c308);                        // code - 8
#endif
  return fma2(code, p.scale, p.zero);
}

#define R0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R1 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define R2 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define R3 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define F8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define F32(d, i) F8(d, i), F8(d, i + 8), F8(d, i + 16), F8(d, i + 24)
#define WGMMA(n, sums, a0, a1, a2, a3, b)                                                              \
  "{.reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n" n "k16.f32." OPERANDS " {" sums \
  "}, {" a0 "," a1 "," a2 "," a3 "}, " b ", add, 1, 1, 0;}"

// sums [64, ROWS] += a [64, 16] b [16, ROWS], done when waited for.
__device__ __forceinline__ void multiply(float* d, const uint32_t* a, uint64_t b) {
#if ROWS == 64
  asm volatile(WGMMA("64", R0, "%32", "%33", "%34", "%35", "%36")
               : F32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#elif ROWS == 128
  asm volatile(WGMMA("128", R0 "," R1, "%64", "%65", "%66", "%67", "%68")
               : F32(d, 0), F32(d, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#elif ROWS == 192
  asm volatile(WGMMA("192", R0 "," R1 "," R2, "%96", "%97", "%98", "%99", "%100")
               : F32(d, 0), F32(d, 32), F32(d, 64) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
  asm volatile(WGMMA("256", R0 "," R1 "," R2 "," R3, "%128", "%129", "%130", "%131", "%132")
               : F32(d, 0), F32(d, 32), F32(d, 64), F32(d, 96) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

// Where wgmma finds 16 columns of ROWS rows: K-major, rows of 128 bytes, swizzled in groups of 8.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return ((uint64_t)1 << 62) | ((uint64_t)(1024 >> 4) << 32) | ((uint64_t)1 << 16) | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ uint16_t to_dtype(float v) {
  uint16_t r;
#if DTYPE_FP16
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
#endif
  return r;
}

__device__ __forceinline__ float4 of_block(uint32_t address, int rank) {
  float4 v;
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
  return v;
}

__device__ __forceinline__ void consumers_barrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
}

__device__ __forceinline__ void cluster_barrier() {  // threads that have returned don't count
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) __cluster_dims__(SPLITS, 1, 1)
many_rows(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap tiles0,
          const __grid_constant__ TensorMap tiles1, const __grid_constant__ TensorMap tiles2,
          const __grid_constant__ TensorMap tiles3, const uint32_t* params0, const uint32_t* params1,
          const uint32_t* params2, const uint32_t* params3, uint16_t* __restrict__ y, int n0, int n1,
          int n2, int n3, int n_padded0, int n_padded1, int n_padded2, int n_padded3, int M, int k_padded) {
  extern __shared__ __align__(1024) uint8_t rings[];
  const uint32_t shared = shared_address(rings), full = shared + BARRIERS, empty = full + 8 * STAGES;
  asm volatile("griddepcontrol.launch_dependents;");
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int rank = blockIdx.x % SPLITS, row_blocks = (M + ROWS - 1) / ROWS;
  const int first_row = blockIdx.x / SPLITS % row_blocks * ROWS;
  int block = blockIdx.x / SPLITS / row_blocks;

  // The weight that the block lies in.
  const TensorMap* tiles = &tiles0;
  const uint32_t* params = params0;
  int n = n0, n_padded = n_padded0, first_column = 0;
  auto next = [&](const TensorMap* t, const uint32_t* p, int next_n, int next_padded) {
    const int blocks = (n + FEATURES - 1) / FEATURES;
    if (block < blocks) return false;
    block -= blocks;
    first_column += n;
    tiles = t, params = p, n = next_n, n_padded = next_padded;
    return true;
  };
  if constexpr (WEIGHTS > 1)
    if (next(&tiles1, params1, n1, n_padded1))
      if constexpr (WEIGHTS > 2)
        if (next(&tiles2, params2, n2, n_padded2))
          if constexpr (WEIGHTS > 3) next(&tiles3, params3, n3, n_padded3);
  const int feature = block * FEATURES;
  const int row_length = n0 + (WEIGHTS > 1 ? n1 : 0) + (WEIGHTS > 2 ? n2 : 0) + (WEIGHTS > 3 ? n3 : 0);

  const int all_steps = (k_padded + STEP - 1) / STEP;
  const int first_step = rank * all_steps / SPLITS;
  const int steps = (rank + 1) * all_steps / SPLITS - first_step;

  if (thread == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(full + 8 * stage));
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(empty + 8 * stage), "n"(CONSUMERS / 32));
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  if (thread >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    if (thread > CONSUMERS) return;
    const int last_group = k_padded / GROUP - 1;
    const uint32_t pairs = 4 * min(FEATURES, n_padded - feature);
    auto load_w = [&](int step) {
      const uint32_t stage = step % STAGES, barrier = full + 8 * stage;
      const int k = (first_step + step) * STEP;
      expect(barrier, X_BYTES + W_BYTES + GROUPS * pairs);
      copy(shared + W_RING + stage * W_BYTES, tiles, k, feature / 8, barrier);
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
        copy(shared + P_RING + stage * P_BYTES + group * FEATURES * 4,
             params + (uint64_t)min(k / GROUP + group, last_group) * n_padded + feature, pairs, barrier);
    };
    auto load_x = [&](int step) {
      const uint32_t stage = step % STAGES, barrier = full + 8 * stage;
#pragma unroll
      for (int panel = 0; panel < PANELS; panel++)
        copy(shared + stage * X_BYTES + panel * ROWS * 128, &x, (first_step + step) * STEP + panel * 64, first_row,
             barrier);
    };
    // x may still be computed by the kernel before, W may not.
    const int early = min(steps, STAGES);
    for (int step = 0; step < early; step++) load_w(step);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int step = 0; step < early; step++) load_x(step);
    for (int step = early; step < steps; step++) {
      wait(empty + 8 * (step % STAGES), (step / STAGES - 1) % 2);
      load_w(step);
      load_x(step);
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
  float sums[SUBTILES][ROWS / 2];
#pragma unroll
  for (int s = 0; s < SUBTILES; s++)
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) sums[s][i] = 0.f;
  int step = 0;
  do {
    const uint32_t stage = step % STAGES;
    wait(full + 8 * stage, step / STAGES % 2);
    const uint32_t* words = (const uint32_t*)(rings + W_RING + stage * W_BYTES);
    const uint32_t* pairs = (const uint32_t*)(rings + P_RING + stage * P_BYTES);
    const uint64_t x_stage = descriptor(shared + stage * X_BYTES);
    uint32_t w[SUBTILES][2][WORDS];
    Parameters p[SUBTILES][2][GROUPS];
#pragma unroll
    for (int s = 0; s < SUBTILES; s++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int tile = (warp / 4 * SUBTILES + s) * 8 + warp % 4 * 2 + half;
#pragma unroll
        for (int j = 0; j < WORDS; j++)
          w[s][half][j] = words[tile * STEP + (j / HALF_INNER * 32 + lane) * HALF_INNER + j % HALF_INNER];
#pragma unroll
        for (int g = 0; g < GROUPS; g++) p[s][half][g] = parameters(pairs[g * FEATURES + tile * 8 + lane / 4]);
      }
#pragma unroll
    for (int slice = 0; slice < STEP / 16; slice++) {
      uint32_t a[SUBTILES][4];
      const int word = slice / 2, group = slice * 16 / GROUP;
#pragma unroll
      for (int s = 0; s < SUBTILES; s++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          if (slice % 2 == 0) {
            a[s][half] = weights<0>(w[s][half][word], p[s][half][group]);
            a[s][2 + half] = weights<1>(w[s][half][word], p[s][half][group]);
          } else {
            a[s][half] = weights<2>(w[s][half][word], p[s][half][group]);
            a[s][2 + half] = weights<3>(w[s][half][word], p[s][half][group]);
          }
        }
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int s = 0; s < SUBTILES; s++)
        multiply(sums[s], a[s], x_stage + (slice / 4 * ROWS * 128 + slice % 4 * 32) / 16);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      // The registers of slices before are free again, and this one multiplies on.
      asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory");
      // So is the stage before.
      if (slice == IN_FLIGHT - 1 && step > 0 && lane == 0) arrive(empty + 8 * ((step - 1) % STAGES));
    }
  } while (++step < steps);
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  consumers_barrier();

  float* parts = (float*)rings;
#pragma unroll
  for (int s = 0; s < SUBTILES; s++)
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) {
      const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int column = (warp / 4 * SUBTILES + s) * 64 + warp % 4 * 16 + lane / 4 + i / 2 % 2 * 8;
      parts[row * PITCH + column] = sums[s][i];
    }
  if constexpr (SPLITS > 1)
    cluster_barrier();
  else
    consumers_barrier();

  constexpr int QUADS = FEATURES / 4, MINE = (ROWS + SPLITS - 1) / SPLITS;
  const bool aligned = row_length % 4 == 0 && first_column % 4 == 0 && (uint64_t)y % 8 == 0;
  for (int quad = thread; quad < MINE * QUADS; quad += CONSUMERS) {
    const int row = rank * MINE + quad / QUADS, column = quad % QUADS * 4;
    if (row >= ROWS || first_row + row >= M) break;
    const uint32_t at = shared + (row * PITCH + column) * 4;
    float4 sum = SPLITS > 1 ? of_block(at, 0) : *(const float4*)(parts + row * PITCH + column);
#pragma unroll
    for (int split = 1; split < SPLITS; split++) {
      const float4 more = of_block(at, split);
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    uint16_t* to = y + (uint64_t)(first_row + row) * row_length + first_column + feature + column;
    const uint16_t out[4] = {to_dtype(sum.x), to_dtype(sum.y), to_dtype(sum.z), to_dtype(sum.w)};
    if (aligned && feature + column + 4 <= n)
      *(uint2*)to = make_uint2(out[0] | out[1] << 16, out[2] | out[3] << 16);
    else
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (feature + column + i < n) to[i] = out[i];
  }
  if constexpr (SPLITS > 1) cluster_barrier();  // the others still read this block's sums
}
