// Optimizer updates of records, in one pass over gradients and records. The rules are in core/rules.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/blocks.h"
#include "core/reduce.h"
#include "core/rules/rule.h"
#include "core/table.h"

namespace recis {

// A width of UpdateRows on the CPU, for every dim.
inline constexpr int kAnyDim = 1;

// Applies a rule to each row that has a gradient. On CUDA, each lane works on tiles of W elements. On the CPU, a piece
// is a whole row, or kAnyPiece elements of a long one, so that a rule is one loop. There, W is the dim, so that the
// loops of narrow rows unroll, or kAnyDim.
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

  static constexpr bool kFixed = !kOnCuda && W != kAnyDim;
  static constexpr int kAnyPiece = 512;
  static constexpr int kPiece = kOnCuda || kFixed ? W : kAnyPiece;

  int64_t fetched_bytes() const { return blocks.record_bytes + dim * 4; }
  int64_t lanes() const { return (dim + W - 1) / W; }

  RECIS_HD void prefetch(int64_t u) const {
    prefetch_record<true>(blocks, gradients.unique[u], blocks.record_bytes);
    gradients.prefetch(u, width());
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
        float sums[kPiece];
        const float* gradient = gradient_of(u, d, n, sums);
        if constexpr (Rule::kNeeds == Needs::kSquares) {
          float squares[kPiece];
          squares_of(u, d, n, gradient, squares);
          apply(record, d, n, gradient, squares, rounding);
        } else {
          apply(record, d, n, gradient, rounding);
        }
      });
    }
  }

 private:
  RECIS_HD int64_t width() const { return kFixed ? W : dim; }

  // f(first, count) for each piece of a row. CUDA: for each tile of the lane.
  template <class Lanes, class F>
  RECIS_HD void for_pieces(Lanes lanes, F&& f) const {
    if constexpr (kOnCuda) {
      for_tiles<W>(dim, lanes, f);
    } else if constexpr (kFixed) {
      f(int64_t{0}, Const<W>{});
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

  // The gradient of a piece; a single one is read in place on the CPU, and otherwise it is summed into the buffer.
  template <class Count>
  RECIS_HD const float* gradient_of(int64_t u, int64_t d, Count n, float (&buffer)[kPiece]) const {
    if constexpr (!kOnCuda) {
      if (const float* only = gradients.only(u)) return only + d;
    }
    sum(u, d, n, buffer);
    return buffer;
  }

  // The sums of the squares of the sources of a piece of the gradient.
  template <class Count>
  RECIS_HD void squares_of(int64_t u, int64_t d, Count n, const float* gradient, float (&squares)[kPiece]) const {
    if constexpr (kOnCuda) {
      gradients.template sum_squares<W>(u, d, n, squares);
    } else if (gradients.only(u) != nullptr) {
      for (int j = 0; j < n; ++j) squares[j] = gradient[j] * gradient[j];
    } else {
      gradients.sum_many_squares(u, d, n, squares);
    }
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
    return width() <= int64_t{kPiece} * lanes.size;
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
    Squares squares;
    const bool fits = keeps(lanes);
    for_pieces(lanes, [&](int64_t d, auto n) {
      if constexpr (kOnCuda) {
        float tile[kPiece];
        direct(u, record, d, n, first, tile);
        squares.add(n, tile);
        if (fits) {
          for (int j = 0; j < n; ++j) kept[j] = tile[j];
        }
      } else {
        gradient = direct(u, record, d, n, first, kept);
        squares.add(n, gradient);
      }
    });
    const float mean = lanes_sum(squares.total(), lanes) / static_cast<float>(width());
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
      float sums[kPiece];
      rule.template direct<E, S, W>(record, d, n, gradient_of(u, d, n, sums), buffer, first);
      return buffer;
    } else {
      return gradient_of(u, d, n, buffer);
    }
  }

  // On CUDA, two kept tiles would be too many registers.
  template <class Lanes>
  RECIS_HD void with_norms(int64_t u, char* record, Lanes lanes) const {
    float sums[kPiece];
    float direction[kPiece];
    const float* gradient = sums;
    Squares of_direction;
    Squares of_embedding;
    for_pieces(lanes, [&](int64_t d, auto n) {
      gradient = gradient_of(u, d, n, sums);
      rule.template direct<E, S, W>(record, d, n, gradient, direction);
      of_direction.add(n, direction);
      ReadTile<E, W> tile(field_at<E>(record, 0, d));
      if constexpr (std::is_same_v<E, float>) {
        of_embedding.add(n, tile.data());
      } else {
        float w[kPiece];
        for (int j = 0; j < n; ++j) w[j] = load_element(tile.data()[j]);
        of_embedding.add(n, w);
      }
    });
    const float scale = rule.trust(lanes_sum(of_direction.total(), lanes), lanes_sum(of_embedding.total(), lanes));
    for_pieces(lanes, [&](int64_t d, auto n) {
      if (kOnCuda || !keeps(lanes)) {
        gradient = gradient_of(u, d, n, sums);
        rule.template direct<E, S, W>(record, d, n, gradient, direction);
      }
      apply(record, d, n, gradient, direction, rounding, scale);
    });
  }

  // The sum of the squares of a row, as running sums by element modulo their number, so that they are vectorized.
  class Squares {
   public:
    template <class Count>
    RECIS_HD void add(Count n, const float* x) {
      int at = 0;
#if defined(__CUDACC__)
      for (; at + kSums <= n; at += kSums) {
        for (int j = 0; j < kSums; ++j) sums_[j] += x[at + j] * x[at + j];
      }
#else
      // A variable of a vector type: the compiler would keep an array in memory.
      typedef float Vector __attribute__((vector_size(4 * kSums)));
      Vector sums;
      memcpy(&sums, sums_, sizeof(sums));
      for (; at + kSums <= n; at += kSums) {
        Vector whole;
        memcpy(&whole, x + at, sizeof(whole));
        sums += whole * whole;
      }
      memcpy(sums_, &sums, sizeof(sums));
#endif
      for (int j = 0; j < n - at; ++j) sums_[j] += x[at + j] * x[at + j];
    }

    RECIS_HD float total() const { return halved(sums_); }

   private:
    static constexpr int kSums = kOnCuda || (kFixed && W < 16) ? W : 16;

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

    float sums_[kSums] = {};
  };
};

}  // namespace recis
