// The CPU's inner loops as a table of function pointers, one table for each instruction-set level.
//
// Every kernel adds in an order that depends on the shape of one row alone: results do not change with the number of rows
// in a call, with threads, or with how a prompt was cut. Sizes need not be multiples of anything unless it says so.
#pragma once

#include <cstdint>

#include "../quant.h"
#include "../tensor.h"

#if defined(__GNUC__)
#define GEMMA_INLINE __attribute__((always_inline)) inline
#define GEMMA_NOINLINE __attribute__((noinline))
#else
#define GEMMA_INLINE inline
#define GEMMA_NOINLINE
#endif

namespace gemma {

// Activations for quantised weights: int8 in blocks of 32 along K, each with a scale for either half ("fine"), or one for both.
struct ActScale {
  float d[2];    // value = d[half] * q; equal when not fine
  float dsum;    // sum of the block's values, for encodings with an offset
  int32_t sum;   // sum of the block's q: undoes the unsigned shift of the weights
  int32_t sum0;  // the same over the first half
};

// One chunk of up to kActChunk rows, interleaved so that a block of weights meets all rows in one sequential read.
constexpr int kActChunk = 64;
struct QuantActs {
  const int8_t* q;        // [blocks][rows][32]
  const ActScale* scale;  // [blocks][rows]
  int rows;
  bool fine;
};

// A panel of quantised weights: its units and, for Q8_0 and Q6_K, the low bits of its values.
struct TiledPanel {
  const uint8_t* units;
  const uint8_t* low;
};

// How much of a panel's bf16 weights lies in the scratch as the kernel likes it: nothing, what it begins with, everything.
enum class Packed { kNothing, kFirst, kAll };

// One block of an activation row for the scan of a head by the high bits h of its values: d_w being the weight row's scale, the
// block adds d_w 2^-k (h . q + start) to the estimate and d_w^2 energy to the margin's square, in units that are the caller's for each row.
// With a scale for either half (Q6_K), each half adds its own. The integer sum begins with `begin`, the bits of `zero` = 1.5 * 2^(23-k) plus
// the start: as a float it is then zero + 2^-k (h . q + start) exactly, since |h . q + start| < 2^17, which takes neither a conversion nor a
// product with a scale.
struct ScanScale {
  int32_t begin[2];
  float zero;
  float energy[2];
};

// Query rows that `attend` takes at most, as many as AMX has in a tile; half of them fit the registers of AVX-512.
constexpr int kQueryRows = 16;
constexpr int kKeys = 64;  // keys a block, kKeyBlock of backend.h

struct Kernels {
  const char* name;

  // out[k] = x / rms(x) * w, sum of squares in float32. out may be x.
  void (*rms_norm)(const float* x, const float* w, int64_t n, float eps, float* out);
  // n rows of k floats, ldx apart (the last block padded with zeros), into slots [0, n) of a chunk of `rows` rows. A block whose
  // largest value is too small to divide by becomes zeros; one with a value that is not finite becomes zeros times NaN.
  void (*quantize)(const float* x, int64_t ldx, int n, int64_t k, bool fine, int8_t* q, ActScale* scale, int rows);
  // Values [at, at + count) of n rows of k floats, which lie in x, ldx apart, into slots [row, row + n) of the `rows` rows that `bf16`
  // reads: pack_bytes(k) bytes each, padded with zeros. `at` is a multiple of 32, and so is `count` unless the rows end there.
  void (*pack)(const float* x, int64_t ldx, int n, int64_t at, int64_t count, int64_t k, void* out, int64_t row,
               int64_t rows);
  int64_t (*pack_bytes)(int64_t k);

