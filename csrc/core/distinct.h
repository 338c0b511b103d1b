// The distinct ids of a lookup, ordered by the rank that owns them: the requests to the other ranks. CPU only.
//
// Ids are grouped in parts as in core/group.h; the groups are then assigned to (owner, kind) in the order of their
// parts, so the result depends only on the input.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/group.h"
#include "core/hash/mix.h"

namespace recis {

// Ids as keys that need no row. The `member` of a feature is its kind.
struct IdsAsKeys {
  static uint64_t hash(int64_t id, int64_t) { return mix64(static_cast<uint64_t>(id)); }
};

struct DistinctInputs {
  GroupInputs positions;
  std::vector<int64_t> owners;  // the rank that owns each kind, or -1 if the bucket of each id decides
  int64_t ranks;

  int64_t owner(int64_t id, int64_t kind) const {
    return owners[kind] >= 0 ? owners[kind] : bucket_of(id) * ranks >> 16;
  }
};

struct DistinctOutputs {
  int64_t* ids;      // [n] upper bound: distinct ids by (owner, kind)
  int64_t* counts;   // [n] upper bound: positions of each id
  int64_t* places;   // [n]: the index into `ids` of each position
  int64_t* sizes;    // [ranks, kinds]: ids of each (owner, kind)
  int64_t* offsets;  // [n + 1] upper bound: where the positions of each id begin in `sources` and `scales`
  int64_t* sources;  // [n]: grouped by id, in input order
  float* scales;     // [n], likewise; or null
  int64_t* count;    // [1]
};

// Finds the distinct ids of a lookup. The result does not depend on the executor.
template <class Executor>
void distinct_cpu(const Executor& executor, const DistinctInputs& in, const DistinctOutputs& out) {
  const GroupInputs& positions = in.positions;
  const int64_t n = positions.positions();
  const auto kinds = static_cast<int64_t>(in.owners.size());
  const detail::Parts parts(positions.features, n, IdsAsKeys{});
  const detail::Sources position_sources(positions, parts);
  const int64_t* const sources = position_sources.data;
  const bool plain = sources == nullptr;
  const detail::PartGroups part_groups(n);
  const auto owners = detail::room<int32_t>(n);            // of each group
  std::vector<int64_t> groups(parts.count() * in.ranks);   // groups of each part and owner; later their starts
  std::vector<int64_t> members(parts.count() * in.ranks);  // positions in these groups, likewise
  std::vector<int64_t> counts(parts.count());              // groups of each part

  detail::group_parts(executor, parts, IdsAsKeys{}, part_groups, [&](int64_t part, int32_t count) {
    const int64_t begin = parts.begins[part];
    counts[part] = count;
    for (int64_t g = begin; g < begin + count; ++g) {
      const int64_t owner = in.owner(part_groups.keys[g], parts.members[part]);
      owners[g] = static_cast<int32_t>(owner);
      ++groups[part * in.ranks + owner];
      members[part * in.ranks + owner] += part_groups.sizes[g];
    }
  });

  int64_t place = 0;
  int64_t first = 0;
  std::vector<std::vector<int64_t>> parts_of(kinds);
  for (int64_t part = 0; part < parts.count(); ++part) parts_of[parts.members[part]].push_back(part);
  for (int64_t owner = 0; owner < in.ranks; ++owner) {
    for (int64_t kind = 0; kind < kinds; ++kind) {
      const int64_t before = place;
      for (const int64_t part : parts_of[kind]) {
        const int64_t at = part * in.ranks + owner;
        place += std::exchange(groups[at], place);
        first += std::exchange(members[at], first);
      }
      out.sizes[owner * kinds + kind] = place - before;
    }
  }

  executor(parts.count(), 1, [&](int64_t begin_part, int64_t end_part) {
    std::vector<int64_t> next;     // the place of the next position of each group
    std::vector<int64_t> indices;  // the index into out.ids of each group
    for (int64_t part = begin_part; part < end_part; ++part) {
      const int64_t begin = parts.begins[part];
      const int64_t length = parts.begins[part + 1] - begin;
      next.resize(counts[part]);
      indices.resize(counts[part]);
      for (int64_t g = 0; g < counts[part]; ++g) {
        const int64_t at = part * in.ranks + owners[begin + g];
        const int64_t to = indices[g] = groups[at]++;
        next[g] = members[at];
        members[at] += part_groups.sizes[begin + g];
        out.ids[to] = part_groups.keys[begin + g];
        out.counts[to] = part_groups.sizes[begin + g];
        out.offsets[to] = next[g];
      }
      for (int64_t i = 0; i < length; ++i) {
        const int32_t g = part_groups.local[begin + i];
        const int64_t position = parts.position(begin + i);
        const int64_t to = next[g]++;
        out.places[position] = indices[g];
        out.sources[to] = plain ? source_of(part, i) : sources[position];
        if (positions.scales != nullptr) out.scales[to] = positions.scales[position];
      }
    }
  });
  out.count[0] = place;
  out.offsets[place] = n;
}

}  // namespace recis
