// Gathering and pooling: from rows to one vector for each bag.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__AVX__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#include "core/bags.h"
#include "core/element.h"
#include "core/for_each.h"
#include "core/initializer.h"
#include "core/segments.h"
#include "core/table.h"

namespace recis {

// Copies with non-temporal stores, for outputs larger than the caches: a plain store would first read the line that it
// overwrites. `to` must be aligned to 32 bytes.
#if defined(__AVX__) && !defined(__CUDACC__)
template <class E, class Count>
inline constexpr bool kCanStream = std::is_same_v<E, float> && !std::is_same_v<Count, int>;

template <int N>
inline void stream_copy(float* to, const float* from) {
  for (int j = 0; j < N; j += 8) _mm256_stream_ps(to + j, _mm256_loadu_ps(from + j));
}
#else
template <class E, class Count>
inline constexpr bool kCanStream = false;

template <int N>
RECIS_HD void stream_copy(float*, const float*) {}
#endif

// Writes a row's embedding as a vector; `streams` as for stream_copy.
template <class E, int W, class Lanes>
RECIS_HD void copy_vector(float* RECIS_RESTRICT out, const E* RECIS_RESTRICT row, int64_t dim, bool streams,
                          Lanes lanes) {
  for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
    if constexpr (kCanStream<E, decltype(n)>) {
      if (streams) return stream_copy<decltype(n)::value>(out + d, row + d);
    }
    ReadTile<E, W> from(row + d);
    WriteTile<float, W> to(out + d);
    if constexpr (std::is_same_v<E, float> && !kOnCuda) {
      memcpy(to.data(), from.data(), n * sizeof(float));
    } else {
      for (int j = 0; j < n; ++j) to.data()[j] = load_element(from.data()[j]);
    }
  });
}

// The vectors of one feature: vectors first, first + 1, ... and the positions of their ids in `rows`.
struct BagSpan {
  int64_t first;
  int64_t first_position;
  Bags bags;
  const int64_t* ids;  // the feature's ids, needed for the initial values of unknown ids
  float* out;          // [vectors, dim]
  int32_t* winners;    // max: [vectors, dim], the position in the bag of the id that won each element, -1 for an empty
                       // bag; or null
  const Initializer* init;  // null: an unknown id counts as zeros
};

// out[v] = the combined embeddings of the ids of a bag, zeros for an empty bag. An id without a row (row -1) counts as
// the initial value that it would get, or as zeros.
template <class E, int W>
struct GatherBags {
  Segments<BagSpan> segments;
  BlocksRef blocks;
  const int64_t* rows;
  int64_t dim;
  bool streams;  // whether to use stream_copy: the output is larger than the caches, and every vector is aligned

  int64_t fetched_bytes() const { return dim * static_cast<int64_t>(sizeof(E)); }
  int64_t lanes() const { return (dim + W - 1) / W; }

  RECIS_HD void prefetch(int32_t part, int64_t v) const {
    const BagSpan& span = segments[part];
    const Range bag = span.bags.range(v - span.first);
    // A longer bag prefetches the rest as it is summed.
    for (int64_t p = bag.begin; p < min64(bag.end, bag.begin + 4); ++p) prefetch_row(rows[span.first_position + p]);
  }

  RECIS_HD void prefetch_row(int64_t row) const {
    if (row >= 0) prefetch_record<false>(blocks, row, dim * static_cast<int64_t>(sizeof(E)));
  }

