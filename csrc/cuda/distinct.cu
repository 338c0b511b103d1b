// The distinct ids of a lookup on CUDA, ordered by the rank that owns them; core/distinct.h is its CPU counterpart.
// Positions are sorted by id and then, because CUB's radix sort is stable, by (owner, kind), so that input order is
// kept among the positions of an id.
#include "core/hash/mix.h"
#include "core/id_map.h"
#include "cuda/device.cuh"
#include "cuda/sort.cuh"
#include "ops/gather.h"
#include "ops/id_map.h"

namespace recis {
namespace {

// The share of a position is owner * kinds + kind; that of a position without an id comes after all others.
struct ShareIds {
  Segments<IdSpan> segments;  // `member` is the kind
  const int64_t* owners;      // the rank that owns each kind, or -1 if the bucket of each id decides
  int64_t ranks;
  int64_t kinds;
  uint64_t* ids;
  uint64_t* shares;
  int64_t* positions;

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes) const {
    const IdSpan& span = segments[part];
    const bool has = span.has(i);
    const int64_t id = has ? span.id(i) : 0;
    const int64_t fixed = owners[span.member];
    const int64_t owner = fixed >= 0 ? fixed : bucket_of(id) * ranks >> 16;
    ids[i] = static_cast<uint64_t>(id);
    shares[i] = static_cast<uint64_t>(has ? owner * kinds + span.member : ranks * kinds);
    positions[i] = i;
  }
};

struct PermuteShares {
  const int64_t* order;
  const uint64_t* shares;
  uint64_t* permuted;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    permuted[i] = shares[order[i]];
  }
};

// Positions sorted by (share, id).
struct Sorted {
  const uint64_t* ids;     // by position
  const uint64_t* shares;  // in order
  const int64_t* order;
  int64_t n;
  uint64_t unused;  // the share of positions without an id

  RECIS_HD uint64_t id(int64_t i) const { return ids[order[i]]; }
  RECIS_HD bool used(int64_t i) const { return shares[i] != unused; }
  RECIS_HD bool is_first(int64_t i) const {
    return used(i) && (i == 0 || shares[i] != shares[i - 1] || id(i) != id(i - 1));
  }
};

// Items 0 .. n, so that a running sum of the marks ends with their number.
struct MarkFirst {
  Sorted sorted;
  int64_t* marks;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    marks[i] = i < sorted.n && sorted.is_first(i) ? 1 : 0;
  }
};

// Items 0 .. n; the last one writes the totals.
struct WriteDistinct {
  Sorted sorted;
  const int64_t* before;  // [n + 1]: distinct ids before each sorted position
  const int64_t* position_sources;
  const float* position_scales;
  int64_t* distinct;
  int64_t* starts;
  int64_t* sources;
  float* scales;
  int64_t* places;
  int64_t* count;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    const int64_t n = sorted.n;
    // The positions of the last id end where those without an id begin.
    if (i == n ? sorted.used(n - 1) : !sorted.used(i) && (i == 0 || sorted.used(i - 1))) starts[before[i]] = i;
    if (i == n) {
      *count = before[n];
      return;
    }
    const int64_t position = sorted.order[i];
    sources[i] = position_sources[position];
    if (scales != nullptr) scales[i] = position_scales[position];
    if (!sorted.used(i)) {
      places[position] = -1;
      return;
    }
    const bool first = before[i + 1] > before[i];
    const int64_t place = first ? before[i] : before[i] - 1;
    places[position] = place;
    if (first) {
      distinct[place] = static_cast<int64_t>(sorted.id(i));
      starts[place] = i;
    }
  }
};

// counts[u] = positions of id u, 0 beyond the last id.
struct CountPositions {
  const int64_t* starts;
  const int64_t* count;
  int64_t* counts;

  template <class Lanes>
  RECIS_HD void operator()(int64_t u, Lanes) const {
    counts[u] = u < *count ? starts[u + 1] - starts[u] : 0;
  }
};

// sizes[share] = its number of distinct ids.
struct SizeShares {
  Sorted sorted;
  const int64_t* before;
  int64_t* sizes;

  // Distinct ids of the shares below one.
  RECIS_HD int64_t ids_below(uint64_t share) const {
    int64_t low = 0;
    int64_t high = sorted.n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (sorted.shares[middle] < share) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return before[low];
  }

