// core/for_each.h's Pool over the threads that run an XLA program.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>

#include "core/for_each.h"
#include "xla/ffi/api/ffi.h"

namespace recis {

// While it exists, its thread computes with subnormal numbers, as torch's threads do: XLA's treat them as zeros.
class Subnormals {
 public:
  Subnormals() : before_(control()) { set_control(before_ & ~kFlush); }
  ~Subnormals() { set_control(before_); }
  Subnormals(const Subnormals&) = delete;
  Subnormals& operator=(const Subnormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kFlush = 0x8040;  // MXCSR: results to zero, arguments as zeros
  static uint64_t control() { return __builtin_ia32_stmxcsr(); }
  static void set_control(uint64_t word) { __builtin_ia32_ldmxcsr(static_cast<uint32_t>(word)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;  // FPCR.FZ
  static uint64_t control() {
    uint64_t word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void set_control(uint64_t word) { asm volatile("msr fpcr, %0" : : "r"(word)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t control() { return 0; }
  static void set_control(uint64_t) {}
#endif

  uint64_t before_;
};

// The thread that calls a handler belongs to the same threads, all of which may be waiting for others. So it works on
// its ranges itself, and waits only for ranges that another thread has begun.
class XlaPool {
 public:
  explicit XlaPool(xla::ffi::ThreadPool threads) : threads_(threads) {}

  Pool pool() { return {&run, this}; }

 private:
  struct Work {
    int64_t n;
    int64_t chunk;
    int64_t chunks;
    Pool::Range body;
    void* argument;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
    std::exception_ptr error;

    void help() {
      for (int64_t i = next++; i < chunks; i = next++) {
        std::exception_ptr raised;
        try {
          body(argument, i * chunk, std::min(n, (i + 1) * chunk));
        } catch (...) {
          raised = std::current_exception();
        }
        const std::lock_guard lock(mutex);
        if (raised != nullptr) error = raised;
        if (++done == chunks) all_done.notify_all();
      }
    }
  };

  static void run(void* self, int64_t n, int64_t grain, Pool::Range body, void* argument) {
    xla::ffi::ThreadPool& threads = static_cast<XlaPool*>(self)->threads_;
    const int64_t count = threads.num_threads();
    if (count <= 1 || n <= grain) return body(argument, 0, n);
    const auto work = std::make_shared<Work>();
    work->n = n;
    work->chunk = std::max(grain, (n + 4 * count - 1) / (4 * count));
    work->chunks = (n + work->chunk - 1) / work->chunk;
    work->body = body;
    work->argument = argument;
    for (int64_t helper = 1; helper < std::min(count, work->chunks); ++helper) {
      threads.Schedule([work] {
        const Subnormals subnormals;
        work->help();
      });
    }
    work->help();
    std::unique_lock lock(work->mutex);
    work->all_done.wait(lock, [&] { return work->done == work->chunks; });
    if (work->error != nullptr) std::rethrow_exception(work->error);
  }

  xla::ffi::ThreadPool threads_;
  Subnormals subnormals_;
};

}  // namespace recis
