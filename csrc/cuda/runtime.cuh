// What operators need of CUDA's runtime: launches, torch's current stream, and the key they are registered under.
//
// A test build replaces this file by csrc/test/emulated/cuda/runtime.cuh, which has the same names.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

// The dispatch key of the device.
#define RECIS_DEVICE_KEY CUDA

// Queues a kernel of blocks of `threads` threads without shared memory.
#define RECIS_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)

namespace recis {

inline bool is_on_device(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

// torch's current stream on a device.
inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

// The largest grid of a kernel that loops over its items.
inline int64_t max_blocks() { return int64_t{1} << 20; }

}  // namespace recis
