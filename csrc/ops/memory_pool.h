// MemoryPool: large buffers of host memory, aligned to 2 MiB, on huge pages if possible, and reused after they are
// freed.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "ops/platform.h"

namespace recis {

class MemoryPool {
 public:
  static constexpr size_t kHugePage = size_t{1} << 21;

  // The pool of the process. Never destroyed: tensors may outlive every static object.
  static MemoryPool& shared() {
    static MemoryPool* const instance = new MemoryPool;
    return *instance;
  }

  // Sizes are rounded up to 1/8 of a power of two, so that batches of slightly different sizes share buffers.
  static size_t round_up(size_t bytes) {
    size_t step = kHugePage;
    while (step * 16 <= bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  // Returns a buffer of a rounded size, or null.
  void* take(size_t size) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto bucket = cache_.find(size);
      if (bucket != cache_.end() && !bucket->second.empty()) {
        void* memory = bucket->second.back();
        bucket->second.pop_back();
        cached_bytes_ -= size;
        return memory;
      }
    }
    void* memory = std::aligned_alloc(kHugePage, size);
    if (memory == nullptr) {  // cached buffers of other sizes may have used up the memory
      release();
      memory = std::aligned_alloc(kHugePage, size);
    }
    if (memory != nullptr) advise_huge_pages(memory, size);
    return memory;
  }

  // Frees the buffers that are not in use.
  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [size, buffers] : cache_) {
      for (void* buffer : buffers) std::free(buffer);
    }
    cache_.clear();
    cached_bytes_ = 0;
  }

  // Takes a buffer back.
  void give(void* memory, size_t size) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (cached_bytes_ + size <= kMaxCached) {
        cache_[size].push_back(memory);
        cached_bytes_ += size;
        return;
      }
    }
    std::free(memory);
  }

 private:
  static constexpr size_t kMaxCached = size_t{1} << 30;

  std::mutex mutex_;
  std::map<size_t, std::vector<void*>> cache_;
  size_t cached_bytes_ = 0;
};

}  // namespace recis
