// Asynchronous reads and writes of one file, many at a time: by io_uring, or by threads where it is not permitted or
// would only hand each transfer to a thread of the kernel, which costs more.
//
// A transfer moves bytes between a file and memory; a batch is a list of transfers that complete together. Batches are
// started in the order in which they are submitted, urgent ones first.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace recis {

struct Transfer {
  int64_t offset;  // in the file
  int64_t bytes;
  char* memory;
};

class TransferBatch {
 public:
  TransferBatch(std::vector<Transfer> transfers, bool writes)
      : transfers_(std::move(transfers)), writes_(writes), left_(static_cast<int64_t>(transfers_.size())) {}

  // Whether all transfers have ended.
  bool is_done() const;

  // Waits until all transfers have ended, and returns 0 or the errno of the first failure; a file that is too short is
  // ENODATA.
  int wait() const;

 private:
  friend class DiskIo;
  friend class Ring;

  void end(int64_t transfers, int error);

  std::vector<Transfer> transfers_;
  bool writes_;
  size_t started_ = 0;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  int64_t left_;
  int error_ = 0;
};

using TransferBatchPtr = std::shared_ptr<TransferBatch>;

class Ring;

class DiskIo {
 public:
  static constexpr int kDepth = 256;   // transfers of a ring that run at the same time
  static constexpr int kThreads = 32;  // without a ring

  // Transfers of a file descriptor, which the caller keeps open. Without `ring`, if the file has no reads that return
  // at once, or once the ring fails, threads are used.
  DiskIo(int file, bool ring);
  ~DiskIo();  // waits for the batches that were submitted
  DiskIo(const DiskIo&) = delete;
  DiskIo& operator=(const DiskIo&) = delete;

  bool uses_ring() const { return uses_ring_; }

  // The memory must stay valid until the batch is done.
  TransferBatchPtr submit(std::vector<Transfer> transfers, bool writes, bool urgent);

 private:
  struct Item {
    TransferBatchPtr batch;
    Transfer transfer;
  };

  // Transfers of one batch that a thread moves in turn.
  struct Share {
    TransferBatchPtr batch;
    size_t first;
    size_t stop;
  };

  bool next(Item& item, bool wait);
  bool next(Share& share);
  int move_bytes(Transfer rest, bool writes) const;
  void run_thread();
  void run_threads();
  void run_ring();
  bool run_ring_until_it_fails(std::vector<Item>& items);

  int file_;
  std::unique_ptr<Ring> ring_;
  std::atomic<bool> uses_ring_;
  std::atomic<bool> waits_ = true;  // whether the last transfers of a thread took longer than copies of memory
  std::mutex mutex_;
  std::condition_variable submitted_;
  std::deque<TransferBatchPtr> batches_;
  bool closed_ = false;
  std::thread thread_;  // runs the ring, or starts the threads
};

}  // namespace recis
