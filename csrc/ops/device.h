// The CPU device of operators.
//
// An operator's body is a template over Device. ops/<family>.cpp registers it for CpuDevice, and cuda/<family>.cu for
// CudaDevice (cuda/device.cuh), which has the same members.
#pragma once

#include <algorithm>
#include <optional>

#include "core/for_each.h"
#include "core/ragged.h"
#include "ops/common.h"

namespace recis {

// The executor of operators (see core/for_each.h): torch's threads, or those of a Pool. It is one type, so that torch
// and other callers share the compiled kernels.
struct CpuThreads {
  const Pool* pool = nullptr;  // null: torch's

  template <class Body>
  void operator()(int64_t n, int64_t grain, Body&& body) const {
    if (n <= 0) return;
    if (pool != nullptr) return (*pool)(n, std::max<int64_t>(grain, 1), body);
    torch::stable::parallel_for(0, n, std::max<int64_t>(grain, 1), body);
  }
};

class CpuDevice {
 public:
  static constexpr bool kSumsChunks = false;  // see core/reduce.h

  explicit CpuDevice(const Tensor& where) : scope_(std::in_place, where) {
    RECIS_CHECK(where.is_cpu(), "expected a CPU tensor");
  }

  // For a call without tensors, on the threads of `pool`, which must outlive the device.
  explicit CpuDevice(const Pool& pool) : threads_{&pool} {}

  const CpuThreads& threads() const { return threads_; }

  // Runs a kernel over n items of about `width` elements each; small items share a task.
  template <class Kernel>
  void for_each(int64_t n, int64_t width, const Kernel& kernel) const {
    for_each_cpu(threads_, n, std::max<int64_t>(64, 32768 / std::max<int64_t>(width, 16)), kernel);
  }

  // Runs a kernel over *count items, at most `bound`. On CUDA only the kernel can read the counter.
  template <class Kernel>
  void for_each_counted(const int64_t* count, int64_t, int64_t width, const Kernel& kernel) const {
    for_each(*count, width, kernel);
  }

  // Runs a kernel over n large items, eight per task; only on this thread unless `parallel`.
  template <class Kernel>
  void for_each_task(int64_t n, bool parallel, const Kernel& kernel) const {
    if (parallel) {
      for_each_cpu(threads_, n, 8, kernel);
    } else {
      for_each_cpu(Serial{}, n, n, kernel);
    }
  }

  // Like for_each, but only on this thread unless `parallel`.
  template <class Kernel>
  void for_each(int64_t n, int64_t width, bool parallel, const Kernel& kernel) const {
    if (parallel) {
      for_each(n, width, kernel);
    } else {
      for_each_cpu(Serial{}, n, n, kernel);
    }
  }

  // Calls f, which queues kernels, unless *refused. On CUDA the kernels read it.
  template <class F>
  void unless(const int64_t* refused, F&& f) const {
    if (*refused == 0) f();
  }

  // Computes the new offsets of several columns (core/ragged.h), one column per item, because a running sum is serial.
  template <class Rule>
  void sum_rows(const std::vector<SumPart<Rule>>& parts, int64_t* faults, bool parallel) const {
    const SumRows<Rule> kernel{parts.data(), faults};
    const auto columns = static_cast<int64_t>(parts.size());
    if (parallel) {
      for_each_cpu(threads_, columns, 1, kernel);
    } else {
      for_each_cpu(Serial{}, columns, columns, kernel);
    }
  }

  // Makes a list of plain data accessible to kernels. `list` must live until the kernel is launched (CPU: has run).
  template <class T>
  const T* upload(const std::vector<T>& list) const {
    return list.data();
  }

  // Does the same for the parts of Segments.
  template <class T>
  void place(Segments<T>& segments, const std::vector<T>& parts) const {
    segments.count = static_cast<int32_t>(parts.size());
    segments.far = upload(parts);
  }

  // Calls f(Const<W>), where W is the number of elements that a lane handles at a time.
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

  // Calls f(Const<W>) for an update (core/update.h): with a frequent dim, if kFixes, or else with 1, for any dim.
  template <bool kFixes, class F>
  void with_update_width(int64_t dim, bool, F&& f) const {
    if constexpr (kFixes) {
      switch (dim) {
        case 8:
          return f(Const<8>{});
        case 16:
          return f(Const<16>{});
        case 32:
          return f(Const<32>{});
        case 64:
          return f(Const<64>{});
        case 128:
          return f(Const<128>{});
      }
    }
    f(Const<1>{});
  }

  // Like with_width, but with one W for every dim, to keep the number of compiled kernels small.
  template <class F>
  void with_narrow_width(bool, F&& f) const {
    f(Const<16>{});
  }

 private:
  CpuThreads threads_;
  std::optional<OnDevice> scope_;
};

}  // namespace recis
