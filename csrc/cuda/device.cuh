// The CUDA device of operators: launches kernels of core/ on torch's current stream, or on that of a Launch.
#pragma once

#include "cuda/runtime.cuh"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

#include "core/for_each.h"
#include "core/table_kernels.h"
#include "ops/common.h"

namespace recis {

// What to do about an error of the installation; an empty string for all others.
inline const char* remedy_for(cudaError_t status) {
  switch (status) {
    case cudaErrorInsufficientDriver:
      return "; the NVIDIA driver is too old for the CUDA runtime that is linked into librecis_cuda.so: update the "
             "driver (nvidia-smi prints the newest CUDA version that it supports), or build with an older CUDA toolkit";
    case cudaErrorNoKernelImageForDevice:
      return "; librecis_cuda.so was not built for this GPU: build it with RECIS_CUDA_ARCHS set to the GPU's compute "
             "capability, e.g. 90";
    default:
      return "";
  }
}

#define RECIS_CUDA_CHECK(call)                                                                                   \
  do {                                                                                                           \
    const cudaError_t status_ = (call);                                                                          \
    RECIS_CHECK(status_ == cudaSuccess, "CUDA: ", cudaGetErrorString(status_), " (" __FILE__ ":", __LINE__, ")", \
                remedy_for(status_));                                                                            \
  } while (0)

inline constexpr int kThreads = 256;

// The number of low bits in which numbers from 0 up to, excluding, `bound` differ; for radix sorts.
inline int bits_for(int64_t bound) {
  int bits = 1;
  while (bits < 63 && (int64_t{1} << bits) < bound) ++bits;
  return bits;
}

// A group of `lanes` threads (a power of two up to 32) works on an item; a grid-stride loop supports any n.
template <class Kernel>
__device__ __forceinline__ void run_items(const Kernel& kernel, const int64_t n, const int lanes) {
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

// `refused`: nothing runs if it is not null and holds a number other than 0.
template <class Kernel>
__global__ void __launch_bounds__(kThreads)
    for_each_kernel(const Kernel kernel, const int64_t n, const int lanes, const int64_t* refused) {
  if (refused == nullptr || *refused == 0) run_items(kernel, n, lanes);
}

template <class Kernel>
__global__ void __launch_bounds__(kThreads)
    for_each_counted_kernel(const Kernel kernel, const int64_t* count, const int lanes, const int64_t* refused) {
  if (refused == nullptr || *refused == 0) run_items(kernel, *count, lanes);
}

// Bytes that travel in the arguments of a kernel, of which CUDA takes 4 KiB.
struct ArgumentBytes {
  static constexpr int64_t kSize = 3840;
  uint64_t words[kSize / 8];
};

struct StoreArguments {
  ArgumentBytes from;
  uint64_t* to;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    to[i] = from.words[i];
  }
};

class CudaDevice {
 public:
  static constexpr bool kSumsChunks = true;  // see core/reduce.h

  explicit CudaDevice(const Tensor& where)
      : like_(where),
        guard_(index_of(where)),
        scope_(std::in_place, where),
        stream_(current_stream(where.get_device_index())) {}

  // For a call without tensors, which must outlive the device.
  explicit CudaDevice(const Launch& launch)
      : launch_(&launch), guard_(launch.device), stream_(stream_of(launch.stream)) {}

  cudaStream_t stream() const { return stream_; }

  template <class Kernel>
  void for_each(int64_t n, int64_t width, const Kernel& kernel) const {
    if (n <= 0) return;
    const int lanes = lanes_of(kernel, width);
    RECIS_LAUNCH(for_each_kernel<Kernel>, blocks_of(n * lanes), kThreads, stream_, kernel, n, lanes, refused_);
    RECIS_CUDA_CHECK(cudaGetLastError());
  }

  // Runs a kernel over *count items, of which the host knows only an upper bound. The grid is no larger than the
  // device holds at once, so that no block starts only to find that it has no item.
  template <class Kernel>
  void for_each_counted(const int64_t* count, int64_t bound, int64_t width, const Kernel& kernel) const {
    if (bound <= 0) return;
    const int lanes = lanes_of(kernel, width);
    static const int64_t resident = resident_blocks(for_each_counted_kernel<Kernel>);  // GPUs of a process are alike
    RECIS_LAUNCH(for_each_counted_kernel<Kernel>, blocks_of(std::min(bound * lanes, resident * kThreads)), kThreads,
                 stream_, kernel, count, lanes, refused_);
    RECIS_CUDA_CHECK(cudaGetLastError());
  }

