// A list of features (or other parts), laid end to end over one range of items.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace recis {

// Items [part.first, first of the next part) belong to a part; the last one ends at `total`. T is plain data with a
// member `int64_t first`. Up to kInline parts are passed in the kernel's arguments, which needs no copy to the device
// and works in a CUDA graph; these arguments are limited to 4 KiB. Longer lists are read through `far`, in memory that
// the kernel can access.
template <class T>
struct Segments {
  static constexpr int kInline = sizeof(T) * 64 <= 3072 ? 64 : static_cast<int>(3072 / sizeof(T));

  int32_t count = 0;
  int64_t total = 0;
  const T* far = nullptr;
  T near[kInline];

  RECIS_HD const T& operator[](int32_t part) const { return far == nullptr ? near[part] : far[part]; }

  RECIS_HD int64_t end(int32_t part) const { return part + 1 < count ? (*this)[part + 1].first : total; }

  // The part of item i: the last one with first <= i, so that empty parts are skipped.
  RECIS_HD int32_t find(int64_t i) const {
    int32_t low = 0;
    int32_t high = count;
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      if ((*this)[middle].first <= i) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

}  // namespace recis
