// Operators on row gradients: reduction, clipping and optimizer updates (kernels: core/reduce.h, core/clip.h,
// core/update.h, core/rules).
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/clip.h"
#include "core/rules/rules.h"
#include "core/table_kernels.h"
#include "core/update.h"
#include "ops/common.h"

namespace recis {

// Grouped gradients are passed as these arguments, in this order.
#define RECIS_GROUPED \
  "Tensor[] gradients, Tensor count, Tensor unique, Tensor offsets, Tensor sources, Tensor? scales, Tensor? factor"

struct Grouped {
  const Tensors& gradients;
  const Tensor& count;
  const Tensor& unique;
  const Tensor& offsets;
  const Tensor& sources;
  const std::optional<Tensor>& scales;
  const std::optional<Tensor>& factor;

  template <class Device>
  GroupedGradients ref(Device& device, std::vector<GradientSpan>& spans, int64_t dim) const {
    spans.reserve(gradients.size());
    for (const Tensor& gradient : gradients) {
      RECIS_CHECK(gradient.scalar_type() == ScalarType::Float && gradient.dim() == 2 && gradient.size(1) == dim,
                  "a gradient must be float32 [vectors, dim]");
      RECIS_CHECK(dim == 1 || gradient.numel() == 0 || gradient.stride(1) == 1, "a gradient's rows must be contiguous");
      spans.push_back({0, static_cast<const float*>(memory(gradient, "gradients")), gradient.stride(0)});
    }
    GroupedGradients grouped{};
    device.place(grouped.features, spans);
    grouped.count = data<int64_t>(count, "count");
    grouped.unique = data<int64_t>(unique, "unique");
    grouped.offsets = data<int64_t>(offsets, "offsets");
    grouped.sources = data<int64_t>(sources, "sources");
    grouped.scales = data_or_null<float>(scales, "scales");
    grouped.factor = data_or_null<float>(factor, "factor");
    return grouped;
  }
};

// Whether every gradient row starts at a multiple of 16 bytes; the parts of a record always do.
inline bool aligned16(const std::vector<GradientSpan>& spans, int64_t dim) {
  bool aligned = dim % 4 == 0;
  for (const GradientSpan& span : spans) {
    aligned = aligned && reinterpret_cast<uintptr_t>(span.values) % 16 == 0 && span.stride % 4 == 0;
  }
  return aligned;
}

// Sums the chunks of long groups first, where the device works on many rows at once.
template <int W, class Device>
GroupedGradients with_chunks(Device& device, GroupedGradients grouped, int64_t positions, int64_t dim) {
  if constexpr (Device::kSumsChunks) {
    const int64_t chunks = (positions + GroupedGradients::kChunk - 1) / GroupedGradients::kChunk;
    if (chunks > 1) {
      auto* partials = static_cast<float*>(device.scratch(chunks * dim * 4));
      device.for_each(chunks, dim, SumChunks<W>{grouped, dim, partials});
      grouped.partials = partials;
    }
  }
  return grouped;
}

template <class Device>
void reduce_rows(Tensors gradients, const Tensor& count, const Tensor& unique, const Tensor& offsets,
                 const Tensor& sources, const std::optional<Tensor>& scales, const std::optional<Tensor>& factor,
                 const Tensor& out) {
  Device device(unique);
  const int64_t dim = out.size(1);
  std::vector<GradientSpan> spans;
  const auto grouped = Grouped{gradients, count, unique, offsets, sources, scales, factor}.ref(device, spans, dim);
  float* sums = data<float>(out, "out");
  const bool aligned = aligned16(spans, dim) && reinterpret_cast<uintptr_t>(sums) % 16 == 0;
  device.with_width(dim, aligned, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const GroupedGradients summed = with_chunks<W>(device, grouped, sources.numel(), dim);
    device.for_each_counted(grouped.count, unique.numel(), dim, ReduceRows<W>{summed, dim, sums});
  });
}

inline const float* check_rows(const Tensor& values, const Tensor& count) {
  RECIS_CHECK(values.dim() == 2 && count.numel() == 1, "values must be [rows, dim] and count [1]");
  return data<float>(values, "values");
}

