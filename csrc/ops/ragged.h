// Operators that change the number of values in the rows of ragged columns (kernels: core/ragged.h).
//
// Each takes many columns and handles them in one launch for the offsets and one for the values. If the number of
// values in a result depends on data, the CPU reads the new offsets and makes the result `exact`. CUDA would have to
// synchronize for that; there, values are allocated for an upper bound and are zero beyond the last offset.
#pragma once

#include "ops/ragged_rows.h"

namespace recis {

enum ResizeFlag : int64_t { kDropFirst = 1, kPadFirst = 2, kStrict = 4, kFixed = 8 };

// The rows of each column, derived from its planes, which must have equal lengths; total is -1 for a column without
// planes.
inline std::vector<Rows> rows_of_planes(const Tensors& offsets, const Tensors& planes, const Ints& owner,
                                        const char* name) {
  std::vector<Rows> rows(offsets.size(), Rows{nullptr, 0, -1});
  for (size_t p = 0; p < planes.size(); ++p) {
    Rows& mine = rows.at(static_cast<size_t>(owner[p]));
    RECIS_CHECK(mine.total < 0 || mine.total == planes[p].size(0), name, ": planes have different lengths");
    mine = rows_of(planes[p], &offsets[static_cast<size_t>(owner[p])]);
  }
  return rows;
}

// Resizes rows to at least `least` and at most `most` values (one of each for each column). A plane belongs to the
// column owner[plane]; its missing values become the word fills[plane]. Returns the new offsets, then the new planes;
// the planes of a column with the flag kFixed are [rows, most, ...].
template <class Device>
Tensors ragged_resize(const Tensors& offsets, const Tensors& planes, const Ints& owner, const Ints& least,
                      const Ints& most, const Ints& flags, const Ints& fills, const std::string& labels, bool exact,
                      bool parallel) {
  if (offsets.empty()) return {};
  Device device(offsets[0]);
  const size_t columns = offsets.size();
  RECIS_CHECK(least.size() == columns && most.size() == columns && flags.size() == columns &&
                  owner.size() == planes.size() && fills.size() == planes.size(),
              "ragged_resize: arguments have different lengths");
  const std::vector<Rows> rows = rows_of_planes(offsets, planes, owner, "ragged_resize");
  Ints counts;
  std::vector<ResizeRule> rules;
  for (size_t k = 0; k < columns; ++k) {
    counts.push_back(row_count(offsets[k], &offsets[k]));
    rules.push_back({rows[k], least[k], most[k], flags[k] & kStrict});
  }
  const auto why = [&](size_t k) {
    return (flags[k] & kStrict) == 0 ? kBadOffsets
                                     : "is longer than length= (put Truncate before it), or its offsets "
                                       "decrease or lie outside the values";
  };
  Tensors results = sum_rows(device, offsets[0], rules, counts, labels, why, parallel);
  RowParts<CopyPart> parts;
  int64_t width = 1;
  for (size_t p = 0; p < planes.size(); ++p) {
    const auto k = static_cast<size_t>(owner[p]);
    const bool fixed = (flags[k] & kFixed) != 0;
    if (fixed) {
      Ints sizes(planes[p].sizes().begin(), planes[p].sizes().end());
      sizes[0] = most[k];
      sizes.insert(sizes.begin(), counts[k]);
      results.push_back(torch::stable::new_empty(planes[p], {sizes.data(), sizes.size()}));
    } else {
      const int64_t added = times(counts[k], least[k]);
      const int64_t bound = least[k] == 0 ? min64(rows[k].total, times(counts[k], most[k])) : rows[k].total + added;
      results.push_back(new_values(planes[p], results[k], bound, exact));
    }
    // Rows of a fixed length have fixed positions, regardless of the new offsets, in which a refused row is empty.
    const Rows target =
        fixed ? Rows{nullptr, most[k], times(counts[k], most[k])} : target_of(results[k], results.back());
    parts.add({0, rows[k], counts[k], nullptr, target, plane_of(planes[p], "planes", results.back()), fills[p],
               flags[k] & kDropFirst, flags[k] & kPadFirst},
              k, counts[k]);
    width = std::max(width, std::min<int64_t>(64, rows[k].total / std::max<int64_t>(counts[k], 1)));
  }
  parts.launch(device, CopyRows{}, width, parallel);
  return results;
}

// Takes rows of columns by index: rows[k] holds row indices of column k, -1 for an empty row. Returns the new offsets,
// then the new planes. Unless `exact`, `bounds` holds an upper bound on the number of values of each column.
template <class Device>
Tensors ragged_take(const Tensors& offsets, const Tensors& rows, const Tensors& planes, const Ints& owner,
                    const Ints& bounds, const std::string& labels, bool exact, bool parallel) {
  if (offsets.empty()) return {};
  Device device(offsets[0]);
  const size_t columns = offsets.size();
  RECIS_CHECK(rows.size() == columns && owner.size() == planes.size() && (exact || bounds.size() == columns),
              "ragged_take: arguments have different lengths");
  const std::vector<Rows> sources = rows_of_planes(offsets, planes, owner, "ragged_take");
  Ints counts;
  std::vector<TakeRule> rules;
  for (size_t k = 0; k < columns; ++k) {
    counts.push_back(rows[k].numel());
    rules.push_back({sources[k], row_count(offsets[k], &offsets[k]), data<int64_t>(rows[k], "rows")});
  }
  const auto why = [](size_t) {
    return "is not a row of the column, or its offsets decrease or lie outside the values";
  };
  Tensors results = sum_rows(device, offsets[0], rules, counts, labels, why, parallel);
  RowParts<CopyPart> parts;
  for (size_t p = 0; p < planes.size(); ++p) {
    const auto k = static_cast<size_t>(owner[p]);
    results.push_back(new_values(planes[p], results[k], exact ? 0 : bounds[k], exact));
    parts.add({0, sources[k], rules[k].count, rules[k].numbers, target_of(results[k], results.back()),
               plane_of(planes[p], "planes", results.back()), 0, 0, 0},
              k, counts[k]);
  }
  parts.launch(device, CopyRows{}, 8, parallel);
  return results;
}

// Crosses pairs of columns: `index` holds x and then y, three tensor indices each (ids; offsets, or -1 for one id per
// row; weights or -1), and a row has at most `most` pairs. Unless `exact`, `bounds` holds an upper bound on the number
// of pairs of each result. Returns for each pair of columns the offsets, the ids, and the weights if x or y has any.
template <class Device>
Tensors ragged_cross(const Tensors& tensors, const Ints& index, const Ints& most, const Ints& bounds,
                     const std::string& labels, bool exact, bool parallel) {
  if (index.empty()) return {};
  const Tensor& like = tensors.at(static_cast<size_t>(index[0]));
  Device device(like);
  RECIS_CHECK(index.size() == most.size() * 6 && (exact || bounds.size() == most.size()),
              "ragged_cross: arguments have different lengths");
  std::vector<CrossRule> rules;
  Ints counts;
  for (size_t k = 0; k < most.size(); ++k) {
    const Column x(tensors, index, 6 * k);
    const Column y(tensors, index, 6 * k + 3);
    rules.push_back({x.rows(), y.rows(), most[k]});
    counts.push_back(x.row_count());
    RECIS_CHECK(counts[k] == y.row_count(), line_of(labels, k), ": the columns must have the same number of rows, got ",
                counts[k], " and ", y.row_count());
  }
  const auto why = [](size_t) {
    return "has more pairs than limit=, or offsets that decrease or lie outside the values";
  };
  const Tensors offsets = sum_rows(device, like, rules, counts, labels, why, parallel);
  Tensors results;
  RowParts<CrossPart> parts;
  for (size_t k = 0; k < most.size(); ++k) {
    const Column x(tensors, index, 6 * k);
    const Column y(tensors, index, 6 * k + 3);
    const int64_t bound = exact ? 0 : bounds[k];
    results.push_back(offsets[k]);
    results.push_back(new_values(x.values, offsets[k], bound, exact));
    CrossPart part{0,
                   rules[k].x,
                   rules[k].y,
                   target_of(offsets[k], results.back()),
                   reinterpret_cast<const uint64_t*>(data<int64_t>(x.values, "ids")),
                   reinterpret_cast<const uint64_t*>(data<int64_t>(y.values, "ids")),
                   weight_data(x.weights, x.values, line_of(labels, k)),
                   weight_data(y.weights, y.values, line_of(labels, k)),
                   reinterpret_cast<uint64_t*>(data<int64_t>(results.back(), "ids")),
                   nullptr};
    if (x.weights != nullptr || y.weights != nullptr) {
      results.push_back(new_values(x.weights != nullptr ? *x.weights : *y.weights, offsets[k], bound, exact));
      part.weights = data<float>(results.back(), "weights");
    }
    parts.add(part, k, counts[k]);
  }
  parts.launch(device, CrossRows{}, 8, parallel);
  return results;
}

// Keeps the `most` values of each row with the greatest weights. Returns for each column the offsets, the values and
// the weights.
template <class Device>
Tensors ragged_topk(const Tensors& values, const Tensors& offsets, const Tensors& weights, const Ints& most,
                    const std::string& labels, bool exact, bool parallel) {
  if (values.empty()) return {};
  Device device(values[0]);
  RECIS_CHECK(offsets.size() == values.size() && weights.size() == values.size() && most.size() == values.size(),
              "ragged_topk: arguments have different lengths");
  std::vector<ResizeRule> rules;
  Ints counts;
  for (size_t k = 0; k < values.size(); ++k) {
    RECIS_CHECK(values[k].dim() == 1 && values[k].numel() == weights[k].numel(),
                "ragged_topk takes values [N] and weights [N]");
    rules.push_back({rows_of(values[k], &offsets[k]), 0, most[k], 0});
    counts.push_back(row_count(values[k], &offsets[k]));
  }
  const Tensors new_offsets = sum_rows(device, values[0], rules, counts, labels, bad_offsets, parallel);
  Tensors results;
  RowParts<TopKPart> parts;
  for (size_t k = 0; k < values.size(); ++k) {
    const int64_t bound = min64(values[k].size(0), times(counts[k], most[k]));
    const Tensor top = new_values(values[k], new_offsets[k], bound, exact);
    const Tensor top_weights = new_values(weights[k], new_offsets[k], bound, exact);
    parts.add({0, rules[k].rows, target_of(new_offsets[k], top), plane_of(values[k], "values", top),
               data<float>(weights[k], "weights"), data<float>(top_weights, "weights")},
              k, counts[k]);
    results.insert(results.end(), {new_offsets[k], top, top_weights});
  }
  parts.launch(device, TopKRows{}, 16, parallel, values[0].is_cpu(), labels,
               "has a NaN weight; drop the value, or set its weight");
  return results;
}

// Keeps the distinct ids of each row. weights[k] is the index in `planes` of the weights of column k, or -1. Returns
// for each column the offsets, the ids, and the weights if it has any.
template <class Device>
Tensors ragged_distinct(const Tensors& ids, const Tensors& offsets, const Tensors& planes, const Ints& weights,
                        const std::string& labels, bool exact, bool parallel) {
  if (ids.empty()) return {};
  Device device(ids[0]);
  RECIS_CHECK(offsets.size() == ids.size() && weights.size() == ids.size(),
              "ragged_distinct: arguments have different lengths");
  std::vector<DistinctRule> rules;
  Ints counts;
  for (size_t k = 0; k < ids.size(); ++k) {
    RECIS_CHECK(ids[k].dim() == 1, "ragged_distinct takes ids [N]");
    rules.push_back({rows_of(ids[k], &offsets[k]), data<int64_t>(ids[k], "ids")});
    counts.push_back(row_count(ids[k], &offsets[k]));
  }
  const Tensors new_offsets = sum_rows(device, ids[0], rules, counts, labels, bad_offsets, parallel);
  Tensors results;
  RowParts<DistinctPart> parts;
  for (size_t k = 0; k < ids.size(); ++k) {
    const Tensor* mine = Column::optional(planes, weights[k]);
    results.push_back(new_offsets[k]);
    results.push_back(new_values(ids[k], new_offsets[k], ids[k].size(0), exact));
    DistinctPart part{0,
                      rules[k].rows,
                      target_of(new_offsets[k], results.back()),
                      rules[k].ids,
                      weight_data(mine, ids[k], line_of(labels, k)),
                      data<int64_t>(results.back(), "ids"),
                      nullptr};
    if (mine != nullptr) {
      results.push_back(new_values(*mine, new_offsets[k], ids[k].size(0), exact));
      part.weights_out = data<float>(results.back(), "weights");
    }
    parts.add(part, k, counts[k]);
  }
  parts.launch(device, DistinctRows{}, 16, parallel);
  return results;
}

// Writes ids [N] in decimal, with a sign if they are signed and negative. Returns for each column the offsets [N + 1]
// of its strings and their bytes.
template <class Device>
Tensors decimal_strings(const Tensors& ids, const Ints& is_unsigned, bool exact, bool parallel) {
  if (ids.empty()) return {};
  Device device(ids[0]);
  RECIS_CHECK(is_unsigned.size() == ids.size(), "decimal_strings: arguments have different lengths");
  constexpr int64_t kMostDigits = 20;
  std::vector<DecimalRule> rules;
  Ints counts;
  for (size_t k = 0; k < ids.size(); ++k) {
    rules.push_back({data<int64_t>(ids[k], "ids"), is_unsigned[k]});
    counts.push_back(ids[k].numel());
  }
  const Tensors offsets = sum_rows(device, ids[0], rules, counts, "", bad_offsets, parallel);
  Tensors results;
  RowParts<DecimalPart> parts;
  for (size_t k = 0; k < ids.size(); ++k) {
    const int64_t size = exact ? data<int64_t>(offsets[k], "offsets")[counts[k]] : counts[k] * kMostDigits;
    results.push_back(offsets[k]);
    results.push_back(new_to_fill(ids[k], {size}, ScalarType::Byte));
    parts.add({0, rules[k], target_of(offsets[k], results.back()), static_cast<uint8_t*>(results.back().data_ptr())}, k,
              counts[k]);
  }
  parts.launch(device, DecimalRows{}, 1, parallel);
  return results;
}

// Joins columns row by row. `index` holds for each result the number of columns, then three tensor indices for each of
// them: values ([N], or [B] or [B, L] without offsets), offsets or -1, weights or -1. Returns for each result the
// offsets, unless all columns are dense; the values ([B, sum of L] if dense); and the weights if a column has any (1
// for the values of columns without).
template <class Device>
Tensors ragged_concat(const Tensors& tensors, const Ints& index, const std::string& labels, bool parallel) {
  if (index.empty()) return {};
  const Tensor& like = tensors.at(static_cast<size_t>(index.at(1)));
  Device device(like);
  Tensors results;
  RowParts<ConcatPart> parts;
  std::vector<size_t> inputs_at;  // for each part: the index of its first column in `inputs`
  std::vector<Rows> inputs;
  size_t number = 0;
  for (size_t at = 0; at < index.size(); at += 1 + 3 * static_cast<size_t>(index[at]), ++number) {
    const std::string label = line_of(labels, number);
    const size_t begin = inputs.size();
    std::vector<Column> columns;
    int64_t values = 0;
    int64_t width = 0;
    bool dense = true;
    bool weighted = false;
    for (size_t k = 0; k < static_cast<size_t>(index[at]); ++k) {
      const Column& mine = columns.emplace_back(tensors, index, at + 1 + 3 * k);
      RECIS_CHECK(mine.values.dim() == 1 || (mine.offsets == nullptr && mine.values.dim() == 2), label,
                  ": columns must be [N] with offsets, [B] or [B, L]");
      weight_data(mine.weights, mine.values, label);
      check_all_reached(mine.values, mine.offsets, label);
      RECIS_CHECK(mine.values.scalar_type() == columns[0].values.scalar_type(),
                  "ragged_concat: columns have different dtypes");
      RECIS_CHECK(mine.row_count() == columns[0].row_count(), label,
                  ": the columns must have the same number of rows, got ", columns[0].row_count(), " and ",
                  mine.row_count());
      inputs.push_back(mine.number_rows());
      values += mine.values.numel();
      width += inputs.back().stride;
      dense = dense && mine.offsets == nullptr;
      weighted = weighted || mine.weights != nullptr;
    }
    const int64_t rows = columns.at(0).row_count();
    int64_t* offsets = nullptr;
    if (!dense) {
      results.push_back(new_to_fill(like, {rows + 1}, ScalarType::Long));
      offsets = data<int64_t>(results.back(), "offsets");
      if (rows == 0) torch::stable::zero_(results.back());
    }
    const Ints sizes = dense ? Ints{rows, width} : Ints{values};
    for (const bool is_weights : {false, true}) {
      if (is_weights && !weighted) continue;
      const ScalarType dtype = is_weights ? ScalarType::Float : columns[0].values.scalar_type();
      results.push_back(new_to_fill(like, sizes, dtype));
      for (size_t k = 0; k < columns.size(); ++k) {
        const Tensor* from = is_weights ? columns[k].weights : &columns[k].values;
        const Plane plane{from == nullptr ? nullptr : raw(*from, "tensors"), results.back().data_ptr(),
                          unit_of(results.back()), 1};
        parts.add({0, nullptr, static_cast<int64_t>(columns.size()), static_cast<int64_t>(k), plane,
                   !is_weights && k == 0 ? offsets : nullptr},
                  number, rows);
        inputs_at.push_back(begin);
      }
    }
  }
  const Rows* uploaded = device.upload(inputs);
  for (size_t p = 0; p < inputs_at.size(); ++p) parts.parts[p].inputs = uploaded + inputs_at[p];
  parts.launch(device, ConcatRows{}, 8, parallel, like.is_cpu(), labels, kBadOffsets);
  return results;
}

// Sums the weights of each class in a row (1 for each value of a column without weights): float32 [B, classes] for each
// column. `index` holds three tensor indices for each: ids ([N], or [B, L] without offsets), offsets or -1, weights or
// -1.
template <class Device>
Tensors multi_hot(const Tensors& tensors, const Ints& index, const Ints& classes, const std::string& labels,
                  bool parallel) {
  if (index.empty()) return {};
  const Tensor& like = tensors.at(static_cast<size_t>(index[0]));
  Device device(like);
  Tensors results;
  RowParts<MultiHotPart> parts;
  for (size_t k = 0; k < classes.size(); ++k) {
    const Column ids(tensors, index, 3 * k);
    const int64_t rows = ids.row_count();
    const int64_t sizes[] = {rows, classes[k]};
    results.push_back(torch::stable::new_zeros(ids.values, {sizes, 2}, ScalarType::Float));
    parts.add(
        {0, ids.number_rows(), data<int64_t>(ids.values, "ids"),
         weight_data(ids.weights, ids.values, line_of(labels, k)), data<float>(results.back(), "out"), classes[k]},
        k, rows);
  }
  parts.launch(device, MultiHotRows{}, 1, parallel, like.is_cpu(), labels,
               "has an id outside [0, classes) (put Mod or Clip before it), or offsets outside the values");
  return results;
}

// Repeats every row of column k times[k] times. `index` holds three tensor indices for each column: values, offsets or
// -1, weights or -1. Returns for each the offsets if it has any, the values, and the weights if it has any.
template <class Device>
Tensors ragged_tile(const Tensors& tensors, const Ints& index, const Ints& times, const std::string& labels,
                    bool parallel) {
  if (index.empty()) return {};
  const Tensor& like = tensors.at(static_cast<size_t>(index[0]));
  Device device(like);
  Tensors results;
  RowParts<TilePart> parts;
  for (size_t k = 0; k < times.size(); ++k) {
    const Column column(tensors, index, 3 * k);
    const int64_t rows = column.row_count() * times[k];
    RECIS_CHECK(column.weights == nullptr || column.weights->size(0) == column.values.size(0), line_of(labels, k),
                ": there must be one weight for each value");
    check_all_reached(column.values, column.offsets, line_of(labels, k));
    int64_t* offsets = nullptr;
    if (column.offsets != nullptr) {
      const int64_t sizes[] = {rows + 1};
      results.push_back(torch::stable::new_zeros(like, {sizes, 1}, ScalarType::Long));
      offsets = data<int64_t>(results.back(), "offsets");
    }
    for (const Tensor* plane : {&column.values, column.weights}) {
      if (plane == nullptr) continue;
      Ints sizes(plane->sizes().begin(), plane->sizes().end());
      sizes[0] *= times[k];
      results.push_back(new_to_fill(*plane, sizes, plane->scalar_type()));
      parts.add({0, rows_of(*plane, column.offsets), times[k], plane_of(*plane, "tensors", results.back()),
                 plane == &column.values ? offsets : nullptr},
                k, rows);
    }
  }
  parts.launch(device, TileRows{}, 8, parallel, like.is_cpu(), labels, kBadOffsets);
  return results;
}

template <class Device, class Library>
void register_ragged(Library& m) {
  m.impl("ragged_resize", TORCH_BOX(&ragged_resize<Device>));
  m.impl("ragged_take", TORCH_BOX(&ragged_take<Device>));
  m.impl("ragged_cross", TORCH_BOX(&ragged_cross<Device>));
  m.impl("ragged_topk", TORCH_BOX(&ragged_topk<Device>));
  m.impl("ragged_distinct", TORCH_BOX(&ragged_distinct<Device>));
  m.impl("decimal_strings", TORCH_BOX(&decimal_strings<Device>));
  m.impl("ragged_concat", TORCH_BOX(&ragged_concat<Device>));
  m.impl("multi_hot", TORCH_BOX(&multi_hot<Device>));
  m.impl("ragged_tile", TORCH_BOX(&ragged_tile<Device>));
}

}  // namespace recis