  // tile[row][32] = one panel of weights times a chunk of activations over `count` blocks along K from `first` on, where `acts`
  // begins (both multiples of 8 for K-quants). `add` goes on from what the tile holds. `next`: what memory is asked for once these blocks
  // have been, the panel of the next call, or nulls for what follows in memory.
  void (*panel)(DType type, const TiledPanel& panel, int64_t first, int64_t count, const QuantActs& acts, bool add,
                const TiledPanel& next, float* tile);
  // low[row * ld], high[row * ld] = the largest of estimate - margin and of estimate + margin among the weight rows of a panel of Q8_0 or
  // Q6_K, without those whose bit is set in `skip`; q is [blocks][rows][32], scales [blocks][rows].
  void (*scan)(DType type, const uint8_t* units, int64_t blocks, const int8_t* q, const ScanScale* scales, int rows,
               uint32_t skip, float* low, float* high, int64_t ld);
  // out[i * ldo + r] = W[r] . x[first + i] for `rows` weight rows in file order (at most kBf16Rows) and m (at most kActChunk) of
  // the n packed activation rows. `scratch`, of bf16_scratch(k) bytes, keeps the weights as the kernel likes them; `packed`: how much of
  // that earlier calls with the same scratch and n have done. `next`: kBf16Rows weight rows, ldw apart, that the next call with this
  // scratch will be for, or null. Returns whether it has begun with them (kFirst).
  bool (*bf16)(const uint16_t* w, int64_t ldw, int rows, int64_t k, const void* x, int64_t first, int m, int64_t n,
               Packed packed, const uint16_t* next, uint8_t* scratch, float* out, int64_t ldo);
  int64_t (*bf16_scratch)(int64_t k);
  // What the amx level has in place of `bf16`, null elsewhere: tile[row][32] (+)= `rows` weight rows in file order (at most kBf16Rows) times m
  // (at most kActChunk) activation rows from `first` on, over values [at, at + count) along K, where `at` is a multiple of 32, 0 starts
  // the sums, and `count` is too unless the rows end there. `scratch`, of bf16_scratch(count) bytes, keeps what of the weights several chunks of
  // rows need; `unpacked`: an earlier call, for 64 rows, has put it there.
  void (*tiles)(const uint16_t* w, int64_t ldw, int rows, int64_t k, int64_t at, int64_t count, const void* x,
                int64_t first, int m, bool unpacked, uint8_t* scratch, float* tile);

  void (*geglu)(const float* gate, const float* up, int64_t n, float* out);  // gelu_tanh(gate) * up
  void (*add)(float* x, const float* y, int64_t n);                          // x += y
  void (*softcap)(float* x, int64_t n, float cap);                           // cap * tanh(x / cap)
  // Half-split rotation: (x[i], x[i + half]) by (cos[i], sin[i]); then everything times `scale`.
  void (*rope)(float* x, const float* cos, const float* sin, int64_t half, float scale);
  // max and sum of exp(x - max)
  void (*log_sum)(const float* x, int64_t n, float* max, float* sum);

  // Null but on the amx level. There `attend` of bf16 keys and values takes as q what this makes of the rows, 1.5 * rows * e floats.
  void (*queries)(const float* q, int rows, int64_t e, void* out);
  // One block of 64 keys against `rows` query rows (row i at q + i * e floats, e a multiple of 32, padded with zeros; or what `queries` made).
  // Row i sees keys [lo[i], hi[i]) of the block; where that is empty its outputs mean nothing. Layouts: see CpuKv.
  // max[i], sum[i], out[i * e ...]: softmax numerators of this block from its own maximum. `next`: keys that the caller will want
  // after these, or null.
  void (*attend)(bool kv_f32, const void* q, int rows, int64_t e, const void* k, const void* v, const void* next,
                 const int* lo, const int* hi, float softcap, float* max, float* sum, float* out);
  // (max, sum, acc) of a row := itself joined with one more block. Start from max = -inf, sum = 0, acc = 0.
  void (*fold)(float* max, float* sum, float* acc, float block_max, float block_sum, const float* block, int64_t e);
  // out[i] = acc[i] / sum
  void (*divide)(const float* acc, float sum, int64_t n, float* out);

  Q4Errors q4_errors;  // see quant.h

  // For probes.h: reads n bytes (a multiple of 256) and returns some sum of them; runs nothing but independent dot-product or
  // multiply-add instructions and returns how many operations that were.
  uint32_t (*read)(const uint8_t* p, int64_t n);
  double (*peak_int8)(int64_t rounds);
  double (*peak_bf16)(int64_t rounds);
  double (*peak_f32)(int64_t rounds);
};

constexpr int kBf16Rows = 32;

extern const Kernels kScalarKernels;
#if defined(GEMMA_NATIVE_X86)
extern const Kernels kAvx2Kernels;
// The avx2 level where vpdpbusd exists for 256 bits: the same bits, since integer sums are exact.
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512EmulatedKernels;  // for tests without the instructions: emulator/avx512.h
// Puts the kernels by tiles into a table of the AVX-512 level.
void use_amx(Kernels& kernels);
void use_emulated_amx(Kernels& kernels);  // emulator/amx.h
#endif

const Kernels& kernels();  // of chosen_isa()

}  // namespace gemma
