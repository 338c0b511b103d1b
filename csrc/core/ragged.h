// Kernels that change how many values a row of a ragged column has.
//
// Each works on many columns at once: segmented over the rows of all of them, or over the columns. New offsets come
// first (rules of lengths, summed up by scan_rows of the device), then the values.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"
#include "core/maps.h"
#include "core/segments.h"
#include "core/transform.h"

namespace recis {

// The rows of a column of `total` values: by offsets, or where these are null `stride` values each.
struct Rows {
  const int64_t* offsets;
  int64_t stride;
  int64_t total;

  RECIS_HD int64_t begin(int64_t row) const { return offsets == nullptr ? row * stride : offsets[row]; }
  RECIS_HD int64_t size(int64_t row) const { return offsets == nullptr ? stride : offsets[row + 1] - offsets[row]; }

  // Whether a row lies within the values; one that does not is never followed. Compared, not subtracted: offsets may be
  // any numbers.
  RECIS_HD bool good(int64_t row) const {
    const int64_t from = begin(row);
    const int64_t to = offsets == nullptr ? from + stride : offsets[row + 1];
    return from >= 0 && from <= to && to <= total;
  }

  // Whether a row is good, and the first one starts with the first value: where places in a result are found from it.
  RECIS_HD bool from_start(int64_t row) const { return good(row) && (row > 0 || begin(0) == 0); }
};

// Rules of lengths: size(row) is the number of values that a row of the result has, or -1 where that is refused.

// At least `least` and at most `most`; a longer row is refused where `strict`.
struct ResizeRule {
  Rows rows;
  int64_t least;
  int64_t most;
  int64_t strict;

  RECIS_HD int64_t size(int64_t row) const {
    if (!rows.good(row)) return -1;
    const int64_t size = rows.size(row);
    if (strict != 0 && size > most) return -1;
    const int64_t kept = size > most ? most : size;
    return kept < least ? least : kept;
  }
};

// Every pair of a value of x and one of y; more than `most` in a row are refused.
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

// Row taken[i] of a column of `count` rows, or no values where it is below 0.
struct TakeRule {
  Rows rows;
  int64_t count;
  const int64_t* taken;

