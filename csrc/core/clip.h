// The norm of summed row gradients, and their clipping.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/for_each.h"
#include "core/macros.h"

namespace recis {

// sums[i] = the sum of chunk i of the terms, in float64: of their squares if T is float, of themselves if it is double.
//
// Term k of a chunk is added to accumulator k % kWays, one for each lane of CUDA, and the accumulators are added by
// halves: the result has the same bits for any number of threads, and on every device.
template <class T>
struct SumTerms {
  static constexpr int kWays = 32;

  const T* terms;
  const int64_t* rows;  // [1]: there are *rows * width terms; null: 1
  int64_t width;
  int64_t chunk;
  double* sums;  // chunks without terms get 0

  int64_t lanes() const { return kWays; }

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    constexpr int kMine = kOnCuda ? 1 : kWays;
    const int64_t begin = i * chunk;
    const int64_t end = min64((rows == nullptr ? 1 : *rows) * width, begin + chunk);
    double sum[kMine];
    for (int j = 0; j < kMine; ++j) sum[j] = 0.0;
    int64_t at = begin + lanes.rank;
#pragma unroll 4  // so that loads are in flight together
    for (; at + kMine <= end; at += kWays) {
      for (int j = 0; j < kMine; ++j) sum[j] += term(terms[at + j]);
    }
    if constexpr (kOnCuda) {
      const double total = lanes_sum(sum[0], lanes);
      if (lanes.rank == 0) sums[i] = total;
    } else {
      for (int j = 0; at + j < end; ++j) sum[j] += term(terms[at + j]);
      for (int half = kWays / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
      }
      sums[i] = sum[0];
    }
  }

  RECIS_HD static double term(float x) { return static_cast<double>(x) * static_cast<double>(x); }
  RECIS_HD static double term(double x) { return x; }
};

// values[u] *= *factor, and then scaled down to a norm of at most `limit`. As in torch's clipping, the scale is
// limit / (norm + 1e-6), but at most 1.
template <int W>
struct ClipRows {
  float* values;        // [upper bound, dim]
  const float* factor;  // [1]; null: 1
  int64_t dim;
  float limit;

  int64_t lanes() const { return (dim + W - 1) / W; }

  template <class Lanes>
  RECIS_HD void operator()(int64_t u, Lanes lanes) const {
    const float by = factor == nullptr ? 1.0f : *factor;
    double squares[W];
    for (int j = 0; j < W; ++j) squares[j] = 0.0;
    for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
      ReadTile<float, W> tile(values + u * dim + d);
      for (int j = 0; j < n; ++j) {
        const float x = tile.data()[j] * by;
        squares[j] += static_cast<double>(x) * static_cast<double>(x);
      }
    });
    double sum = 0.0;
    for (int j = 0; j < W; ++j) sum += squares[j];
    const float ratio = limit / (static_cast<float>(sqrt(lanes_sum(sum, lanes))) + 1e-6f);
    const float scale = ratio > 1.0f ? 1.0f : ratio;  // NaN remains
    for_tiles<W>(dim, lanes, [&](int64_t d, auto n) {
      EditTile<float, W> tile(values + u * dim + d);
      for (int j = 0; j < n; ++j) tile.data()[j] = tile.data()[j] * by * scale;
    });
  }
};

}  // namespace recis
