// The kernels of tables as plain functions, for callers without torch: what librecis_cpu_<level>.so and
// librecis_cuda.so offer to csrc/xla beside their torch operators.
//
// Both sides include this file and the headers of core/, and pass plain data only. A library exports
// recis_table_kernels(); kKernelsVersion must grow whenever a type here or one that it contains changes.
#pragma once

#include <cstdint>
#include <cstring>
#include <exception>

#include "core/bags.h"
#include "core/blocks.h"
#include "core/chain.h"
#include "core/for_each.h"
#include "core/rules/rule.h"
#include "core/table.h"

namespace recis {

inline constexpr int64_t kKernelsVersion = 4;

// Where a call runs. On a device it only queues work on the stream.
struct Launch {
  const Pool* pool;  // the CPU's threads
  void* stream;      // of the device, as CUDA's cudaStream_t
  int32_t device;    // the device's number
  // Returns memory of the device, aligned to 16 bytes, which lives until the work that the call has queued is done;
  // null if there is none.
  void* (*allocate)(void* self, int64_t bytes);
  void* self;
};

// A table: all that a lookup or an update may know about it.
struct TableRef {
  IdMapRef map;
  int64_t* counters;         // [kCounters]
  const int64_t* free_rows;  // [counters[kFree]]
  int64_t max_rows;          // rows that fit into the blocks
  int64_t max_slots;         // slots that may be in use
  BlocksRef blocks;
  int64_t type;        // element type of the embedding: 0 float32, 1 bfloat16, 2 float16
  int64_t state_type;  // that of the optimizer state
  int64_t dim;
  const Initializer* initializers;  // by member table
  RecordStart start;
};

// The ids of one feature, and room for its vectors.
struct FeatureCall {
  const int64_t* ids;      // [length]
  const int64_t* offsets;  // [vectors + 1]; null: one id per vector
  int64_t length;          // with offsets, an upper bound: ids past the last offset are not used
  int64_t vectors;
  int64_t member;
  int32_t combiner;
  int32_t unknown_zeros;  // whether an id without a row counts as zeros instead of its first value
  float* out;             // [vectors, dim]
};

// The positions of a lookup grouped by row, as core/reduce.h reads them. Buffers are upper bounds for N positions.
struct GroupsRef {
  int64_t* count;    // [1]
  int64_t* unique;   // [N]
  int64_t* starts;   // [N + 1]
  int64_t* sources;  // [N]
  float* scales;     // [N]; null if every factor is 1

  // The groups in a lookup's context.
  static GroupsRef in(int64_t* context, int64_t positions, bool scaled) {
    int64_t* starts = context + Context::kUnique + positions;
    int64_t* sources = starts + positions + 1;
    return {context + 2, context + Context::kUnique, starts, sources,
            scaled ? reinterpret_cast<float*>(sources + positions) : nullptr};
  }
};

struct LookupCall {
  Turn turn;
  const FeatureCall* features;
  int64_t feature_count;
  int64_t* context;    // Context, words for all ids; null: ids without a row get none
  int32_t scaled;      // whether factors differ from 1
  int32_t watched;     // whether an update must follow, which marks rows as seen; otherwise the lookup does
  int64_t step;        // the step to mark them with
  int64_t generation;  // of the table
};

struct GradientCall {
  const float* values;  // [vectors, dim]
  int64_t vectors;
};

struct UpdateCall {
  Turn turn;
  const GradientCall* gradients;
  int64_t feature_count;
  const int64_t* context;  // of the lookup
  int64_t positions;       // ids of the lookup
  int32_t scaled;          // as in its call
  uint32_t seed;           // of the stochastic rounding
  RuleCall rule;
  int64_t t;           // the optimizer's step, from 1
  int64_t step;        // the table's step, from 1
  int64_t generation;  // of the table
};

enum class Outcome : int32_t { kDone = 0, kFailed = 1 };

inline constexpr int64_t kReasonBytes = 256;

// A call that its chain refuses (core/chain.h) writes its token, and zeros to the outputs of a lookup; nothing else. A
// call without memory returns kFailed and writes a sentence to reason [kReasonBytes]; then no later call can run.
struct TableKernels {
  int64_t version;
  Outcome (*lookup)(const Launch&, const TableRef&, const LookupCall&, char* reason);
  Outcome (*update)(const Launch&, const TableRef&, const UpdateCall&, char* reason);
};

// Calls a function, whose exceptions become kFailed and a reason.
template <class F>
Outcome without_exceptions(char* reason, F&& f) {
  const char* text = "";
  try {
    return f();
  } catch (const std::exception& error) {
    text = error.what();
  } catch (...) {
    text = "unknown exception";
  }
  std::strncpy(reason, text, kReasonBytes - 1);
  reason[kReasonBytes - 1] = '\0';
  return Outcome::kFailed;
}

}  // namespace recis

extern "C" {
// The kernels of a library, which live as long as it is loaded.
__attribute__((visibility("default"))) const recis::TableKernels* recis_table_kernels();
}
