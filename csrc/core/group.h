// Groups equal keys on the CPU, keeping input order within a group. Keys are rows or ids; of ids, only the distinct
// ones are then looked up.
//
// CUDA has its own grouping (cuda/group.cu, based on CUB's radix sort), because one source would serve neither device
// well.
//
// Positions are partitioned into parts whose hash tables stay in the L1 or L2 cache: by member table (keys of different
// tables are never equal), and within a large table by a hash of the key. The groups of a part are ordered by their
// first positions, so gradients are read nearly in memory order, and the result depends only on the input, not on the
// number of threads. (A radix sort by row took three times as long, and with its order of groups, gradients were read
// at random.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/gather.h"

namespace recis {

// The keys of one feature.
struct KeySpan {
  const int64_t* keys;
  int64_t length;
  int64_t member;
};

struct GroupInputs {
  std::vector<KeySpan> features;  // end to end
  const int64_t* sources;         // [n]; null: each position is its own source (feature, position in it)
  const float* scales;            // [n], or null

  int64_t positions() const {
    int64_t n = 0;
    for (const KeySpan& feature : features) n += feature.length;
    return n;
  }
};

struct GroupOutputs {
  int64_t* rows;             // [n]: the row of each position; null: not written
  int64_t* unique;           // [n] upper bound: the distinct rows
  int64_t* offsets;          // [n + 1] upper bound
  int64_t* grouped_sources;  // [n]
  float* grouped_scales;     // [n], or null
  int64_t* count;            // [1]
};

// Keys that are rows. A key type defines the hash of a key and the rows of distinct keys: rows(keys, count, member,
// found) replaces keys by their rows, and may call found(end) when those before `end` are known. Positions with row -1
// belong to no group. If gathers() is true, gather(row, feature, i) then writes the vector of position i of a feature.
struct RowsAsKeys {
  static uint64_t hash(int64_t row, int64_t) { return static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15ull; }
  bool gathers() const { return false; }
  template <class Found>
  void rows(int64_t*, int64_t, int64_t, Found&&) const {}
  void gather(int64_t, int64_t, int64_t) const {}
};

namespace detail {

inline constexpr int64_t kPartPositions = 4096;

// Uninitialized on purpose: callers write every element before they read it.
template <class T>
std::unique_ptr<T[]> room(int64_t n) {
  return std::unique_ptr<T[]>(new T[std::max<int64_t>(n, 1)]);
}

// The partition of positions into parts.
struct Parts {
  std::vector<int64_t> begins;          // [parts + 1] into the order
  std::vector<const int64_t*> keys;     // the keys of each part, in order
  std::vector<int64_t> members;         // the member table of each part
  std::unique_ptr<int64_t[]> order;     // [n] positions, part after part; null if that is input order
  std::unique_ptr<int64_t[]> in_order;  // [n] keys, likewise

  template <class Keys>
  Parts(const std::vector<KeySpan>& features, int64_t n, const Keys&) {
    // The features of a member table are split into 2^bits parts.
    std::vector<int64_t> sizes;
    std::vector<size_t> of_feature(features.size());
    std::vector<int64_t> tables;
    for (size_t f = 0; f < features.size(); ++f) {
      const size_t at = std::find(tables.begin(), tables.end(), features[f].member) - tables.begin();
      if (at == tables.size()) {
        tables.push_back(features[f].member);
        sizes.push_back(0);
      }
      of_feature[f] = at;
      sizes[at] += features[f].length;
    }
    std::vector<int64_t> first(sizes.size() + 1, 0);
    std::vector<int> shift(sizes.size());
    bool in_input_order = sizes.size() == features.size();
    for (size_t m = 0; m < sizes.size(); ++m) {
      int bits = 0;
      while (sizes[m] > kPartPositions << bits) ++bits;
      shift[m] = 64 - bits;
      first[m + 1] = first[m] + (int64_t{1} << bits);
      members.insert(members.end(), size_t{1} << bits, tables[m]);
      in_input_order = in_input_order && bits == 0;
    }
    begins.assign(first.back() + 1, 0);
    if (in_input_order) {
      for (size_t f = 0; f < features.size(); ++f) {
        begins[f + 1] = begins[f] + features[f].length;
        keys.push_back(features[f].keys);
      }
      return;
    }
    const auto each = [&](auto&& visit) {
      int64_t position = 0;
      for (size_t f = 0; f < features.size(); ++f) {
        const KeySpan& feature = features[f];
        const int64_t base = first[of_feature[f]];
        const int bits = shift[of_feature[f]];
        for (int64_t i = 0; i < feature.length; ++i, ++position) {
          const int64_t key = feature.keys[i];
          visit(base + (bits == 64 ? 0 : static_cast<int64_t>(Keys::hash(key, feature.member) >> bits)), position, key);
        }
      }
    };
    each([&](int64_t part, int64_t, int64_t) { ++begins[part + 1]; });
    for (size_t p = 1; p < begins.size(); ++p) begins[p] += begins[p - 1];
    std::vector<int64_t> next(begins.begin(), begins.end() - 1);
    order = room<int64_t>(n);
    in_order = room<int64_t>(n);
    each([&](int64_t part, int64_t position, int64_t key) {
      in_order[next[part]] = key;
      order[next[part]++] = position;
    });
    for (size_t p = 0; p + 1 < begins.size(); ++p) keys.push_back(in_order.get() + begins[p]);
  }

