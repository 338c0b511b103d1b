// The part of CUDA that csrc/cuda and csrc/core use, on the emulated device.
//
// All of torch and of the standard library is included before __CUDA_ARCH__ is defined: only our own headers see it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulated/machine.h"

#define __CUDA_ARCH__ 900
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)

#define threadIdx (emulated::Machine::get().thread())
#define blockIdx (emulated::Machine::get().block())
#define blockDim (emulated::Machine::get().block_dim())
#define gridDim (emulated::Machine::get().grid_dim())

inline float __shfl_xor_sync(uint32_t mask, float x, int distance) {
  return std::bit_cast<float>(
      static_cast<uint32_t>(emulated::Machine::get().shuffle_xor(mask, std::bit_cast<uint32_t>(x), distance)));
}

inline double __shfl_xor_sync(uint32_t mask, double x, int distance) {
  return std::bit_cast<double>(emulated::Machine::get().shuffle_xor(mask, std::bit_cast<uint64_t>(x), distance));
}

inline uint64_t __shfl_xor_sync(uint32_t mask, uint64_t x, int distance) {
  return emulated::Machine::get().shuffle_xor(mask, x, distance);
}

inline uint32_t __ballot_sync(uint32_t mask, bool vote) { return emulated::Machine::get().ballot(mask, vote); }

inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

namespace cuda {

enum memory_order { memory_order_relaxed, memory_order_acquire, memory_order_release, memory_order_acq_rel };
enum thread_scope { thread_scope_device };

// One fiber runs at a time, so that each access is atomic; others may go first before it.
template <class T, thread_scope>
class atomic_ref {
 public:
  explicit atomic_ref(T& word) : word_(word) { emulated::Machine::get().access(); }
  T load(memory_order) const { return word_; }
  void store(T value, memory_order) const { word_ = value; }
  T fetch_add(T value, memory_order) const { return std::exchange(word_, word_ + value); }
  bool compare_exchange_strong(T& expected, T desired, memory_order, memory_order) const {
    const bool equal = word_ == expected;
    if (equal) {
      word_ = desired;
    } else {
      expected = word_;
    }
    return equal;
  }

 private:
  T& word_;
};

}  // namespace cuda

using cudaStream_t = int64_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInsufficientDriver = 35, cudaErrorNoKernelImageForDevice = 209 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };

inline const char* cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : "an error"; }
inline cudaError_t cudaGetLastError() { return static_cast<cudaError_t>(emulated::Device::get().take_launch_error()); }

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// So few that kernels over a counted number of items loop.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  emulated::Device& device = emulated::Device::get();
  device.count("copies_to_device");
  if (device.is_pinned(from)) {
    device.enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  } else {  // CUDA reads pageable memory before it returns
    device.count("pageable_copies");
    const auto* start = static_cast<const char*>(from);
    device.enqueue(stream,
                   [to, list = std::vector<char>(start, start + bytes)] { std::memcpy(to, list.data(), list.size()); });
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  emulated::Device::get().count("memsets");
  emulated::Device::get().enqueue(stream, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

namespace emulated {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
            const Arguments&... arguments) {
  Device::get().launch(stream, blocks, threads, [=] { kernel(arguments...); });
}

}  // namespace emulated

#define RECIS_DEVICE_KEY PrivateUse1
#define RECIS_LAUNCH(kernel, blocks, threads, stream, ...) \
  emulated::launch(kernel, blocks, threads, stream, __VA_ARGS__)

namespace recis {

inline bool is_on_device(const torch::stable::Tensor& tensor) {
  return tensor.device().type() == torch::headeronly::DeviceType::PrivateUse1;
}

inline cudaStream_t current_stream(int32_t device) { return torch::stable::accelerator::getCurrentStream(device).id(); }

inline cudaStream_t stream_of(void* stream) { return reinterpret_cast<cudaStream_t>(stream); }

inline int64_t max_blocks() { return emulated::Device::get().settings().max_blocks; }

}  // namespace recis
