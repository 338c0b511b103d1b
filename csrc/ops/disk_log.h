// DiskLog: records in a file that is only appended to, in segments that are compacted and used again.
//
// A record is written with its row behind it, which tells a compaction whose record it is and a reader that it reads
// the right one. The segment that is being filled is in memory; a full one is written in one piece, and its records can
// be read from memory until that is done. A slot numbers the place of a record.
//
// The file has no name: it vanishes with the process, two processes never share one, and what it held is restored from
// a checkpoint. Space is allocated before it is needed, so that a full disk is found before anything has changed.
//
// Used by one thread at a time, except for read(), which any thread may call for slots whose segments are pinned.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ops/disk_io.h"

namespace recis {

// Memory for transfers, aligned to pages; that of many transfers is from the MemoryPool, so that no page is new.
class PageBuffer {
 public:
  explicit PageBuffer(int64_t bytes);
  char* data() const { return memory_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    size_t pooled;  // bytes; 0 if the memory is not from the pool
    void operator()(char* memory) const;
  };
  int64_t bytes_;
  std::unique_ptr<char, Free> memory_;
};

// Records that are being read: record(i) is that of the i-th slot once DiskLog::wait() has returned. Frees its memory
// only after the last transfer to it has ended.
struct LogRead {
  LogRead() = default;
  LogRead(LogRead&& other) = default;
  LogRead& operator=(LogRead&& other) noexcept {
    std::swap(places, other.places);
    std::swap(buffer, other.buffer);
    std::swap(batch, other.batch);
    return *this;
  }
  ~LogRead() {
    if (batch != nullptr) batch->wait();
  }

  std::vector<int64_t> places;  // bytes in the buffer
  std::unique_ptr<PageBuffer> buffer;
  TransferBatchPtr batch;

  const char* record(size_t i) const { return buffer->data() + places[i]; }
};

class DiskLog {
 public:
  static constexpr int64_t kNoStep = -1;

  // A log in a new file of the folder `path`; `name` is that of the table, for messages. Without `ring`, threads read.
  DiskLog(std::string name, std::string path, int64_t record_bytes, int64_t segment_bytes, bool ring);
  ~DiskLog();
  DiskLog(const DiskLog&) = delete;
  DiskLog& operator=(const DiskLog&) = delete;

  bool uses_ring() const { return io_->uses_ring(); }
  bool is_direct() const { return is_direct_; }
  int64_t bytes() const { return allocated_ * segment_bytes_; }
  int64_t buffer_bytes() const { return buffers_ * segment_bytes_; }

  // Allocates space for so many more records, or throws; also throws if an earlier write has failed, after trying it
  // again. Nothing is lost then.
  void reserve(int64_t records);

  // Appends a record for which there is space, and returns its slot. `step` is the last one that changed it.
  int64_t append(int64_t row, const char* record, int64_t step);

  // Tells that the record in a slot is not needed any more.
  void release(int64_t slot);

  // The record in a slot if it is in memory, or null; valid until the next reserve(), limit_buffers() or write_all().
  const char* in_memory(int64_t slot) const;

  // Changes whenever the segment of a slot is filled again.
  uint64_t version(int64_t slot) const { return segments_[slot / slots_].version; }

  // Starts to read records from slots in ascending order, which are not in memory.
  LogRead read(const std::vector<int64_t>& slots, bool urgent);

  // Waits for a read, and throws if it has failed.
  void wait(const LogRead& read) const;

  // The row of a record that was read, or is in memory.
  int64_t row_of(const char* record) const;

  // Throws unless a record is that of a row.
  void check(const char* record, int64_t row) const;

  // Waits for writes if many segments are being written, before many records are appended; throws as reserve().
  void limit_buffers() {
    if (writing_.size() >= kMostWrites) take_written(true);
  }

  // Writes all records that are in memory, and waits for it.
  void write_all();

  // Keeps the records that are in the log now, until unpin().
  int64_t pin();
  void unpin(int64_t pin);