  int64_t count() const { return static_cast<int64_t>(begins.size()) - 1; }
  int64_t position(int64_t i) const { return order == nullptr ? i : order[i]; }
};

// The source of each position, even if GroupInputs omits it.
struct Sources {
  const int64_t* data;  // [n]; null: each part is a feature, and source_of(part, index) applies
  std::unique_ptr<int64_t[]> storage;

  Sources(const GroupInputs& in, const Parts& parts) : data(in.sources) {
    if (data != nullptr || parts.order == nullptr) return;
    storage = room<int64_t>(in.positions());
    int64_t* at = storage.get();
    for (size_t f = 0; f < in.features.size(); ++f) {
      for (int64_t i = 0; i < in.features[f].length; ++i) *at++ = source_of(static_cast<int64_t>(f), i);
    }
    data = storage.get();
  }
};

// The groups of each part, before they are numbered across parts. Each array covers all parts; the elements of a part
// start at its begin.
struct PartGroups {
  std::unique_ptr<int32_t[]> local;  // the group of each place in the order, within its part
  std::unique_ptr<int64_t[]> keys;   // of each group
  std::unique_ptr<int32_t[]> sizes;  // positions of each group

  explicit PartGroups(int64_t n) : local(room<int32_t>(n)), keys(room<int64_t>(n)), sizes(room<int32_t>(n)) {}
};

// Gathers the vectors of a part's positions, in input order, as far as the rows of their groups are known: groups are
// numbered by first position.
class PartVectors {
 public:
  PartVectors(const GroupInputs& in, const Parts& parts, int64_t part, const int32_t* local)
      : in_(in), parts_(parts), local_(local), begin_(parts.begins[part]), end_(parts.begins[part + 1]) {
    at_ = begin_;
    if (parts.order == nullptr) {
      feature_ = static_cast<size_t>(part);
      first_ = begin_;
    }
  }

  // `groups`: the number of groups whose rows are known.
  template <class Keys>
  __attribute__((always_inline)) void operator()(const Keys& keys, const int64_t* rows, int64_t groups) {
    int64_t at = at_;
    if (parts_.order == nullptr) {
      for (; at < end_ && local_[at - begin_] < groups; ++at) {
        keys.gather(rows[local_[at - begin_]], static_cast<int64_t>(feature_), at - first_);
      }
    } else {
      for (; at < end_ && local_[at - begin_] < groups; ++at) {
        const int64_t position = parts_.order[at];  // positions ascend within a part
        while (position >= first_ + in_.features[feature_].length) first_ += in_.features[feature_++].length;
        keys.gather(rows[local_[at - begin_]], static_cast<int64_t>(feature_), position - first_);
      }
    }
    at_ = at;
  }

