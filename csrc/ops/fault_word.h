// How an operator learns that its kernels have refused an element.
#pragma once

#include "ops/common.h"

namespace recis {

// A word that holds 1 + a refused element, or 0. Kernels take word().
//
// On the CPU it belongs to the call, which raises. On an accelerator the host cannot read it without waiting, so it is
// pinned memory of the caller, which reads it later; `address` [1], on the device, holds its address.
class FaultWord {
 public:
  FaultWord(const Tensor& where, const std::optional<Tensor>& address) {
    if (where.is_cpu()) return;
    RECIS_CHECK(address.has_value() && address->numel() == 1,
                "faults must hold the address of a word, for kernels that "
                "refuse elements");
    word_ = reinterpret_cast<int64_t* const*>(data<int64_t>(*address, "faults"));
  }
  FaultWord(const FaultWord&) = delete;
  FaultWord& operator=(const FaultWord&) = delete;

  int64_t* const* word() const { return word_; }

  // 1 + an element that was refused on the CPU, or 0.
  int64_t fault() const { return fault_; }

 private:
  int64_t fault_ = 0;
  int64_t* const own_ = &fault_;
  int64_t* const* word_ = &own_;
};

}  // namespace recis
