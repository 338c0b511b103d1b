// Reduction of row gradients, in input order.
#pragma once

#include <cstdint>

#include "core/for_each.h"
#include "core/gather.h"
#include "core/segments.h"

namespace recis {

// The gradients of one feature's vectors.
struct GradientSpan {
  int64_t first;  // unused: features are found by index
  const float* values;
  int64_t stride;  // elements from one vector to the next; 0 for an expanded gradient
};

// Row gradients grouped by row: row unique[u] receives the gradients sources[offsets[u] .. offsets[u + 1]), in input
// order. There are *count rows; the buffers are upper bounds.
struct GroupedGradients {
  Segments<GradientSpan> features;
  const int64_t* count;
  const int64_t* unique;
  const int64_t* offsets;
  const int64_t* sources;
  const float* scales;              // in the order of `sources`; or null
  const float* factor;              // [1]: multiplies the summed gradients (unscaling, clipping); or null
  const float* partials = nullptr;  // CUDA: the sums of SumChunks, [chunks of positions, dim]; null if no group is long

  RECIS_HD const float* source(int64_t k) const {
    const GradientSpan& feature = features[static_cast<int32_t>(sources[k] >> kSourceShift)];
    return feature.values + (sources[k] & kSourceVector) * feature.stride;
  }

  // Number of gradients that prefetch() loads; a longer group prefetches the rest as it is summed.
  static constexpr int64_t kAhead = 8;

  RECIS_HD void prefetch(int64_t u, int64_t dim) const {
    const int64_t end = min64(offsets[u + 1], offsets[u] + kAhead);
    for (int64_t k = offsets[u]; k < end; ++k) prefetch_source(k, dim);
  }

  RECIS_HD void prefetch_source(int64_t k, int64_t dim) const {
#if !defined(__CUDA_ARCH__)
    const float* gradient = source(k);
    for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(gradient + d, 0, 3);
#endif
  }

  // Gradients are added in input order, in chunks of kChunk whose sums are added in order: the result has the same bits
  // for any number of threads, and several threads can sum one long group.
  static constexpr int64_t kChunk = 256;

  template <int W, class Count>
  RECIS_HD void sum(int64_t u, int64_t dim, int64_t d, Count n, float (&total)[W]) const {
    const int64_t begin = offsets[u];
    const int64_t end = offsets[u + 1];
    if (d == 0) {
      for (int64_t k = begin + kAhead; k < min64(end, begin + 64); ++k) prefetch_source(k, n);
    }
    sum_chunk<W>(begin, min64(end, begin + kChunk), d, n, total);
    if constexpr (kOnCuda) {
#pragma unroll 2  // so that loads are in flight together
      for (int64_t at = begin + kChunk; at < end; at += kChunk) {
        ReadTile<float, W> chunk(partials + at / kChunk * dim + d);
        for (int j = 0; j < n; ++j) total[j] += chunk.data()[j];
      }
    } else {
      for (int64_t at = begin + kChunk; at < end; at += kChunk) {
        float chunk[W];
        sum_chunk<W>(at, min64(end, at + kChunk), d, n, chunk);
        for (int j = 0; j < n; ++j) total[j] += chunk[j];
      }
    }
    if (factor != nullptr) {
      for (int j = 0; j < n; ++j) total[j] *= *factor;
    }
  }

  // Sums n elements of a gradient from d on, on the CPU. Not inlined, so that it is compiled once for all rules.
  template <class Count>
  [[gnu::noinline]] void sum_many(int64_t u, int64_t dim, int64_t d, Count n, float* total) const {
    for_blocks(
        n,
        [&](auto width, int at) {
          constexpr int W = decltype(width)::value;
          sum<W>(u, dim, d + at, width, *reinterpret_cast<float (*)[W]>(total + at));
        },
        [&](int rest, int at) {
          float sums[8];
          sum<8>(u, dim, d + at, rest, sums);
          for (int j = 0; j < rest; ++j) total[at + j] = sums[j];
        });
  }

  // The gradient of a row that has one source with a factor of 1; or null. On the CPU.
  const float* only(int64_t u) const {
    const int64_t begin = offsets[u];
    return offsets[u + 1] - begin == 1 && scales == nullptr && factor == nullptr ? source(begin) : nullptr;
  }

