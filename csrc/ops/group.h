// Grouping on the CPU, shared by its operators (kernels: core/group.h).
#pragma once

#include "core/group.h"
#include "ops/device.h"
#include "ops/gather.h"

namespace recis {

// The keys of a lookup's features, each from its own list of ids.
inline std::vector<KeySpan> key_spans(const Tensors& ids, const Ints& lengths, const Ints& members) {
  RECIS_CHECK(ids.size() == lengths.size(), "groups: there must be one length for each list of ids");
  std::vector<KeySpan> features;
  for (size_t f = 0; f < ids.size(); ++f) {
    RECIS_CHECK(ids[f].numel() == lengths[f], "groups: each length must be the number of ids in its list");
    features.push_back({data<int64_t>(ids[f], "ids"), ids[f].numel(), members[f]});
  }
  return features;
}

// The positions of a lookup as grouping reads them; must outlive the grouping.
struct Positions {
  GroupInputs in;
  std::unique_ptr<int64_t[]> sources;
  std::unique_ptr<float[]> scales;

  Positions(CpuDevice& device, std::vector<KeySpan> features, const Ints& lengths, const Ints& vectors,
            const Tensors& offsets, const Tensors& weights, const Ints& combiners, const Ints& tiles, bool scaled)
      : in{std::move(features), nullptr, nullptr} {
    if (offsets.empty() && !scaled) return;  // one id a vector: each position is its own source
    const int64_t n = in.positions();
    sources = detail::room<int64_t>(n);
    in.sources = sources.get();
    if (scaled) {
      scales = detail::room<float>(n);
      in.scales = scales.get();
    }
    fill_sources(device, lengths, vectors, offsets, weights, combiners, tiles, sources.get(), scales.get());
  }
};

// Groups the keys of a lookup's features; `rows` may be null.
template <class Keys>
void group_positions(CpuDevice& device, const Keys& keys, std::vector<KeySpan> features, const Ints& lengths,
                     const Ints& vectors, const Tensors& offsets, const Tensors& weights, const Ints& combiners,
                     const Ints& tiles, int64_t* rows, const Tensor& unique, const Tensor& starts,
                     const Tensor& sources, const std::optional<Tensor>& scales, const Tensor& count) {
  float* factors = data_or_null<float>(scales, "scales");
  const Positions positions(device, std::move(features), lengths, vectors, offsets, weights, combiners, tiles,
                            factors != nullptr);
  check_groups(positions.in.positions(), unique, starts, sources);
  group_cpu(device.threads(), positions.in, keys,
            GroupOutputs{rows, data<int64_t>(unique, "unique"), data<int64_t>(starts, "starts"),
                         data<int64_t>(sources, "sources"), factors, data<int64_t>(count, "count")});
}

}  // namespace recis
