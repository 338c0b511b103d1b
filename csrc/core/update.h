// Optimizer updates of records, in one pass over gradients and records. The rules are in core/rules.
#pragma once

#include <cstdint>

#include "core/blocks.h"
#include "core/reduce.h"
#include "core/rules/rule.h"
#include "core/table.h"

namespace recis {

// Applies a rule to each row that has a gradient. On CUDA, each lane works on tiles of W elements. On the CPU, W is
// unused and a piece is a whole row, or kPiece elements of a long one: so a rule is one loop, whatever the dim.
template <class Rule, class E, class S, int W>
struct UpdateRows {
  GroupedGradients gradients;
  BlocksRef blocks;
  int64_t dim;
  int64_t step;
  bool mark_seen;  // whether to mark the rows as seen in this step, as SeeRows does
  Rounding rounding;
  Rule rule;
  const int64_t* repeated = nullptr;  // [1]: whether the rows are marked already, which the host need not know; or null

  static constexpr int kPiece = kOnCuda ? W : 512;

  int64_t fetched_bytes() const { return blocks.record_bytes + dim * 4; }
  int64_t lanes() const { return (dim + W - 1) / W; }

  RECIS_HD void prefetch(int64_t u) const {
    prefetch_record<true>(blocks, gradients.unique[u], blocks.record_bytes);
    gradients.prefetch(u, dim);
  }

  template <class Lanes>
  RECIS_HD void operator()(int64_t u, Lanes lanes) const {
    const int64_t row = gradients.unique[u];
    char* record = blocks.record(row);
    int64_t updated = 0;  // the step of the row's last update, for one lane
    if (lanes.rank == 0) {
      RowMeta* meta = blocks.meta(row);
      const bool marks = mark_seen && (repeated == nullptr || *repeated == 0);
      const int64_t times = marks ? gradients.offsets[u + 1] - gradients.offsets[u] : 0;
      updated = meta->updated_step();
      *meta = RowMeta::of(step, marks ? step : meta->seen_step(), meta->frequency() + times);
    }
    if constexpr (Rule::kNeeds == Needs::kNorm) {
      with_norm(u, record, step - updated, lanes);
    } else if constexpr (Rule::kNeeds == Needs::kNorms) {
      with_norms(u, record, lanes);
    } else {
      for_pieces(lanes, [&](int64_t d, auto n) {
        float gradient[kPiece];
        if constexpr (Rule::kNeeds == Needs::kSquares) {
          float squares[kPiece];
          sum(u, d, n, gradient);
          gradients.sum_squares(u, d, n, squares);
          apply(record, d, n, gradient, squares, rounding);
        } else {
          apply(record, d, n, gradient_of(u, d, n, gradient), rounding);
        }
      });
    }
  }

 private:
  // f(first, count) for each piece of a row. CUDA: for each tile of the lane.
  template <class Lanes, class F>
  RECIS_HD void for_pieces(Lanes lanes, F&& f) const {
    if constexpr (kOnCuda) {
      for_tiles<W>(dim, lanes, f);
    } else {
      for (int64_t d = 0; d < dim; d += kPiece) f(d, static_cast<int>(min64(dim - d, kPiece)));
    }
  }

  template <class Count>
  RECIS_HD void sum(int64_t u, int64_t d, Count n, float (&gradient)[kPiece]) const {
    if constexpr (kOnCuda) {
      gradients.template sum<W>(u, dim, d, n, gradient);
    } else {
      gradients.sum_many(u, dim, d, n, gradient);
    }
  }

  static constexpr int kSums = kOnCuda ? W : 16;

  // The gradient of a piece; a single one is read in place on the CPU, and otherwise it is summed into the buffer.
  template <class Count>
  RECIS_HD const float* gradient_of(int64_t u, int64_t d, Count n, float (&buffer)[kPiece]) const {
    if constexpr (!kOnCuda) {
      if (const float* only = gradients.only(u)) return only + d;
    }
    sum(u, d, n, buffer);
    return buffer;
  }

  // One lane does what a row needs once; the sum broadcasts its result to all lanes.
  template <class Lanes, class F>
  RECIS_HD static float once(Lanes lanes, F&& f) {
    return lanes_sum(lanes.rank == 0 ? f() : 0.0f, lanes);
  }

