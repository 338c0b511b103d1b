// The CPU side of "an operator is written once": where kernels run and what a launch needs to know there.
//
// An operator's body is a template over Device; ops/<family>.cpp registers it for CpuDevice, cuda/<family>.cu for
// CudaDevice (cuda/device.cuh), which has the same members.
#pragma once

#include <algorithm>

#include "core/for_each.h"
#include "ops/common.h"

namespace recis {

struct TorchPool {
  template <class Body>
  void operator()(int64_t n, int64_t grain, Body&& body) const {
    if (n > 0) torch::stable::parallel_for(0, n, std::max<int64_t>(grain, 1), body);
  }
};

class CpuDevice {
 public:
  explicit CpuDevice(const Tensor& where) { RECIS_CHECK(where.is_cpu(), "expected a CPU tensor"); }

  // Runs over n items that each handle about `width` elements: small items share a task.
  template <class Kernel>
  void for_each(int64_t n, int64_t width, const Kernel& kernel) const {
    for_each_cpu(TorchPool{}, n, std::max<int64_t>(64, 32768 / std::max<int64_t>(width, 16)), kernel);
  }

  // Puts a list of parts where kernels can read it; `parts` must live until the kernel is launched (CPU: has run).
  template <class T>
  void place(Segments<T>& segments, const std::vector<T>& parts) const {
    segments.count = static_cast<int32_t>(parts.size());
    segments.far = parts.data();
  }

  // How many items a counter says there are. On the CPU it can be read; on CUDA the bound stands in for it and the
  // kernel reads the counter itself.
  int64_t items(const int64_t* counter, int64_t) const { return *counter; }

  // Calls f(Const<W>) with the elements that one lane handles at a time.
  template <class F>
  void with_width(int64_t dim, bool, F&& f) const {
    if (dim % 64 == 0) {
      f(Const<64>{});
    } else {
      f(Const<16>{});
    }
  }

  // As with_width, of which there is only one.
  template <class F>
  void with_narrow_width(bool, F&& f) const {
    f(Const<16>{});
  }
};

}  // namespace recis
