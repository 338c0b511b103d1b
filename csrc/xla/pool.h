// core/for_each.h's Pool over the threads that run an XLA program.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>

#include "core/for_each.h"
#include "xla/ffi/api/ffi.h"

namespace recis {

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
      threads.Schedule([work] { work->help(); });
    }
    work->help();
    std::unique_lock lock(work->mutex);
    work->all_done.wait(lock, [&] { return work->done == work->chunks; });
    if (work->error != nullptr) std::rethrow_exception(work->error);
  }

  xla::ffi::ThreadPool threads_;
};

}  // namespace recis
