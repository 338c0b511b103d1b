#include "ops/disk_io.h"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <system_error>

#include "ops/platform.h"

#if defined(RECIS_LINUX) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#define RECIS_IO_URING 1
#endif

namespace recis {
namespace {

constexpr size_t kMostOfAThread = 32;  // transfers that a thread takes at a time
constexpr int kShareOfWait = 4;        // of the transfers in flight, the share that a wait is for

// The longest time in which a thread moves bytes if it only copies memory.
std::chrono::microseconds longest_copy(int64_t transfers, int64_t bytes) {
  return std::chrono::microseconds(3 * transfers + bytes / 4096);
}

}  // namespace

bool TransferBatch::is_done() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return left_ == 0;
}

int TransferBatch::wait() const {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return left_ == 0; });
  return error_;
}

void TransferBatch::end(int64_t transfers, int error) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (error != 0 && error_ == 0) error_ = error;
  left_ -= transfers;
  if (left_ == 0) changed_.notify_all();
}

#if defined(RECIS_IO_URING)

// An io_uring of kDepth entries, used by one thread. Indices are shared with the kernel: each side publishes its own
// with release and reads the other's with acquire.
class Ring {
 public:
  static std::unique_ptr<Ring> make() {
    io_uring_params params{};
    int file = -1;
#if defined(IORING_SETUP_COOP_TASKRUN)
    params.flags = IORING_SETUP_COOP_TASKRUN;  // a completion does not interrupt the thread
    file = static_cast<int>(syscall(__NR_io_uring_setup, DiskIo::kDepth, &params));
#endif
    if (file < 0) {
      params = {};
      file = static_cast<int>(syscall(__NR_io_uring_setup, DiskIo::kDepth, &params));
    }
    if (file < 0) return nullptr;
    auto ring = std::unique_ptr<Ring>(new Ring(file));
    // The kernel has IORING_OP_READ since the version that has this feature.
    if ((params.features & IORING_FEAT_RW_CUR_POS) == 0 || !ring->map(params)) return nullptr;
    return ring;
  }

  ~Ring() {
    if (entries_ != nullptr) munmap(entries_, entries_bytes_);
    if (completed_ != nullptr && completed_ != submitted_) munmap(completed_, completed_bytes_);
    if (submitted_ != nullptr) munmap(submitted_, submitted_bytes_);
    close(file_);
  }

  // Adds a transfer to those that the next enter() starts; there must be less than kDepth in flight.
  void add(int file, const Transfer& transfer, bool writes, uint64_t token) {
    const unsigned tail = tail_->load(std::memory_order_relaxed);
    io_uring_sqe& entry = entries_[tail & mask_];
    std::memset(&entry, 0, sizeof(entry));
    entry.opcode = writes ? IORING_OP_WRITE : IORING_OP_READ;
    entry.fd = file;
    entry.addr = reinterpret_cast<uint64_t>(transfer.memory);
    entry.len = static_cast<unsigned>(std::min<int64_t>(transfer.bytes, int64_t{1} << 30));
    entry.off = static_cast<uint64_t>(transfer.offset);
    entry.user_data = token;
    array_[tail & mask_] = tail & mask_;
    tail_->store(tail + 1, std::memory_order_release);
    ++added_;
  }

  // Starts the transfers that were added, and waits until some of those in flight have ended. Returns 0 or an errno,
  // after which the transfers of earlier calls still run.
  int enter(int some) {
    const auto started = syscall(__NR_io_uring_enter, file_, added_, some, IORING_ENTER_GETEVENTS, nullptr, 0);
    if (started < 0) return errno == EINTR || errno == EAGAIN || errno == EBUSY ? 0 : errno;
    added_ -= static_cast<unsigned>(started);
    return 0;
  }

  // Removes the transfers that were added and that the kernel has not started. Calls f(token) for each.
  template <class F>
  void withdraw(F&& f) {
    const unsigned tail = tail_->load(std::memory_order_relaxed);
    const unsigned head = head_->load(std::memory_order_acquire);
    for (unsigned at = head; at != tail; ++at) f(entries_[at & mask_].user_data);
    tail_->store(head, std::memory_order_release);
    added_ = 0;
  }

  // Takes the result of a transfer that has ended: bytes, or a negative errno.
  bool take(uint64_t& token, int& result) {
    const unsigned head = done_head_->load(std::memory_order_relaxed);
    if (head == done_tail_->load(std::memory_order_acquire)) return false;
    const io_uring_cqe& entry = results_[head & done_mask_];
    token = entry.user_data;
    result = entry.res;
    done_head_->store(head + 1, std::memory_order_release);
    return true;
  }

 private:
  explicit Ring(int file) : file_(file) {}

