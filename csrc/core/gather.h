// Gather and pool: from rows to one vector a bag.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/initializer.h"
#include "core/segments.h"
#include "core/table.h"

namespace recis {

enum class Combiner : int32_t { kSum = 0, kMean = 1 };

// The bags of one feature: bags first, first + 1, ... and the positions of their ids.
struct BagSpan {
  int64_t first;
  int64_t first_position;
  const int64_t* offsets;  // [bags + 1] into the feature's positions; null: one id a bag
  const int64_t* ids;      // the feature's ids, for first values of unknown ones
  float* out;              // [bags, dim]
  Combiner combiner;
  Initializer init;
};

struct Range {
  int64_t begin;
  int64_t end;
};

template <class Span>
RECIS_HD Range bag_range(const Span& span, int64_t bag) {
  const int64_t b = bag - span.first;
  if (span.offsets == nullptr) return {span.first_position + b, span.first_position + b + 1};
  return {span.first_position + span.offsets[b], span.first_position + span.offsets[b + 1]};
}

// out[bag] = sum or mean of its ids' embeddings; zeros for an empty bag. A row of -1 (an id that has none, in an
// evaluation) counts with the first value it would have.
template <int W>
struct GatherBags {
  Segments<BagSpan> segments;
  BlocksRef blocks;
  const int64_t* rows;
  int64_t dim;

  RECIS_HD void prefetch(int32_t part, int64_t bag) const {
    const Range range = bag_range(segments[part], bag);
    // A long bag fetches as it goes; its beginning is enough here.
    for (int64_t p = range.begin; p < range.end && p < range.begin + 4; ++p) {
      if (rows[p] >= 0) prefetch_record<false>(blocks, rows[p], dim * 4);
    }
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t bag, Lanes lanes) const {
    const BagSpan& span = segments[part];
    const Range range = bag_range(span, bag);
    const int64_t length = range.end - range.begin;
    float* out = span.out + (bag - span.first) * dim;
    const float scale = span.combiner == Combiner::kMean && length > 1 ? 1.0f / static_cast<float>(length) : 1.0f;
    for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
      float sum[W];
      for (int j = 0; j < n; ++j) sum[j] = 0.0f;
      for (int64_t p = range.begin; p < range.end; ++p) {
        if (rows[p] >= 0) {
          const float* row = reinterpret_cast<const float*>(blocks.record(rows[p])) + d;
          for (int j = 0; j < n; ++j) sum[j] += row[j];
        } else {
          add_first_values(span, p, d, n, sum);
        }
      }
      for (int j = 0; j < n; ++j) out[d + j] = sum[j] * scale;
    });
  }

  template <class Count>
  RECIS_HD void add_first_values(const BagSpan& span, int64_t p, int64_t d, Count n, float (&sum)[W]) const {
    const int64_t id = span.ids[p - span.first_position];
    int64_t quad = -1;
    float values[4];
    for (int j = 0; j < n; ++j) {
      if ((d + j) / 4 != quad) {
        quad = (d + j) / 4;
        first_values(span.init, id, quad, values);
      }
      sum[j] += values[(d + j) % 4];
    }
  }
};

// Where the gradient of each position comes from: (feature, bag) packed into one word, and its share of it.
struct SourceSpan {
  int64_t first;
  int64_t first_position;
  const int64_t* offsets;
  Combiner combiner;
};

inline constexpr int kSourceShift = 40;  // feature above, bag of the feature below
inline constexpr int64_t kSourceBag = (int64_t{1} << kSourceShift) - 1;

struct FillSources {
  Segments<SourceSpan> segments;
  int64_t* sources;  // [positions]
  float* scales;     // [positions], or null where every share is 1

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t bag, Lanes lanes) const {
    const SourceSpan& span = segments[part];
    const Range range = bag_range(span, bag);
    const int64_t source = (static_cast<int64_t>(part) << kSourceShift) | (bag - span.first);
    const float scale = span.combiner == Combiner::kMean ? 1.0f / static_cast<float>(range.end - range.begin) : 1.0f;
    for (int64_t p = range.begin + lanes.rank; p < range.end; p += lanes.size) {
      sources[p] = source;
      if (scales != nullptr) scales[p] = scale;
    }
  }
};

}  // namespace recis