  template <class Kernel>
  void for_each(int64_t n, int64_t width, bool, const Kernel& kernel) const {
    for_each(n, width, kernel);
  }

  // The kernels that f launches do nothing if *refused, which is on the device. Calls of CUB run in any case.
  template <class F>
  void unless(const int64_t* refused, F&& f) {
    const int64_t* outer = std::exchange(refused_, refused);
    f();
    refused_ = outer;
  }

  // One thread per item: the items of these kernels are tiles, which have one element on CUDA.
  template <class Kernel>
  void for_each_task(int64_t n, bool, const Kernel& kernel) const {
    for_each(n, 1, kernel);
  }

  // Copies a list to the device, as arguments of kernels that store them: a copy from pageable memory could not be part
  // of a CUDA graph. `list` may be freed at once. The buffer comes from the caching allocator and is reused in stream
  // order.
  template <class T>
  const T* upload(const std::vector<T>& list) {
    static_assert(std::is_trivially_copyable_v<T>);
    const auto bytes = static_cast<int64_t>(list.size() * sizeof(T));
    auto* buffer = static_cast<uint64_t*>(scratch((bytes + 7) / 8 * 8));
    for (int64_t begin = 0; begin < bytes; begin += ArgumentBytes::kSize) {
      ArgumentBytes part;
      std::memcpy(part.words, reinterpret_cast<const char*>(list.data()) + begin,
                  static_cast<size_t>(std::min(bytes - begin, ArgumentBytes::kSize)));
      for_each(std::min<int64_t>(bytes - begin + 7, ArgumentBytes::kSize) / 8, 1,
               StoreArguments{part, buffer + begin / 8});
    }
    return reinterpret_cast<const T*>(buffer);
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

  // Device memory for the kernels of the operator or call.
  void* scratch(int64_t bytes) {
    const int64_t sizes[] = {std::max<int64_t>(bytes, 1)};
    if (launch_ != nullptr) {
      void* start = launch_->allocate(launch_->self, sizes[0]);
      RECIS_CHECK(start != nullptr, "out of device memory: a call needs ", sizes[0], " bytes of scratch memory");
      return start;
    }
    buffers_.push_back(torch::stable::new_empty(*like_, {sizes, 1}, ScalarType::Byte));
    return buffers_.back().data_ptr();
  }

  // Four floats per lane, one 16-byte access, if rows are aligned.
  template <class F>
  void with_width(int64_t, bool aligned, F&& f) const {
    if (aligned) {
      f(Const<4>{});
    } else {
      f(Const<1>{});
    }
  }

  template <bool, class F>
  void with_update_width(int64_t dim, bool aligned, F&& f) const {
    with_width(dim, aligned, f);
  }

  template <class F>
  void with_narrow_width(bool aligned, F&& f) const {
    with_width(0, aligned, f);
  }

 private:
  static int32_t index_of(const Tensor& where) {
    RECIS_CHECK(is_on_device(where),
                "the operator's first tensor must be on the device of the others, and is not on CUDA");
    return where.get_device_index();
  }

  // One lane for four elements, unless the kernel says how many have work.
  template <class Kernel>
  static int lanes_of(const Kernel& kernel, int64_t width) {
    int64_t most = (width + 3) / 4;
    if constexpr (requires { kernel.lanes(); }) most = kernel.lanes();
    int lanes = 1;
    while (lanes < 32 && lanes < most) lanes *= 2;
    return lanes;
  }

  static unsigned blocks_of(int64_t threads) {
    return static_cast<unsigned>(std::min(max_blocks(), (threads + kThreads - 1) / kThreads));
  }

  template <class... Parameters>
  static int64_t resident_blocks(void (*kernel)(Parameters...)) {
    int device = 0;
    int processors = 0;
    int blocks = 0;
    RECIS_CUDA_CHECK(cudaGetDevice(&device));
    RECIS_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    RECIS_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
    return int64_t{processors} * std::max(blocks, 1);
  }

  const Launch* launch_ = nullptr;
  std::optional<Tensor> like_;
  torch::stable::accelerator::DeviceGuard guard_;
  std::optional<OnDevice> scope_;
  cudaStream_t stream_;
  const int64_t* refused_ = nullptr;
  std::vector<Tensor> buffers_;
};

}  // namespace recis
