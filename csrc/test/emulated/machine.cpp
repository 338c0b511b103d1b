#include "emulated/machine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace emulated {
namespace {

constexpr unsigned char kPoison = 0xa5;

// A kernel waits for ever if none of its threads ends within so many switches: some seconds, in which 512 threads take
// millions of items.
constexpr int64_t kPatience = 20'000'000;

void* aligned(size_t bytes) {
  void* start = nullptr;
  if (posix_memalign(&start, 256, std::max<size_t>(bytes, 1)) != 0) return nullptr;
  std::memset(start, kPoison, bytes);
  return start;
}

}  // namespace

Machine& Machine::get() {
  static Machine machine;
  return machine;
}

void Machine::fail(const std::string& what) const {
  std::string text = "emulated device: " + what;
  if (running_ != nullptr) {
    text += " (block " + std::to_string(running_->block.x) + ", thread " + std::to_string(running_->thread.x) + ")";
  }
  throw std::runtime_error(text + "; seed=" + std::to_string(settings_.seed) + ", warps=" +
                           std::to_string(settings_.warps) + ", yield_every=" + std::to_string(settings_.yield_every) +
                           ", max_blocks=" + std::to_string(settings_.max_blocks));
}

void Machine::seed(const Settings& settings) {
  settings_ = settings;
  random_.seed(static_cast<unsigned>(settings.seed));
}

void Machine::run(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  if (blocks == 0 || threads == 0 || threads > 1024) fail("a launch needs 1 to 1024 threads and at least a block");
  grid_dim_ = {blocks, 1, 1};
  block_dim_ = {threads, 1, 1};
  body_ = &body;
  warps_of_block_ = (threads + kWarp - 1) / kWarp;
  total_warps_ = warps_of_block_ * blocks;
  next_warp_ = 0;
  groups_.clear();
  const int slots = static_cast<int>(std::min(settings_.warps, total_warps_));
  while (static_cast<int>(fibers_.size()) < slots * kWarp) add_fiber();
  live_.clear();
  for (int slot = 0; slot < slots; ++slot) fill(slot);
  int64_t patience = kPatience;
  while (!live_.empty()) {
    const size_t pick = random_() % live_.size();
    const int index = live_[pick];
    resume(index);
    if (error_ != nullptr) {
      fibers_.clear();  // the others are in the middle of the kernel; what they hold needs no destructor
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
    if (!fibers_[index]->done) {
      if (--patience > 0) continue;
      fibers_.clear();
      fail("the kernel does not end: its threads wait for each other");
    }
    patience = kPatience;
    live_[pick] = live_.back();
    live_.pop_back();
    const int slot = index / kWarp;
    const auto first = fibers_.begin() + slot * kWarp;
    if (std::all_of(first, first + kWarp, [](const auto& fiber) { return fiber->done; })) fill(slot);
  }
  body_ = nullptr;
}

void Machine::access() {
  if (running_ != nullptr && random_() % settings_.yield_every == 0) yield();
}

uint64_t Machine::shuffle_xor(uint32_t mask, uint64_t value, int distance) {
  const int other = index_ % kWarp ^ distance;
  return meet(mask, value, [other](const uint64_t* values) { return values[other]; });
}

uint32_t Machine::ballot(uint32_t mask, bool vote) {
  return static_cast<uint32_t>(meet(mask, vote ? 1 : 0, [mask](const uint64_t* values) {
    uint64_t votes = 0;
    for (int lane = 0; lane < kWarp; ++lane) votes |= (mask >> lane & 1 & values[lane]) << lane;
    return votes;
  }));
}

// Waits for all lanes of the mask; `read` then gives the result from the values of all.
uint64_t Machine::meet(uint32_t mask, uint64_t value, const std::function<uint64_t(const uint64_t*)>& read) {
  const int lane = index_ % kWarp;
  if ((mask >> lane & 1) == 0) fail("shuffle: the caller is not in its own mask");
  Group& group = groups_[{index_ / kWarp, mask}];
  while ((group.left >> lane & 1) != 0) wait_for(mask);  // the previous shuffle is not over for all lanes
  group.values[lane] = value;
  group.arrived |= 1u << lane;
  while ((group.arrived & mask) != mask) wait_for(mask);
  const uint64_t result = read(group.values);
  group.left |= 1u << lane;
  if (group.left == mask) group.arrived = group.left = 0;
  while ((group.left >> lane & 1) != 0) wait_for(mask);
  return result;
}

void Machine::wait_for(uint32_t mask) {
  const int first = index_ / kWarp * kWarp;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) != 0 && fibers_[first + lane]->done) fail("shuffle: a lane of the mask has left the kernel");
  }
  yield();
}

