// Kernels that change the number of values in the rows of ragged columns.
//
// Each launch handles many columns: its items are the rows of all of them, or the columns. The new offsets are computed
// first (a rule returns each row's new length, and the device's sum_rows sums the lengths), then the values.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"
#include "core/maps.h"
#include "core/segments.h"
#include "core/transform.h"

namespace recis {

// The rows of a column of `total` values: defined by offsets or, if these are null, of `stride` values each.
struct Rows {
  const int64_t* offsets;
  int64_t stride;
  int64_t total;

  RECIS_HD int64_t begin(int64_t row) const { return offsets == nullptr ? row * stride : offsets[row]; }
  RECIS_HD int64_t size(int64_t row) const { return offsets == nullptr ? stride : offsets[row + 1] - offsets[row]; }

  // Whether a row lies within the values; kernels never read a row that does not. Ends are compared, not subtracted,
  // because offsets may hold any number and differences may overflow.
  RECIS_HD bool good(int64_t row) const {
    const int64_t from = begin(row);
    const int64_t to = offsets == nullptr ? from + stride : offsets[row + 1];
    return from >= 0 && from <= to && to <= total;
  }

  // Whether a row is good and row 0 starts at value 0, as required by kernels that derive positions in the result from
  // positions in the source.
  RECIS_HD bool from_start(int64_t row) const { return good(row) && (row > 0 || begin(0) == 0); }
};

// Length rules: size(row) is the number of values in a row of the result, or -1 if the row is refused.

// At least `least` and at most `most` values; with `strict` a longer row is refused instead of shortened.
struct ResizeRule {
  Rows rows;
  int64_t least;
  int64_t most;
  int64_t strict;

  RECIS_HD int64_t size(int64_t row) const {
    if (!rows.good(row)) return -1;
    const int64_t size = rows.size(row);
    if (strict != 0 && size > most) return -1;
    const int64_t length = size > most ? most : size;
    return length < least ? least : length;
  }
};

// One value for each pair of a value of x and a value of y; a row with more than `most` pairs is refused.
struct CrossRule {
  Rows x;
  Rows y;
  int64_t most;

  RECIS_HD int64_t size(int64_t row) const {
    if (!x.good(row) || !y.good(row)) return -1;
    const int64_t size = x.size(row) * y.size(row);
    return size > most ? -1 : size;
  }
};

// Row i of the result is row numbers[i] of a column of `count` rows, or empty if the number is negative.
struct TakeRule {
  Rows rows;
  int64_t count;
  const int64_t* numbers;

  RECIS_HD int64_t size(int64_t i) const {
    if (numbers[i] < 0) return 0;
    return numbers[i] < count && rows.good(numbers[i]) ? rows.size(numbers[i]) : -1;
  }
};

// The distinct values of a row.
struct DistinctRule {
  Rows rows;
  const int64_t* ids;

  RECIS_HD int64_t size(int64_t row) const {
    if (!rows.good(row)) return -1;
    const int64_t begin = rows.begin(row);
    const int64_t end = begin + rows.size(row);
    int64_t distinct = 0;
    for (int64_t k = begin; k < end; ++k) {
      int64_t j = begin;
      while (j < k && ids[j] != ids[k]) ++j;
      distinct += j == k ? 1 : 0;
    }
    return distinct;
  }
};

// The decimal digits of id i and its sign.
struct DecimalRule {
  const int64_t* ids;
  int64_t is_unsigned;

  RECIS_HD static int64_t digits(uint64_t number) {
    int64_t count = 1;
    for (; number >= 10; number /= 10) ++count;
    return count;
  }

  RECIS_HD bool negative(int64_t i) const { return is_unsigned == 0 && ids[i] < 0; }
  RECIS_HD uint64_t magnitude(int64_t i) const {
    const auto number = static_cast<uint64_t>(ids[i]);
    return negative(i) ? 0 - number : number;
  }
  RECIS_HD int64_t size(int64_t i) const { return digits(magnitude(i)) + (negative(i) ? 1 : 0); }
};

// Computes new offsets by a rule, one column per item: sums[0] is 0, sums[i + 1] the number of values in rows 0 .. i. A
// refused row counts as empty and is reported: faults[column] becomes 1 + the row.
template <class Rule>
struct SumPart {
  Rule rule;
  int64_t rows;
  int64_t* sums;
};

template <class Rule>
struct SumRows {
  const SumPart<Rule>* parts;
  int64_t* faults;

