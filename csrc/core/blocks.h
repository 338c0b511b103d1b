// Kernels of EmbeddingBlocks: first values of new rows, plain reads and writes of one part of the records.
#pragma once

#include <cstdint>

#include "core/id_map.h"
#include "core/initializer.h"
#include "core/table.h"

namespace recis {

// One part of a record after the embedding: optimizer state that starts as a constant.
struct StateField {
  int64_t offset;  // bytes from the record's start
  int64_t width;   // float32 elements
  float first_value;
};

inline constexpr int kMaxStateFields = 8;

struct RecordStart {
  int64_t dim;
  int32_t fields;
  StateField field[kMaxStateFields];

  // Writes a whole record: the embedding by its initializer, then each state field.
  template <class Lanes>
  RECIS_HD void write(char* record, const Initializer& init, int64_t id, Lanes lanes) const {
    float* embedding = reinterpret_cast<float*>(record);
    for (int64_t quad = lanes.rank; quad * 4 < dim; quad += lanes.size) {
      float values[4];
      first_values(init, id, quad, values);
      for (int j = 0; j < 4 && quad * 4 + j < dim; ++j) embedding[quad * 4 + j] = values[j];
    }
    for (int32_t f = 0; f < fields; ++f) {
      float* state = reinterpret_cast<float*>(record + field[f].offset);
      for (int64_t d = lanes.rank; d < field[f].width; d += lanes.size) state[d] = field[f].first_value;
    }
  }
};

// Ids with the first values of their member table.
struct InitSpan {
  int64_t first;
  const int64_t* ids;
  Initializer init;
};

// Gives the rows that a find-or-insert has just handed out their first values. Launched over an upper bound of new
// rows; how many there are is read from the counters, so that the host need not know.
struct InitFreshRows {
  Segments<InitSpan> spans;  // not named `segments`: items are new rows, not positions
  BlocksRef blocks;
  const int64_t* counters;
  const int64_t* fresh;
  RecordStart start;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    const int64_t before = counters[1];
    if (i >= counters[0] - before) return;
    const int64_t position = fresh[i];
    const InitSpan& span = spans[spans.find(position)];
    start.write(blocks.record(before + i), span.init, span.ids[position - span.first], lanes);
  }
};

// Closes a find-or-insert: the rows handed out so far are old from now on.
struct CommitFreshRows {
  int64_t* counters;

  template <class Lanes>
  RECIS_HD void operator()(int64_t, Lanes lanes) const {
    if (lanes.rank == 0) counters[1] = counters[0];
  }
};

// values[i] = part of the record of rows[i] (kRead), or the other way round. Rows are distinct where written.
template <bool kRead>
struct CopyField {
  BlocksRef blocks;
  const int64_t* rows;
  int64_t offset;  // bytes
  int64_t width;   // float32 elements
  float* values;   // [n, width]

  RECIS_HD void prefetch(int64_t i) const {
#if !defined(__CUDA_ARCH__)
    const char* part = blocks.record(rows[i]) + offset;
    for (int64_t at = 0; at < width * 4; at += 64) __builtin_prefetch(part + at, kRead ? 0 : 1, 3);
#endif
  }

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    float* part = reinterpret_cast<float*>(blocks.record(rows[i]) + offset);
    float* value = values + i * width;
    for (int64_t d = lanes.rank; d < width; d += lanes.size) {
      if constexpr (kRead) {
        value[d] = part[d];
      } else {
        part[d] = value[d];
      }
    }
  }
};

}  // namespace recis
