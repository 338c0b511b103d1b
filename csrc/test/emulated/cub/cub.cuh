// The calls of CUB that csrc/cuda makes, by their documented contracts, on the emulated device.
#pragma once

#include "cuda/runtime.cuh"

namespace cub {
namespace detail {

// Whether a call asks for the size of its temporary storage.
inline bool asks_for_size(const void* temporary, size_t& bytes) {
  if (temporary == nullptr) bytes = 64;
  return temporary == nullptr;
}

template <class Work>
cudaError_t run(void* temporary, size_t bytes, cudaStream_t stream, Work work) {
  emulated::Device::get().count("cub_calls");
  emulated::Device::get().enqueue(stream, [=] {
    std::memset(temporary, 0xa5, bytes);
    work();
  });
  return cudaSuccess;
}

}  // namespace detail

struct DeviceRadixSort {
  template <class Key, class Value, class Size>
  static cudaError_t SortPairs(void* temporary, size_t& bytes, const Key* keys, Key* sorted_keys, const Value* values,
                               Value* sorted_values, Size n, int begin_bit, int end_bit, cudaStream_t stream) {
    if (detail::asks_for_size(temporary, bytes)) return cudaSuccess;
    return detail::run(temporary, bytes, stream, [=] {
      const int bits = end_bit - begin_bit;
      const uint64_t mask = (bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1) << begin_bit;
      std::vector<Size> order(static_cast<size_t>(n));
      for (Size i = 0; i < n; ++i) order[i] = i;
      std::stable_sort(order.begin(), order.end(), [&](Size a, Size b) {
        return (static_cast<uint64_t>(keys[a]) & mask) < (static_cast<uint64_t>(keys[b]) & mask);
      });
      for (Size i = 0; i < n; ++i) {
        sorted_keys[i] = keys[order[i]];
        sorted_values[i] = values[order[i]];
      }
    });
  }
};

struct DeviceRunLengthEncode {
  template <class Key, class T, class Length, class Count, class Size>
  static cudaError_t Encode(void* temporary, size_t& bytes, const Key* in, T* unique, Length* lengths, Count* count,
                            Size n, cudaStream_t stream) {
    if (detail::asks_for_size(temporary, bytes)) return cudaSuccess;
    return detail::run(temporary, bytes, stream, [=] {
      Count runs = 0;
      for (Size i = 0; i < n; ++i) {
        if (i == 0 || in[i] != in[i - 1]) {
          unique[runs] = static_cast<T>(in[i]);
          lengths[runs++] = 0;
        }
        ++lengths[runs - 1];
      }
      *count = runs;
    });
  }
};

struct DeviceScan {
  // Like CUB, adds in the type of the input.
  template <class T, class Sum, class Size>
  static cudaError_t ExclusiveSum(void* temporary, size_t& bytes, const T* in, Sum* out, Size n, cudaStream_t stream) {
    if (detail::asks_for_size(temporary, bytes)) return cudaSuccess;
    return detail::run(temporary, bytes, stream, [=] {
      T sum = 0;
      for (Size i = 0; i < n; ++i) {
        const T value = in[i];
        out[i] = static_cast<Sum>(sum);
        sum += value;
      }
    });
  }
};

}  // namespace cub
