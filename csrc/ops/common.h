// Shared by all families of operators: short names for the stable ABI, checks, raw pointers.
//
// Python validates a user's arguments and raises in the user's terms; the checks here are the second line of defense.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/element.h"
#include "core/table.h"

namespace recis {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;
using torch::headeronly::ScalarType;

#define RECIS_CHECK(...) STD_TORCH_CHECK(__VA_ARGS__)

template <class T>
inline constexpr ScalarType kTypeOf = ScalarType::Undefined;
template <>
inline constexpr ScalarType kTypeOf<int64_t> = ScalarType::Long;
template <>
inline constexpr ScalarType kTypeOf<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType kTypeOf<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kTypeOf<uint8_t> = ScalarType::Byte;

// The device on which this thread runs an operator; data() checks that every tensor of the operator is there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& where) : outer_(current_) { current_ = where_is(where); }
  ~OnDevice() { current_ = outer_; }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  static void check(const Tensor& tensor, const char* name) {
    const Where at = where_is(tensor);
    RECIS_CHECK(!current_.known || (at.type == current_.type && at.index == current_.index), name,
                " must be on the device of the operator's first tensor, number ", current_.index, " of type ",
                current_.type, ", and is on number ", at.index, " of type ", at.type);
  }

 private:
  struct Where {
    bool known;
    int32_t type;
    int32_t index;
  };

  static Where where_is(const Tensor& tensor) {
    const auto device = tensor.device();
    return {true, static_cast<int32_t>(device.type()), static_cast<int32_t>(device.index())};
  }

  static inline thread_local Where current_{};
  Where outer_;
};

// The tensor's memory, of any dtype and strides, after checking that it is on the operator's device.
inline void* memory(const Tensor& tensor, const char* name) {
  OnDevice::check(tensor, name);
  return tensor.data_ptr();
}

// The tensor's memory as T, after checking that it is contiguous, of that type, and on the operator's device.
template <class T>
T* data(const Tensor& tensor, const char* name) {
  OnDevice::check(tensor, name);
  RECIS_CHECK(tensor.scalar_type() == kTypeOf<T>, name, ": unexpected dtype ", static_cast<int>(tensor.scalar_type()));
  RECIS_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data_or_null(const std::optional<Tensor>& tensor, const char* name) {
  return tensor.has_value() ? data<T>(*tensor, name) : nullptr;
}

// Whether the offsets of `lists` lists never decrease. Kernels follow offsets, so on the CPU, where that is cheap, they
// are checked in every call: the caller may have written to them since they were validated.
inline bool ascend(const int64_t* offsets, int64_t lists) {
  int64_t falls = 0;
  for (int64_t b = 0; b < lists; ++b) falls += offsets[b] > offsets[b + 1] ? 1 : 0;
  return falls == 0;
}

// The map of a header, int64 [kHeaderWords + chunks].
inline IdMapRef id_map_ref(const Tensor& header, const char* name = "header") {
  RECIS_CHECK(header.dim() == 1 && header.numel() > kHeaderWords, name, " must be the header of an IDMap");
  return {reinterpret_cast<uint64_t*>(data<int64_t>(header, name))};
}

// EmbeddingBlocks are passed as four arguments, declared in a schema by RECIS_BLOCKS. The tensor is the table of block
// addresses; it is marked as mutated where the operator writes to the blocks.
#define RECIS_BLOCKS "Tensor blocks, int block_shift, int meta_offset, int record_bytes"
#define RECIS_BLOCKS_MUT "Tensor(a!) blocks, int block_shift, int meta_offset, int record_bytes"

inline BlocksRef blocks_ref(const Tensor& addresses, int64_t block_shift, int64_t meta_offset, int64_t record_bytes) {
  RECIS_CHECK(record_bytes > 0 && record_bytes % 16 == 0, "record_bytes must be a multiple of 16, got ", record_bytes);
  RECIS_CHECK(meta_offset > 0 && meta_offset + 16 <= record_bytes, "the row metadata must lie within the record");
  return {data<int64_t>(addresses, "blocks"), static_cast<int32_t>(block_shift), static_cast<int32_t>(meta_offset),
          record_bytes};
}

// Calls f with a value of an element type, given by its code: 0 float32, 1 bfloat16, 2 float16.
template <class F>
void with_element(int64_t type, F&& f) {
  if (type == 0) return f(float{});
  if (type == 1) return f(BFloat16{});
  if (type == 2) return f(Float16{});
  RECIS_CHECK(false, "unknown element type: ", type);
}

// The data of feature f in a list with one tensor per feature, or null. The list is empty if no feature has a tensor,
// and an empty tensor stands for a feature without one.
template <class T>
const T* optional_data(const Tensors& list, size_t f, const char* name) {
  return list.empty() || list[f].numel() == 0 ? nullptr : data<T>(list[f], name);
}

}  // namespace recis
