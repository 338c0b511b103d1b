// Kernels of single element-wise operators: one operation over one tensor.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/maps.h"

namespace recis {

// Reports that element i has no result: *fault becomes 1 + i for one of these elements. `fault` may be null.
RECIS_HD void refuse(int64_t* fault, int64_t i) {
#if defined(__CUDA_ARCH__)
  if (fault != nullptr) *fault = i + 1;
#else
  if (fault != nullptr) __atomic_store_n(fault, i + 1, __ATOMIC_RELAXED);
#endif
}

// out[i] = map(values[i]), for the maps of maps.h.
template <class Map, class In, class Out>
struct MapValues {
  const In* values;
  Map map;
  Out* out;
  const int64_t* used;    // [1]: the number of rows in use; null: all. Elements after them are never refused
  int64_t width;          // elements of a row
  int64_t* const* fault;  // see ops/fault_word.h; null: no element is refused

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes) const {
    const In value = values[i];
    if (fault != nullptr && map.bad(value) && (used == nullptr || i < *used * width)) refuse(*fault, i);
    out[i] = map(value);
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

}  // namespace recis
