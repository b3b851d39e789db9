// What kernels are written against: CUDA's own operations under nvcc, emulator/emulator.h's under a plain C++ compiler. The kernels' sources
// are the same for both; everything of either kind lives in the namespace `gpu`, which is another one for each.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define gpu gpu_cuda
#define GEMMA_DEVICE __device__ __forceinline__
#define GEMMA_HOST_DEVICE __host__ __device__ __forceinline__
#define GEMMA_KERNEL __global__ void
#define GEMMA_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
// A static array, and the block's dynamic bytes, in shared memory.
#define GEMMA_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define GEMMA_DYNAMIC_SHARED(name)                         \
  extern __shared__ __align__(16) uint8_t gemma_dynamic[]; \
  uint8_t* name = gemma_dynamic
#define GEMMA_UNROLL _Pragma("unroll")
#define GEMMA_ROLLED _Pragma("unroll 1")
#else
#include "../emulator/emulator.h"
#define gpu gpu_emulated
#define GEMMA_DEVICE inline
#define GEMMA_HOST_DEVICE inline
#define GEMMA_KERNEL void
#define GEMMA_BOUNDS(threads, blocks)
#define GEMMA_SHARED(T, name, count) T* name = static_cast<T*>(::gemma::emulator::static_shared(sizeof(T) * (count)))
#define GEMMA_DYNAMIC_SHARED(name) uint8_t* name = static_cast<uint8_t*>(::gemma::emulator::dynamic_shared())
#define GEMMA_UNROLL
#define GEMMA_ROLLED
#endif

namespace gemma::gpu {

struct alignas(16) Word4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Word2 {
  uint32_t x, y;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(8) Float2 {
  float x, y;
};

GEMMA_HOST_DEVICE float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float f;
  std::memcpy(&f, &u, 4);
  return f;
#endif
}
GEMMA_HOST_DEVICE uint32_t float_bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
#endif
}

// Round to nearest even. Not for NaN, which no caller has that has not lost already.
GEMMA_HOST_DEVICE uint16_t bf16_of(float f) {
  const uint32_t u = float_bits(f);
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
GEMMA_HOST_DEVICE float float_of_bf16(uint16_t b) { return bits_float(static_cast<uint32_t>(b) << 16); }
GEMMA_HOST_DEVICE uint32_t bf16_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return bf16_of(low) | static_cast<uint32_t>(bf16_of(high)) << 16;
#endif
}
// Of an integer of at most 8 significant bits.
GEMMA_HOST_DEVICE constexpr uint32_t bf16_bits_of_integer(int i) {
  const uint32_t sign = i < 0 ? 0x8000 : 0, magnitude = static_cast<uint32_t>(i < 0 ? -i : i);
  uint32_t exponent = 0;
  while (magnitude >> exponent > 1) ++exponent;
  return sign | (127 + exponent) << 7 | (magnitude << 7 >> exponent & 127);
}
// Exact for every half, the subnormal ones too.
GEMMA_HOST_DEVICE float float_of_half(uint16_t h) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000u | (rest & 1023) << 13);
  return bits_float(sign | float_bits(bits_float(rest << 13) * 5.192296858534828e33f));  // 2^112
#endif
}

#if defined(__CUDACC__)
// ---- CUDA --------------------------------------------------------------------------------------------------------------

GEMMA_DEVICE int thread_x() { return static_cast<int>(threadIdx.x); }
GEMMA_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
GEMMA_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
GEMMA_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
GEMMA_DEVICE int blocks_x() { return static_cast<int>(gridDim.x); }
GEMMA_DEVICE void sync_block() { __syncthreads(); }
GEMMA_DEVICE void sync_warp() { __syncwarp(); }
// What this thread, and those that met it at a barrier, wrote before is seen by blocks that see what it writes after.
GEMMA_DEVICE void fence() { __threadfence(); }
// ++*count, for any number of blocks; the value before.
GEMMA_DEVICE uint32_t count_up(uint32_t* count) { return atomicAdd(count, 1u); }
GEMMA_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
GEMMA_DEVICE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

GEMMA_DEVICE float warp_sum(float x) {
  GEMMA_UNROLL
  for (int m = 16; m; m >>= 1) x += __shfl_xor_sync(0xffffffffu, x, m);
  return x;
}
GEMMA_DEVICE float warp_max(float x) {
  GEMMA_UNROLL
  for (int m = 16; m; m >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, m));
  return x;
}