  template <class Lanes>
  RECIS_HD void operator()(int64_t share, Lanes) const {
    sizes[share] = ids_below(static_cast<uint64_t>(share) + 1) - ids_below(static_cast<uint64_t>(share));
  }
};

void distinct_ids(Tensors ids, Ints kinds, Tensors used, Ints owners, int64_t ranks, Ints lengths, Ints vectors,
                  Tensors offsets, Tensors weights, Ints combiners, Ints tiles, const Tensor& distinct,
                  const Tensor& starts, const Tensor& sources, const std::optional<Tensor>& scales, const Tensor& count,
                  const Tensor& counts, const Tensor& places, const Tensor& sizes) {
  CudaDevice device(distinct);
  const int64_t n = places.numel();
  check_distinct(kinds, owners, ranks, lengths, distinct, starts, sources, counts, places, sizes);
  const auto shares = static_cast<int64_t>(owners.size()) * ranks;
  int64_t* begins = data<int64_t>(starts, "starts");
  int64_t* found = data<int64_t>(count, "count");
  float* factors = data_or_null<float>(scales, "scales");
  int64_t* share_sizes = data<int64_t>(sizes, "sizes");
  if (n == 0) {
    RECIS_CUDA_CHECK(cudaMemsetAsync(begins, 0, sizeof(int64_t), device.stream()));
    RECIS_CUDA_CHECK(cudaMemsetAsync(found, 0, sizeof(int64_t), device.stream()));
    RECIS_CUDA_CHECK(cudaMemsetAsync(share_sizes, 0, static_cast<size_t>(shares) * sizeof(int64_t), device.stream()));
    return;
  }
  const auto signed_words = [&](int64_t size) { return static_cast<int64_t*>(device.scratch(size * 8)); };
  const auto unsigned_words = [&](int64_t size) { return reinterpret_cast<uint64_t*>(signed_words(size)); };
  std::vector<IdSpan> spans;
  ShareIds share{spans_of(device, {ids, kinds, used}, places, spans),
                 device.upload(owners),
                 ranks,
                 static_cast<int64_t>(owners.size()),
                 unsigned_words(n),
                 unsigned_words(n),
                 signed_words(n)};
  int64_t* position_sources = signed_words(n);
  float* position_scales = factors == nullptr ? nullptr : static_cast<float*>(device.scratch(n * 4));
  uint64_t* keys = unsigned_words(n);  // sorted ids, then their shares
  uint64_t* sorted_shares = unsigned_words(n);
  int64_t* by_id = signed_words(n);
  int64_t* order = signed_words(n);
  int64_t* marks = signed_words(n + 1);
  int64_t* before = signed_words(n + 1);
  const int bits = bits_for(shares + 1);
  const auto stream = device.stream();
  const auto sort_by_id = radix_sort(share.ids, keys, share.positions, by_id, n, 64, stream);
  const auto sort_by_share = radix_sort(keys, sorted_shares, by_id, order, n, bits, stream);
  const auto sum = running_sum(marks, before, n + 1, stream);
  const CubStorage storage(device, sort_by_id, sort_by_share, sum);

  fill_sources(device, lengths, vectors, offsets, weights, combiners, tiles, position_sources, position_scales);
  device.for_each(n, 1, share);
  storage.run(sort_by_id);
  device.for_each(n, 1, PermuteShares{by_id, share.shares, keys});
  storage.run(sort_by_share);
  const Sorted sorted{share.ids, sorted_shares, order, n, static_cast<uint64_t>(shares)};
  device.for_each(n + 1, 1, MarkFirst{sorted, marks});
  storage.run(sum);
  device.for_each(
      n + 1, 1,
      WriteDistinct{sorted, before, position_sources, position_scales, data<int64_t>(distinct, "distinct"), begins,
                    data<int64_t>(sources, "sources"), factors, data<int64_t>(places, "places"), found});
  device.for_each(n, 1, CountPositions{begins, found, data<int64_t>(counts, "counts")});
  device.for_each(shares, 1, SizeShares{sorted, before, share_sizes});
}

}  // namespace
}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, RECIS_DEVICE_KEY, m) { m.impl("distinct_ids", TORCH_BOX(&recis::distinct_ids)); }
