// Operators of EmbeddingBlocks (kernels: core/blocks.h, core/gather.h).
#pragma once

#include "core/blocks.h"
#include "core/gather.h"
#include "ops/common.h"

namespace recis {

// Initializers travel as three lists: kinds [F], values [2 F] (a, b), keys [F].
inline Initializer initializer(const Ints& kinds, const Floats& values, const Ints& keys, size_t f) {
  return {static_cast<InitKind>(kinds[f]), static_cast<float>(values[2 * f]), static_cast<float>(values[2 * f + 1]),
          static_cast<uint64_t>(keys[f])};
}

template <class Device>
void blocks_init_fresh(const Tensor& blocks, int64_t block_shift, int64_t record_bytes, const Tensor& counters,
                       const Tensor& fresh, Tensors ids, Ints init_kinds, Floats init_values, Ints init_keys,
                       int64_t dim, Ints field_offsets, Ints field_widths, Floats field_values) {
  Device device(fresh);
  std::vector<InitSpan> spans;
  int64_t total = 0;
  for (size_t f = 0; f < ids.size(); ++f) {
    spans.push_back({total, data<int64_t>(ids[f], "ids"), initializer(init_kinds, init_values, init_keys, f)});
    total += ids[f].numel();
  }
  RecordStart start{};
  start.dim = dim;
  start.fields = static_cast<int32_t>(field_offsets.size());
  RECIS_CHECK(start.fields <= kMaxStateFields, "a record has at most ", kMaxStateFields, " state fields");
  for (int32_t k = 0; k < start.fields; ++k) {
    start.field[k] = {field_offsets[k], field_widths[k], static_cast<float>(field_values[k])};
  }
  InitFreshRows kernel{};
  device.place(kernel.spans, spans);
  kernel.spans.total = total;
  kernel.blocks = blocks_ref(blocks, block_shift, record_bytes);
  int64_t* count = data<int64_t>(counters, "counters");
  kernel.counters = count;
  kernel.fresh = data<int64_t>(fresh, "fresh");
  kernel.start = start;
  // CPU: the counters say how many rows are new. CUDA: launched over the bound, the kernel looks itself.
  device.for_each(device.difference(count, fresh.numel()), record_bytes / 4, kernel);
  device.for_each(1, 1, CommitFreshRows{count});
}

template <class Device>
void gather_bags(const Tensor& blocks, int64_t block_shift, int64_t record_bytes, const Tensor& rows, Tensors ids,
                 Tensors offsets, Ints combiners, Ints init_kinds, Floats init_values, Ints init_keys, int64_t dim,
                 Tensors outs) {
  Device device(rows);
  std::vector<BagSpan> spans;
  int64_t bags = 0;
  int64_t positions = 0;
  bool aligned = dim % 4 == 0;
  for (size_t f = 0; f < ids.size(); ++f) {
    float* out = data<float>(outs[f], "out");
    RECIS_CHECK(outs[f].size(1) == dim, "out must be [bags, dim]");
    const bool ragged = offsets[f].numel() > 0;
    RECIS_CHECK(ragged ? offsets[f].numel() == outs[f].size(0) + 1 : ids[f].numel() == outs[f].size(0),
                "offsets or ids do not fit the number of bags");
    spans.push_back({bags, positions, ragged ? data<int64_t>(offsets[f], "offsets") : nullptr,
                     data<int64_t>(ids[f], "ids"), out, static_cast<Combiner>(combiners[f]),
                     initializer(init_kinds, init_values, init_keys, f)});
    aligned = aligned && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    bags += outs[f].size(0);
    positions += ids[f].numel();
  }
  RECIS_CHECK(rows.numel() == positions, "rows must hold one element for each id");
  device.with_width(dim, aligned, [&](auto width) {
    GatherBags<decltype(width)::value> kernel{};
    device.place(kernel.segments, spans);
    kernel.segments.total = bags;
    kernel.blocks = blocks_ref(blocks, block_shift, record_bytes);
    kernel.rows = data<int64_t>(rows, "rows");
    kernel.dim = dim;
    device.for_each(bags, dim, kernel);
  });
}

template <class Device, bool kRead>
void copy_field(const Tensor& blocks, int64_t block_shift, int64_t record_bytes, const Tensor& rows, int64_t offset,
                const Tensor& values) {
  Device device(rows);
  const int64_t width = values.size(1);
  RECIS_CHECK(values.size(0) == rows.numel(), "values must be [rows, width]");
  RECIS_CHECK(offset >= 0 && offset % 4 == 0 && offset + width * 4 <= record_bytes, "the part lies outside the record");
  device.for_each(rows.numel(), width,
                  CopyField<kRead>{blocks_ref(blocks, block_shift, record_bytes), data<int64_t>(rows, "rows"), offset,
                                   width, data<float>(values, "values")});
}

template <class Device>
void blocks_read(const Tensor& blocks, int64_t block_shift, int64_t record_bytes, const Tensor& rows, int64_t offset,
                 const Tensor& values) {
  copy_field<Device, true>(blocks, block_shift, record_bytes, rows, offset, values);
}

template <class Device>
void blocks_write(const Tensor& blocks, int64_t block_shift, int64_t record_bytes, const Tensor& rows, int64_t offset,
                  const Tensor& values) {
  copy_field<Device, false>(blocks, block_shift, record_bytes, rows, offset, values);
}

template <class Device, class Library>
void register_blocks(Library& m) {
  m.impl("blocks_init_fresh", TORCH_BOX(&blocks_init_fresh<Device>));
  m.impl("gather_bags", TORCH_BOX(&gather_bags<Device>));
  m.impl("blocks_read", TORCH_BOX(&blocks_read<Device>));
  m.impl("blocks_write", TORCH_BOX(&blocks_write<Device>));
}

}  // namespace recis