// Weights pass once: they need not push anything out of the caches.
GEMMA_DEVICE Word4 load_stream(const void* p) {
  Word4 w;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
               : "l"(p));
  return w;
}

GEMMA_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t s) { return __byte_perm(a, b, s); }
// (a & mask) | bits and (~a & mask) | bits as one instruction, of which the compiler makes two where both are constants.
GEMMA_DEVICE uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
  return r;
}
GEMMA_DEVICE uint32_t masked_not_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xae;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
  return r;
}
// Two sums of bf16 values, rounded to nearest even.
GEMMA_DEVICE uint32_t add_pairs(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return r;
}

// d += a b: a 16 x 16 and b 16 x 8 bf16 fragments, d 16 x 8 float32 (PTX's layout of mma.m16n8k16).
GEMMA_DEVICE void mma(float* d, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d = a b
GEMMA_DEVICE void mma_new(float* d, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, "
      "%10, "
      "%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}
// Four 8 x 8 matrices of 16-bit values; lane l names row l % 8 of matrix l / 8 in shared memory.
GEMMA_DEVICE void load_matrices(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}
GEMMA_DEVICE void load_matrices_transposed(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}

// 16 bytes to shared memory, of which the last 16 - valid become zeros.
GEMMA_DEVICE void copy16(void* to, const void* from, int valid) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(valid));
}
// The same of weights, of which the neighbours are wanted soon.
GEMMA_DEVICE void copy16_stream(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(valid));
}
GEMMA_DEVICE void copy8(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from));
}
GEMMA_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int kLeft>
GEMMA_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft));
}

GEMMA_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// One instruction each, right to about 2^-22, subnormal values taken for 0: for what is rounded to bf16 later.
GEMMA_DEVICE float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
GEMMA_DEVICE float reciprocal_fast(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
GEMMA_DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }

// Programmatic dependent launch (compute capability 9.0): the next kernel of the stream may take free multiprocessors already, but
// reads and writes nothing that this one does before its own `wait_for_previous` returns. Every kernel calls both.
GEMMA_DEVICE void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
GEMMA_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#else
// ---- the emulation -----------------------------------------------------------------------------------------------------

inline int thread_x() { return emulator::thread().x; }
inline int block_x() { return emulator::thread().block.x; }
inline int block_y() { return emulator::thread().block.y; }
inline int block_z() { return emulator::thread().block.z; }
inline int blocks_x() { return emulator::thread().grid.x; }
inline void sync_block() { emulator::barrier(); }
inline void fence() {}
inline uint32_t count_up(uint32_t* count) { return (*count)++; }
inline void sync_warp() {
  emulator::collective([](void* const*) {}, nullptr, "sync_warp");
}

template <class T>
T shuffle_xor(T x, int mask) {
  struct Operands {
    T in, out;
    int mask;
  } o{x, x, mask};
  emulator::collective(
      [](void* const* lanes) {
        for (int i = 0; i < 32; ++i) {
          auto* mine = static_cast<Operands*>(lanes[i]);
          mine->out = static_cast<Operands*>(lanes[i ^ mine->mask])->in;
        }
      },
      &o, "shuffle_xor");
  return o.out;
}

template <class F>
float warp_reduce(float x, const char* what) {
  struct Operands {
    float value;
  } o{x};
  emulator::collective(
      [](void* const* lanes) {
        float v[32], w[32];
        for (int i = 0; i < 32; ++i) v[i] = static_cast<Operands*>(lanes[i])->value;
        for (int m = 16; m; m >>= 1) {
          for (int i = 0; i < 32; ++i) w[i] = F()(v[i], v[i ^ m]);
          std::memcpy(v, w, sizeof v);
        }
        for (int i = 0; i < 32; ++i) static_cast<Operands*>(lanes[i])->value = v[i];
      },
      &o, what);
  return o.value;
}
struct Plus {
  float operator()(float a, float b) const { return a + b; }
};
struct Maximum {
  float operator()(float a, float b) const { return std::fmax(a, b); }
};
inline float warp_sum(float x) { return warp_reduce<Plus>(x, "warp_sum"); }
inline float warp_max(float x) { return warp_reduce<Maximum>(x, "warp_max"); }

