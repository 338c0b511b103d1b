// Marks and small helpers that let one source serve g++ and nvcc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RECIS_HD __host__ __device__ __forceinline__
#else
#define RECIS_HD inline __attribute__((always_inline))
#endif

#define RECIS_RESTRICT __restrict__

namespace recis {

// A compile-time count: loops over it unroll and vectorise; a plain int in its place serves tails.
template <int N>
struct Const {
  static constexpr int value = N;
  RECIS_HD constexpr operator int() const { return N; }
};

RECIS_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace recis
