// Calls of CUB that share their temporary storage: a stable radix sort, and running sums.
#pragma once

#include <cub/cub.cuh>

#include "cuda/device.cuh"

namespace recis {

// Calls take a pointer to temporary storage and its size, like functions of CUB: with a null pointer, they set the
// size that they need.

// Sorts pairs by the `bits` low bits of their keys; equal keys keep their order.
template <class Key, class Value>
auto radix_sort(const Key* keys, Key* sorted_keys, const Value* values, Value* sorted_values, int64_t n, int bits,
                cudaStream_t stream) {
  return [=](void* storage, size_t& bytes) {
    return cub::DeviceRadixSort::SortPairs(storage, bytes, keys, sorted_keys, values, sorted_values, n, 0, bits,
                                           stream);
  };
}

// sums[i] = the sum of the terms before term i, added in the type of the terms.
template <class Term>
auto running_sum(const Term* terms, int64_t* sums, int64_t n, cudaStream_t stream) {
  return [=](void* storage, size_t& bytes) {
    return cub::DeviceScan::ExclusiveSum(storage, bytes, terms, sums, n, stream);
  };
}

// Temporary storage for calls of CUB that run one after another.
class CubStorage {
 public:
  template <class... Calls>
  explicit CubStorage(CudaDevice& device, const Calls&... calls) {
    size_t needed[sizeof...(Calls)] = {};
    size_t* next = needed;
    (check(calls(nullptr, *next++)), ...);
    bytes_ = *std::max_element(needed, next);
    storage_ = device.scratch(static_cast<int64_t>(bytes_));
  }

  template <class Call>
  void run(const Call& call) const {
    size_t bytes = bytes_;
    check(call(storage_, bytes));
  }

 private:
  static void check(cudaError_t status) { RECIS_CUDA_CHECK(status); }

  size_t bytes_ = 0;
  void* storage_ = nullptr;
};

}  // namespace recis