  template <class Lanes>
  RECIS_HD void operator()(int64_t column, Lanes) const {
    const SumPart<Rule>& part = parts[column];
    int64_t sum = 0;
    part.sums[0] = 0;
    for (int64_t row = 0; row < part.rows; ++row) {
      const int64_t size = part.rule.size(row);
      if (size < 0) faults[column] = row + 1;
      sum += size < 0 ? 0 : size;
      part.sums[row + 1] = sum;
    }
  }
};

// Calls f with a word of `unit` bytes: values are copied as bits, regardless of their type.
template <class F>
RECIS_HD void with_word(int64_t unit, F&& f) {
  switch (unit) {
    case 8:
      return f(uint64_t{});
    case 4:
      return f(uint32_t{});
    case 2:
      return f(uint16_t{});
    default:
      return f(uint8_t{});
  }
}

// Copies `n` words. Rows are short and their lengths vary, so on the CPU few branches depend on them: long rows are
// copied 32 bytes at a time, where the last copy overlaps the previous one, and rows of one to three large words as
// three words.
template <class T, class Lanes>
RECIS_HD void copy_words(const T* RECIS_RESTRICT from, T* RECIS_RESTRICT to, int64_t n, Lanes lanes) {
#if !defined(__CUDA_ARCH__)
  constexpr int64_t kChunk = 32 / sizeof(T);
  if (n >= kChunk) {
    for (int64_t k = 0; k + kChunk < n; k += kChunk) memcpy(to + k, from + k, 32);
    memcpy(to + n - kChunk, from + n - kChunk, 32);
    return;
  }
  if constexpr (kChunk == 4) {
    if (n == 0) return;
    const T middle = from[n >> 1];
    const T last = from[n - 1];
    to[0] = from[0];
    to[n >> 1] = middle;
    to[n - 1] = last;
    return;
  }
#endif
  for (int64_t k = lanes.rank; k < n; k += lanes.size) to[k] = from[k];
}

template <class T, class Lanes>
RECIS_HD void fill_words(T* to, T value, int64_t n, Lanes lanes) {
  for (int64_t k = lanes.rank; k < n; k += lanes.size) to[k] = value;
}

// One plane of a column (its values or its weights) and the plane that it is copied to.
struct Plane {
  const void* from;
  void* to;
  int64_t unit;   // bytes of a word: 1, 2, 4 or 8
  int64_t words;  // words of a value

  // Calls f(from, to) with pointers to words.
  template <class F>
  RECIS_HD void typed(F&& f) const {
    with_word(unit, [&](auto word) {
      using T = decltype(word);
      f(static_cast<const T*>(from), static_cast<T*>(to));
    });
  }

  // Copies `count` values from position `source` of `from` to position `target` of `to`.
  template <class Lanes>
  RECIS_HD void copy(int64_t source, int64_t target, int64_t count, Lanes lanes) const {
    typed([&](const auto* in, auto* out) {
      copy_words(in + source * words, out + target * words, count * words, lanes);
    });
  }
};

// Writes the new offset at which a row ends; row 0 also writes the leading 0. Null offsets are skipped.
template <class Lanes>
RECIS_HD void write_offset(int64_t* offsets, int64_t row, int64_t end, Lanes lanes) {
  if (offsets == nullptr || lanes.rank != 0) return;
  if (row == 0) offsets[0] = 0;
  offsets[row + 1] = end;
}

// The kernels below copy values. They neither read a refused row nor write a row for which the result has no space. On
// the CPU the operator has raised before they run. On CUDA offsets are not checked first, and rows that are
// individually good may add up to more values than the result can hold.

// Copies rows of one plane into rows of other lengths. Values that do not fit are dropped at one end, and missing
// values are filled in at one end.
struct CopyPart {
  int64_t first;
  Rows rows;
  int64_t count;           // of `rows`
  const int64_t* numbers;  // the source of each new row, negative for an empty one; null: the row with the same index
  Rows target;
  Plane plane;
  int64_t fill;        // the word for a missing value
  int64_t drop_first;  // whether the first values are dropped instead of the last
  int64_t pad_first;   // whether padding precedes the values instead of following them
};

struct CopyRows {
  Segments<CopyPart> segments;

