// Operators of the GPU cache of records (kernels: core/cache.h).
#pragma once

#include "core/cache.h"
#include "ops/common.h"

namespace recis {

// A cache is passed as these arguments, in this order; first_place is a multiple of the rows of a block.
#define RECIS_CACHE_MUT "Tensor(b!) tags, Tensor(c!) states, Tensor(d!) counters, int first_place"

inline CacheRef cache_ref(const Tensor& tags, const Tensor& states, const Tensor& counters, int64_t first_place) {
  const int64_t ways = tags.numel();
  RECIS_CHECK(ways > 0 && ways % kWays == 0 && states.numel() == ways, "tags and states must be [sets, ", kWays, "]");
  RECIS_CHECK(counters.numel() == kCounterCopies * kCacheCounters, "counters must be [", kCounterCopies, ", ",
              static_cast<int>(kCacheCounters), "]");
  auto* tag_data = reinterpret_cast<uint32_t*>(data<int32_t>(tags, "tags"));
  RECIS_CHECK(reinterpret_cast<uintptr_t>(tag_data) % 16 == 0, "tags must start at a multiple of 16 bytes");
  return {tag_data, reinterpret_cast<uint64_t*>(data<int64_t>(states, "states")), data<int64_t>(counters, "counters"),
          ways / kWays, first_place};
}

template <class Device>
void cache_admit(const Tensor& blocks, int64_t block_shift, int64_t meta_offset, int64_t record_bytes,
                 const Tensor& tags, const Tensor& states, const Tensor& counters, int64_t first_place,
                 const Tensor& count, const Tensor& unique, const Tensor& missing, int64_t lookup, int64_t epoch) {
  Device device(unique);
  const CacheRef cache = cache_ref(tags, states, counters, first_place);
  const BlocksRef ref = blocks_ref(blocks, block_shift, meta_offset, record_bytes);
  const int64_t bound = unique.numel();
  RECIS_CHECK(missing.numel() >= bound, "missing must hold one element for each row");
  const int64_t* rows = data<int64_t>(unique, "unique");
  const int64_t* used = data<int64_t>(count, "count");
  const CacheTime now{static_cast<uint64_t>(lookup), static_cast<uint64_t>(epoch)};
  uint8_t* flags = data<uint8_t>(missing, "missing");
  device.for_each_counted(used, bound, kWays, TouchRows{cache, rows, now, flags});
  device.for_each_counted(used, bound, record_bytes / 4, ClaimWays{cache, ref, rows, now, flags});
}

template <class Device>
void cache_locate(const Tensor& tags, const Tensor& states, const Tensor& counters, int64_t first_place,
                  const Tensor& rows, const std::optional<Tensor>& count, bool writes, const Tensor& places) {
  Device device(rows);
  const CacheRef cache = cache_ref(tags, states, counters, first_place);
  const int64_t bound = rows.numel();
  RECIS_CHECK(places.numel() == bound, "places must hold one element for each row");
  const int64_t* used = data_or_null<int64_t>(count, "count");
  const int64_t* row_data = data<int64_t>(rows, "rows");
  int64_t* place_data = data<int64_t>(places, "places");
  const auto locate = [&](const auto& kernel) {
    if (used == nullptr) {
      device.for_each(bound, kWays, kernel);
    } else {
      device.for_each_counted(used, bound, kWays, kernel);
    }
  };
  if (writes) {
    locate(LocateRows<true>{cache, row_data, place_data});
  } else {
    locate(LocateRows<false>{cache, row_data, place_data});
  }
}

template <class Device>
void cache_write_back(const Tensor& blocks, int64_t block_shift, int64_t meta_offset, int64_t record_bytes,
                      const Tensor& tags, const Tensor& states, const Tensor& counters, int64_t first_place) {
  Device device(tags);
  const CacheRef cache = cache_ref(tags, states, counters, first_place);
  device.for_each(tags.numel(), record_bytes / 4,
                  WriteBackWays{cache, blocks_ref(blocks, block_shift, meta_offset, record_bytes)});
}

template <class Device, class Library>
void register_cache(Library& m) {
  m.impl("cache_admit", TORCH_BOX(&cache_admit<Device>));
  m.impl("cache_locate", TORCH_BOX(&cache_locate<Device>));
  m.impl("cache_write_back", TORCH_BOX(&cache_write_back<Device>));
}

}  // namespace recis