 private:
  const GroupInputs& in_;
  const Parts& parts_;
  const int32_t* local_;
  int64_t begin_;
  int64_t end_;
  int64_t at_;
  size_t feature_ = 0;
  int64_t first_ = 0;  // position of the feature
};

// Groups the keys of each part. finish(part, count) is called as soon as the groups of a part are known, by the thread
// that has them in its cache.
template <class Executor, class Keys, class Finish>
void group_parts(const Executor& executor, const Parts& parts, const Keys&, const PartGroups& out,
                 const Finish& finish) {
  executor(parts.count(), 1, [&](int64_t first, int64_t last) {
    std::vector<int32_t> table;
    std::vector<uint64_t> hashes;
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = parts.begins[part];
      const int64_t length = parts.begins[part + 1] - begin;
      const int64_t* RECIS_RESTRICT part_keys = parts.keys[part];
      int32_t* RECIS_RESTRICT part_local = out.local.get() + begin;
      int64_t* RECIS_RESTRICT group_keys = out.keys.get() + begin;
      int32_t* RECIS_RESTRICT group_sizes = out.sizes.get() + begin;
      const int64_t member = parts.members[part];
      int bits = 4;
      while ((int64_t{1} << bits) < 2 * length) ++bits;
      table.assign(size_t{1} << bits, -1);
      const uint64_t mask = (uint64_t{1} << bits) - 1;
      int32_t count = 0;
      hashes.resize(length);
      for (int64_t i = 0; i < length; ++i) hashes[i] = Keys::hash(part_keys[i], member);
      for (int64_t i = 0; i < length; ++i) {
        const int64_t key = part_keys[i];
        // A group is prepared for each key, whether the key is new or not, and then used or not without a branch:
        // whether it is new is unpredictable.
        group_keys[count] = key;
        group_sizes[count] = 0;
        // The highest bits chose the part, so use lower ones.
        uint64_t at = hashes[i] >> 20 & mask;
        int32_t absent = table[at] >> 31;  // -1 for an empty place, otherwise 0
        int32_t group = (table[at] & ~absent) | (count & absent);
        while (__builtin_expect(group_keys[group] != key, 0)) {
          at = (at + 1) & mask;
          absent = table[at] >> 31;
          group = (table[at] & ~absent) | (count & absent);
        }
        table[at] = group;
        part_local[i] = group;
        ++group_sizes[group];
        count -= absent;
      }
      finish(part, count);
    }
  });
}

}  // namespace detail

// Groups the positions of equal keys. The result does not depend on the executor.
template <class Executor, class Keys>
void group_cpu(const Executor& executor, const GroupInputs& in, const Keys& keys, const GroupOutputs& out) {
  const int64_t n = in.positions();
  const detail::Parts parts(in.features, n, keys);
  const detail::Sources position_sources(in, parts);
  const int64_t* const sources = position_sources.data;
  const bool plain = sources == nullptr;
  const detail::PartGroups part_groups(n);
  const auto& rows = part_groups.keys;                // the key of each group, later its row
  std::vector<int64_t> groups(parts.count() + 1, 0);  // groups with a row in each part; later in the parts before it
  std::vector<int64_t> places(parts.count() + 1, 0);  // positions in these groups, likewise
  std::vector<int64_t> counts(parts.count(), 0);      // groups of each part, with and without a row

  detail::group_parts(executor, parts, keys, part_groups, [&](int64_t part, int32_t count) {
    int64_t* part_rows = rows.get() + parts.begins[part];
    const int32_t* part_sizes = part_groups.sizes.get() + parts.begins[part];
    counts[part] = count;
    detail::PartVectors vectors(in, parts, part, part_groups.local.get() + parts.begins[part]);
    keys.rows(part_rows, count, parts.members[part], [&](int64_t known) {
      if (keys.gathers()) vectors(keys, part_rows, known);
    });
    for (int32_t g = 0; g < count; ++g) {
      if (part_rows[g] < 0) continue;
      ++groups[part + 1];
      places[part + 1] += part_sizes[g];
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
      const int64_t length = parts.begins[part + 1] - begin;
      next.resize(counts[part]);
      int64_t group = groups[part];
      int64_t place = places[part];
      for (int64_t g = 0; g < counts[part]; ++g) {
        next[g] = place;
        if (rows[begin + g] < 0) continue;
        out.unique[group] = rows[begin + g];
        out.offsets[group++] = place;
        place += part_groups.sizes[begin + g];
      }
      const int32_t* RECIS_RESTRICT local = part_groups.local.get() + begin;
      const int64_t* RECIS_RESTRICT part_rows = rows.get() + begin;
      int64_t* RECIS_RESTRICT next_place = next.data();
      for (int64_t i = 0; i < length; ++i) {
        const int32_t g = local[i];
        const int64_t row = part_rows[g];
        const int64_t position = parts.position(begin + i);
        if (out.rows != nullptr) out.rows[position] = row;
        if (row < 0) continue;
        const int64_t to = next_place[g]++;
        out.grouped_sources[to] = plain ? source_of(part, i) : sources[position];
        if (in.scales != nullptr) out.grouped_scales[to] = in.scales[position];
      }
    }
  });
  out.count[0] = groups.back();
  out.offsets[groups.back()] = places.back();
}

}  // namespace recis
