// Atomic accesses to plain 64-bit words, the same on CPU and CUDA.
//
// State is held in torch tensors, so words are plain int64, and every concurrent access goes through these functions.
// Memory order is specified at each access (acquire, release) and never by fences, which ThreadSanitizer does not
// model.
#pragma once

#include <cstdint>

#include "core/macros.h"

#if defined(__CUDACC__)
#include <cuda/atomic>
#endif

namespace recis {

template <class Word>
RECIS_HD Word load_acquire(const Word* word) {
#if defined(__CUDA_ARCH__)
  return cuda::atomic_ref<Word, cuda::thread_scope_device>(*const_cast<Word*>(word)).load(cuda::memory_order_acquire);
#else
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
#endif
}

RECIS_HD void store_release(uint64_t* word, uint64_t value) {
#if defined(__CUDA_ARCH__)
  cuda::atomic_ref<uint64_t, cuda::thread_scope_device>(*word).store(value, cuda::memory_order_release);
#else
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
#endif
}

// Stores `desired` and returns true if the word holds `expected`; otherwise loads the word into `expected`.
RECIS_HD bool compare_exchange(uint64_t* word, uint64_t& expected, uint64_t desired) {
#if defined(__CUDA_ARCH__)
  return cuda::atomic_ref<uint64_t, cuda::thread_scope_device>(*word).compare_exchange_strong(
      expected, desired, cuda::memory_order_acq_rel, cuda::memory_order_acquire);
#else
  return __atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
#endif
}

// Adds `value` and returns the previous value. The order is relaxed, for counters, which publish nothing.
RECIS_HD int64_t fetch_add(int64_t* word, int64_t value) {
#if defined(__CUDA_ARCH__)
  return cuda::atomic_ref<int64_t, cuda::thread_scope_device>(*word).fetch_add(value, cuda::memory_order_relaxed);
#else
  return __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
#endif
}

// The same, published to a thread that acquires the sum.
RECIS_HD int64_t fetch_add_release(int64_t* word, int64_t value) {
#if defined(__CUDA_ARCH__)
  return cuda::atomic_ref<int64_t, cuda::thread_scope_device>(*word).fetch_add(value, cuda::memory_order_release);
#else
  return __atomic_fetch_add(word, value, __ATOMIC_RELEASE);
#endif
}

template <class Word>
RECIS_HD Word load_relaxed(const Word* word) {
#if defined(__CUDA_ARCH__)
  return cuda::atomic_ref<Word, cuda::thread_scope_device>(*const_cast<Word*>(word)).load(cuda::memory_order_relaxed);
#else
  return __atomic_load_n(word, __ATOMIC_RELAXED);
#endif
}

// Two adjacent words, aligned to 16 bytes, in one access. They may be of different times.
RECIS_HD void load_relaxed_pair(const uint64_t* words, uint64_t& first, uint64_t& second) {
#if defined(__CUDA_ARCH__) && defined(__CUDACC__)
  asm volatile("ld.relaxed.gpu.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(words) : "memory");
#else
  first = load_relaxed(words);
  second = load_relaxed(words + 1);
#endif
}

RECIS_HD void store_relaxed(uint64_t* word, uint64_t value) {
#if defined(__CUDA_ARCH__)
  cuda::atomic_ref<uint64_t, cuda::thread_scope_device>(*word).store(value, cuda::memory_order_relaxed);
#else
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
#endif
}

}  // namespace recis