// The sum of the squares of the first *count rows of `values`, float64 [1].
template <class Device>
Tensor sum_squares(const Tensor& values, const Tensor& count) {
  constexpr int64_t kChunk = 8192;
  constexpr int64_t kSums = 1024;  // sums of chunks that are added at once
  Device device(values);
  const float* terms = check_rows(values, count);
  int64_t chunks = std::max<int64_t>((values.numel() + kChunk - 1) / kChunk, 1);
  const auto doubles = [&](int64_t size) { return torch::stable::new_empty(values, {&size, 1}, ScalarType::Double); };
  Tensor sums = doubles(chunks);
  device.for_each(chunks, kChunk,
                  SumTerms<float>{terms, data<int64_t>(count, "count"), values.size(1), kChunk,
                                  static_cast<double*>(sums.data_ptr())});
  while (chunks > 1) {
    const int64_t parts = chunks;
    const Tensor terms_of_parts = sums;
    chunks = (parts + kSums - 1) / kSums;
    sums = doubles(chunks);
    device.for_each(chunks, kSums,
                    SumTerms<double>{static_cast<const double*>(terms_of_parts.data_ptr()), nullptr, parts, kSums,
                                     static_cast<double*>(sums.data_ptr())});
  }
  return sums;
}

// Multiplies the first *count rows of `values` by `factor` [1], and clips each of them; see ClipRows.
template <class Device>
void clip_rows(const Tensor& values, const Tensor& count, const std::optional<Tensor>& factor, double limit) {
  Device device(values);
  float* rows = const_cast<float*>(check_rows(values, count));
  const int64_t dim = values.size(1);
  const float* by = data_or_null<float>(factor, "factor");
  const bool aligned = dim % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0;
  device.with_width(dim, aligned, [&](auto width) {
    device.for_each_counted(data<int64_t>(count, "count"), values.size(0), dim,
                            ClipRows<decltype(width)::value>{rows, by, dim, static_cast<float>(limit)});
  });
}

// A table to update; RECIS_TABLE declares it in a schema. `type` and `state_type` are the element types of the
// embedding and its state. `step` is written to the metadata of updated rows and, if `mark_seen`, also as the step in
// which they were seen. `seed` is the seed of the stochastic rounding.
#define RECIS_TABLE RECIS_BLOCKS_MUT ", int type, int state_type, int dim, int step, bool mark_seen, int seed"

struct Records {
  BlocksRef blocks;
  int64_t type;
  int64_t state_type;
  int64_t dim;
  int64_t step;
  bool mark_seen;
  uint32_t seed;
  const int64_t* repeated = nullptr;  // as in UpdateRows
};

inline RuleCall rule_call(int64_t kind, Ints state_offsets, Floats values) {
  RECIS_CHECK(state_offsets.size() <= RuleCall::kOffsets && values.size() <= RuleCall::kValues,
              "a rule has too many offsets or values");
  RuleCall call{};
  call.kind = static_cast<RuleKind>(kind);
  std::copy(state_offsets.begin(), state_offsets.end(), call.offsets);
  std::copy(values.begin(), values.end(), call.values);
  return call;
}

// Calls f with values of the types of embedding and state. The state is float32 or of the type of the embedding;
// float32 for a rule without state.
template <class Rule, class F>
void with_types(const Records& records, F&& f) {
  RECIS_CHECK(records.state_type == 0 || records.state_type == records.type,
              "the state must be float32 or of the type of the embedding");
  with_element(records.type, [&](auto element) {
    if constexpr (Rule::kHasState) {
      if (records.state_type != 0) return f(element, element);
    }
    f(element, float{});
  });
}