  // Calls f(slot, record) for all records of the segments that hold one changed after `step`, current or not.
  template <class F>
  void scan(int64_t step, F&& f) {
    for (int64_t segment = 0; segment < static_cast<int64_t>(segments_.size()); ++segment) {
      if (segments_[segment].holds() && segments_[segment].last_step > step) scan_segment(segment, f);
    }
  }

  // Compaction: the caller moves the records of a segment that are still current. Calls f(slot, record) for each of one
  // segment, if one has been read; starts to read another if too much of the log is not current, and waits for it if
  // far too much is. f must release() the current ones. Throws if a segment cannot be read, once for each: it is then
  // left alone until none of its records is current.
  template <class F>
  void compact(F&& f) {
    do {
      if (compacted_ != kNone && (is_behind() || compacting_.batch->is_done())) {
        const int64_t segment = compacted_;
        reserve(segments_[segment].live);
        const LogRead whole = compacted_segment();
        for_each_record(segment, whole.buffer->data(), f);
        end_compaction(segment);
      }
      if (compacted_ == kNone) start_compaction();
    } while (compacted_ != kNone && is_behind());
  }

 private:
  static constexpr int64_t kNone = -1;
  static constexpr size_t kMostWrites = 8;  // segments that wait to be written

  enum class State { kHole, kFree, kReserved, kFilling, kWriting, kWritten };

  struct Segment {
    State state = State::kHole;
    uint64_t version = 0;
    int64_t used = 0;  // slots
    int64_t live = 0;  // of them, those of current records
    int64_t pins = 0;
    int64_t last_step = kNoStep;
    bool is_unreadable = false;  // a compaction could not read it
    std::unique_ptr<PageBuffer> buffer;
    TransferBatchPtr write;

    bool holds() const { return state == State::kFilling || state == State::kWriting || state == State::kWritten; }
  };

  template <class F>
  void for_each_record(int64_t segment, const char* records, F&& f) const {
    const int64_t used = segments_[segment].used;
    for (int64_t i = 0; i < used; ++i) f(segment * slots_ + i, records + i * stride_);
  }

  template <class F>
  void scan_segment(int64_t segment, F&& f) {
    if (segments_[segment].buffer != nullptr) return for_each_record(segment, segments_[segment].buffer->data(), f);
    const LogRead whole = read_segment(segment);
    wait(whole);
    for_each_record(segment, whole.buffer->data(), f);
  }

  [[noreturn]] void fail(const std::string& what, int error) const;
  void check_read(int error) const;
  void open_file();
  void allocate(int64_t segment);
  int64_t free_segment();
  void start_write(int64_t segment);
  void fill_next();
  void take_written(bool wait);
  void recycle(int64_t segment);
  LogRead read_segment(int64_t segment);
  bool is_behind() const { return used_ - live_ > live_ / 2 + 6 * slots_; }
  void start_compaction();
  LogRead compacted_segment();
  void end_compaction(int64_t segment);

  std::string name_;
  std::string path_;
  int64_t record_bytes_;
  int64_t stride_;
  int64_t segment_bytes_;
  int64_t slots_;  // of a segment
  int file_ = -1;
  bool is_direct_ = true;
  int64_t alignment_;  // of reads
  uint64_t mark_;      // of this log, in each record
  std::unique_ptr<DiskIo> io_;
  std::vector<Segment> segments_;
  std::vector<int64_t> free_;   // segments with space but without records
  std::vector<int64_t> holes_;  // segments without space
  std::vector<int64_t> reserved_;
  std::vector<int64_t> writing_;
  int64_t filling_ = kNone;
  int64_t allocated_ = 0;  // segments
  int64_t buffers_ = 0;
  int64_t used_ = 0;  // slots
  int64_t live_ = 0;
  int64_t compacted_ = kNone;
  LogRead compacting_;
  int64_t next_pin_ = 0;
  std::unordered_map<int64_t, std::vector<int64_t>> pins_;
};

}  // namespace recis
