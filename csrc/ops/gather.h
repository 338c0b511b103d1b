// Operators that pool rows into vectors and spread gradients back to positions (kernels: core/gather.h).
#pragma once

#include <type_traits>

#include "core/feature_kernels.h"
#include "core/gather.h"
#include "ops/blocks.h"
#include "ops/common.h"

namespace recis {

// The features of a lookup are passed as lists, one element each: `lengths` (number of ids), `vectors` (number of
// output vectors), `offsets` and `weights` (see optional_data), `combiners`, `tiles`.
#define RECIS_FEATURES "int[] lengths, int[] vectors, Tensor[] offsets, Tensor[] weights, int[] combiners, int[] tiles"

inline void check_offsets(const Tensor& offsets, int64_t ids) {
  if (!offsets.is_cpu() || offsets.numel() == 0) return;
  const int64_t* at = data<int64_t>(offsets, "offsets");
  const int64_t bags = offsets.numel() - 1;
  RECIS_CHECK(at[0] >= 0 && at[bags] <= ids && ascend(at, bags), "offsets must not decrease and must be within the ",
              ids, " ids of their feature; were they modified after the batch was created?");
}

inline Bags bags_of(const Tensors& offsets, const Tensors& weights, const Ints& lengths, const Ints& vectors,
                    const Ints& combiners, const Ints& tiles, size_t f) {
  const int64_t* starts = optional_data<int64_t>(offsets, f, "offsets");
  const float* factors = optional_data<float>(weights, f, "weights");
  const int64_t bags = tiles[f] == 0 ? vectors[f] : vectors[f] / tiles[f];
  RECIS_CHECK(starts == nullptr ? lengths[f] == vectors[f] && tiles[f] == 0 : offsets[f].numel() == bags + 1,
              "offsets or ids do not match the number of bags");
  RECIS_CHECK(factors == nullptr || weights[f].numel() == lengths[f], "there must be one weight for each id");
  if (starts != nullptr) check_offsets(offsets[f], lengths[f]);
  return {starts, factors, static_cast<Combiner>(combiners[f]), tiles[f]};
}

// Outputs of more bytes than this are written with non-temporal stores.
inline constexpr int64_t kStreamFrom = 4 << 20;

// Whether to write vectors with non-temporal stores, for which every vector must be aligned to 32 bytes.
inline bool can_stream(const Tensor& out, const Ints& starts, int64_t vectors, int64_t dim) {
  bool aligned = dim % 16 == 0 && reinterpret_cast<uintptr_t>(out.data_ptr()) % 64 == 0;
  for (const int64_t start : starts) aligned = aligned && start % 8 == 0;
  return aligned && vectors * dim * 4 > kStreamFrom;
}

// Checks that vectors can be gathered while ids are grouped: one for each id, without weights.
inline void check_plain(const Tensor& out, const Ints& starts, const Ints& lengths, const Ints& vectors,
                        const Tensors& offsets, const Tensors& weights, int64_t dim) {
  RECIS_CHECK(offsets.empty() && weights.empty(), "out requires features with one id per vector and without weights");
  RECIS_CHECK(starts.size() == lengths.size() && vectors.size() == lengths.size(),
              "out: there must be one start for each feature");
  for (size_t f = 0; f < lengths.size(); ++f) {
    RECIS_CHECK(vectors[f] == lengths[f], "out: there must be one vector for each id");
    RECIS_CHECK(starts[f] >= 0 && starts[f] + lengths[f] * dim <= out.numel(), "out is too small");
  }
}

// Gathers `total` vectors. `aligned`: whether all of them and their winners start at multiples of 16 bytes; `streams`:
// as in GatherBags.
template <class Device>
void gather_spans(Device& device, const std::vector<BagSpan>& spans, const BlocksRef& blocks, int64_t type, int64_t dim,
                  const int64_t* rows, int64_t total, bool aligned, bool streams) {
  with_element(type, [&](auto element) {
    const auto gather = [&](auto width) {
      GatherBags<decltype(element), decltype(width)::value> kernel{};
      device.place(kernel.segments, spans);
      kernel.segments.total = total;
      kernel.blocks = blocks;
      kernel.rows = rows;
      kernel.dim = dim;
      kernel.streams = streams;
      device.for_each(total, dim, kernel);
    };
    if constexpr (std::is_same_v<decltype(element), float>) {
      device.with_width(dim, aligned, gather);
    } else {
      device.with_narrow_width(aligned, gather);
    }
  });
}

template <class Device>
void gather_bags(const Tensor& blocks, int64_t block_shift, int64_t meta_offset, int64_t record_bytes, int64_t type,
                 int64_t dim, const Tensor& rows, Ints lengths, Ints vectors, Tensors offsets, Tensors weights,
                 Ints combiners, Ints tiles, Tensors ids, Ints members, const Tensor& initializers, const Tensor& out,
                 Ints starts, const std::optional<Tensor>& winners) {
  Device device(rows);
  const Initializer* inits = initializer_data(initializers);
  float* buffer = data<float>(out, "out");
  int32_t* winner_data = data_or_null<int32_t>(winners, "winners");
  std::vector<BagSpan> spans;
  spans.reserve(lengths.size());
  int64_t total = 0;
  int64_t positions = 0;
  bool aligned = dim % 4 == 0 && reinterpret_cast<uintptr_t>(buffer) % 16 == 0 &&
                 reinterpret_cast<uintptr_t>(winner_data) % 16 == 0;
  for (size_t f = 0; f < lengths.size(); ++f) {
    const Bags bags = bags_of(offsets, weights, lengths, vectors, combiners, tiles, f);
    RECIS_CHECK(starts[f] >= 0 && starts[f] + vectors[f] * dim <= out.numel(), "out is too small");
    RECIS_CHECK(ids.empty() || ids[f].numel() == lengths[f], "ids must hold one element for each row");
    spans.push_back({total, positions, bags, ids.empty() ? nullptr : data<int64_t>(ids[f], "ids"), buffer + starts[f],
                     bags.combiner == Combiner::kMax && winner_data != nullptr ? winner_data + starts[f] : nullptr,
                     ids.empty() || members[f] < 0 ? nullptr : inits + members[f]});
    aligned = aligned && starts[f] % 4 == 0;
    total += vectors[f];
    positions += lengths[f];
  }
  RECIS_CHECK(rows.numel() == positions, "rows must hold one element for each id");
  gather_spans(device, spans, blocks_ref(blocks, block_shift, meta_offset, record_bytes), type, dim,
               data<int64_t>(rows, "rows"), total, aligned, can_stream(out, starts, total, dim));
}

template <class Device>
void spread_max(const Tensor& offsets, const Tensor& winners, const Tensor& gradient, const Tensor& out) {
  Device device(out);
  const int64_t dim = out.size(1);
  RECIS_CHECK(gradient.scalar_type() == ScalarType::Float && gradient.size(1) == dim &&
                  (dim == 1 || gradient.numel() == 0 || gradient.stride(1) == 1),
              "the gradient must be float32 [bags, dim] with contiguous rows");
  const int64_t bags = gradient.size(0);
  RECIS_CHECK(winners.numel() == bags * dim && (offsets.numel() == 0 ? out.size(0) : offsets.numel() - 1) == bags,
              "winners, offsets and gradient must have the same number of bags");
  check_offsets(offsets, out.size(0));
  device.for_each(bags, dim,
                  SpreadMax{offsets.numel() == 0 ? nullptr : data<int64_t>(offsets, "offsets"),
                            data<int32_t>(winners, "winners"), static_cast<const float*>(memory(gradient, "gradient")),
                            gradient.stride(0), dim, data<float>(out, "out")});
}

// Checks the offsets of bags of rows on the CPU.
inline void check_bags(const BagsCall& call) {
  const int64_t* at = call.offsets;
  RECIS_CHECK(at[0] >= 0 && at[call.bags] <= call.rows && ascend(at, call.bags),
              "segment_reduce: offsets must not decrease and must be within the ", call.rows, " rows of the values");
}

// Combines bags of rows of an array, which is read like the records of a block.
template <class Device>
void combine_call(Device& device, const BagsCall& call, const int64_t* address, const int64_t* numbers, float* out,
                  int32_t* winners) {
  const bool aligned = call.dim % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(winners) % 16 == 0 && *address % 16 == 0;
  const bool streams =
      call.dim % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0 && call.bags * call.dim * 4 > kStreamFrom;
  const BagSpan span{0, 0, {call.offsets, nullptr, call.combiner, 0}, nullptr, out, winners, nullptr};
  gather_spans(device, {span}, BlocksRef{address, kRowBits, 16, call.dim * 4}, 0, call.dim, numbers, call.bags, aligned,
               streams);
}

template <class Device>
void spread_call(const Device& device, const BagsCall& call, const float* gradients, const int32_t* winners,
                 float* out) {
  if (call.combiner == Combiner::kMax) {
    device.for_each(call.bags, call.dim, SpreadMax{call.offsets, winners, gradients, call.dim, call.dim, out});
  } else {
    device.for_each(call.bags, call.dim,
                    SpreadSum{{call.offsets, nullptr, call.combiner, 0}, gradients, call.dim, out});
  }
}

// The outputs of grouping; RECIS_GROUPS declares the tensors in a schema, starting with the letter `b`.
#define RECIS_GROUPS "Tensor(b!) unique, Tensor(c!) starts, Tensor(d!) sources, Tensor(e!)? scales, Tensor(f!) count"

inline void check_groups(int64_t n, const Tensor& unique, const Tensor& starts, const Tensor& sources) {
  RECIS_CHECK(unique.numel() >= n && starts.numel() >= n + 1 && sources.numel() >= n,
              "groups: a buffer is smaller than its upper bound");
  // CUB counts runs in an int, and groups are numbered by int32 on the CPU.
  RECIS_CHECK(n < (int64_t{1} << 31), "groups: there must be at most 2^31 - 1 positions, got ", n);
}

// Checks that the lengths of features match the number of positions; otherwise kernels would read out of bounds.
inline void check_features(int64_t positions, const Ints& members, const Ints& lengths) {
  int64_t total = 0;
  bool negative = false;
  for (const int64_t length : lengths) {
    total += length;
    negative = negative || length < 0;
  }
  RECIS_CHECK(
      members.size() == lengths.size() && total == positions && !negative,
      "groups: each feature must have a member table and a length, and lengths must not be negative and must sum "
      "to ",
      positions, ", got ", total);
}

inline void check_distinct(const Ints& kinds, const Ints& owners, int64_t ranks, const Ints& lengths,
                           const Tensor& distinct, const Tensor& starts, const Tensor& sources, const Tensor& counts,
                           const Tensor& places, const Tensor& sizes) {
  check_features(places.numel(), kinds, lengths);
  check_groups(places.numel(), distinct, starts, sources);
  const auto all = static_cast<int64_t>(owners.size());
  RECIS_CHECK(ranks > 0 && sizes.numel() == ranks * all, "sizes must be [ranks, kinds]");
  RECIS_CHECK(counts.numel() >= places.numel(), "counts: a buffer is smaller than its upper bound");
  for (const int64_t owner : owners) RECIS_CHECK(owner < ranks, "an owner must be a rank or -1, got ", owner);
  for (const int64_t kind : kinds) RECIS_CHECK(kind >= 0 && kind < all, "a kind must have an owner, got ", kind);
}

// Writes the source of each position of a lookup and, unless `scales` is null, its factor.
template <class Device>
void fill_sources(Device& device, const std::vector<SourceSpan>& spans, int64_t vectors, int64_t* sources,
                  float* scales) {
  FillSources kernel{};
  device.place(kernel.segments, spans);
  kernel.segments.total = vectors;
  kernel.sources = sources;
  kernel.scales = scales;
  device.for_each(vectors, 1, kernel);
}

template <class Device>
void fill_sources(Device& device, const Ints& lengths, const Ints& vectors, const Tensors& offsets,
                  const Tensors& weights, const Ints& combiners, const Ints& tiles, int64_t* sources, float* scales) {
  std::vector<SourceSpan> spans;
  spans.reserve(lengths.size());
  int64_t first = 0;
  int64_t positions = 0;
  for (size_t f = 0; f < lengths.size(); ++f) {
    spans.push_back({first, positions, bags_of(offsets, weights, lengths, vectors, combiners, tiles, f)});
    first += vectors[f];
    positions += lengths[f];
  }
  fill_sources(device, spans, first, sources, scales);
}

template <class Device, class Library>
void register_gather(Library& m) {
  m.impl("gather_bags", TORCH_BOX(&gather_bags<Device>));
  m.impl("spread_max", TORCH_BOX(&spread_max<Device>));
}

}  // namespace recis
