// Kernels of single element-wise operators: one operation over one tensor.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/maps.h"

namespace recis {

// Says that element i has no answer: *refused becomes 1 + i (one of those there are) for the operator to raise. A GPU
// has nobody to tell without a synchronisation: there `refused` is null.
RECIS_HD void refuse(int64_t* refused, int64_t i) {
#if defined(__CUDA_ARCH__)
  if (refused != nullptr) *refused = i + 1;
#else
  if (refused != nullptr) __atomic_store_n(refused, i + 1, __ATOMIC_RELAXED);
#endif
}

// out[i] = ids[i] mod the divisor, the id's 64 bits read as an unsigned number: 0 <= out[i] < divisor.
struct ModIds {
  const int64_t* ids;
  Divisor divisor;
  int64_t* out;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    out[i] = static_cast<int64_t>(divisor.remainder(static_cast<uint64_t>(ids[i])));
  }
};

// out[i] = the hash that `hash` is of ids[i].
struct MultiHashIds {
  const int64_t* ids;
  MultiHash hash;
  int64_t* out;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    out[i] = static_cast<int64_t>(hash(static_cast<uint64_t>(ids[i])));
  }
};

// out[i] = the id of the pair (x[i], y[i]).
struct CrossIds {
  const int64_t* x;
  const int64_t* y;
  int64_t* out;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    out[i] = static_cast<int64_t>(cross_ids(static_cast<uint64_t>(x[i]), static_cast<uint64_t>(y[i])));
  }
};

// out[i] = how many of the sorted boundaries lie at or below values[i] (kRight), or below it. NaN is above all of them.
template <class T, bool kRight>
struct Bucketize {
  const T* values;
  const T* boundaries;
  int64_t count;
  int64_t* out;
  int64_t* refused;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    const T value = values[i];
    if (is_nan(value)) refuse(refused, i);
    out[i] = bucket_of<kRight>(value, boundaries, count);
  }
};

// out[i] = map(values[i])
template <class Map, class In, class Out>
struct MapValues {
  const In* values;
  Map map;
  Out* out;
  int64_t* refused;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    const In value = values[i];
    if (map.bad(value)) refuse(refused, i);
    out[i] = map(value);
  }
};

}  // namespace recis
