// Macros and small helpers that let one source serve g++ and nvcc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RECIS_HD __host__ __device__ __forceinline__
#else
#define RECIS_HD inline __attribute__((always_inline))
#endif

// A function with a loop that g++ must see alone: inlined behind a branch, the loop is not vectorized.
#if defined(__CUDACC__)
#define RECIS_HD_ALONE RECIS_HD
#else
#define RECIS_HD_ALONE inline __attribute__((noinline))
#endif

#define RECIS_RESTRICT __restrict__

// Keeps a loop over 64-bit products scalar if vectors have no such product (below AVX-512): a loop of products composed
// of 32-bit ones takes 1.5 times as long as the scalar loop.
#if defined(__CUDACC__) || defined(__AVX512DQ__) || !defined(__GNUC__)
#define RECIS_ONE_BY_ONE(word)
#else
#define RECIS_ONE_BY_ONE(word) asm("" : "+r"(word))
#endif

namespace recis {

// A compile-time count, over which loops unroll and vectorize; a plain int in its place handles tails.
template <int N>
struct Const {
  static constexpr int value = N;
  RECIS_HD constexpr operator int() const { return N; }
};

// The high 64 bits of a product.
RECIS_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

RECIS_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Starts loading every cache line of `bytes` bytes, for writing if kWrite. CUDA has enough threads to wait for memory.
template <bool kWrite>
RECIS_HD void prefetch_bytes(const void* start, int64_t bytes) {
#if !defined(__CUDA_ARCH__)
  // The last byte may be in one line more. Its line is prefetched whether it is or not, because whether the bytes begin
  // near the end of a line is unpredictable.
  const char* first = static_cast<const char*>(start);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(first + at, kWrite ? 1 : 0, 3);
  if (bytes > 1) __builtin_prefetch(first + bytes - 1, kWrite ? 1 : 0, 3);
#endif
}

}  // namespace recis
