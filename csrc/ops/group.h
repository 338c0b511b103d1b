// Grouping on the CPU as its operators need it (kernels: core/group.h).
#pragma once

#include "core/group.h"
#include "ops/device.h"
#include "ops/gather.h"

namespace recis {

// Where an operator writes groups; RECIS_GROUPS declares the tensors in a schema, from the letter `b` on.
#define RECIS_GROUPS "Tensor(b!) unique, Tensor(c!) starts, Tensor(d!) sources, Tensor(e!)? scales, Tensor(f!) count"

inline void check_groups(int64_t n, const Tensor& unique, const Tensor& starts, const Tensor& sources) {
  RECIS_CHECK(unique.numel() >= n && starts.numel() >= n + 1 && sources.numel() >= n,
              "groups: a buffer is smaller than its upper bound");
  RECIS_CHECK(n < (int64_t{1} << 31), "groups: at most 2^31 - 1 positions, got ", n);
}

// What an operator is told of its features must agree with what it is given, or kernels would read beyond it.
inline void check_features(int64_t positions, const Ints& members, const Ints& lengths) {
  int64_t total = 0;
  for (const int64_t length : lengths) total += length;
  RECIS_CHECK(members.size() == lengths.size() && total == positions,
              "groups: a member table and a length for each feature, and lengths of ", positions, " together, got ",
              total);
}

// What grouping is told of a lookup's positions; it must outlive the grouping.
struct Positions {
  GroupInputs in;
  std::unique_ptr<int64_t[]> sources;
  std::unique_ptr<float[]> scales;

  Positions(CpuDevice& device, std::vector<KeySpan> features, const Ints& lengths, const Ints& vectors,
            const Tensors& offsets, const Tensors& weights, const Ints& combiners, const Ints& tiles, bool scaled)
      : in{std::move(features), nullptr, nullptr} {
    if (offsets.empty() && !scaled) return;  // one id a vector: nothing to look up
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
  float* shares = data_or_null<float>(scales, "scales");
  const Positions positions(device, std::move(features), lengths, vectors, offsets, weights, combiners, tiles,
                            shares != nullptr);
  check_groups(positions.in.positions(), unique, starts, sources);
  group_cpu(TorchPool{}, positions.in, keys,
            GroupOutputs{rows, data<int64_t>(unique, "unique"), data<int64_t>(starts, "starts"),
                         data<int64_t>(sources, "sources"), shares, data<int64_t>(count, "count")});
}

}  // namespace recis