  bool map(const io_uring_params& params) {
    submitted_bytes_ = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    completed_bytes_ = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
    const bool together = (params.features & IORING_FEAT_SINGLE_MMAP) != 0;
    if (together) submitted_bytes_ = completed_bytes_ = std::max(submitted_bytes_, completed_bytes_);
    submitted_ = map_at(submitted_bytes_, IORING_OFF_SQ_RING);
    if (submitted_ == nullptr) return false;
    completed_ = together ? submitted_ : map_at(completed_bytes_, IORING_OFF_CQ_RING);
    entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    entries_ = reinterpret_cast<io_uring_sqe*>(map_at(entries_bytes_, IORING_OFF_SQES));
    if (completed_ == nullptr || entries_ == nullptr) return false;
    head_ = at<std::atomic<unsigned>>(submitted_, params.sq_off.head);
    tail_ = at<std::atomic<unsigned>>(submitted_, params.sq_off.tail);
    mask_ = *at<unsigned>(submitted_, params.sq_off.ring_mask);
    array_ = at<unsigned>(submitted_, params.sq_off.array);
    done_head_ = at<std::atomic<unsigned>>(completed_, params.cq_off.head);
    done_tail_ = at<std::atomic<unsigned>>(completed_, params.cq_off.tail);
    done_mask_ = *at<unsigned>(completed_, params.cq_off.ring_mask);
    results_ = at<io_uring_cqe>(completed_, params.cq_off.cqes);
    return true;
  }

  char* map_at(size_t bytes, int64_t offset) const {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file_, offset);
    return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
  }

  template <class T>
  static T* at(char* memory, unsigned offset) {
    return reinterpret_cast<T*>(memory + offset);
  }

  int file_;
  char* submitted_ = nullptr;
  char* completed_ = nullptr;
  io_uring_sqe* entries_ = nullptr;
  size_t submitted_bytes_ = 0;
  size_t completed_bytes_ = 0;
  size_t entries_bytes_ = 0;
  std::atomic<unsigned>* head_ = nullptr;
  std::atomic<unsigned>* tail_ = nullptr;
  std::atomic<unsigned>* done_head_ = nullptr;
  std::atomic<unsigned>* done_tail_ = nullptr;
  unsigned* array_ = nullptr;
  unsigned mask_ = 0;
  unsigned done_mask_ = 0;
  unsigned added_ = 0;
  io_uring_cqe* results_ = nullptr;
};

#else

class Ring {
 public:
  static std::unique_ptr<Ring> make() { return nullptr; }
  void add(int, const Transfer&, bool, uint64_t) {}
  int enter(int) { return ENOSYS; }
  template <class F>
  void withdraw(F&&) {}
  bool take(uint64_t&, int&) { return false; }
};

#endif

namespace {

// Whether a read of a file can return at once if it would have to wait. Otherwise an io_uring hands every transfer to a
// thread of the kernel.
bool returns_at_once(int file) {
#if defined(RECIS_LINUX) && defined(RWF_NOWAIT)
  char byte = 0;
  const iovec part{&byte, 1};
  return preadv2(file, &part, 1, 0, RWF_NOWAIT) >= 0 || errno != EOPNOTSUPP;
#else
  static_cast<void>(file);
  return true;
#endif
}

}  // namespace

DiskIo::DiskIo(int file, bool ring)
    : file_(file), ring_(ring && returns_at_once(file) ? Ring::make() : nullptr), uses_ring_(ring_ != nullptr) {
  if (ring_ != nullptr) {
    thread_ = std::thread([this] { run_ring(); });
  } else {
    thread_ = std::thread([this] { run_threads(); });
  }
}

DiskIo::~DiskIo() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
  }
  submitted_.notify_all();
  thread_.join();
}

TransferBatchPtr DiskIo::submit(std::vector<Transfer> transfers, bool writes, bool urgent) {
  auto batch = std::make_shared<TransferBatch>(std::move(transfers), writes);
  if (batch->transfers_.empty()) return batch;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (urgent) {
      batches_.push_front(batch);
    } else {
      batches_.push_back(batch);
    }
  }
  submitted_.notify_one();  // a thread that leaves transfers wakes the next one
  return batch;
}

// Takes the next transfer to start; false if there is none. With `wait`, false only once the object is being destroyed.
bool DiskIo::next(Item& item, bool wait) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (wait) submitted_.wait(lock, [this] { return closed_ || !batches_.empty(); });
  if (batches_.empty()) return false;
  item.batch = batches_.front();
  item.transfer = item.batch->transfers_[item.batch->started_++];
  if (item.batch->started_ == item.batch->transfers_.size()) batches_.pop_front();
  return true;
}