  RECIS_HD int64_t size(int64_t i) const {
    if (taken[i] < 0) return 0;
    return taken[i] < count && rows.good(taken[i]) ? rows.size(taken[i]) : -1;
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

// The decimal digits of id i, and its sign.
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

// The new offsets of whole columns by a rule, a column an item: sums[0] is 0, sums[i + 1] the values of rows 0 .. i. A
// refused row counts as empty and is noted: refused[column] becomes 1 + the row.
template <class Rule>
struct SumPart {
  Rule rule;
  int64_t rows;
  int64_t* sums;
};

template <class Rule>
struct SumRows {
  const SumPart<Rule>* parts;
  int64_t* refused;

  template <class Lanes>
  RECIS_HD void operator()(int64_t column, Lanes) const {
    const SumPart<Rule>& part = parts[column];
    int64_t sum = 0;
    part.sums[0] = 0;
    for (int64_t row = 0; row < part.rows; ++row) {
      const int64_t size = part.rule.size(row);
      if (size < 0) refused[column] = row + 1;
      sum += size < 0 ? 0 : size;
      part.sums[row + 1] = sum;
    }
  }
};

// Calls f with a word of `unit` bytes: values are moved as bits, whatever they are.
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

// `n` words from `from` to `to`. Rows are short and their lengths vary, so that on the CPU few branches depend on them:
// 32 bytes are copied at a time, the last of which may overlap the ones before, and up to three words as three.
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

// In the kernels of values below, a row that is refused reads nothing, and a row of a result that has no room writes
// nothing. On the CPU an operator has raised before; on CUDA nobody has looked, and rows that are good one by one may
// come to more values than there are.

// One plane (the values, or the weights) of one column, on its way into rows of other lengths: what does not fit is
// dropped at one end, what is missing is filled at one end.
struct CopyPart {
  int64_t first;
  Rows rows;
  int64_t count;         // of them
  const int64_t* taken;  // the source of each row, below 0 for an empty one; null: the row itself
  Rows made;
  const void* from;
  void* to;
  int64_t unit;   // bytes of a word: 1, 2, 4 or 8
  int64_t words;  // words of a value
  int64_t fill;
  int64_t drop_first;  // whether the first values are dropped, not the last
  int64_t pad_first;
};

struct CopyRows {
  Segments<CopyPart> segments;

  template <class T, class Lanes>
  RECIS_HD static void copy(const CopyPart& part, int64_t row, int64_t source, Lanes lanes) {
    if (!part.made.good(row)) return;
    const bool there = source >= 0 && source < part.count && part.rows.good(source);
    const int64_t size = there ? part.rows.size(source) : 0;
    const int64_t made = part.made.size(row);
    const int64_t kept = size < made ? size : made;
    const int64_t skipped = part.drop_first != 0 ? size - kept : 0;
    const int64_t padded = made - kept;
    T* to = static_cast<T*>(part.to) + part.made.begin(row) * part.words;
    if (there) {
      const T* from = static_cast<const T*>(part.from) + (part.rows.begin(source) + skipped) * part.words;
      copy_words(from, to + (part.pad_first != 0 ? padded : 0) * part.words, kept * part.words, lanes);
    }
    if (padded > 0) {
      fill_words(to + (part.pad_first != 0 ? 0 : kept) * part.words, static_cast<T>(part.fill), padded * part.words,
                 lanes);
    }
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    const CopyPart& part = segments[number];
    const int64_t row = i - part.first;
    const int64_t source = part.taken == nullptr ? row : part.taken[row];
    with_word(part.unit, [&](auto word) { copy<decltype(word)>(part, row, source, lanes); });
  }
};

// Pairs of the values of two columns, the pairs of x's first value first; weights are multiplied (none counts as 1).
struct CrossPart {
  int64_t first;
  Rows x;
  Rows y;
  const int64_t* made;
  const uint64_t* x_ids;
  const uint64_t* y_ids;
  const float* x_weights;
  const float* y_weights;
  uint64_t* ids;
  float* weights;
  int64_t room;  // values that the result has
};

struct CrossRows {
  Segments<CrossPart> segments;

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    const CrossPart& part = segments[number];
    const int64_t row = i - part.first;
    const int64_t to = part.made[row];
    const int64_t pairs = part.made[row + 1] - to;
    if (pairs == 0 || to + pairs > part.room) return;
    const int64_t x = part.x.begin(row);
    const int64_t y = part.y.begin(row);
    const int64_t wide = part.y.size(row);
    for (int64_t k = lanes.rank; k < pairs; k += lanes.size) {
      const int64_t a = x + (wide == 1 ? k : k / wide);
      const int64_t b = y + (wide == 1 ? 0 : k % wide);
      part.ids[to + k] = cross_ids(part.x_ids[a], part.y_ids[b]);
      if (part.weights == nullptr) continue;
      const float weight = part.x_weights == nullptr ? 1.0f : part.x_weights[a];
      part.weights[to + k] = part.y_weights == nullptr ? weight : weight * part.y_weights[b];
    }
  }
};

// The values of a row with the greatest weights, greatest first; of equal weights the first in the row.
struct TopKPart {
  int64_t first;
  Rows rows;
  const int64_t* made;
  const void* from;
  void* to;
  int64_t unit;
  const float* weights;
  float* weights_out;
  int64_t room;  // values that the result has
};

struct TopKRows {
  Segments<TopKPart> segments;
  int64_t* refused;  // 1 + an item whose row has a weight that is NaN

  template <class T>
  RECIS_HD static void put(const TopKPart& part, int64_t from, int64_t to) {
    static_cast<T*>(part.to)[to] = static_cast<const T*>(part.from)[from];
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    const TopKPart& part = segments[number];
    const int64_t row = i - part.first;
    const int64_t to = part.made[row];
    const int64_t kept = part.made[row + 1] - to;
    if (kept == 0 || to + kept > part.room) return;
    const int64_t begin = part.rows.begin(row);
    const int64_t size = part.rows.size(row);
    for (int64_t k = lanes.rank; k < size; k += lanes.size) {
      const float mine = part.weights[begin + k];
      if (is_nan(mine)) refuse(refused, i);
      // How many go before it: those above, and the equal ones to its left. NaN goes last.
      int64_t before = 0;
      for (int64_t j = 0; j < size; ++j) {
        const float other = part.weights[begin + j];
        const bool greater = other > mine || (is_nan(mine) && !is_nan(other));
        const bool equal = other == mine || (is_nan(mine) && is_nan(other));
        before += greater || (equal && j < k) ? 1 : 0;
      }
      if (before >= kept) continue;
      part.weights_out[to + before] = mine;
      with_word(part.unit, [&](auto word) { put<decltype(word)>(part, begin + k, to + before); });
    }
  }
};

// The first of each distinct value of a row, with its weight, in their order.
struct DistinctPart {
  int64_t first;
  Rows rows;
  const int64_t* made;
  const int64_t* ids;
  const float* weights;  // or null
  int64_t* ids_out;
  float* weights_out;
  int64_t room;  // values that the result has
};

struct DistinctRows {
  Segments<DistinctPart> segments;