  // total = the sums of the squares of the gradients, in input order, for elements d .. d + n - 1.
  template <int W, class Count>
  RECIS_HD void sum_squares(int64_t u, int64_t d, Count n, float (&total)[W]) const {
    float sum[W];  // as in sum_chunk
    for (int j = 0; j < n; ++j) sum[j] = 0.0f;
    for (int64_t k = offsets[u]; k < offsets[u + 1]; ++k) {
      const float* RECIS_RESTRICT gradient = source(k) + d;
      const float scale = (scales == nullptr ? 1.0f : scales[k]) * (factor == nullptr ? 1.0f : *factor);
      for (int j = 0; j < n; ++j) sum[j] += scale * gradient[j] * (scale * gradient[j]);
    }
    for (int j = 0; j < n; ++j) total[j] = sum[j];
  }

  // Like sum_many.
  template <class Count>
  [[gnu::noinline]] void sum_many_squares(int64_t u, int64_t d, Count n, float* total) const {
    for_blocks(
        n,
        [&](auto width, int at) {
          constexpr int W = decltype(width)::value;
          sum_squares<W>(u, d + at, width, *reinterpret_cast<float (*)[W]>(total + at));
        },
        [&](int rest, int at) {
          float sums[8];
          sum_squares<8>(u, d + at, rest, sums);
          for (int j = 0; j < rest; ++j) total[at + j] = sums[j];
        });
  }

  template <int W, class Count>
  RECIS_HD void sum_chunk(int64_t begin, int64_t end, int64_t d, Count n, float (&total)[W]) const {
    float sum[W];  // a local array, so that the compiler knows that no pointer aliases it
    for (int j = 0; j < n; ++j) sum[j] = 0.0f;
    for (int64_t k = begin; k < end; ++k) {
      ReadTile<float, W> tile(source(k) + d);
      const float* RECIS_RESTRICT gradient = tile.data();
      if (scales == nullptr) {
        for (int j = 0; j < n; ++j) sum[j] += gradient[j];
      } else {
        const float scale = scales[k];
        for (int j = 0; j < n; ++j) sum[j] += scale * gradient[j];
      }
    }
    for (int j = 0; j < n; ++j) total[j] = sum[j];
  }

 private:
  // Splits n elements into blocks whose sums fit into registers: block(Const<W>, first) for each, and tail(count,
  // first) for the last, fewer than 8.
  template <class Count, class Block, class Tail>
  static void for_blocks(Count n, Block&& block, Tail&& tail) {
    int at = 0;
    const auto blocks = [&](auto width) {
      for (; at + width <= n; at += width) block(width, at);
    };
    blocks(Const<64>{});
    blocks(Const<16>{});
    blocks(Const<8>{});
    if (at < n) tail(n - at, at);
  }
};

// Sums the chunks of long groups, except the first of each, in parallel: the threads of a row would add the gradients
// of a frequent id one after another. One item per kChunk positions: at most one of these chunks begins among them,
// because a group that has one is longer than kChunk.
template <int W>
struct SumChunks {
  GroupedGradients gradients;
  int64_t dim;
  float* partials;  // [items, dim]

  static constexpr int64_t kChunk = GroupedGradients::kChunk;

  int64_t lanes() const { return (dim + W - 1) / W; }

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    const int64_t* offsets = gradients.offsets;
    const int64_t position = i * kChunk;
    // The group of this position: the last one that begins at or before it.
    int64_t low = 0;
    int64_t high = *gradients.count;
    if (position >= offsets[high]) return;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (offsets[middle] <= position) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int64_t begin = offsets[low];
    const int64_t end = offsets[low + 1];
    const int64_t at = begin + (position - begin + kChunk - 1) / kChunk * kChunk;
    if (at <= begin || at >= end) return;
    for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
      float sum[W];
      gradients.template sum_chunk<W>(at, min64(end, at + kChunk), d, n, sum);
      WriteTile<float, W> to(partials + i * dim + d);
      for (int j = 0; j < n; ++j) to.data()[j] = sum[j];
    });
  }
};

// out[u] = the summed gradient of row unique[u].
template <int W>
struct ReduceRows {
  GroupedGradients gradients;
  int64_t dim;
  float* out;  // [upper bound, dim]

  int64_t fetched_bytes() const { return dim * 4; }
  int64_t lanes() const { return (dim + W - 1) / W; }

  RECIS_HD void prefetch(int64_t u) const { gradients.prefetch(u, dim); }

  template <class Lanes>
  RECIS_HD void operator()(int64_t u, Lanes lanes) const {
    for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
      float sum[W];
      gradients.template sum<W>(u, dim, d, n, sum);
      WriteTile<float, W> to(out + u * dim + d);
      for (int j = 0; j < n; ++j) to.data()[j] = sum[j];
    });
  }
};

}  // namespace recis