void Machine::add_fiber() {
  constexpr size_t kStack = 64 << 10;
  auto fiber = std::make_unique<Fiber>();
  fiber->stack.reset(new char[kStack]);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, &Machine::fiber_main, 0);
  fibers_.push_back(std::move(fiber));
}

void Machine::fiber_main() {
  Machine& machine = get();
  for (;;) {
    try {
      (*machine.body_)();
    } catch (...) {  // may not leave the fiber
      machine.error_ = std::current_exception();
    }
    machine.running_->done = true;
    machine.yield();
  }
}

void Machine::fill(int slot) {
  if (next_warp_ >= total_warps_) return;
  const int64_t warp = next_warp_++;
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto thread = static_cast<unsigned>(warp % warps_of_block_ * kWarp + lane);
    if (thread >= block_dim_.x) break;
    Fiber& fiber = *fibers_[slot * kWarp + lane];
    fiber.thread = {thread, 0, 0};
    fiber.block = {static_cast<unsigned>(warp / warps_of_block_), 0, 0};
    fiber.done = false;
    live_.push_back(slot * kWarp + lane);
  }
}

void Machine::resume(int index) {
  running_ = fibers_[index].get();
  index_ = index;
  swapcontext(&main_, &running_->context);
  running_ = nullptr;
}

void Machine::yield() { swapcontext(&running_->context, &main_); }

Device& Device::get() {
  static auto* device = new Device;  // tensors may be freed after static objects
  return *device;
}

void Device::configure(const Settings& settings) {
  const std::lock_guard guard(lock_);
  synchronize();
  settings_ = settings;
  Machine::get().seed(settings);
}

Settings Device::settings() {
  const std::lock_guard guard(lock_);
  return settings_;
}

void Device::enqueue(int64_t stream, std::function<void()> work) {
  const std::lock_guard guard(lock_);
  queues_[stream].push_back(std::move(work));
  if (settings_.late == 0) drain(stream);
}

void Device::run_next(int64_t stream) {
  auto& queue = queues_[stream];
  const std::function<void()> work = std::move(queue.front());
  queue.pop_front();
  work();
}

void Device::drain(int64_t stream) {
  while (!queues_[stream].empty()) run_next(stream);
}

void Device::drain_until(const Event& event) {
  while (!event.done && !queues_[event.stream].empty()) run_next(event.stream);
}

std::shared_ptr<Event> Device::record(int64_t stream) {
  auto event = std::make_shared<Event>();
  event->stream = stream;
  enqueue(stream, [event] { event->done = true; });
  return event;
}

void Device::wait(int64_t stream, std::shared_ptr<Event> event) {
  enqueue(stream, [this, event = std::move(event)] { drain_until(*event); });
}

void Device::synchronize(int64_t stream) {
  const std::lock_guard guard(lock_);
  if (settings_.late == 2) {
    for (auto& [other, queue] : queues_) {
      if (other != stream) drain(other);
    }
  }
  drain(stream);
  release();
}

void Device::synchronize(const Event& event) {
  const std::lock_guard guard(lock_);
  drain_until(event);
  release();
}