// Updates the rows of `grouped`, of which `bound` is an upper bound, by the gradients of so many positions.
template <class Device>
void update_records(Device& device, const Records& records, const GroupedGradients& grouped, int64_t positions,
                    int64_t bound, bool aligned, const RuleCall& call, int64_t t) {
  const bool known = with_rule(call, t, [&]<class Rule>(const Rule& rule) {
    with_types<Rule>(records, [&](auto element, auto state) {
      using E = decltype(element);
      using S = decltype(state);
      // On the CPU, only kernels of float32 are compiled for each of the frequent dims, which limits their number.
      constexpr bool kFixes = std::is_same_v<E, float> && std::is_same_v<S, float>;
      device.template with_update_width<kFixes>(records.dim, aligned, [&](auto width) {
        constexpr int W = decltype(width)::value;
        const GroupedGradients summed = with_chunks<W>(device, grouped, positions, records.dim);
        device.for_each_counted(
            grouped.count, bound, 4 * records.dim,
            UpdateRows<Rule, E, S, W>{summed, records.blocks, records.dim, records.step, records.mark_seen,
                                      Rounding{records.seed}, rule, records.repeated});
      });
    });
  });
  RECIS_CHECK(known, "unknown rule: ", static_cast<int>(call.kind));
}

// Reduces row gradients and applies step t, from 1, of a rule: its kind, the offsets of its state in a record, and its
// hyperparameters; see core/rules.
template <class Device>
void update_rows(const Tensor& blocks, int64_t block_shift, int64_t meta_offset, int64_t record_bytes, int64_t type,
                 int64_t state_type, int64_t dim, int64_t step, bool mark_seen, int64_t seed, Tensors gradients,
                 const Tensor& count, const Tensor& unique, const Tensor& offsets, const Tensor& sources,
                 const std::optional<Tensor>& scales, const std::optional<Tensor>& factor, int64_t kind,
                 Ints state_offsets, Floats values, int64_t t) {
  Device device(unique);
  const Records records{blocks_ref(blocks, block_shift, meta_offset, record_bytes),
                        type,
                        state_type,
                        dim,
                        step,
                        mark_seen,
                        static_cast<uint32_t>(seed)};
  const RuleCall call = rule_call(kind, state_offsets, values);
  std::vector<GradientSpan> spans;
  const auto grouped = Grouped{gradients, count, unique, offsets, sources, scales, factor}.ref(device, spans, dim);
  update_records(device, records, grouped, sources.numel(), unique.numel(), aligned16(spans, dim), call, t);
}

// Updates the records of a call inside jit.
template <class Device>
void update_table(Device& device, const TableRef& table, const UpdateCall& call, const CallFlags* flags) {
  std::vector<GradientSpan> spans;
  spans.reserve(call.feature_count);
  for (int64_t f = 0; f < call.feature_count; ++f) spans.push_back({0, call.gradients[f].values, table.dim});
  const GroupsRef groups = GroupsRef::in(const_cast<int64_t*>(call.context), call.positions, call.scaled != 0);
  GroupedGradients grouped{};
  device.place(grouped.features, spans);
  grouped.count = groups.count;
  grouped.unique = groups.unique;
  grouped.offsets = groups.starts;
  grouped.sources = groups.sources;
  grouped.scales = groups.scales;
  const Records records{table.blocks, table.type, table.state_type, table.dim,
                        call.step,    true,       call.seed,        &flags->repeated};
  update_records(device, records, grouped, call.positions, call.positions, aligned16(spans, table.dim), call.rule,
                 call.t);
}

// An update inside jit.
template <class Device>
void update_call(Device& device, const TableRef& table, const UpdateCall& call, CallFlags* flags) {
  device.for_each(1, 1, StartUpdate{call.turn, flags, call.context, call.generation});
  device.unless(&flags->refused, [&] { update_table(device, table, call, flags); });
  device.for_each(1, 1, EndUpdate{call.turn, flags});
}

template <class Device, class Library>
void register_update(Library& m) {
  m.impl("reduce_rows", TORCH_BOX(&reduce_rows<Device>));
  m.impl("sum_squares", TORCH_BOX(&sum_squares<Device>));
  m.impl("clip_rows", TORCH_BOX(&clip_rows<Device>));
  m.impl("update_rows", TORCH_BOX(&update_rows<Device>));
}

}  // namespace recis
