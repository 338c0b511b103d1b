// Operators on row gradients: where they come from, their reduction, and the optimizers' updates (kernels:
// core/update.h).
#pragma once

#include <cmath>

#include "core/update.h"
#include "ops/common.h"

namespace recis {

template <class Device>
void bag_sources(Tensors offsets, Ints bags, Ints lengths, Ints combiners, const Tensor& sources,
                 const std::optional<Tensor>& scales) {
  Device device(sources);
  std::vector<SourceSpan> spans;
  int64_t first = 0;
  int64_t positions = 0;
  for (size_t f = 0; f < offsets.size(); ++f) {
    const bool ragged = offsets[f].numel() > 0;
    spans.push_back({first, positions, ragged ? data<int64_t>(offsets[f], "offsets") : nullptr,
                     static_cast<Combiner>(combiners[f])});
    first += bags[f];
    positions += lengths[f];
  }
  RECIS_CHECK(sources.numel() == positions, "sources must hold one element for each position");
  FillSources kernel{};
  device.place(kernel.segments, spans);
  kernel.segments.total = first;
  kernel.sources = data<int64_t>(sources, "sources");
  kernel.scales = data_or_null<float>(scales, "scales");
  device.for_each(first, 1, kernel);
}

template <class Device>
GroupedGradients grouped_gradients(Device& device, const Tensors& gradients, const Tensor& count, const Tensor& unique,
                                   const Tensor& offsets, const Tensor& sources, const std::optional<Tensor>& scales,
                                   std::vector<GradientSpan>& spans, int64_t dim) {
  for (const Tensor& gradient : gradients) {
    RECIS_CHECK(gradient.scalar_type() == ScalarType::Float && gradient.dim() == 2 && gradient.size(1) == dim,
                "a gradient must be float32 [bags, dim]");
    RECIS_CHECK(dim == 1 || gradient.numel() == 0 || gradient.stride(1) == 1, "a gradient's rows must be contiguous");
    spans.push_back({0, static_cast<const float*>(gradient.data_ptr()), gradient.stride(0)});
  }
  GroupedGradients grouped{};
  device.place(grouped.features, spans);
  grouped.count = data<int64_t>(count, "count");
  grouped.unique = data<int64_t>(unique, "unique");
  grouped.offsets = data<int64_t>(offsets, "offsets");
  grouped.sources = data<int64_t>(sources, "sources");
  grouped.scales = data_or_null<float>(scales, "scales");
  return grouped;
}

// Whether every gradient row starts at a multiple of 16 bytes.
inline bool aligned16(const std::vector<GradientSpan>& spans, int64_t dim) {
  bool aligned = dim % 4 == 0;
  for (const GradientSpan& span : spans) {
    aligned = aligned && reinterpret_cast<uintptr_t>(span.values) % 16 == 0 && span.stride % 4 == 0;
  }
  return aligned;
}

template <class Device>
void reduce_rows(Tensors gradients, const Tensor& count, const Tensor& unique, const Tensor& offsets,
                 const Tensor& sources, const std::optional<Tensor>& scales, const Tensor& out) {
  Device device(unique);
  const int64_t dim = out.size(1);
  std::vector<GradientSpan> spans;
  const auto grouped = grouped_gradients(device, gradients, count, unique, offsets, sources, scales, spans, dim);
  device.with_width(dim, aligned16(spans, dim), [&](auto width) {
    device.for_each(device.items(grouped.count, unique.numel()), dim,
                    ReduceRows<decltype(width)::value>{grouped, dim, data<float>(out, "out")});
  });
}

template <class Device, class Rule>
void update_rows(const Tensor& blocks, int64_t block_shift, int64_t record_bytes, int64_t dim, const Tensors& gradients,
                 const Tensor& count, const Tensor& unique, const Tensor& offsets, const Tensor& sources,
                 const std::optional<Tensor>& scales, const Rule& rule) {
  Device device(unique);
  std::vector<GradientSpan> spans;
  const auto grouped = grouped_gradients(device, gradients, count, unique, offsets, sources, scales, spans, dim);
  device.with_width(dim, aligned16(spans, dim), [&](auto width) {
    device.for_each(
        device.items(grouped.count, unique.numel()), 4 * dim,
        UpdateRows<Rule, decltype(width)::value>{grouped, blocks_ref(blocks, block_shift, record_bytes), dim, rule});
  });
}

template <class Device>
void sgd_update(const Tensor& blocks, int64_t block_shift, int64_t record_bytes, int64_t dim, Tensors gradients,
                const Tensor& count, const Tensor& unique, const Tensor& offsets, const Tensor& sources,
                const std::optional<Tensor>& scales, double lr) {
  update_rows<Device>(blocks, block_shift, record_bytes, dim, gradients, count, unique, offsets, sources, scales,
                      SgdRule{static_cast<float>(lr)});
}

template <class Device>
void adagrad_update(const Tensor& blocks, int64_t block_shift, int64_t record_bytes, int64_t dim, Tensors gradients,
                    const Tensor& count, const Tensor& unique, const Tensor& offsets, const Tensor& sources,
                    const std::optional<Tensor>& scales, int64_t sum_offset, double lr, double eps) {
  update_rows<Device>(blocks, block_shift, record_bytes, dim, gradients, count, unique, offsets, sources, scales,
                      AdagradRule{sum_offset, static_cast<float>(lr), static_cast<float>(eps)});
}

template <class Device>
void adam_update(const Tensor& blocks, int64_t block_shift, int64_t record_bytes, int64_t dim, Tensors gradients,
                 const Tensor& count, const Tensor& unique, const Tensor& offsets, const Tensor& sources,
                 const std::optional<Tensor>& scales, int64_t exp_avg_offset, int64_t exp_avg_sq_offset, double lr,
                 double beta1, double beta2, double eps, int64_t step) {
  const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(step));
  const double correction2 = 1.0 - std::pow(beta2, static_cast<double>(step));
  update_rows<Device>(
      blocks, block_shift, record_bytes, dim, gradients, count, unique, offsets, sources, scales,
      AdamRule{exp_avg_offset, exp_avg_sq_offset, static_cast<float>(1.0 - beta1), static_cast<float>(1.0 - beta2),
               static_cast<float>(lr * std::sqrt(correction2) / correction1), static_cast<float>(eps)});
}

template <class Device, class Library>
void register_update(Library& m) {
  m.impl("bag_sources", TORCH_BOX(&bag_sources<Device>));
  m.impl("reduce_rows", TORCH_BOX(&reduce_rows<Device>));
  m.impl("sgd_update", TORCH_BOX(&sgd_update<Device>));
  m.impl("adagrad_update", TORCH_BOX(&adagrad_update<Device>));
  m.impl("adam_update", TORCH_BOX(&adam_update<Device>));
}

}  // namespace recis