  // On the CPU. Vectors of one row each are copied without looking at bags, which would take as long as to copy a
  // narrow one.
  void run(int32_t part, int64_t begin, int64_t end) const {
    const BagSpan& span = segments[part];
    const int64_t lead = detail::distance(*this);
    const bool copies = span.bags.offsets == nullptr && span.bags.weights == nullptr && span.winners == nullptr;
    if (!copies) {
      for (int64_t v = begin; v < std::min(end, begin + lead); ++v) prefetch(part, v);
      for (int64_t v = begin; v < end; ++v) {
        if (v + lead < end) prefetch(part, v + lead);
        (*this)(part, v, OneLane{});
      }
      return;
    }
    const int64_t* row_of = rows + span.first_position - span.first;
    float* out = span.out + (begin - span.first) * dim;
    for (int64_t v = begin; v < std::min(end, begin + lead); ++v) prefetch_row(row_of[v]);
    for (int64_t v = begin; v < end; ++v, out += dim) {
      if (v + lead < end) prefetch_row(row_of[v + lead]);
      if (row_of[v] < 0) {
        (*this)(part, v, OneLane{});
      } else if (dim == W) {
        copy_vector<E, W>(out, reinterpret_cast<const E*>(blocks.record(row_of[v])), W, streams, OneLane{});
      } else {
        copy_vector<E, W>(out, reinterpret_cast<const E*>(blocks.record(row_of[v])), dim, streams, OneLane{});
      }
    }
  }

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t v, Lanes lanes) const {
    const BagSpan& span = segments[part];
    const Range bag = span.bags.range(v - span.first);
    const int64_t* bag_rows = rows + span.first_position;
    float* RECIS_RESTRICT out = span.out + (v - span.first) * dim;
    if (bag.end - bag.begin == 1 && span.bags.weights == nullptr && bag_rows[bag.begin] >= 0 &&
        span.winners == nullptr) {
      return copy_vector<E, W>(out, reinterpret_cast<const E*>(blocks.record(bag_rows[bag.begin])), dim, streams,
                               lanes);
    }
    if (span.bags.combiner == Combiner::kMax) return greatest(span, bag, bag_rows, v, lanes);
    const float norm = span.bags.norm(bag);
    for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
      float sum[W];
      for (int j = 0; j < n; ++j) sum[j] = 0.0f;
      for (int64_t p = bag.begin; p < bag.end; ++p) {
        if (p + 4 < bag.end && d == 0) prefetch_row(bag_rows[p + 4]);
        const float weight = span.bags.weight(p);
        if (bag_rows[p] >= 0) {
          ReadTile<E, W> tile(reinterpret_cast<const E*>(blocks.record(bag_rows[p])) + d);
          const E* row = tile.data();
          for (int j = 0; j < n; ++j) sum[j] += weight * load_element(row[j]);
        } else if (span.init != nullptr) {
          float unknown[W];
          first(span, p, d, n, unknown);
          for (int j = 0; j < n; ++j) sum[j] += weight * unknown[j];
        }
      }
      WriteTile<float, W> to(out + d);
      for (int j = 0; j < n; ++j) to.data()[j] = sum[j] * norm;
    });
  }

  template <class Lanes>
  RECIS_HD void greatest(const BagSpan& span, Range bag, const int64_t* bag_rows, int64_t v, Lanes lanes) const {
    const int64_t at = (v - span.first) * dim;
    for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
      float best[W];
      int32_t winner[W];
      for (int j = 0; j < n; ++j) {
        best[j] = bag.begin == bag.end ? 0.0f : -INFINITY;
        winner[j] = bag.begin == bag.end ? -1 : 0;
      }
      for (int64_t p = bag.begin; p < bag.end; ++p) {
        float x[W];
        if (bag_rows[p] >= 0) {
          ReadTile<E, W> tile(reinterpret_cast<const E*>(blocks.record(bag_rows[p])) + d);
          const E* row = tile.data();
          for (int j = 0; j < n; ++j) x[j] = load_element(row[j]);
        } else if (span.init != nullptr) {
          first(span, p, d, n, x);
        } else {
          for (int j = 0; j < n; ++j) x[j] = 0.0f;
        }
        for (int j = 0; j < n; ++j) {
          // The first of equal elements wins, as in torch; NaN wins over all numbers and propagates.
          const bool wins = x[j] > best[j] || (x[j] != x[j] && best[j] == best[j]);
          best[j] = wins ? x[j] : best[j];
          winner[j] = wins ? static_cast<int32_t>(p - bag.begin) : winner[j];
        }
      }
      if constexpr (kOnCuda) {
        WriteTile<float, W> to(span.out + at + d);
        for (int j = 0; j < n; ++j) to.data()[j] = best[j];
        if (span.winners == nullptr) return;
        WriteTile<int32_t, W> winners(span.winners + at + d);
        for (int j = 0; j < n; ++j) winners.data()[j] = winner[j];
      } else {
        for (int j = 0; j < n; ++j) {
          span.out[at + d + j] = best[j];
          if (span.winners != nullptr) span.winners[at + d + j] = winner[j];
        }
      }
    });
  }

  // Elements d .. d + n - 1 of the initial value of the id at position p, rounded to the record's type.
  template <class Count>
  RECIS_HD void first(const BagSpan& span, int64_t p, int64_t d, Count n, float (&out)[W]) const {
    float values[4];
    if constexpr (kOnCuda) {
      // A tile lies within these four. They are selected by comparisons: an indexed array would not be in registers.
      first_values(*span.init, span.ids[p], d / 4, values);
      for (int j = 0; j < n; ++j) {
        float value = values[0];
        for (int k = 1; k < 4; ++k) value = (d + j) % 4 == k ? values[k] : value;
        E rounded;
        store_element(&rounded, value);
        out[j] = load_element(rounded);
      }
      return;
    }
    int64_t quad = -1;
    for (int j = 0; j < n; ++j) {
      if ((d + j) / 4 != quad) {
        quad = (d + j) / 4;
        first_values(*span.init, span.ids[p], quad, values);
      }
      E rounded;
      store_element(&rounded, values[(d + j) % 4]);
      out[j] = load_element(rounded);
    }
  }
};