void Device::synchronize() {
  const std::lock_guard guard(lock_);
  for (auto& [stream, queue] : queues_) drain(stream);
  release();
}

bool Device::is_idle(int64_t stream) {
  const std::lock_guard guard(lock_);
  return queues_[stream].empty();
}

void Device::fail_launch(int64_t error) {
  const std::lock_guard guard(lock_);
  launch_error_ = error;
}

int64_t Device::take_launch_error() {
  const std::lock_guard guard(lock_);
  return std::exchange(launch_error_, 0);
}

void Device::launch(int64_t stream, unsigned blocks, unsigned threads, std::function<void()> body) {
  count("launches");
  enqueue(stream, [blocks, threads, body = std::move(body)] { Machine::get().run(blocks, threads, body); });
}

void Device::fail_allocation(int64_t number) {
  const std::lock_guard guard(lock_);
  allocations_to_failure_ = number;
}

void* Device::allocate(size_t bytes, int64_t stream) {
  const std::lock_guard guard(lock_);
  if (allocations_to_failure_ > 0 && --allocations_to_failure_ == 0) {
    count("failed_allocations");
    return nullptr;
  }
  void* start = aligned(bytes);
  if (start != nullptr) blocks_[start] = {bytes, stream, {}};
  return start;
}

void Device::free(void* start) {
  const std::lock_guard guard(lock_);
  const auto found = blocks_.find(start);
  const Block block = found->second;
  blocks_.erase(found);
  for (const int64_t user : block.users) wait(block.stream, record(user));
  enqueue(block.stream, [this, start, bytes = block.bytes] { quarantine(start, bytes); });
}

void Device::record_use(void* start, int64_t stream) {
  const std::lock_guard guard(lock_);
  const auto found = blocks_.find(start);
  if (found != blocks_.end() && found->second.stream != stream) found->second.users.push_back(stream);
}

void* Device::allocate_pinned(size_t bytes) {
  const std::lock_guard guard(lock_);
  void* start = aligned(bytes);
  if (start != nullptr) pinned_[start] = bytes;
  return start;
}

void Device::free_pinned(void* start) {
  const std::lock_guard guard(lock_);
  const auto found = pinned_.find(start);
  const size_t bytes = found->second;
  pinned_.erase(found);
  quarantine(start, bytes);
}

bool Device::is_pinned(const void* start) {
  const std::lock_guard guard(lock_);
  auto found = pinned_.upper_bound(start);
  if (found == pinned_.begin()) return false;
  --found;
  return start < static_cast<const char*>(found->first) + std::max<size_t>(found->second, 1);
}

void Device::quarantine(void* start, size_t bytes) {
  std::memset(start, kPoison, bytes);
  freed_.emplace_back(static_cast<char*>(start), bytes);
  if (settings_.late == 0) release();
}

// Gives freed memory back once nothing is queued that could still reach it.
void Device::release() {
  for (auto& [stream, queue] : queues_) {
    if (!queue.empty()) return;
  }
  for (const auto& [start, bytes] : freed_) {
    const bool intact =
        std::all_of(start, start + bytes, [](char c) { return static_cast<unsigned char>(c) == kPoison; });
    if (!intact && fault_.empty())
      fault_ = "a kernel or copy wrote to " + std::to_string(bytes) + " bytes that were freed";
    std::free(start);
  }
  freed_.clear();
}

void Device::count(const std::string& what, int64_t times) {
  const std::lock_guard guard(lock_);
  counts_[what] += times;
}

std::map<std::string, int64_t> Device::counts() {
  const std::lock_guard guard(lock_);
  return counts_;
}

void Device::clear_counts() {
  const std::lock_guard guard(lock_);
  counts_.clear();
}

std::string Device::take_fault() {
  const std::lock_guard guard(lock_);
  return std::exchange(fault_, {});
}

}  // namespace emulated
