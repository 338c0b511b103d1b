// Kernels of EmbeddingBlocks: initial values of new rows, row metadata, plain reads and writes of one part of the
// records.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/element.h"
#include "core/for_each.h"
#include "core/id_map.h"
#include "core/initializer.h"
#include "core/table.h"

namespace recis {

// One part of a record after the embedding: optimizer state with a constant initial value.
struct StateField {
  int64_t offset;        // bytes from the record's start
  int64_t width;         // elements
  int32_t element_size;  // bytes: 4 for float32, 2 for bfloat16 and float16
  uint32_t first_value;  // its bits in memory
};

inline constexpr int kMaxStateFields = 8;

// The initial values of a record.
struct RecordStart {
  int64_t dim;
  int32_t fields;
  StateField field[kMaxStateFields];

  // Writes a whole record: the embedding by its initializer, then each state field.
  template <class E, class Lanes>
  RECIS_HD void write(char* record, RowMeta* meta, const Initializer& init, int64_t id, Lanes lanes) const {
    E* embedding = reinterpret_cast<E*>(record);
    for (int64_t quad = lanes.rank; quad * 4 < dim; quad += lanes.size) {
      float values[4];
      first_values(init, id, quad, values);
      for (int j = 0; j < 4 && quad * 4 + j < dim; ++j) store_element(embedding + quad * 4 + j, values[j]);
    }
    if (lanes.rank == 0) *meta = RowMeta::of(0, 0, 0);
    for (int32_t f = 0; f < fields; ++f) {
      char* state = record + field[f].offset;
      for (int64_t d = lanes.rank; d < field[f].width; d += lanes.size) {
        if (field[f].element_size == 4) {
          reinterpret_cast<uint32_t*>(state)[d] = field[f].first_value;
        } else {
          reinterpret_cast<uint16_t*>(state)[d] = static_cast<uint16_t>(field[f].first_value);
        }
      }
    }
  }
};

// Writes the initial values of the rows that a find-or-insert has just allocated. One item per new row; the counter
// kFresh holds their number, which the host need not know.
template <class E>
struct InitFreshRows {
  Segments<IdSpan> spans;  // not named `segments`, because items are new rows, not positions
  BlocksRef blocks;
  const Initializer* initializers;  // by member table
  const int64_t* rows;
  const int64_t* fresh;
  RecordStart start;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    const int64_t position = fresh[i];
    const IdSpan& span = spans[spans.find(position)];
    const int64_t row = rows[position];
    start.template write<E>(blocks.record(row), blocks.meta(row), initializers[span.member], span.id(position), lanes);
  }
};

// Marks the rows of a training lookup as seen: row unique[u] occurs offsets[u + 1] - offsets[u] times in it.
struct SeeRows {
  BlocksRef blocks;
  const int64_t* unique;
  const int64_t* offsets;
  int64_t step;

  static constexpr int64_t fetched_bytes() { return 64; }

  RECIS_HD void prefetch(int64_t u) const { prefetch_bytes<true>(blocks.meta(unique[u]), 1); }

  template <class Lanes>
  RECIS_HD void operator()(int64_t u, Lanes lanes) const {
    if (lanes.rank != 0) return;
    RowMeta* meta = blocks.meta(unique[u]);
    *meta = RowMeta::of(meta->updated_step(), step, meta->frequency() + offsets[u + 1] - offsets[u]);
  }
};

// marks[i] = whether row i was updated or seen after `step`. One item per row, in memory order.
struct MarkTouched {
  BlocksRef blocks;
  int64_t n;  // rows
  int64_t step;
  uint8_t* marks;

  static constexpr int64_t fetched_bytes() { return 64; }

  RECIS_HD void prefetch(int64_t i) const {
    if (i < n) prefetch_bytes<false>(blocks.meta(i), 1);
  }

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    if (lanes.rank != 0) return;
    const RowMeta* meta = blocks.meta(i);
    marks[i] = meta->updated_step() > step || meta->seen_step() > step ? 1 : 0;
  }
};

// Copies the updated step, seen step and frequency of rows[i] to columns[0..2][i] (kRead), or back.
template <bool kRead>
struct CopyMeta {
  BlocksRef blocks;
  const int64_t* rows;
  int64_t n;
  int64_t* columns;  // [3, n]

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    if (lanes.rank != 0) return;
    RowMeta* meta = blocks.meta(rows[i]);
    if constexpr (kRead) {
      columns[i] = meta->updated_step();
      columns[n + i] = meta->seen_step();
      columns[2 * n + i] = meta->frequency();
    } else {
      *meta = RowMeta::of(columns[i], columns[n + i], columns[2 * n + i]);
    }
  }
};

// Copies a part of the record of rows[i] to values[i] (kRead), or back; rows must be distinct. T only has the size of
// an element, because bits are copied.
template <class T, bool kRead>
struct CopyField {
  BlocksRef blocks;
  const int64_t* rows;
  int64_t offset;  // bytes
  int64_t width;   // elements
  T* values;       // [n, width]

  int64_t fetched_bytes() const { return width * static_cast<int64_t>(sizeof(T)); }

  RECIS_HD void prefetch(int64_t i) const {
    prefetch_bytes<!kRead>(blocks.record(rows[i]) + offset, width * static_cast<int64_t>(sizeof(T)));
  }

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    T* part = reinterpret_cast<T*>(blocks.record(rows[i]) + offset);
    T* value = values + i * width;
    for (int64_t d = lanes.rank; d < width; d += lanes.size) {
      if constexpr (kRead) {
        value[d] = part[d];
      } else {
        part[d] = value[d];
      }
    }
  }
};

// Copies whole records from rows `from` to rows `to`. The rows in `to` must be distinct and must not occur in `from`.
struct CopyRecords {
  BlocksRef blocks;
  const int64_t* from;
  const int64_t* to;

  int64_t lanes() const { return blocks.record_bytes / 16; }

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    // A thread of CUDA moves 16 bytes at once; the CPU's compiler vectorizes a loop over words.
    using Part = std::conditional_t<std::is_same_v<Lanes, OneLane>, uint64_t, Word<16>>;
    const Part* source = reinterpret_cast<const Part*>(blocks.record(from[i]));
    Part* target = reinterpret_cast<Part*>(blocks.record(to[i]));
    const int64_t words = blocks.record_bytes / static_cast<int64_t>(sizeof(Part));
    for (int64_t w = lanes.rank; w < words; w += lanes.size) target[w] = source[w];
  }
};

}  // namespace recis
