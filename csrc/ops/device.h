// The CPU side of "an operator is written once": where kernels run and what a launch needs to know there.
//
// An operator's body is a template over Device; ops/<family>.cpp registers it for CpuDevice, cuda/<family>.cu for
// CudaDevice (cuda/device.cuh), which has the same members.
#pragma once

#include <algorithm>

#include "core/for_each.h"
#include "core/ragged.h"
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

  // Runs over n items that are worth a task by the eight; in this thread alone where not `parallel`.
  template <class Kernel>
  void for_each_task(int64_t n, bool parallel, const Kernel& kernel) const {
    if (parallel) {
      for_each_cpu(TorchPool{}, n, 8, kernel);
    } else {
      for_each_cpu(Serial{}, n, n, kernel);
    }
  }

  // As for_each, in this thread alone where not `parallel`.
  template <class Kernel>
  void for_each(int64_t n, int64_t width, bool parallel, const Kernel& kernel) const {
    if (parallel) {
      for_each(n, width, kernel);
    } else {
      for_each_cpu(Serial{}, n, n, kernel);
    }
  }

  // New offsets of several columns (core/ragged.h): a column is one item here, for a sum runs in one thread.
  template <class Rule>
  void sum_rows(const std::vector<SumPart<Rule>>& parts, int64_t* refused, bool parallel) const {
    const SumRows<Rule> kernel{parts.data(), refused};
    const auto columns = static_cast<int64_t>(parts.size());
    if (parallel) {
      for_each_cpu(TorchPool{}, columns, 1, kernel);
    } else {
      for_each_cpu(Serial{}, columns, columns, kernel);
    }
  }

  // A list of plain data where kernels can read it; `list` must live until the kernel is launched (CPU: has run).
  template <class T>
  const T* upload(const std::vector<T>& list) const {
    return list.data();
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
    } else if (dim % 32 == 0) {
      f(Const<32>{});
    } else if (dim == 8) {
      f(Const<8>{});
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
