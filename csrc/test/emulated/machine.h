// A GPU on the CPU, for tests: threads are fibers, and a seeded scheduler decides which of them runs next.
//
// Whole warps are resident together. A fiber runs until an atomic access, where others may go first, or until a
// shuffle, where it waits for its mask. Streams are queues: in late mode, work on them runs only when something waits
// for it.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace emulated {

inline constexpr int kWarp = 32;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Settings of tests; python: tests/support/emulated.py.
struct Settings {
  int64_t seed = 1;
  int64_t warps = 16;       // warps that are resident together
  int64_t yield_every = 3;  // an atomic access lets others go first once in so many times, on average
  int64_t max_blocks = 4;   // so small that the loops over the grid are entered
  // 1: streams run only when something waits for them; 2: and then all others run first
  int64_t late = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Dim thread, block;
  bool done = true;
};

// Runs kernels, one at a time, on the calling thread.
class Machine {
 public:
  static Machine& get();

  // Runs body for each thread of a grid; a fresh warp takes the place of one that has ended. Throws if a thread
  // shuffles with one that has left, or if no thread ends for long; the message has the settings, which reproduce it.
  void run(unsigned blocks, unsigned threads, const std::function<void()>& body);

  // An atomic access: lets other fibers go first, now and then.
  void access();

  uint64_t shuffle_xor(uint32_t mask, uint64_t value, int distance);
  uint32_t ballot(uint32_t mask, bool vote);

  const Dim& thread() const { return running_->thread; }
  const Dim& block() const { return running_->block; }
  const Dim& block_dim() const { return block_dim_; }
  const Dim& grid_dim() const { return grid_dim_; }

  // Restarts the scheduler from the seed of the settings.
  void seed(const Settings& settings);

 private:
  struct Group {
    uint32_t arrived = 0, left = 0;
    uint64_t values[kWarp] = {};
  };

  [[noreturn]] void fail(const std::string& what) const;
  void add_fiber();
  static void fiber_main();
  void fill(int slot);
  void resume(int index);
  void yield();
  void wait_for(uint32_t mask);
  uint64_t meet(uint32_t mask, uint64_t value, const std::function<uint64_t(const uint64_t*)>& read);

  Dim block_dim_, grid_dim_;
  Fiber* running_ = nullptr;
  int index_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> live_;
  std::map<std::pair<int, uint32_t>, Group> groups_;
  ucontext_t main_;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;  // of the fiber that ran last
  int64_t next_warp_ = 0, total_warps_ = 0, warps_of_block_ = 0;
  std::minstd_rand random_{1};
  Settings settings_;
};

struct Event {
  int64_t stream = 0;
  bool done = false;
};

// The device's streams and memory. Calls come from any thread.
class Device {
 public:
  static Device& get();

  void configure(const Settings& settings);
  Settings settings();

  // Queues work; runs it at once unless streams are late.
  void enqueue(int64_t stream, std::function<void()> work);
  std::shared_ptr<Event> record(int64_t stream);
  void wait(int64_t stream, std::shared_ptr<Event> event);
  void synchronize(int64_t stream);
  void synchronize(const Event& event);
  void synchronize();
  bool is_idle(int64_t stream);

  // Lets the next launch fail with an error of CUDA.
  void fail_launch(int64_t error);
  int64_t take_launch_error();
  void launch(int64_t stream, unsigned blocks, unsigned threads, std::function<void()> body);

  // Memory of the device. Freed memory is poisoned when its stream, and those that were recorded on it, have come so
  // far; it is given back after a synchronization, which reports writes to it.
  void* allocate(size_t bytes, int64_t stream);
  // Lets the allocation of that number from now fail; 0: none.
  void fail_allocation(int64_t number);
  void free(void* start);
  void record_use(void* start, int64_t stream);
  // Pinned memory of the host, poisoned as soon as it is freed.
  void* allocate_pinned(size_t bytes);
  void free_pinned(void* start);
  bool is_pinned(const void* start);

  void count(const std::string& what, int64_t times = 1);
  std::map<std::string, int64_t> counts();
  void clear_counts();
  // Returns and clears the first fault: a write to freed memory.
  std::string take_fault();

 private:
  struct Block {
    size_t bytes = 0;
    int64_t stream = 0;
    std::vector<int64_t> users;
  };

  void drain(int64_t stream);
  void drain_until(const Event& event);
  void run_next(int64_t stream);
  void quarantine(void* start, size_t bytes);
  void release();

  std::recursive_mutex lock_;
  Settings settings_;
  std::map<int64_t, std::deque<std::function<void()>>> queues_;
  std::map<void*, Block> blocks_;
  std::map<const void*, size_t> pinned_;
  std::vector<std::pair<char*, size_t>> freed_;
  std::map<std::string, int64_t> counts_;
  std::string fault_;
  int64_t allocations_to_failure_ = 0;
  int64_t launch_error_ = 0;
};

}  // namespace emulated
