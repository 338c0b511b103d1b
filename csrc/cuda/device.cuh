// The CUDA device of operators: launches kernels of core/ on torch's current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "core/for_each.h"
#include "ops/common.h"

namespace recis {

#define RECIS_CUDA_CHECK(call)                                                                                    \
  do {                                                                                                            \
    const cudaError_t status_ = (call);                                                                           \
    RECIS_CHECK(status_ == cudaSuccess, "CUDA: ", cudaGetErrorString(status_), " (" __FILE__ ":", __LINE__, ")"); \
  } while (0)

inline constexpr int kThreads = 256;

// A group of `lanes` threads (a power of two up to 32) works on an item; a grid-stride loop supports any n.
template <class Kernel>
__global__ void __launch_bounds__(kThreads) for_each_kernel(const Kernel kernel, const int64_t n, const int lanes) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * blockDim.x / lanes;
  const ManyLanes mine{static_cast<int>(threadIdx.x % lanes), lanes};
  for (int64_t i = thread / lanes; i < n; i += groups) {
    if constexpr (detail::Segmented<Kernel>) {
      kernel(kernel.segments.find(i), i, mine);
    } else {
      kernel(i, mine);
    }
  }
}

class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& where) : like_(where), guard_(where.get_device_index()) {
    RECIS_CHECK(where.is_cuda(), "expected a CUDA tensor");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  template <class Kernel>
  void for_each(int64_t n, int64_t width, const Kernel& kernel) const {
    if (n <= 0) return;
    int lanes = 1;
    while (lanes < 32 && lanes * 4 < width) lanes *= 2;
    constexpr int64_t kMostBlocks = 1 << 20;
    const int64_t blocks = std::min(kMostBlocks, (n * lanes + kThreads - 1) / kThreads);
    for_each_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream_>>>(kernel, n, lanes);
    RECIS_CUDA_CHECK(cudaGetLastError());
  }

  template <class Kernel>
  void for_each(int64_t n, int64_t width, bool, const Kernel& kernel) const {
    for_each(n, width, kernel);
  }

  // One thread per item: the items of these kernels are tiles, which have one element on CUDA.
  template <class Kernel>
  void for_each_task(int64_t n, bool, const Kernel& kernel) const {
    for_each(n, 1, kernel);
  }

  // Copies a list to the device. The copy reads pageable memory, which CUDA stages before it returns, so `list` may be
  // freed at once. The buffer comes from the caching allocator and is reused in stream order.
  template <class T>
  const T* upload(const std::vector<T>& list) {
    const size_t bytes = list.size() * sizeof(T);
    const Tensor buffer = scratch(static_cast<int64_t>(bytes));
    if (bytes > 0) {
      RECIS_CUDA_CHECK(cudaMemcpyAsync(buffer.data_ptr(), list.data(), bytes, cudaMemcpyHostToDevice, stream_));
    }
    return static_cast<const T*>(buffer.data_ptr());
  }

  // Puts up to kInline parts into the kernel's arguments, and more into a buffer.
  template <class T>
  void place(Segments<T>& segments, const std::vector<T>& parts) {
    segments.count = static_cast<int32_t>(parts.size());
    if (parts.size() <= static_cast<size_t>(Segments<T>::kInline)) {
      std::copy(parts.begin(), parts.end(), segments.near);
      segments.far = nullptr;
      return;
    }
    segments.far = upload(parts);
  }

  // Device memory that lives until the last kernel of the operator is queued.
  Tensor scratch(int64_t bytes) {
    const int64_t sizes[] = {std::max<int64_t>(bytes, 1)};
    buffers_.push_back(torch::stable::new_empty(like_, {sizes, 1}, ScalarType::Byte));
    return buffers_.back();
  }

  int64_t items(const int64_t*, int64_t bound) const { return bound; }

  // Four floats per lane, one 16-byte access, if rows are aligned.
  template <class F>
  void with_width(int64_t, bool aligned, F&& f) const {
    if (aligned) {
      f(Const<4>{});
    } else {
      f(Const<1>{});
    }
  }

  template <class F>
  void with_narrow_width(bool aligned, F&& f) const {
    with_width(0, aligned, f);
  }

 private:
  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::vector<Tensor> buffers_;
};

}  // namespace recis
