#include "ops/feature_kernels.h"

const recis::FeatureKernels* recis_feature_kernels() {
  static const recis::FeatureKernels kernels{
      recis::kFeatureKernelsVersion, &recis::hash_ids_cpu,     &recis::mod_ids_cpu,
      &recis::bucketize_cpu,         &recis::combine_bags_cpu, &recis::spread_bags_cpu,
  };
  return &kernels;
}
