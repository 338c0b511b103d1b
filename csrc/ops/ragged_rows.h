// Helpers of the operators on ragged columns: columns given by tensor indices, launches over the rows of several
// columns, new offsets and values.
#pragma once

#include <limits>

#include "core/ragged.h"
#include "ops/common.h"

namespace recis {

inline constexpr int64_t kNoBound = std::numeric_limits<int64_t>::max();

// The size of an element in bytes: 1, 2, 4 or 8.
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

// The number of elements in one value of a tensor [N, ...].
inline int64_t words_of(const Tensor& tensor) {
  int64_t words = 1;
  for (int64_t d = 1; d < tensor.dim(); ++d) words *= tensor.size(d);
  return words;
}

inline const void* raw(const Tensor& tensor, const char* name) {
  RECIS_CHECK(tensor.is_contiguous(), "ragged columns must be contiguous");
  return memory(tensor, name);
}

// A plane to be copied into `to`, a tensor of the same dtype and value shape.
inline Plane plane_of(const Tensor& from, const char* name, const Tensor& to) {
  return {raw(from, name), to.data_ptr(), unit_of(from), words_of(from)};
}

// The rows of `values` by offsets or, without them, one value per row.
inline Rows rows_of(const Tensor& values, const Tensor* offsets) {
  if (offsets != nullptr) return {data<int64_t>(*offsets, "offsets"), 0, values.size(0)};
  return {nullptr, 1, values.size(0)};
}

inline int64_t row_count(const Tensor& values, const Tensor* offsets) {
  if (offsets == nullptr) return values.size(0);
  RECIS_CHECK(offsets->numel() > 0, "offsets must be [rows + 1]");
  return offsets->numel() - 1;
}

// The rows of the values that an operator is about to write.
inline Rows target_of(const Tensor& offsets, const Tensor& values) {
  return {data<int64_t>(offsets, "offsets"), 0, values.size(0)};
}

// A column given by three tensor indices: its values, its offsets and its weights, the latter two -1 for none.
struct Column {
  const Tensor& values;
  const Tensor* offsets;
  const Tensor* weights;

  Column(const Tensors& tensors, const Ints& index, size_t at)
      : values(tensors.at(static_cast<size_t>(index.at(at)))),
        offsets(optional(tensors, index.at(at + 1))),
        weights(optional(tensors, index.at(at + 2))) {}

  static const Tensor* optional(const Tensors& tensors, int64_t number) {
    return number < 0 ? nullptr : &tensors.at(static_cast<size_t>(number));
  }

  int64_t row_count() const { return recis::row_count(values, offsets); }

  // Rows of values; without offsets one value of any shape per row.
  Rows rows() const { return rows_of(values, offsets); }

  // Rows of numbers: values [N] by offsets, or [B, L] with L numbers per row.
  Rows number_rows() const { return offsets != nullptr ? rows() : Rows{nullptr, words_of(values), values.numel()}; }
};

// The weights of values, or null for none.
inline const float* weight_data(const Tensor* weights, const Tensor& values, const std::string& label) {
  if (weights == nullptr) return nullptr;
  RECIS_CHECK(weights->numel() == values.numel(), label, ": there must be one weight for each of the ", values.numel(),
              " values, got ", weights->numel());
  return data<float>(*weights, "weights");
}

// a * b, or kNoBound if it overflows.
inline int64_t times(int64_t a, int64_t b) {
  int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? kNoBound : product;
}

// Labels are lines, one for each column.
inline std::string line_of(const std::string& labels, size_t number) {
  size_t begin = 0;
  for (size_t k = 0; k < number && begin != std::string::npos; ++k) {
    begin = labels.find('\n', begin);
    if (begin != std::string::npos) ++begin;
  }
  if (begin == std::string::npos) return "";
  return labels.substr(begin, labels.find('\n', begin) - begin);
}

inline constexpr const char* kBadOffsets = "has offsets that decrease or lie outside the values";
inline const char* bad_offsets(size_t) { return kBadOffsets; }

// Raises on the CPU for offsets that do not cover all values: the result has a position for each value, and the
// positions of values that belong to no row would never be written.
inline void check_all_reached(const Tensor& values, const Tensor* offsets, const std::string& label) {
  if (offsets == nullptr || !values.is_cpu()) return;
  const int64_t* at = data<int64_t>(*offsets, "offsets");
  const int64_t rows = row_count(values, offsets);
  RECIS_CHECK(at[0] == 0 && at[rows] == values.size(0), label, ": row ", at[0] != 0 || rows == 0 ? 0 : rows - 1, " ",
              kBadOffsets);
}

// The parts of a launch over the rows of several columns, end to end. `parts` must outlive the launch.
template <class Part>
struct RowParts {
  std::vector<Part> parts;
  std::vector<size_t> columns;  // of each part
  int64_t total = 0;            // rows

  void add(Part part, size_t column, int64_t rows) {
    part.first = total;
    parts.push_back(part);
    columns.push_back(column);
    total += rows;
  }

  // Runs a kernel that refuses nothing.
  template <class Device, class Kernel>
  void launch(Device& device, Kernel kernel, int64_t width, bool parallel) const {
    device.place(kernel.segments, parts);
    kernel.segments.total = total;
    device.for_each(total, width, parallel, kernel);
  }

  // Runs a kernel that may refuse rows; raises on the CPU if it did. On CUDA `fault` is null.
  template <class Device, class Kernel>
  void launch(Device& device, Kernel kernel, int64_t width, bool parallel, bool on_cpu, const std::string& labels,
              const char* why) const {
    int64_t fault = 0;
    kernel.fault = on_cpu ? &fault : nullptr;
    launch(device, kernel, width, parallel);
    if (fault == 0) return;
    size_t number = 0;
    while (number + 1 < parts.size() && parts[number + 1].first < fault) ++number;
    RECIS_CHECK(false, line_of(labels, columns[number]), ": row ", fault - 1 - parts[number].first, " ", why);
  }
};

// A tensor for a kernel to fill. On CUDA it is zero-initialized, because the kernel skips the rows that it refuses.
inline Tensor new_to_fill(const Tensor& like, const Ints& sizes, ScalarType dtype) {
  if (like.is_cpu()) return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
  return torch::stable::new_zeros(like, {sizes.data(), sizes.size()}, dtype);
}

// New offsets by a rule for each column. Raises on the CPU for a refused row of column k, with the reason why(k).
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
  Ints faults(rules.size(), 0);
  device.sum_rows(parts, like.is_cpu() ? faults.data() : nullptr, parallel);
  for (size_t k = 0; k < faults.size(); ++k) {
    RECIS_CHECK(faults[k] == 0, line_of(labels, k), ": row ", faults[k] - 1, " ", why(k));
  }
  return offsets;
}

// A tensor for the values of a result: exactly as many as the offsets define, or `bound`, an upper bound.
inline Tensor new_values(const Tensor& like, const Tensor& offsets, int64_t bound, bool exact) {
  Ints sizes(like.sizes().begin(), like.sizes().end());
  sizes[0] = bound;
  if (exact) {
    sizes[0] = data<int64_t>(offsets, "offsets")[offsets.numel() - 1];
    return torch::stable::new_empty(like, {sizes.data(), sizes.size()});
  }
  RECIS_CHECK(bound != kNoBound, "the size of this result has no upper bound, but a GPU requires one");
  return torch::stable::new_zeros(like, {sizes.data(), sizes.size()});
}

}  // namespace recis
