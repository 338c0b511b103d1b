// Marks and small helpers that let one source serve g++ and nvcc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RECIS_HD __host__ __device__ __forceinline__
#else
#define RECIS_HD inline __attribute__((always_inline))
#endif

#define RECIS_RESTRICT __restrict__

// Keeps a loop over 64-bit products from being vectorised where the machine has no such product in its vectors (below
// AVX-512): made of 32-bit ones it takes half as long again as the scalar loop.
#if defined(__CUDACC__) || defined(__AVX512DQ__) || !defined(__GNUC__)
#define RECIS_ONE_BY_ONE(word)
#else
#define RECIS_ONE_BY_ONE(word) asm("" : "+r"(word))
#endif

namespace recis {

// A compile-time count: loops over it unroll and vectorise; a plain int in its place serves tails.
template <int N>
struct Const {
  static constexpr int value = N;
  RECIS_HD constexpr operator int() const { return N; }
};

RECIS_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace recis
