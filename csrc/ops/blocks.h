// Operators of EmbeddingBlocks (kernels: core/blocks.h).
#pragma once

#include "core/blocks.h"
#include "ops/common.h"

namespace recis {

inline const Initializer* initializer_data(const Tensor& initializers) {
  RECIS_CHECK(initializers.dim() == 2 && initializers.size(1) * 8 == sizeof(Initializer),
              "initializers must be [members, 5]");
  return reinterpret_cast<const Initializer*>(data<int64_t>(initializers, "initializers"));
}

inline RecordStart record_start(int64_t dim, const Ints& offsets, const Ints& widths, const Ints& sizes,
                                const Ints& values) {
  RecordStart start{};
  start.dim = dim;
  start.fields = static_cast<int32_t>(offsets.size());
  RECIS_CHECK(start.fields <= kMaxStateFields, "a record has at most ", kMaxStateFields, " state fields");
  for (int32_t k = 0; k < start.fields; ++k) {
    start.field[k] = {offsets[k], widths[k], static_cast<int32_t>(sizes[k]), static_cast<uint32_t>(values[k])};
  }
  return start;
}

// The ids of all features, end to end. Kernels may read them until they have run.
inline std::vector<IdSpan> id_spans(const Tensors& ids, const Ints& members) {
  std::vector<IdSpan> spans;
  int64_t total = 0;
  for (size_t f = 0; f < ids.size(); ++f) {
    spans.push_back({total, data<int64_t>(ids[f], "ids"), members[f], nullptr});
    total += ids[f].numel();
  }
  return spans;
}

// The kernel that gives fresh rows their first values; everything about it that may raise.
template <class E, class Device>
InitFreshRows<E> init_fresh_rows(Device& device, const BlocksRef& blocks, const Tensor& rows, const Tensor& fresh,
                                 const std::vector<IdSpan>& spans, const Tensor& initializers,
                                 const RecordStart& start) {
  InitFreshRows<E> kernel{};
  device.place(kernel.spans, spans);
  kernel.spans.total = rows.numel();
  kernel.blocks = blocks;
  kernel.initializers = initializer_data(initializers);
  kernel.rows = data<int64_t>(rows, "rows");
  kernel.fresh = data<int64_t>(fresh, "fresh");
  kernel.start = start;
  return kernel;
}

template <class Device>
void blocks_init_fresh(const Tensor& blocks, int64_t block_shift, int64_t meta_offset, int64_t record_bytes,
                       int64_t type, const Tensor& counters, const Tensor& rows, const Tensor& fresh, Tensors ids,
                       Ints members, const Tensor& initializers, int64_t dim, Ints field_offsets, Ints field_widths,
                       Ints field_sizes, Ints field_values) {
  Device device(fresh);
  const std::vector<IdSpan> spans = id_spans(ids, members);
  const RecordStart start = record_start(dim, field_offsets, field_widths, field_sizes, field_values);
  const int64_t* count = data<int64_t>(counters, "counters");
  with_element(type, [&](auto element) {
    const auto kernel = init_fresh_rows<decltype(element)>(
        device, blocks_ref(blocks, block_shift, meta_offset, record_bytes), rows, fresh, spans, initializers, start);
    device.for_each_counted(count + kFresh, fresh.numel(), record_bytes / 4, kernel);
  });
}

template <class Device, bool kRead>
void copy_field(const Tensor& blocks, int64_t block_shift, int64_t meta_offset, int64_t record_bytes,
                const Tensor& rows, int64_t offset, const Tensor& values) {
  Device device(rows);
  const int64_t width = values.size(1);
  const bool wide = values.scalar_type() == ScalarType::Float;
  RECIS_CHECK(wide || values.scalar_type() == ScalarType::BFloat16 || values.scalar_type() == ScalarType::Half,
              "values must be float32, bfloat16 or float16");
  const int64_t size = wide ? 4 : 2;
  RECIS_CHECK(values.size(0) == rows.numel() && values.is_contiguous(), "values must be [rows, width], contiguous");
  RECIS_CHECK(offset >= 0 && offset % size == 0 && offset + width * size <= record_bytes,
              "the part must lie within the record");
  const BlocksRef ref = blocks_ref(blocks, block_shift, meta_offset, record_bytes);
  const auto copy = [&](auto element) {
    using T = decltype(element);
    device.for_each(rows.numel(), width,
                    CopyField<T, kRead>{ref, data<int64_t>(rows, "rows"), offset, width,
                                        static_cast<T*>(memory(values, "values"))});
  };
  if (wide) {
    copy(uint32_t{});
  } else {
    copy(uint16_t{});
  }
}

template <class Device, bool kRead>
void copy_meta(const Tensor& blocks, int64_t block_shift, int64_t meta_offset, int64_t record_bytes, const Tensor& rows,
               const Tensor& columns) {
  Device device(rows);
  RECIS_CHECK(columns.size(0) == 3 && columns.size(1) == rows.numel(), "columns must be [3, rows]");
  device.for_each(rows.numel(), 1,
                  CopyMeta<kRead>{blocks_ref(blocks, block_shift, meta_offset, record_bytes),
                                  data<int64_t>(rows, "rows"), rows.numel(), data<int64_t>(columns, "columns")});
}

template <class Device>
void copy_records(const Tensor& blocks, int64_t block_shift, int64_t meta_offset, int64_t record_bytes,
                  const Tensor& from, const Tensor& to) {
  Device device(from);
  RECIS_CHECK(from.numel() == to.numel(), "source and target must have the same number of rows");
  device.for_each(from.numel(), record_bytes / 8,
                  CopyRecords{blocks_ref(blocks, block_shift, meta_offset, record_bytes), data<int64_t>(from, "source"),
                              data<int64_t>(to, "target")});
}

template <class Device>
void see_rows(const Tensor& blocks, int64_t block_shift, int64_t meta_offset, int64_t record_bytes, const Tensor& count,
              const Tensor& unique, const Tensor& offsets, int64_t step) {
  Device device(unique);
  const int64_t* row_count = data<int64_t>(count, "count");
  device.for_each_counted(row_count, unique.numel(), 1,
                          SeeRows{blocks_ref(blocks, block_shift, meta_offset, record_bytes),
                                  data<int64_t>(unique, "unique"), data<int64_t>(offsets, "offsets"), step});
}

template <class Device>
void mark_touched(const Tensor& blocks, int64_t block_shift, int64_t meta_offset, int64_t record_bytes, int64_t step,
                  const Tensor& marks) {
  Device device(blocks);
  const int64_t rows = marks.numel();
  device.for_each(rows, 1,
                  MarkTouched{blocks_ref(blocks, block_shift, meta_offset, record_bytes), rows, step,
                              data<uint8_t>(marks, "marks")});
}

template <class Device, class Library>
void register_blocks(Library& m) {
  m.impl("blocks_init_fresh", TORCH_BOX(&blocks_init_fresh<Device>));
  m.impl("blocks_read", TORCH_BOX((&copy_field<Device, true>)));
  m.impl("blocks_write", TORCH_BOX((&copy_field<Device, false>)));
  m.impl("blocks_read_meta", TORCH_BOX((&copy_meta<Device, true>)));
  m.impl("blocks_write_meta", TORCH_BOX((&copy_meta<Device, false>)));
  m.impl("blocks_copy_records", TORCH_BOX(&copy_records<Device>));
  m.impl("blocks_see_rows", TORCH_BOX(&see_rows<Device>));
  m.impl("blocks_mark_touched", TORCH_BOX(&mark_touched<Device>));
}

}  // namespace recis
