// Groups equal rows on the CPU, keeping input order within a group.
//
// CUDA has its own (cuda/group.cu, over CUB's radix sort): grouping is where one source would serve neither well.
//
// Positions are dealt to parts that small hash tables in a first-level cache can group, one after another: by member
// table (rows of two never meet), and those of a large one by a hash of the row. A part's groups come in the order of
// their first positions. So gradients are read nearly in the order in which they lie, and the result depends on the
// input alone, not on the number of threads. (A radix sort by row took three times as long, and ordered the groups by
// row, in which gradients are read at random.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/gather.h"

namespace recis {

struct GroupInputs {
  const int64_t* rows;  // [n]; positions whose row is below 0 belong to no group
  int64_t n;
  std::vector<int64_t> lengths;  // of the features, end to end
  std::vector<int64_t> members;  // of the features
  const int64_t* sources;        // [n]; null: a position's feature, and which of its positions it is
  const float* scales;           // [n], or null
};

struct GroupOutputs {
  int64_t* unique;           // [n] upper bound: distinct rows
  int64_t* offsets;          // [n + 1] upper bound
  int64_t* grouped_sources;  // [n]
  float* grouped_scales;     // [n], or null
  int64_t* count;            // [1]
};

namespace detail {

inline constexpr int64_t kPartPositions = 4096;

inline uint64_t row_hash(int64_t row) { return static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15ull; }

// Uninitialised on purpose: everything that is read was written.
template <class T>
std::unique_ptr<T[]> room(int64_t n) {
  return std::unique_ptr<T[]>(new T[std::max<int64_t>(n, 1)]);
}

// How positions are dealt to parts.
struct Parts {
  std::vector<int64_t> begins;       // [parts + 1] into the order
  std::unique_ptr<int64_t[]> order;  // [n] positions, part after part; null where they are in order as they lie

  explicit Parts(const GroupInputs& in) {
    const size_t features = in.lengths.size();
    // Features of one member table make one part, or several of a size that is a power of two.
    std::vector<int64_t> sizes;
    std::vector<size_t> of_feature(features);
    std::vector<int64_t> seen;
    for (size_t f = 0; f < features; ++f) {
      const size_t at = std::find(seen.begin(), seen.end(), in.members[f]) - seen.begin();
      if (at == seen.size()) {
        seen.push_back(in.members[f]);
        sizes.push_back(0);
      }
      of_feature[f] = at;
      sizes[at] += in.lengths[f];
    }
    std::vector<int64_t> first(sizes.size() + 1, 0);
    std::vector<int> shift(sizes.size());
    bool as_they_lie = sizes.size() == features;
    for (size_t m = 0; m < sizes.size(); ++m) {
      int bits = 0;
      while (sizes[m] > kPartPositions << bits) ++bits;
      shift[m] = 64 - bits;
      first[m + 1] = first[m] + (int64_t{1} << bits);
      as_they_lie = as_they_lie && bits == 0;
    }
    begins.assign(first.back() + 1, 0);
    if (as_they_lie) {
      for (size_t f = 0; f < features; ++f) begins[f + 1] = begins[f] + in.lengths[f];
      return;
    }
    const auto each = [&](auto&& visit) {
      int64_t position = 0;
      for (size_t f = 0; f < features; ++f) {
        const int64_t base = first[of_feature[f]];
        const int bits = shift[of_feature[f]];
        for (const int64_t end = position + in.lengths[f]; position < end; ++position) {
          visit(base + (bits == 64 ? 0 : static_cast<int64_t>(row_hash(in.rows[position]) >> bits)), position);
        }
      }
    };
    each([&](int64_t part, int64_t) { ++begins[part + 1]; });
    for (size_t p = 1; p < begins.size(); ++p) begins[p] += begins[p - 1];
    std::vector<int64_t> next(begins.begin(), begins.end() - 1);
    order = room<int64_t>(in.n);
    each([&](int64_t part, int64_t position) { order[next[part]++] = position; });
  }

