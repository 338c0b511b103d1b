// Operators of the count-min sketch (kernels: core/sketch.h).
#pragma once

#include "core/sketch.h"
#include "ops/common.h"
#include "ops/id_map.h"

namespace recis {

// The sketch of `words`, int64 [member tables, blocks, kSketchWords].
inline SketchRef sketch_ref(const Tensor& words, int64_t first_block, int64_t block_shift, int64_t cell_bits) {
  RECIS_CHECK(words.dim() == 3 && words.size(2) == kSketchWords, "words must be [member tables, blocks, 8]");
  RECIS_CHECK(cell_bits == 2 || cell_bits == 4 || cell_bits == 8 || cell_bits == 16,
              "a cell has 2, 4, 8 or 16 bits, got ", cell_bits);
  RECIS_CHECK(first_block >= 0 && block_shift >= 24 && block_shift < 64, "there are at most 2^40 blocks");
  return {reinterpret_cast<uint64_t*>(data<int64_t>(words, "words")), static_cast<uint64_t>(first_block),
          static_cast<uint64_t>(words.size(1)), static_cast<int32_t>(block_shift), static_cast<int32_t>(cell_bits)};
}

template <class Device>
void sketch_admit(const Tensor& words, int64_t first_block, int64_t block_shift, int64_t cell_bits, Tensors ids,
                  Ints members, Tensors used, const Tensor& rows, const std::optional<Tensor>& counts, int64_t least,
                  const Tensor& admitted) {
  Device device(words);
  const SketchRef sketch = sketch_ref(words, first_block, block_shift, cell_bits);
  std::vector<IdSpan> spans;
  const Segments<IdSpan> segments = spans_of(device, {ids, members, used}, rows, spans);
  for (int64_t member : members) {
    RECIS_CHECK(member >= 0 && member < words.size(0), "there is no member table ", member);
  }
  RECIS_CHECK(admitted.numel() == rows.numel() && (!counts.has_value() || counts->numel() == rows.numel()),
              "counts and admitted must hold one element for each id");
  const SketchIds sketched{segments, sketch, data<int64_t>(rows, "rows")};
  const CountInSketch count{sketched, data_or_null<int64_t>(counts, "counts")};
  const AdmitSketched admit{sketched, static_cast<uint64_t>(least), data<uint8_t>(admitted, "admitted")};
  // All ids are counted before one is admitted, so that every position of an id gets the same answer.
  device.for_each(rows.numel(), 1, count);
  device.for_each(rows.numel(), 1, admit);
}

template <class Device>
void sketch_halve(const Tensor& words, int64_t cell_bits, int64_t times) {
  Device device(words);
  RECIS_CHECK(times > 0 && times <= cell_bits, "cells are halved 1 to ", cell_bits, " times, got ", times);
  device.for_each(words.size(0) * words.size(1), kSketchWords,
                  HalveSketch{sketch_ref(words, 0, 24, cell_bits), static_cast<int32_t>(times)});
}

template <class Device, class Library>
void register_sketch(Library& m) {
  m.impl("sketch_admit", TORCH_BOX(&sketch_admit<Device>));
  m.impl("sketch_halve", TORCH_BOX(&sketch_halve<Device>));
}

}  // namespace recis