  // By one lane: where a value goes depends on those before it.
  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    if (lanes.rank != 0) return;
    const DistinctPart& part = segments[number];
    const int64_t row = i - part.first;
    const int64_t to = part.made[row];
    const int64_t end = part.made[row + 1];
    if (to == end || end > part.room) return;
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

// Ids as decimal digits, an id a row of bytes.
struct DecimalPart {
  int64_t first;
  DecimalRule rule;
  const int64_t* made;
  uint8_t* bytes;
  int64_t room;
};

struct DecimalRows {
  Segments<DecimalPart> segments;

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    if (lanes.rank != 0) return;
    const DecimalPart& part = segments[number];
    const int64_t id = i - part.first;
    int64_t at = part.made[id + 1];
    if (at > part.room) return;
    uint64_t left = part.rule.magnitude(id);
    do {
      part.bytes[--at] = static_cast<uint8_t>('0' + left % 10);
      left /= 10;
    } while (left != 0);
    if (part.rule.negative(id)) part.bytes[--at] = '-';
  }
};

// Rows put together of the rows of several columns: row i of the result is row i of each of them in turn.
struct ConcatPart {
  int64_t first;
  const Rows* inputs;  // of all columns
  int64_t count;
  int64_t which;     // the column that this part copies
  const void* from;  // null: ones, of a column without weights
  void* to;
  int64_t unit;
  int64_t words;
  int64_t* made;  // the new offsets, written by the first column's part; or null

  RECIS_HD int64_t begin(int64_t row) const {
    int64_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += inputs[k].begin(row);
    return sum;
  }
};

struct ConcatRows {
  Segments<ConcatPart> segments;
  int64_t* refused;

  template <class T, class Lanes>
  RECIS_HD static void copy(const ConcatPart& part, int64_t row, int64_t to, Lanes lanes) {
    const Rows& rows = part.inputs[part.which];
    T* out = static_cast<T*>(part.to) + to * part.words;
    const int64_t n = rows.size(row) * part.words;
    if (part.from == nullptr) {
      fill_words(reinterpret_cast<float*>(out), 1.0f, n, lanes);
    } else {
      copy_words(static_cast<const T*>(part.from) + rows.begin(row) * part.words, out, n, lanes);
    }
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    const ConcatPart& part = segments[number];
    const int64_t row = i - part.first;
    for (int64_t k = 0; k < part.count; ++k) {
      if (!part.inputs[k].from_start(row)) return refuse(refused, i);
    }
    int64_t to = part.begin(row);
    if (part.made != nullptr && lanes.rank == 0) {
      if (row == 0) part.made[0] = 0;
      part.made[row + 1] = part.begin(row + 1);
    }
    for (int64_t k = 0; k < part.which; ++k) to += part.inputs[k].size(row);
    if (part.to == nullptr) return;
    with_word(part.unit, [&](auto word) { copy<decltype(word)>(part, row, to, lanes); });
  }
};

// out[row, id] += weight for each id of a row; out is zero before.
struct MultiHotPart {
  int64_t first;
  Rows rows;
  const int64_t* ids;
  const float* weights;
  float* out;
  int64_t classes;
};

struct MultiHotRows {
  Segments<MultiHotPart> segments;
  int64_t* refused;  // 1 + an item whose row has an id out of range or lies outside

  // By one lane, so that weights are added in the order of the row.
  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    if (lanes.rank != 0) return;
    const MultiHotPart& part = segments[number];
    const int64_t row = i - part.first;
    if (!part.rows.good(row)) return refuse(refused, i);
    const int64_t begin = part.rows.begin(row);
    for (int64_t k = begin; k < begin + part.rows.size(row); ++k) {
      const int64_t id = part.ids[k];
      if (id < 0 || id >= part.classes) {
        refuse(refused, i);
      } else {
        part.out[row * part.classes + id] += part.weights == nullptr ? 1.0f : part.weights[k];
      }
    }
  }
};

// Every row `times` times in a row.
struct TilePart {
  int64_t first;
  Rows rows;
  int64_t times;
  const void* from;
  void* to;
  int64_t unit;
  int64_t words;
  int64_t* made;  // the new offsets, or null
};

struct TileRows {
  Segments<TilePart> segments;
  int64_t* refused;

  template <class T, class Lanes>
  RECIS_HD static void copy(const TilePart& part, int64_t row, int64_t to, Lanes lanes) {
    copy_words(static_cast<const T*>(part.from) + part.rows.begin(row) * part.words,
               static_cast<T*>(part.to) + to * part.words, part.rows.size(row) * part.words, lanes);
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t number, int64_t i, Lanes lanes) const {
    const TilePart& part = segments[number];
    const int64_t made = i - part.first;
    const int64_t row = made / part.times;
    if (!part.rows.from_start(row)) return refuse(refused, i);
    const int64_t to = part.rows.begin(row) * part.times + made % part.times * part.rows.size(row);
    if (part.made != nullptr && lanes.rank == 0) {
      if (made == 0) part.made[0] = 0;
      part.made[made + 1] = to + part.rows.size(row);
    }
    with_word(part.unit, [&](auto word) { copy<decltype(word)>(part, row, to, lanes); });
  }
};

}  // namespace recis