  int64_t count() const { return static_cast<int64_t>(begins.size()) - 1; }
  int64_t position(int64_t i) const { return order == nullptr ? i : order[i]; }
};

// What `sources` stands for where it is null, written out.
inline std::unique_ptr<int64_t[]> plain_sources(const GroupInputs& in) {
  auto sources = room<int64_t>(in.n);
  int64_t* at = sources.get();
  for (size_t f = 0; f < in.lengths.size(); ++f) {
    for (int64_t i = 0; i < in.lengths[f]; ++i) *at++ = static_cast<int64_t>(f) << kSourceShift | i;
  }
  return sources;
}

}  // namespace detail

template <class Executor>
void group_rows_cpu(const Executor& executor, const GroupInputs& in, const GroupOutputs& out) {
  const detail::Parts parts(in);
  // Parts that lie in order are features, of which the source is known without looking.
  const bool plain = in.sources == nullptr && parts.order == nullptr;
  const auto written = in.sources == nullptr && !plain ? detail::plain_sources(in) : nullptr;
  const int64_t* sources = in.sources == nullptr ? written.get() : in.sources;
  const auto local = detail::room<int32_t>(in.n);      // the group of each place in the order, within its part; or -1
  const auto rows = detail::room<int64_t>(in.n);       // the row of each group, from its part's begin on
  const auto sizes = detail::room<int32_t>(in.n + 1);  // how many positions each has, likewise
  std::vector<int64_t> groups(parts.count() + 1, 0);   // of each part; then of the parts before it
  std::vector<int64_t> places(parts.count() + 1, 0);   // that have a row, likewise

  executor(parts.count(), 1, [&](int64_t first, int64_t last) {
    std::vector<int32_t> table;
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = parts.begins[part];
      const int64_t end = parts.begins[part + 1];
      int bits = 4;
      while ((int64_t{1} << bits) < 2 * (end - begin)) ++bits;
      table.assign(size_t{1} << bits, -1);
      const uint64_t mask = (uint64_t{1} << bits) - 1;
      int32_t count = 0;
      int64_t with_row = 0;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = in.rows[parts.position(i)];
        local[i] = -1;
        if (row < 0) continue;
        ++with_row;
        // Bits below those that dealt the parts.
        for (uint64_t at = detail::row_hash(row) >> 20 & mask;; at = (at + 1) & mask) {
          const int32_t group = table[at];
          if (group < 0) {
            table[at] = local[i] = count;
            rows[begin + count] = row;
            sizes[begin + count++] = 1;
            break;
          }
          if (rows[begin + group] == row) {
            local[i] = group;
            ++sizes[begin + group];
            break;
          }
        }
      }
      groups[part + 1] = count;
      places[part + 1] = with_row;
    }
  });
  for (int64_t part = 0; part < parts.count(); ++part) {
    groups[part + 1] += groups[part];
    places[part + 1] += places[part];
  }
  executor(parts.count(), 1, [&](int64_t first, int64_t last) {
    std::vector<int64_t> next;
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = parts.begins[part];
      const int64_t count = groups[part + 1] - groups[part];
      next.resize(count);
      int64_t place = places[part];
      for (int64_t g = 0; g < count; ++g) {
        out.unique[groups[part] + g] = rows[begin + g];
        out.offsets[groups[part] + g] = next[g] = place;
        place += sizes[begin + g];
      }
      for (int64_t i = begin; i < parts.begins[part + 1]; ++i) {
        if (local[i] < 0) continue;
        const int64_t position = parts.position(i);
        const int64_t to = next[local[i]]++;
        out.grouped_sources[to] = plain ? part << kSourceShift | (i - begin) : sources[position];
        if (in.scales != nullptr) out.grouped_scales[to] = in.scales[position];
      }
    }
  });
  out.count[0] = groups.back();
  out.offsets[groups.back()] = places.back();
}

}  // namespace recis
