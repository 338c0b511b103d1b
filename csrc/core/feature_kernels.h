// The kernels of features as plain functions, for callers without torch, like core/table_kernels.h: what
// librecis_cpu_<level>.so offers to csrc/xla beside its torch operators.
//
// A library exports recis_feature_kernels(); kFeatureKernelsVersion must grow whenever a type here changes.
#pragma once

#include <cstdint>

#include "core/bags.h"
#include "core/for_each.h"
#include "core/table_kernels.h"

namespace recis {

inline constexpr int64_t kFeatureKernelsVersion = 1;

// The type of the elements of an array.
enum class NumberType : int32_t { kInt64 = 0, kInt32 = 1, kFloat32 = 2, kFloat64 = 3 };

struct HashCall {
  int64_t kind;        // a HashKind
  const int64_t* ids;  // [count]
  int64_t count;
  int64_t* out;  // [count]
};

struct ModCall {
  uint64_t modulus;
  const int64_t* ids;  // [count]
  int64_t count;
  void* out;  // [count] of out_type: kInt64, or kInt32 if the modulus is at most 2^31
  NumberType out_type;
};

struct BucketizeCall {
  const void* values;      // [count] of `type`: kInt64, kFloat32 or kFloat64
  const void* boundaries;  // [boundary_count] of `type`, sorted
  int64_t count;
  int64_t boundary_count;
  void* out;  // [count] of out_type: kInt64, or kInt32 if there are fewer than 2^31 boundaries
  NumberType type;
  NumberType out_type;
  int32_t right;       // whether a value equal to a boundary belongs to the bucket above it
  int32_t refuse_nan;  // whether a NaN makes the call fail
};

// Bags of consecutive rows of an array [rows, dim]: bag b has the rows offsets[b] .. offsets[b + 1].
struct BagsCall {
  const int64_t* offsets;  // [bags + 1]
  int64_t bags;
  int64_t rows;
  int64_t dim;
  Combiner combiner;
};

// A call with bad arguments, or without memory, returns kFailed and writes a sentence to reason [kReasonBytes].
struct FeatureKernels {
  int64_t version;
  Outcome (*hash_ids)(const Pool&, const HashCall&, char* reason);
  Outcome (*mod_ids)(const Pool&, const ModCall&, char* reason);
  Outcome (*bucketize)(const Pool&, const BucketizeCall&, char* reason);
  // out [bags, dim] = the combined rows of each bag of `values`. `winners` [bags, dim]: for kMax, the index within the
  // bag of the row that each element came from; or null.
  Outcome (*combine_bags)(const Pool&, const BagsCall&, const float* values, float* out, int32_t* winners,
                          char* reason);
  // out [rows, dim] = the gradient of each row, given `gradients` [bags, dim] of the combined rows; 0 outside all bags.
  Outcome (*spread_bags)(const Pool&, const BagsCall&, const float* gradients, const int32_t* winners, float* out,
                         char* reason);
};

}  // namespace recis

extern "C" {
// The kernels of a library, which live as long as it is loaded.
__attribute__((visibility("default"))) const recis::FeatureKernels* recis_feature_kernels();
}