inline Word4 load_stream(const void* p) {
  Word4 w;
  std::memcpy(&w, __builtin_assume_aligned(p, 16), 16);
  return w;
}

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t s) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(both >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
  return r;
}

inline uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
inline uint32_t masked_not_or(uint32_t a, uint32_t mask, uint32_t bits) { return (~a & mask) | bits; }

inline uint32_t add_pairs(uint32_t a, uint32_t b) {
  auto half = [](uint32_t x, int i) { return float_of_bf16(static_cast<uint16_t>(x >> 16 * i)); };
  return bf16_pair(half(a, 0) + half(b, 0), half(a, 1) + half(b, 1));
}

inline void mma(float* d, const uint32_t* a, const uint32_t* b) {
  struct Operands {
    float* d;
    const uint32_t *a, *b;
  } o{d, a, b};
  emulator::collective(
      [](void* const* lanes) {
        float A[16][16], B[8][16];
        for (int l = 0; l < 32; ++l) {
          const auto* o = static_cast<Operands*>(lanes[l]);
          for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 4; ++j)
              A[l / 4 + 8 * (j & 1)][l % 4 * 2 + i + 8 * (j >> 1)] =
                  float_of_bf16(static_cast<uint16_t>(o->a[j] >> 16 * i));
          for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j)
              B[l / 4][l % 4 * 2 + i + 8 * j] = float_of_bf16(static_cast<uint16_t>(o->b[j] >> 16 * i));
        }
        for (int l = 0; l < 32; ++l) {
          float* d = static_cast<Operands*>(lanes[l])->d;
          for (int i = 0; i < 4; ++i) {
            const int row = l / 4 + 8 * (i >> 1), column = l % 4 * 2 + (i & 1);
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += A[row][k] * B[column][k];
            d[i] += sum;
          }
        }
      },
      &o, "mma");
}

inline void mma_new(float* d, const uint32_t* a, const uint32_t* b) {
  for (int i = 0; i < 4; ++i) d[i] = 0;
  mma(d, a, b);
}

template <bool kTransposed>
void load_matrices_as(uint32_t* r, const void* row, const char* what) {
  struct Operands {
    uint32_t* r;
    const void* row;
  } o{r, row};
  emulator::collective(
      [](void* const* lanes) {
        for (int m = 0; m < 4; ++m) {
          uint16_t v[8][8];
          for (int i = 0; i < 8; ++i)
            std::memcpy(v[i], __builtin_assume_aligned(static_cast<Operands*>(lanes[m * 8 + i])->row, 16), 16);
          for (int l = 0; l < 32; ++l) {
            const int i = l / 4, j = l % 4 * 2;
            const uint16_t low = kTransposed ? v[j][i] : v[i][j], high = kTransposed ? v[j + 1][i] : v[i][j + 1];
            static_cast<Operands*>(lanes[l])->r[m] = low | static_cast<uint32_t>(high) << 16;
          }
        }
      },
      &o, what);
}
inline void load_matrices(uint32_t* r, const void* row) { load_matrices_as<false>(r, row, "load_matrices"); }
inline void load_matrices_transposed(uint32_t* r, const void* row) {
  load_matrices_as<true>(r, row, "load_matrices_transposed");
}

inline void copy16(void* to, const void* from, int valid) { emulator::async_copy(to, from, 16, valid); }
inline void copy16_stream(void* to, const void* from, int valid) { copy16(to, from, valid); }
inline void copy8(void* to, const void* from) { emulator::async_copy(to, from, 8, 8); }
inline void copy_commit() { emulator::async_commit(); }
template <int kLeft>
void copy_wait() {
  emulator::async_wait(kLeft);
}

inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline bool any_lane(bool x) { return warp_max(x ? 1.0f : 0.0f) > 0; }

inline void allow_next() {}
inline void wait_for_previous() { emulator::wait_for_previous(); }
#endif

// The start of a kernel that has nothing to do before its inputs are there.
GEMMA_DEVICE void start() {
  allow_next();
  wait_for_previous();
}

GEMMA_DEVICE int lane() { return thread_x() & 31; }
GEMMA_DEVICE int warp() { return thread_x() >> 5; }

}  // namespace gemma::gpu
