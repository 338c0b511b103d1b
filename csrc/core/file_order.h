// The order of rows in checkpoints: by (member table, bucket, id), ids as signed numbers.
//
// Buckets are random and nearly equal in size, so rows are counted into buckets and each bucket is sorted separately.
// CPU only: it runs once per checkpoint, on a list in host memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/hash/mix.h"

namespace recis {

struct FileRows {
  int64_t* ids;
  int64_t* rows;
  int64_t* buckets;
};

namespace detail {

inline constexpr int64_t kBuckets = 65536;

using IdAndRow = std::pair<int64_t, int64_t>;

// Orders the rows of one member table.
template <class Executor>
void order_member(const Executor& executor, int64_t n, const int64_t* ids, const int64_t* rows, FileRows out) {
  std::vector<int64_t> next(kBuckets + 1, 0);
  for (int64_t i = 0; i < n; ++i) ++next[bucket_of(ids[i]) + 1];
  for (int64_t b = 0; b < kBuckets; ++b) next[b + 1] += next[b];
  std::vector<int64_t> first(next.begin(), next.end());
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = next[bucket_of(ids[i])]++;
    out.ids[at] = ids[i];
    out.rows[at] = rows[i];
  }
  executor(kBuckets, 1024, [&](int64_t begin, int64_t end) {
    std::vector<IdAndRow> entries;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t start = first[b], stop = first[b + 1];
      entries.clear();
      for (int64_t i = start; i < stop; ++i) entries.emplace_back(out.ids[i], out.rows[i]);
      std::sort(entries.begin(), entries.end());
      for (int64_t i = start; i < stop; ++i) {
        out.ids[i] = entries[i - start].first;
        out.rows[i] = entries[i - start].second;
        out.buckets[i] = b;
      }
    }
  });
}

// The same for few rows, where counting buckets would cost more than sorting.
inline void order_few(int64_t n, const int64_t* ids, const int64_t* rows, FileRows out) {
  std::vector<std::pair<int64_t, IdAndRow>> entries;
  entries.reserve(n);
  for (int64_t i = 0; i < n; ++i) entries.emplace_back(bucket_of(ids[i]), IdAndRow{ids[i], rows[i]});
  std::sort(entries.begin(), entries.end());
  for (int64_t i = 0; i < n; ++i) {
    out.buckets[i] = entries[i].first;
    out.ids[i] = entries[i].second.first;
    out.rows[i] = entries[i].second.second;
  }
}

}  // namespace detail

// Orders n rows. Members must be in 0 .. members_count - 1.
template <class Executor>
void file_order(const Executor& executor, int64_t n, const int64_t* ids, const int64_t* members, const int64_t* rows,
                int64_t members_count, FileRows out) {
  std::vector<int64_t> first(members_count + 1, 0);
  for (int64_t i = 0; i < n; ++i) ++first[members[i] + 1];
  for (int64_t m = 0; m < members_count; ++m) first[m + 1] += first[m];
  std::vector<int64_t> ids_by_member, rows_by_member;
  if (members_count > 1) {
    ids_by_member.resize(n);
    rows_by_member.resize(n);
    std::vector<int64_t> next(first);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = next[members[i]]++;
      ids_by_member[at] = ids[i];
      rows_by_member[at] = rows[i];
    }
    ids = ids_by_member.data();
    rows = rows_by_member.data();
  }
  for (int64_t m = 0; m < members_count; ++m) {
    const int64_t start = first[m], count = first[m + 1] - start;
    const FileRows part{out.ids + start, out.rows + start, out.buckets + start};
    if (count < detail::kBuckets / 8) {
      detail::order_few(count, ids + start, rows + start, part);
    } else {
      detail::order_member(executor, count, ids + start, rows + start, part);
    }
  }
}

}  // namespace recis
