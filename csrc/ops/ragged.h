// Operators that change how many values the rows of ragged columns have (kernels: core/ragged.h).
//
// Each takes many columns and handles them in one launch for offsets and one for values. Where the number of values of
// a result depends on data, the CPU looks at the new offsets and makes it `exact`; CUDA would have to wait, so that
// there the values come with an upper bound, and zeros after those that the offsets reach.
#pragma once

#include "ops/ragged_rows.h"

namespace recis {

enum ResizeFlag : int64_t { kDropFirst = 1, kPadFirst = 2, kStrict = 4, kFixed = 8 };

// Rows of at least `least` and at most `most` values (a pair for each of the offsets). A plane belongs to the column
// owner[plane]; what it lacks becomes the word fills[plane]. Returns the new offsets, then the new planes; those of a
// column whose flags say kFixed are [rows, most, ...].
template <class Device>
Tensors ragged_resize(const Tensors& offsets, const Tensors& planes, const Ints& owner, const Ints& least,
                      const Ints& most, const Ints& flags, const Ints& fills, const std::string& labels, bool exact,
                      bool parallel) {
  if (offsets.empty()) return {};
  Device device(offsets[0]);
  const size_t columns = offsets.size();
  RECIS_CHECK(least.size() == columns && most.size() == columns && flags.size() == columns &&
                  owner.size() == planes.size() && fills.size() == planes.size(),
              "ragged_resize: arguments do not fit together");
  std::vector<Rows> rows(columns, Rows{nullptr, 0, -1});
  Ints counts;
  for (const Tensor& column : offsets) counts.push_back(row_count(column, &column));
  for (size_t p = 0; p < planes.size(); ++p) {
    Rows& mine = rows.at(static_cast<size_t>(owner[p]));
    RECIS_CHECK(mine.total < 0 || mine.total == planes[p].size(0), "ragged_resize: planes of unequal length");
    mine = rows_of(planes[p], &offsets[static_cast<size_t>(owner[p])]);
  }
  std::vector<ResizeRule> rules;
  for (size_t k = 0; k < columns; ++k) rules.push_back({rows[k], least[k], most[k], flags[k] & kStrict});
  const auto why = [&](size_t k) {
    return (flags[k] & kStrict) == 0 ? kBadOffsets
                                     : "is longer than the length given (put Truncate before it), or its offsets "
                                       "decrease or lie outside the values";
  };
  Tensors results = sum_rows(device, offsets[0], rules, counts, labels, why, parallel);
  std::vector<CopyPart> parts;
  int64_t total = 0;
  int64_t width = 1;
  for (size_t p = 0; p < planes.size(); ++p) {
    const auto k = static_cast<size_t>(owner[p]);
    const int64_t added = times(counts[k], least[k]);
    const int64_t bound = least[k] == 0 ? min64(rows[k].total, times(counts[k], most[k])) : rows[k].total + added;
    Tensor made = planes[p];
    if ((flags[k] & kFixed) != 0) {
      Ints sizes(made.sizes().begin(), made.sizes().end());
      sizes[0] = most[k];
      sizes.insert(sizes.begin(), counts[k]);
      made = torch::stable::new_empty(planes[p], {sizes.data(), sizes.size()});
    } else {
      made = new_values(planes[p], results[k], bound, exact);
    }
    results.push_back(made);
    // Rows of one length are where they are whatever the offsets say: a refused row counts as empty there.
    const Rows placed = (flags[k] & kFixed) != 0 ? Rows{nullptr, most[k], times(counts[k], most[k])}
                                                 : Rows{data<int64_t>(results[k], "offsets"), 0, made.size(0)};
    parts.push_back({total, rows[k], counts[k], nullptr, placed, raw(planes[p]), made.data_ptr(), unit_of(planes[p]),
                     words_of(planes[p]), fills[p], flags[k] & kDropFirst, flags[k] & kPadFirst});
    width = std::max(width, std::min<int64_t>(64, rows[k].total / std::max<int64_t>(counts[k], 1)));
    total += counts[k];
  }
  launch_rows(device, CopyRows{}, parts, total, width, parallel);
  return results;
}

// Rows of columns by number: rows[k] names those of the column offsets[k], -1 a row of no values. Returns the new
// offsets, then the new planes. `bounds` holds the most values that a column may come to, where not `exact`.
template <class Device>
Tensors ragged_take(const Tensors& offsets, const Tensors& rows, const Tensors& planes, const Ints& owner,
                    const Ints& bounds, const std::string& labels, bool exact, bool parallel) {
  if (offsets.empty()) return {};
  Device device(offsets[0]);
  RECIS_CHECK(
      rows.size() == offsets.size() && owner.size() == planes.size() && (exact || bounds.size() == offsets.size()),
      "ragged_take: arguments do not fit together");
  std::vector<TakeRule> rules(offsets.size(), TakeRule{{nullptr, 0, -1}, 0, nullptr});
  Ints counts;
  for (const Tensor& taken : rows) counts.push_back(taken.numel());
  for (size_t p = 0; p < planes.size(); ++p) {
    const auto k = static_cast<size_t>(owner[p]);
    RECIS_CHECK(rules[k].rows.total < 0 || rules[k].rows.total == planes[p].size(0),
                "ragged_take: planes of unequal length");
    rules[k] = {rows_of(planes[p], &offsets[k]), row_count(planes[p], &offsets[k]), data<int64_t>(rows[k], "rows")};
  }
  const auto why = [](size_t) { return "is no row of the column, or its offsets decrease or lie outside the values"; };
  Tensors results = sum_rows(device, offsets[0], rules, counts, labels, why, parallel);
  std::vector<CopyPart> parts;
  int64_t total = 0;
  for (size_t p = 0; p < planes.size(); ++p) {
    const auto k = static_cast<size_t>(owner[p]);
    results.push_back(new_values(planes[p], results[k], exact ? 0 : bounds[k], exact));
    const Rows placed{data<int64_t>(results[k], "offsets"), 0, results.back().size(0)};
    parts.push_back({total, rules[k].rows, rules[k].count, rules[k].taken, placed, raw(planes[p]),
                     results.back().data_ptr(), unit_of(planes[p]), words_of(planes[p]), 0, 0, 0});
    total += counts[k];
  }
  launch_rows(device, CopyRows{}, parts, total, 8, parallel);
  return results;
}

// Crosses of columns, six numbers of tensors each: ids, offsets (-1: one id a row) and weights (-1: none) of x, then of
// y. At most `most` pairs a row. Returns for each the offsets, the ids, and the weights where x or y has them.
template <class Device>
Tensors ragged_cross(const Tensors& tensors, const Ints& index, const Ints& most, const std::string& labels, bool exact,
                     bool parallel) {
  if (index.empty()) return {};
  Device device(tensors.at(static_cast<size_t>(index[0])));
  RECIS_CHECK(index.size() == most.size() * 6, "ragged_cross: arguments do not fit together");
  std::vector<CrossRule> rules;
  Ints counts;
  for (size_t k = 0; k < most.size(); ++k) {
    const int64_t* at = index.data() + 6 * k;
    const Tensor& x = *tensor_at(tensors, at[0]);
    const Tensor& y = *tensor_at(tensors, at[3]);
    rules.push_back({rows_of(x, tensor_at(tensors, at[1])), rows_of(y, tensor_at(tensors, at[4])), most[k]});
    counts.push_back(row_count(x, tensor_at(tensors, at[1])));
    RECIS_CHECK(counts.back() == row_count(y, tensor_at(tensors, at[4])), line_of(labels, k),
                ": the columns have different numbers of rows, ", counts.back(), " and ",
                row_count(y, tensor_at(tensors, at[4])));
  }
  const auto why = [](size_t) {
    return "makes more pairs than the limit given, or has offsets that decrease or lie outside the values";
  };
  const Tensors offsets =
      sum_rows(device, tensors.at(static_cast<size_t>(index[0])), rules, counts, labels, why, parallel);
  Tensors results;
  std::vector<CrossPart> parts;
  int64_t total = 0;
  for (size_t k = 0; k < most.size(); ++k) {
    const int64_t* at = index.data() + 6 * k;
    const auto& [x, y, limit] = rules[k];
    const int64_t bound = x.offsets == nullptr ? y.total : y.offsets == nullptr ? x.total : times(counts[k], limit);
    results.push_back(offsets[k]);
    results.push_back(new_values(*tensor_at(tensors, at[0]), offsets[k], bound, exact));
    CrossPart part{total,
                   x,
                   y,
                   data<int64_t>(offsets[k], "offsets"),
                   reinterpret_cast<const uint64_t*>(data<int64_t>(*tensor_at(tensors, at[0]), "ids")),
                   reinterpret_cast<const uint64_t*>(data<int64_t>(*tensor_at(tensors, at[3]), "ids")),
                   weights_of(tensors, at[2], *tensor_at(tensors, at[0]), line_of(labels, k)),
                   weights_of(tensors, at[5], *tensor_at(tensors, at[3]), line_of(labels, k)),
                   reinterpret_cast<uint64_t*>(data<int64_t>(results.back(), "ids")),
                   nullptr,
                   results.back().size(0)};
    if (at[2] >= 0 || at[5] >= 0) {
      results.push_back(new_values(*tensor_at(tensors, at[2] >= 0 ? at[2] : at[5]), offsets[k], bound, exact));
      part.weights = data<float>(results.back(), "weights");
    }
    parts.push_back(part);
    total += counts[k];
  }
  launch_rows(device, CrossRows{}, parts, total, 8, parallel);
  return results;
}

// The k values of the greatest weights of each row. Returns for each column the offsets, the values and the weights.
template <class Device>
Tensors ragged_topk(const Tensors& values, const Tensors& offsets, const Tensors& weights, const Ints& most,
                    const std::string& labels, bool exact, bool parallel) {
  if (values.empty()) return {};
  Device device(values[0]);
  RECIS_CHECK(offsets.size() == values.size() && weights.size() == values.size() && most.size() == values.size(),
              "ragged_topk: arguments do not fit together");
  std::vector<ResizeRule> rules;
  Ints counts;
  for (size_t k = 0; k < values.size(); ++k) {
    RECIS_CHECK(values[k].dim() == 1 && values[k].numel() == weights[k].numel(), "ragged_topk takes [N] and weights");
    rules.push_back({rows_of(values[k], &offsets[k]), 0, most[k], 0});
    counts.push_back(row_count(values[k], &offsets[k]));
  }
  const Tensors made = sum_rows(device, values[0], rules, counts, labels, bad_offsets, parallel);
  Tensors results;
  std::vector<TopKPart> parts;
  Ints column;
  int64_t total = 0;
  for (size_t k = 0; k < values.size(); ++k) {
    const int64_t bound = min64(values[k].size(0), times(counts[k], most[k]));
    results.push_back(made[k]);
    results.push_back(new_values(values[k], made[k], bound, exact));
    results.push_back(new_values(weights[k], made[k], bound, exact));
    parts.push_back({total, rules[k].rows, data<int64_t>(made[k], "offsets"), raw(values[k]),
                     results[results.size() - 2].data_ptr(), unit_of(values[k]), data<float>(weights[k], "weights"),
                     data<float>(results.back(), "weights"), results.back().size(0)});
    column.push_back(static_cast<int64_t>(k));
    total += counts[k];
  }
  Refusals refusals(1, values[0].is_cpu());
  TopKRows kernel{};
  kernel.refused = refusals.data();
  launch_rows(device, kernel, parts, total, 16, parallel);
  refusals.raise_by_row(parts, column, labels, "has a weight that is NaN; drop it, or give it a weight");
  return results;
}

// The distinct values of each row. For each column the offsets, the ids, and the weights where weights[k], a number of
// one of `planes`, is not -1. Returns the same of the result.
template <class Device>
Tensors ragged_distinct(const Tensors& ids, const Tensors& offsets, const Tensors& planes, const Ints& weights,
                        const std::string& labels, bool exact, bool parallel) {
  if (ids.empty()) return {};
  Device device(ids[0]);
  RECIS_CHECK(offsets.size() == ids.size() && weights.size() == ids.size(),
              "ragged_distinct: arguments do not fit together");
  std::vector<DistinctRule> rules;
  Ints counts;
  for (size_t k = 0; k < ids.size(); ++k) {
    RECIS_CHECK(ids[k].dim() == 1, "ragged_distinct takes ids [N]");
    rules.push_back({rows_of(ids[k], &offsets[k]), data<int64_t>(ids[k], "ids")});
    counts.push_back(row_count(ids[k], &offsets[k]));
  }
  const Tensors made = sum_rows(device, ids[0], rules, counts, labels, bad_offsets, parallel);
  Tensors results;
  std::vector<DistinctPart> parts;
  int64_t total = 0;
  for (size_t k = 0; k < ids.size(); ++k) {
    results.push_back(made[k]);
    results.push_back(new_values(ids[k], made[k], ids[k].size(0), exact));
    DistinctPart part{total,
                      rules[k].rows,
                      data<int64_t>(made[k], "offsets"),
                      rules[k].ids,
                      weights_of(planes, weights[k], ids[k], line_of(labels, k)),
                      data<int64_t>(results.back(), "ids"),
                      nullptr,
                      results.back().size(0)};
    if (weights[k] >= 0) {
      results.push_back(new_values(*tensor_at(planes, weights[k]), made[k], ids[k].size(0), exact));
      part.weights_out = data<float>(results.back(), "weights");
    }
    parts.push_back(part);
    total += counts[k];
  }
  launch_rows(device, DistinctRows{}, parts, total, 16, parallel);
  return results;
}

// The decimal digits of ids [N], with a sign where they are signed and below 0. Returns for each column the offsets
// [N + 1] of its strings, and their bytes.
template <class Device>
Tensors decimal_strings(const Tensors& ids, const Ints& is_unsigned, bool exact, bool parallel) {
  if (ids.empty()) return {};
  Device device(ids[0]);
  RECIS_CHECK(is_unsigned.size() == ids.size(), "decimal_strings: arguments do not fit together");
  constexpr int64_t kMostDigits = 20;
  std::vector<DecimalRule> rules;
  Ints counts;
  for (size_t k = 0; k < ids.size(); ++k) {
    rules.push_back({data<int64_t>(ids[k], "ids"), is_unsigned[k]});
    counts.push_back(ids[k].numel());
  }
  const Tensors made = sum_rows(device, ids[0], rules, counts, "", bad_offsets, parallel);
  Tensors results;
  std::vector<DecimalPart> parts;
  int64_t total = 0;
  for (size_t k = 0; k < ids.size(); ++k) {
    const int64_t bytes = exact ? data<int64_t>(made[k], "offsets")[counts[k]] : counts[k] * kMostDigits;
    results.push_back(made[k]);
    results.push_back(new_to_fill(ids[k], {bytes}, ScalarType::Byte));
    parts.push_back(
        {total, rules[k], data<int64_t>(made[k], "offsets"), static_cast<uint8_t*>(results.back().data_ptr()), bytes});
    total += counts[k];
  }
  launch_rows(device, DecimalRows{}, parts, total, 1, parallel);
  return results;
}

// Columns put together row by row. `index` holds for each result how many columns, then three numbers of tensors for
// each: values ([N], or [B, L] without offsets), offsets or -1, weights or -1. Returns for each the offsets, unless all
// are dense, the values ([B, sum of L] where dense), and the weights where one has them (1 in those that have none).
template <class Device>
Tensors ragged_concat(const Tensors& tensors, const Ints& index, const std::string& labels, bool parallel) {
  if (index.empty()) return {};
  const Tensor& like = tensors.at(static_cast<size_t>(index[1]));
  Device device(like);
  Tensors results;
  std::vector<ConcatPart> parts;
  std::vector<Rows> inputs;
  Ints column;
  int64_t total = 0;
  int64_t number = 0;
  for (size_t at = 0; at < index.size(); at += 1 + 3 * static_cast<size_t>(index[at]), ++number) {
    const auto count = static_cast<size_t>(index[at]);
    const int64_t* first = index.data() + at + 1;
    bool dense = true;
    bool weighted = false;
    int64_t values = 0;
    int64_t rows = -1;
    const Tensor& source = *tensor_at(tensors, first[0]);
    const size_t rows_at = inputs.size();
    for (size_t k = 0; k < count; ++k) {
      const Tensor& mine = *tensor_at(tensors, first[3 * k]);
      const Tensor* offsets = tensor_at(tensors, first[3 * k + 1]);
      RECIS_CHECK(mine.dim() == 1 || (offsets == nullptr && mine.dim() == 2),
                  line_of(labels, static_cast<size_t>(number)), ": columns must be [N] with offsets, [B] or [B, L]");
      weights_of(tensors, first[3 * k + 2], mine, line_of(labels, static_cast<size_t>(number)));
      check_all_reached(mine, offsets, line_of(labels, static_cast<size_t>(number)));
      RECIS_CHECK(mine.scalar_type() == source.scalar_type(), "ragged_concat: columns of unequal dtypes");
      const int64_t mine_rows = row_count(mine, offsets);
      RECIS_CHECK(rows < 0 || rows == mine_rows, line_of(labels, static_cast<size_t>(number)),
                  ": the columns have different numbers of rows, ", rows, " and ", mine_rows);
      rows = mine_rows;
      Rows column_rows = rows_of(mine, offsets);
      if (offsets == nullptr) column_rows = {nullptr, mine.dim() == 2 ? mine.size(1) : 1, mine.numel()};
      inputs.push_back(column_rows);
      dense = dense && offsets == nullptr;
      weighted = weighted || first[3 * k + 2] >= 0;
      values += mine.numel();
    }
    int64_t* made = nullptr;
    if (!dense) {
      results.push_back(new_to_fill(like, {rows + 1}, ScalarType::Long));
      made = data<int64_t>(results.back(), "offsets");
      if (rows == 0) torch::stable::zero_(results.back());
    }
    int64_t wide = 0;
    for (size_t k = 0; k < count; ++k) wide += inputs[rows_at + k].stride;
    const Ints sizes = dense ? Ints{rows, wide} : Ints{values};
    const size_t planes = weighted ? 2 : 1;
    for (size_t plane = 0; plane < planes; ++plane) {
      const ScalarType dtype = plane == 0 ? source.scalar_type() : ScalarType::Float;
      results.push_back(new_to_fill(like, sizes, dtype));
      for (size_t k = 0; k < count; ++k) {
        const Tensor* from = tensor_at(tensors, first[3 * k + 2 * plane]);
        parts.push_back({total, reinterpret_cast<const Rows*>(rows_at), static_cast<int64_t>(count),
                         static_cast<int64_t>(k), from == nullptr ? nullptr : raw(*from), results.back().data_ptr(),
                         unit_of(results.back()), 1, plane == 0 && k == 0 ? made : nullptr});
        column.push_back(number);
        total += rows;
      }
    }
  }
  const Rows* placed = device.upload(inputs);
  for (ConcatPart& part : parts) part.inputs = placed + reinterpret_cast<size_t>(part.inputs);
  Refusals refusals(1, like.is_cpu());
  ConcatRows kernel{};
  kernel.refused = refusals.data();
  launch_rows(device, kernel, parts, total, 8, parallel);
  refusals.raise_by_row(parts, column, labels, kBadOffsets);
  return results;
}

// For each column, three numbers of tensors (ids [N], or [B, L] without offsets; offsets or -1; weights or -1): the sum
// of the weights (1 where there are none) of each of its classes in a row, float32 [B, classes].
template <class Device>
Tensors multi_hot(const Tensors& tensors, const Ints& index, const Ints& classes, const std::string& labels,
                  bool parallel) {
  if (index.empty()) return {};
  const Tensor& like = tensors.at(static_cast<size_t>(index[0]));
  Device device(like);
  Tensors results;
  std::vector<MultiHotPart> parts;
  Ints column;
  int64_t total = 0;
  for (size_t k = 0; k < classes.size(); ++k) {
    const Tensor& ids = *tensor_at(tensors, index.at(3 * k));
    const Tensor* offsets = tensor_at(tensors, index.at(3 * k + 1));
    const int64_t rows = row_count(ids, offsets);
    Rows mine = rows_of(ids, offsets);
    if (offsets == nullptr) mine = {nullptr, words_of(ids), ids.numel()};
    const int64_t sizes[] = {rows, classes[k]};
    results.push_back(torch::stable::new_zeros(ids, {sizes, 2}, ScalarType::Float));
    parts.push_back({total, mine, data<int64_t>(ids, "ids"),
                     weights_of(tensors, index.at(3 * k + 2), ids, line_of(labels, k)),
                     data<float>(results.back(), "out"), classes[k]});
    column.push_back(static_cast<int64_t>(k));
    total += rows;
  }
  Refusals refusals(1, like.is_cpu());
  MultiHotRows kernel{};
  kernel.refused = refusals.data();
  launch_rows(device, kernel, parts, total, 1, parallel);
  refusals.raise_by_row(parts, column, labels,
                        "has an id that is no class (put Mod or Clip before it), or offsets outside the values");
  return results;
}

// For each column, three numbers of tensors (values, offsets or -1, weights or -1): every row `times` times in a row.
// Returns for each the offsets, where it has some, the values, and the weights, where it has some.
template <class Device>
Tensors ragged_tile(const Tensors& tensors, const Ints& index, const Ints& times, const std::string& labels,
                    bool parallel) {
  if (index.empty()) return {};
  const Tensor& like = tensors.at(static_cast<size_t>(index[0]));
  Device device(like);
  Tensors results;
  std::vector<TilePart> parts;
  Ints column;
  int64_t total = 0;
  for (size_t k = 0; k < times.size(); ++k) {
    const Tensor& values = *tensor_at(tensors, index.at(3 * k));
    const Tensor* offsets = tensor_at(tensors, index.at(3 * k + 1));
    const int64_t rows = row_count(values, offsets) * times[k];
    const Tensor* weights = tensor_at(tensors, index.at(3 * k + 2));
    RECIS_CHECK(weights == nullptr || weights->size(0) == values.size(0), line_of(labels, k),
                ": weights must be as many as the values");
    check_all_reached(values, offsets, line_of(labels, k));
    int64_t* made = nullptr;
    if (offsets != nullptr) {
      const int64_t sizes[] = {rows + 1};
      results.push_back(torch::stable::new_zeros(like, {sizes, 1}, ScalarType::Long));
      made = data<int64_t>(results.back(), "offsets");
    }
    for (const Tensor* plane : {&values, weights}) {
      if (plane == nullptr) continue;
      Ints sizes(plane->sizes().begin(), plane->sizes().end());
      sizes[0] *= times[k];
      results.push_back(new_to_fill(*plane, sizes, plane->scalar_type()));
      parts.push_back({total, rows_of(*plane, offsets), times[k], raw(*plane), results.back().data_ptr(),
                       unit_of(*plane), words_of(*plane), plane == &values ? made : nullptr});
      column.push_back(static_cast<int64_t>(k));
      total += rows;
    }
  }
  Refusals refusals(1, like.is_cpu());
  TileRows kernel{};
  kernel.refused = refusals.data();
  launch_rows(device, kernel, parts, total, 8, parallel);
  refusals.raise_by_row(parts, column, labels, kBadOffsets);
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