  template <class T, class Lanes>
  RECIS_HD static void copy(const CopyPart& part, int64_t row, int64_t source, Lanes lanes) {
    if (!part.target.good(row)) return;
    const bool exists = source >= 0 && source < part.count && part.rows.good(source);
    const int64_t size = exists ? part.rows.size(source) : 0;
    const int64_t length = part.target.size(row);
    const int64_t count = size < length ? size : length;
    const int64_t skip = part.drop_first != 0 ? size - count : 0;
    const int64_t padding = length - count;
    const int64_t words = part.plane.words;
    T* to = static_cast<T*>(part.plane.to) + part.target.begin(row) * words;
    if (exists) {
      const T* from = static_cast<const T*>(part.plane.from) + (part.rows.begin(source) + skip) * words;
      copy_words(from, to + (part.pad_first != 0 ? padding : 0) * words, count * words, lanes);
    }
    if (padding > 0) {
      fill_words(to + (part.pad_first != 0 ? 0 : count) * words, static_cast<T>(part.fill), padding * words, lanes);
    }
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    const CopyPart& part = segments[number];
    const int64_t row = i - part.first;
    const int64_t source = part.numbers == nullptr ? row : part.numbers[row];
    with_word(part.plane.unit, [&](auto word) { copy<decltype(word)>(part, row, source, lanes); });
  }
};

// Pairs the values of two columns, ordered by the value of x. Weights are multiplied; a missing weight counts as 1.
struct CrossPart {
  int64_t first;
  Rows x;
  Rows y;
  Rows target;
  const uint64_t* x_ids;
  const uint64_t* y_ids;
  const float* x_weights;  // or null
  const float* y_weights;  // or null
  uint64_t* ids;
  float* weights;  // null where neither column has weights
};

struct CrossRows {
  Segments<CrossPart> segments;

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    const CrossPart& part = segments[number];
    const int64_t row = i - part.first;
    const int64_t to = part.target.begin(row);
    const int64_t pairs = part.target.size(row);
    if (pairs == 0 || !part.target.good(row)) return;
    const int64_t x = part.x.begin(row);
    const int64_t y = part.y.begin(row);
    const int64_t width = part.y.size(row);
    for (int64_t k = lanes.rank; k < pairs; k += lanes.size) {
      const int64_t a = x + (width == 1 ? k : k / width);
      const int64_t b = y + (width == 1 ? 0 : k % width);
      part.ids[to + k] = cross_ids(part.x_ids[a], part.y_ids[b]);
      if (part.weights == nullptr) continue;
      const float weight = part.x_weights == nullptr ? 1.0f : part.x_weights[a];
      part.weights[to + k] = part.y_weights == nullptr ? weight : weight * part.y_weights[b];
    }
  }
};

// Keeps the values of a row with the greatest weights, in descending order. Equal weights keep the order of the row.
struct TopKPart {
  int64_t first;
  Rows rows;
  Rows target;
  Plane plane;  // with one word per value
  const float* weights;
  float* weights_out;
};

struct TopKRows {
  Segments<TopKPart> segments;
  int64_t* fault;  // 1 + an item whose row has a NaN weight

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    const TopKPart& part = segments[number];
    const int64_t row = i - part.first;
    const int64_t to = part.target.begin(row);
    const int64_t count = part.target.size(row);
    if (count == 0 || !part.target.good(row)) return;
    const int64_t begin = part.rows.begin(row);
    const int64_t size = part.rows.size(row);
    for (int64_t k = lanes.rank; k < size; k += lanes.size) {
      const float mine = part.weights[begin + k];
      if (is_nan(mine)) refuse(fault, i);
      // The rank of the value: the number of weights that are greater, or equal and earlier in the row. NaN ranks last.
      int64_t before = 0;
      for (int64_t j = 0; j < size; ++j) {
        const float other = part.weights[begin + j];
        const bool greater = other > mine || (is_nan(mine) && !is_nan(other));
        const bool equal = other == mine || (is_nan(mine) && is_nan(other));
        before += greater || (equal && j < k) ? 1 : 0;
      }
      if (before >= count) continue;
      part.weights_out[to + before] = mine;
      part.plane.typed([&](const auto* in, auto* out) { out[to + before] = in[begin + k]; });
    }
  }
};

// Keeps the first occurrence of each distinct value of a row, with its weight, in the order of the row.
struct DistinctPart {
  int64_t first;
  Rows rows;
  Rows target;
  const int64_t* ids;
  const float* weights;  // or null
  int64_t* ids_out;
  float* weights_out;
};

struct DistinctRows {
  Segments<DistinctPart> segments;

  // Uses one lane, because the position of a value depends on the previous values.
  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    if (lanes.rank != 0) return;
    const DistinctPart& part = segments[number];
    const int64_t row = i - part.first;
    const int64_t to = part.target.begin(row);
    const int64_t end = to + part.target.size(row);
    if (to == end || !part.target.good(row)) return;
    const int64_t begin = part.rows.begin(row);
    int64_t next = to;
    for (int64_t k = begin; k < begin + part.rows.size(row); ++k) {
      int64_t j = to;
      while (j < next && part.ids_out[j] != part.ids[k]) ++j;
      if (j < next || next == end) continue;
      part.ids_out[next] = part.ids[k];
      if (part.weights != nullptr) part.weights_out[next] = part.weights[k];
      ++next;
    }
  }
};