  // Whether the pieces of a row can be kept: one, or on CUDA a tile for each lane. Those of a longer row are computed
  // twice, because a rule that needs a norm needs that of the whole row first.
  template <class Lanes>
  RECIS_HD bool keeps(Lanes lanes) const {
    return dim <= int64_t{kPiece} * lanes.size;
  }

  template <class Count, class... Rest>
  RECIS_HD_ALONE void apply(char* record, int64_t d, Count n, Rest... rest) const {
    rule.template apply<E, S, W>(record, d, n, rest...);
  }

  template <class Lanes>
  RECIS_HD void with_norm(int64_t u, char* record, int64_t elapsed, Lanes lanes) const {
    float first = 0.0f;
    if constexpr (requires { rule.begin(record, elapsed); }) {
      first = once(lanes, [&] { return rule.begin(record, elapsed); });
    }
    float kept[kPiece];  // CUDA: only in the registers of a lane with one tile
    const float* gradient = kept;
    float squares[kSums] = {};
    const bool fits = keeps(lanes);
    for_pieces(lanes, [&](int64_t d, auto n) {
      if constexpr (kOnCuda) {
        float tile[kPiece];
        direct(u, record, d, n, first, tile);
        add_squares(n, tile, squares);
        if (fits) {
          for (int j = 0; j < n; ++j) kept[j] = tile[j];
        }
      } else {
        gradient = direct(u, record, d, n, first, kept);
        add_squares(n, gradient, squares);
      }
    });
    const float mean = lanes_sum(halved(squares), lanes) / static_cast<float>(dim);
    const float scale = once(lanes, [&] { return rule.advance(record, mean); });
    for_pieces(lanes, [&](int64_t d, auto n) {
      if (fits) return apply(record, d, n, kOnCuda ? kept : gradient, rounding, first, scale);
      float again[kPiece];
      apply(record, d, n, direct(u, record, d, n, first, again), rounding, first, scale);
    });
  }

  template <class Count>
  RECIS_HD const float* direct(int64_t u, char* record, int64_t d, Count n, float first,
                               float (&buffer)[kPiece]) const {
    if constexpr (Rule::kDirects) {
      sum(u, d, n, buffer);
      rule.template direct<E, S, W>(record, d, n, buffer, first);
      return buffer;
    } else {
      return gradient_of(u, d, n, buffer);
    }
  }

  // On CUDA, two kept tiles would be too many registers.
  template <class Lanes>
  RECIS_HD void with_norms(int64_t u, char* record, Lanes lanes) const {
    float gradient[kPiece];
    float direction[kPiece];
    float of_direction[kSums] = {};
    float of_embedding[kSums] = {};
    for_pieces(lanes, [&](int64_t d, auto n) {
      sum(u, d, n, gradient);
      rule.template direct<E, S, W>(record, d, n, gradient, direction);
      add_squares(n, direction, of_direction);
      float w[kPiece];
      ReadTile<E, W> tile(field_at<E>(record, 0, d));
      for (int j = 0; j < n; ++j) w[j] = load_element(tile.data()[j]);
      add_squares(n, w, of_embedding);
    });
    const float scale = rule.trust(lanes_sum(halved(of_direction), lanes), lanes_sum(halved(of_embedding), lanes));
    for_pieces(lanes, [&](int64_t d, auto n) {
      if (kOnCuda || !keeps(lanes)) {
        sum(u, d, n, gradient);
        rule.template direct<E, S, W>(record, d, n, gradient, direction);
      }
      apply(record, d, n, gradient, direction, rounding, scale);
    });
  }

  // Running sums by element modulo their number, so that the compiler vectorizes them.
  template <class Count, int N>
  RECIS_HD static void add_squares(Count n, const float* x, float (&sums)[N]) {
    int at = 0;
    for (; at + N <= n; at += N) {
      for (int j = 0; j < N; ++j) sums[j] += x[at + j] * x[at + j];
    }
    for (int j = 0; j < n - at; ++j) sums[j] += x[at + j] * x[at + j];
  }

  // Sums by halves, so that the order does not depend on the processor's vector width.
  template <int N>
  RECIS_HD static float halved(const float (&x)[N]) {
    if constexpr (N == 1) {
      return x[0];
    } else {
      float half[N / 2];
      for (int j = 0; j < N / 2; ++j) half[j] = x[j] + x[j + N / 2];
      return halved(half);
    }
  }
};

}  // namespace recis
