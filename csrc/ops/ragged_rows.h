// What operators on ragged columns share: tensors by number, launches over the rows of several columns, new offsets.
#pragma once

#include <limits>
#include <type_traits>

#include "core/ragged.h"
#include "ops/common.h"

namespace recis {

inline constexpr int64_t kNoBound = std::numeric_limits<int64_t>::max();

inline int64_t unit_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Bool:
      return 1;
    case ScalarType::Short:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Int:
    case ScalarType::Float:
      return 4;
    case ScalarType::Long:
    case ScalarType::Double:
      return 8;
    default:
      RECIS_CHECK(false, "ragged columns hold bool, integers or real numbers, got dtype ",
                  static_cast<int>(tensor.scalar_type()));
  }
}

// Numbers in one value of a tensor [N, ...].
inline int64_t words_of(const Tensor& tensor) {
  int64_t words = 1;
  for (int64_t d = 1; d < tensor.dim(); ++d) words *= tensor.size(d);
  return words;
}

inline const void* raw(const Tensor& tensor) {
  RECIS_CHECK(tensor.is_contiguous(), "ragged columns must be contiguous");
  return tensor.data_ptr();
}

// Tensors by number, -1 for none.
inline const Tensor* tensor_at(const Tensors& tensors, int64_t number) {
  return number < 0 ? nullptr : &tensors.at(static_cast<size_t>(number));
}

// The rows of `values`: by offsets, or where there are none as many as its first dimension has.
inline Rows rows_of(const Tensor& values, const Tensor* offsets) {
  if (offsets != nullptr) return {data<int64_t>(*offsets, "offsets"), 0, values.size(0)};
  return {nullptr, 1, values.size(0)};
}

inline int64_t row_count(const Tensor& values, const Tensor* offsets) {
  if (offsets == nullptr) return values.size(0);
  RECIS_CHECK(offsets->numel() > 0, "offsets must be [rows + 1]");
  return offsets->numel() - 1;
}

// The weights of a column's values by number, null for none.
inline const float* weights_of(const Tensors& tensors, int64_t number, const Tensor& values, const std::string& label) {
  const Tensor* weights = tensor_at(tensors, number);
  if (weights == nullptr) return nullptr;
  RECIS_CHECK(weights->numel() == values.numel(), label, ": weights must be as many as the values, ", values.numel(),
              ", got ", weights->numel());
  return data<float>(*weights, "weights");
}

inline int64_t times(int64_t a, int64_t b) {
  int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? kNoBound : product;
}

inline std::string line_of(const std::string& labels, size_t number) {
  size_t begin = 0;
  for (size_t k = 0; k < number && begin != std::string::npos; ++k) {
    begin = labels.find('\n', begin);
    if (begin != std::string::npos) ++begin;
  }
  if (begin == std::string::npos) return "";
  return labels.substr(begin, labels.find('\n', begin) - begin);
}

// The launch of a segmented kernel over the rows of several columns.
template <class Device, class Kernel, class Part>
void launch_rows(Device& device, Kernel kernel, const std::vector<Part>& parts, int64_t total, int64_t width,
                 bool parallel) {
  device.place(kernel.segments, parts);
  kernel.segments.total = total;
  device.for_each(total, width, parallel, kernel);
}

// Where kernels note rows that they refuse, for the operator to raise. On CUDA nobody looks, and there it is null.
struct Refusals {
  Ints rows;
  bool cpu;

  Refusals(size_t count, bool on_cpu) : rows(count, 0), cpu(on_cpu) {}
  int64_t* data() { return cpu ? rows.data() : nullptr; }

  // For one word for each column; `why(k)` says what is wrong with a row of column k.
  template <class Why>
  void raise_by_column(const std::string& labels, Why&& why) const {
    for (size_t k = 0; k < rows.size(); ++k) {
      RECIS_CHECK(rows[k] == 0, line_of(labels, k), ": row ", rows[k] - 1, " ", why(k));
    }
  }

  // For one word over the rows of all columns.
  template <class Part>
  void raise_by_row(const std::vector<Part>& parts, const Ints& column, const std::string& labels,
                    const char* why) const {
    if (rows[0] == 0) return;
    size_t number = 0;
    while (number + 1 < parts.size() && parts[number + 1].first < rows[0]) ++number;
    RECIS_CHECK(false, line_of(labels, static_cast<size_t>(column[number])), ": row ",
                rows[0] - 1 - parts[number].first, " ", why);
  }
};

inline constexpr const char* kBadOffsets = "has offsets that decrease or lie outside the values";
inline const char* bad_offsets(size_t) { return kBadOffsets; }

// Raises (on CPU) for offsets that do not reach from the first value to the last, where a result has a place for each
// value: those of values that no row has would never be written.
inline void check_all_reached(const Tensor& values, const Tensor* offsets, const std::string& label) {
  if (offsets == nullptr || !values.is_cpu()) return;
  const int64_t* at = data<int64_t>(*offsets, "offsets");
  const int64_t rows = row_count(values, offsets);
  RECIS_CHECK(at[0] == 0 && at[rows] == values.size(0), label, ": row ", at[0] != 0 || rows == 0 ? 0 : rows - 1, " ",
              kBadOffsets);
}

// A tensor for a kernel to fill: zeros on CUDA, where it leaves out what it refuses and what no row has.
inline Tensor new_to_fill(const Tensor& like, const Ints& sizes, ScalarType dtype) {
  if (like.is_cpu()) return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
  return torch::stable::new_zeros(like, {sizes.data(), sizes.size()}, dtype);
}

// New offsets by a rule for each column; raises (on CPU) for a refused row.
template <class Device, class Rule, class Why>
Tensors sum_rows(Device& device, const Tensor& like, const std::vector<Rule>& rules, const Ints& rows,
                 const std::string& labels, Why&& why, bool parallel) {
  Tensors offsets;
  std::vector<SumPart<Rule>> parts;
  for (size_t k = 0; k < rules.size(); ++k) {
    const int64_t sizes[] = {rows[k] + 1};
    offsets.push_back(torch::stable::new_empty(like, {sizes, 1}, ScalarType::Long));
    parts.push_back({rules[k], rows[k], data<int64_t>(offsets.back(), "offsets")});
  }
  Refusals refusals(rules.size(), like.is_cpu());
  device.sum_rows(parts, refusals.data(), parallel);
  refusals.raise_by_column(labels, why);
  return offsets;
}

// A tensor for the values of a result: exactly as many as the offsets say, or `bound` of which the last may be none.
inline Tensor new_values(const Tensor& like, const Tensor& offsets, int64_t bound, bool exact) {
  Ints sizes(like.sizes().begin(), like.sizes().end());
  sizes[0] = bound;
  if (exact) {
    sizes[0] = data<int64_t>(offsets, "offsets")[offsets.numel() - 1];
    return torch::stable::new_empty(like, {sizes.data(), sizes.size()});
  }
  RECIS_CHECK(bound != kNoBound, "the size of this result has no bound; a GPU needs one");
  return torch::stable::new_zeros(like, {sizes.data(), sizes.size()});
}

}  // namespace recis