// Writes ids as decimal digits, one row of bytes per id.
struct DecimalPart {
  int64_t first;
  DecimalRule rule;
  Rows target;
  uint8_t* bytes;
};

struct DecimalRows {
  Segments<DecimalPart> segments;

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    if (lanes.rank != 0) return;
    const DecimalPart& part = segments[number];
    const int64_t id = i - part.first;
    if (!part.target.good(id)) return;
    int64_t at = part.target.begin(id) + part.target.size(id);
    uint64_t rest = part.rule.magnitude(id);
    do {
      part.bytes[--at] = static_cast<uint8_t>('0' + rest % 10);
      rest /= 10;
    } while (rest != 0);
    if (part.rule.negative(id)) part.bytes[--at] = '-';
  }
};

// Joins the rows of several columns: row i of the result concatenates row i of each column.
struct ConcatPart {
  int64_t first;
  const Rows* inputs;  // of all columns
  int64_t count;       // columns
  int64_t which;       // the column that this part copies
  Plane plane;         // `from` is null for the weights of a column without weights, which are ones
  int64_t* offsets;    // the new offsets, written by the first column's part; or null

  RECIS_HD int64_t begin(int64_t row) const {
    int64_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += inputs[k].begin(row);
    return sum;
  }
};

struct ConcatRows {
  Segments<ConcatPart> segments;
  int64_t* fault;  // 1 + an item whose row lies outside the values of a column

  template <class T, class Lanes>
  RECIS_HD static void copy(const ConcatPart& part, int64_t row, int64_t to, Lanes lanes) {
    const Rows& rows = part.inputs[part.which];
    T* out = static_cast<T*>(part.plane.to) + to * part.plane.words;
    const int64_t n = rows.size(row) * part.plane.words;
    if (part.plane.from == nullptr) {
      fill_words(reinterpret_cast<float*>(out), 1.0f, n, lanes);
    } else {
      copy_words(static_cast<const T*>(part.plane.from) + rows.begin(row) * part.plane.words, out, n, lanes);
    }
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    const ConcatPart& part = segments[number];
    const int64_t row = i - part.first;
    for (int64_t k = 0; k < part.count; ++k) {
      if (!part.inputs[k].from_start(row)) return refuse(fault, i);
    }
    int64_t to = part.begin(row);
    if (part.offsets != nullptr) write_offset(part.offsets, row, part.begin(row + 1), lanes);
    for (int64_t k = 0; k < part.which; ++k) to += part.inputs[k].size(row);
    if (part.plane.to == nullptr) return;
    with_word(part.plane.unit, [&](auto word) { copy<decltype(word)>(part, row, to, lanes); });
  }
};

// out[row, id] += weight for each id of a row; `out` must be initialized to zero.
struct MultiHotPart {
  int64_t first;
  Rows rows;
  const int64_t* ids;
  const float* weights;  // null: ones
  float* out;            // [rows, classes]
  int64_t classes;
};

struct MultiHotRows {
  Segments<MultiHotPart> segments;
  int64_t* fault;  // 1 + an item whose row lies outside the values or has an id outside [0, classes)

  // Uses one lane, so that weights are added in the order of the row.
  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    if (lanes.rank != 0) return;
    const MultiHotPart& part = segments[number];
    const int64_t row = i - part.first;
    if (!part.rows.good(row)) return refuse(fault, i);
    const int64_t begin = part.rows.begin(row);
    for (int64_t k = begin; k < begin + part.rows.size(row); ++k) {
      const int64_t id = part.ids[k];
      if (id < 0 || id >= part.classes) {
        refuse(fault, i);
      } else {
        part.out[row * part.classes + id] += part.weights == nullptr ? 1.0f : part.weights[k];
      }
    }
  }
};

// Repeats every row `times` times; the copies of a row are adjacent.
struct TilePart {
  int64_t first;
  Rows rows;
  int64_t times;
  Plane plane;
  int64_t* offsets;  // the new offsets, or null
};

struct TileRows {
  Segments<TilePart> segments;
  int64_t* fault;  // 1 + an item whose row lies outside the values

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    const TilePart& part = segments[number];
    const int64_t target = i - part.first;
    const int64_t row = target / part.times;
    if (!part.rows.from_start(row)) return refuse(fault, i);
    const int64_t size = part.rows.size(row);
    const int64_t to = part.rows.begin(row) * part.times + target % part.times * size;
    write_offset(part.offsets, target, to + size, lanes);
    part.plane.copy(part.rows.begin(row), to, size, lanes);
  }
};

}  // namespace recis
