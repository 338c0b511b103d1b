// The functions of FeatureKernels (core/feature_kernels.h) on the CPU. Each is defined beside the operators that launch
// the same kernels, so that these are compiled once.
#pragma once

#include "core/feature_kernels.h"

namespace recis {

Outcome hash_ids_cpu(const Pool& pool, const HashCall& call, char* reason);
Outcome mod_ids_cpu(const Pool& pool, const ModCall& call, char* reason);
Outcome bucketize_cpu(const Pool& pool, const BucketizeCall& call, char* reason);
Outcome combine_bags_cpu(const Pool& pool, const BagsCall& call, const float* values, float* out, int32_t* winners,
                         char* reason);
Outcome spread_bags_cpu(const Pool& pool, const BagsCall& call, const float* gradients, const int32_t* winners,
                        float* out, char* reason);

}  // namespace recis