// Backward of max: each id of a bag receives the gradient of the elements that it won, and zero elsewhere.
struct SpreadMax {
  const int64_t* offsets;  // [bags + 1]; null: one id per bag
  const int32_t* winners;  // [bags, dim]
  const float* gradient;   // [bags, dim], rows `stride` apart
  int64_t stride;
  int64_t dim;
  float* out;  // [ids, dim]

  template <class Lanes>
  RECIS_HD void operator()(int64_t b, Lanes lanes) const {
    const Range bag = Bags{offsets, nullptr, Combiner::kMax, 0}.range(b);
    for (int64_t p = bag.begin; p < bag.end; ++p) {
      for (int64_t d = lanes.rank; d < dim; d += lanes.size) {
        out[p * dim + d] = winners[b * dim + d] == p - bag.begin ? gradient[b * stride + d] : 0.0f;
      }
    }
  }
};

// Backward of a sum: the gradient of each row of a bag is that of the combined row times the bag's factor.
struct SpreadSum {
  Bags bags;
  const float* gradient;  // [bags, dim]
  int64_t dim;
  float* out;  // [rows, dim]

  template <class Lanes>
  RECIS_HD void operator()(int64_t b, Lanes lanes) const {
    const Range bag = bags.range(b);
    const float norm = bags.norm(bag);
    for (int64_t p = bag.begin; p < bag.end; ++p) {
      const float factor = bags.weight(p) * norm;
      // A sum of one product, as in reduce.h: it has no negative zeros.
      for (int64_t d = lanes.rank; d < dim; d += lanes.size) out[p * dim + d] = 0.0f + factor * gradient[b * dim + d];
    }
  }
};

// The source of a position's gradient: a feature in the high bits and one of its vectors in the low bits.
inline constexpr int kSourceShift = 40;
inline constexpr int64_t kSourceVector = (int64_t{1} << kSourceShift) - 1;

RECIS_HD int64_t source_of(int64_t feature, int64_t vector) { return feature << kSourceShift | vector; }

struct SourceSpan {
  int64_t first;
  int64_t first_position;
  Bags bags;
};

// Writes the source of each position, and the factor by which its bag multiplies the embedding.
struct FillSources {
  Segments<SourceSpan> segments;
  int64_t* sources;  // [positions]
  float* scales;     // [positions], or null if every factor is 1

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t v, Lanes lanes) const {
    const SourceSpan& span = segments[part];
    const Range bag = span.bags.range(v - span.first);
    const int64_t source = source_of(part, v - span.first);
    const float norm = scales == nullptr ? 1.0f : span.bags.norm(bag);
    for (int64_t p = bag.begin + lanes.rank; p < bag.end; p += lanes.size) {
      sources[span.first_position + p] = source;
      if (scales != nullptr) scales[span.first_position + p] = span.bags.weight(p) * norm;
    }
  }
};

}  // namespace recis