// Takes the next transfers for a thread: of many, several at a time, but no more than keeps all threads busy. Another
// thread is woken for the rest only if transfers wait for a disk: waking it takes longer than copying some records.
// Returns false once the object is being destroyed.
bool DiskIo::next(Share& share) {
  std::unique_lock<std::mutex> lock(mutex_);
  submitted_.wait(lock, [this] { return closed_ || !batches_.empty(); });
  if (batches_.empty()) return false;
  share.batch = batches_.front();
  const size_t left = share.batch->transfers_.size() - share.batch->started_;
  share.first = share.batch->started_;
  share.stop = share.first + std::clamp<size_t>(left / (2 * kThreads), 1, kMostOfAThread);
  share.batch->started_ = share.stop;
  if (share.stop == share.batch->transfers_.size()) batches_.pop_front();
  if (!batches_.empty() && waits_) submitted_.notify_one();
  return true;
}

// Moves the bytes of a transfer, and waits for it. Returns 0 or an errno.
int DiskIo::move_bytes(Transfer rest, bool writes) const {
  while (rest.bytes > 0) {
    const ssize_t moved = writes ? pwrite(file_, rest.memory, rest.bytes, rest.offset)
                                 : pread(file_, rest.memory, rest.bytes, rest.offset);
    if (moved == 0) return ENODATA;
    if (moved > 0) {
      rest = {rest.offset + moved, rest.bytes - moved, rest.memory + moved};
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

void DiskIo::run_thread() {
  using Clock = std::chrono::steady_clock;
  Share share;
  while (next(share)) {
    int error = 0;
    int64_t bytes = 0;
    const auto begin = Clock::now();
    for (size_t i = share.first; i < share.stop; ++i) {
      const int result = move_bytes(share.batch->transfers_[i], share.batch->writes_);
      if (error == 0) error = result;
      bytes += share.batch->transfers_[i].bytes;
    }
    const auto transfers = static_cast<int64_t>(share.stop - share.first);
    waits_ = Clock::now() - begin > longest_copy(transfers, bytes);
    share.batch->end(transfers, error);
    share.batch.reset();
  }
}

void DiskIo::run_threads() {
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < kThreads; ++i) others.emplace_back([this] { run_thread(); });
  } catch (const std::system_error&) {  // at a limit of threads: fewer do
  }
  run_thread();
  for (auto& thread : others) thread.join();
}

void DiskIo::run_ring() {
  std::vector<Item> items(kDepth);
  if (run_ring_until_it_fails(items)) return;
  // No batch may end while the kernel still moves bytes from or to its memory, which the caller frees then. So wait for
  // what was started; its results arrive in shared memory. What was not, and all that follows, is for threads.
  uses_ring_ = false;
  std::vector<Item> again;
  const auto retry = [&](Item& item) {
    again.push_back(std::move(item));
    item.batch.reset();
  };
  ring_->withdraw([&](uint64_t token) { retry(items[token]); });
  const auto in_flight = [](const Item& item) { return item.batch != nullptr; };
  while (std::any_of(items.begin(), items.end(), in_flight)) {
    uint64_t token = 0;
    int result = 0;
    if (ring_->take(token, result)) {
      retry(items[token]);
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  for (Item& item : again) item.batch->end(1, move_bytes(item.transfer, item.batch->writes_));
  again.clear();
  run_threads();
}

// Returns true once the object is being destroyed and no transfer is left, and false if the ring fails; transfers of
// items with a batch may be in flight then.
bool DiskIo::run_ring_until_it_fails(std::vector<Item>& items) {
  std::vector<int> unused;
  for (int i = kDepth - 1; i >= 0; --i) unused.push_back(i);
  const auto start = [&](int i) {
    ring_->add(file_, items[i].transfer, items[i].batch->writes_, static_cast<uint64_t>(i));
  };
  const auto end = [&](int i, int error) {
    items[i].batch->end(1, error);
    items[i].batch.reset();
    unused.push_back(i);
  };
  while (true) {
    while (!unused.empty()) {
      const int i = unused.back();
      // With transfers in flight this thread must not sleep here: their results would wait for the next batch.
      if (!next(items[i], static_cast<int>(unused.size()) == kDepth)) break;
      unused.pop_back();
      start(i);
    }
    const int in_flight = kDepth - static_cast<int>(unused.size());
    if (in_flight == 0) return true;
    // The others keep the disk busy while those that have ended are replaced, many by one call.
    if (ring_->enter(std::max(1, in_flight / kShareOfWait)) != 0) return false;
    uint64_t token = 0;
    int result = 0;
    while (ring_->take(token, result)) {
      const int i = static_cast<int>(token);
      Transfer& rest = items[i].transfer;
      if (result == -EINTR || result == -EAGAIN) {
        start(i);
      } else if (result <= 0) {
        end(i, result == 0 ? ENODATA : -result);
      } else if (result < rest.bytes) {
        rest = {rest.offset + result, rest.bytes - result, rest.memory + result};
        start(i);
      } else {
        end(i, 0);
      }
    }
  }
}

}  // namespace recis
