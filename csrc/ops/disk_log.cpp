#include "ops/disk_log.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <stdexcept>

#include "ops/memory_pool.h"
#include "ops/platform.h"

namespace recis {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kLongestRead = 1 << 20;
// Unneeded bytes that are read rather than starting another transfer: from a disk, and where a read copies memory.
constexpr int64_t kGap = 4 * kPage;
constexpr int64_t kGapInMemory = 1 << 10;
constexpr int64_t kWord = 8;     // a file that is read by copying memory has no longer alignment
constexpr size_t kKeptFree = 4;  // free segments that keep their space

int64_t round_up(int64_t bytes, int64_t to = kPage) { return (bytes + to - 1) / to * to; }

// The multiple in bytes at which reads of a file must begin and end, in the file and in memory.
int64_t alignment_of(int file, bool is_direct) {
  if (!is_direct || is_in_memory(file)) return kWord;
  const int64_t least = direct_alignment(file);
  if (least > 0 && kPage % least == 0) return std::max(least, kWord);
  return kPage;
}

}  // namespace

PageBuffer::PageBuffer(int64_t bytes) : bytes_(round_up(std::max<int64_t>(bytes, 1))), memory_(nullptr, Free{0}) {
  const auto size = static_cast<size_t>(bytes_);
  const size_t pooled = size < MemoryPool::kHugePage / 2 ? 0 : MemoryPool::round_up(size);
  void* memory = pooled == 0 ? std::aligned_alloc(kPage, size) : MemoryPool::shared().take(pooled);
  if (memory == nullptr) throw std::bad_alloc();
  memory_ = {static_cast<char*>(memory), Free{pooled}};
}

void PageBuffer::Free::operator()(char* memory) const {
  if (pooled == 0) {
    std::free(memory);
  } else {
    MemoryPool::shared().give(memory, pooled);
  }
}

DiskLog::DiskLog(std::string name, std::string path, int64_t record_bytes, int64_t segment_bytes, bool ring)
    : name_(std::move(name)),
      path_(std::move(path)),
      record_bytes_(record_bytes),
      stride_(record_bytes + static_cast<int64_t>(sizeof(int64_t))),
      segment_bytes_(round_up(std::max(segment_bytes, 8 * stride_))),
      slots_(segment_bytes_ / stride_) {
  std::random_device random;
  mark_ = static_cast<uint64_t>(random()) << 40 | static_cast<uint64_t>(random()) << 8;
  open_file();
  io_ = std::make_unique<DiskIo>(file_, ring);
}

DiskLog::~DiskLog() {
  io_.reset();  // waits for transfers
  close(file_);
}

void DiskLog::fail(const std::string& what, int error) const {
  std::string message = "table " + name_ + ": " + what + " in " + path_ + ": " + std::strerror(error);
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
    message += "; free space there, or use another Placement(path=)";
  }
  throw std::runtime_error(message);
}

void DiskLog::open_file() {
  file_ = open_unnamed(path_);
  if (file_ < 0) {
    const int error = errno;
    throw std::runtime_error("table " + name_ + ": cannot create the file of its records in " + path_ + ": " +
                             std::strerror(error) +
                             "; Placement(path=) must be an existing folder that can be "
                             "written to");
  }
  // Without the page cache, which would hold the same records twice; not every file system can do without.
  is_direct_ = bypass_page_cache(file_);
  alignment_ = alignment_of(file_, is_direct_);
}

void DiskLog::allocate(int64_t segment) {
  const int error = reserve_space(file_, segment * segment_bytes_, segment_bytes_);
  if (error != 0) fail("no space for " + std::to_string(segment_bytes_) + " more bytes of records", error);
  segments_[segment].state = State::kFree;
  ++allocated_;
}

int64_t DiskLog::free_segment() {
  if (!free_.empty()) {
    const int64_t segment = free_.back();
    free_.pop_back();
    return segment;
  }
  if (holes_.empty()) {
    holes_.push_back(static_cast<int64_t>(segments_.size()));
    segments_.emplace_back();
  }
  const int64_t segment = holes_.back();
  allocate(segment);
  holes_.pop_back();
  return segment;
}

void DiskLog::reserve(int64_t records) {
  take_written(writing_.size() >= kMostWrites);
  int64_t room = static_cast<int64_t>(reserved_.size()) * slots_;
  if (filling_ != kNone) room += slots_ - segments_[filling_].used;
  while (room < records) {
    const int64_t segment = free_segment();
    segments_[segment].state = State::kReserved;
    reserved_.push_back(segment);
    room += slots_;
  }
}

void DiskLog::fill_next() {
  filling_ = reserved_.back();
  Segment& segment = segments_[filling_];
  segment.buffer = std::make_unique<PageBuffer>(segment_bytes_);
  reserved_.pop_back();
  ++buffers_;
  segment.state = State::kFilling;
  ++segment.version;
  segment.used = segment.live = 0;
  segment.last_step = kNoStep;
}

int64_t DiskLog::append(int64_t row, const char* record, int64_t step) {
  if (filling_ == kNone) fill_next();
  Segment& segment = segments_[filling_];
  char* to = segment.buffer->data() + segment.used * stride_;
  std::memcpy(to, record, static_cast<size_t>(record_bytes_));
  const uint64_t marked = mark_ ^ static_cast<uint64_t>(row);
  std::memcpy(to + record_bytes_, &marked, sizeof(marked));
  const int64_t slot = filling_ * slots_ + segment.used;
  ++segment.used;
  ++segment.live;
  ++used_;
  ++live_;
  segment.last_step = std::max(segment.last_step, step);
  if (segment.used == slots_) start_write(filling_);
  return slot;
}

// Closes the segment that is being filled, and starts to write it.
void DiskLog::start_write(int64_t segment) {
  Segment& full = segments_[segment];
  full.state = State::kWriting;
  full.write =
      io_->submit({{segment * segment_bytes_, round_up(full.used * stride_), full.buffer->data()}}, true, false);
  writing_.push_back(segment);
  filling_ = kNone;
}

// Frees the buffers of segments that have been written. With `wait`, waits for all. A failed write is tried once more.
void DiskLog::take_written(bool wait) {
  size_t kept = 0;
  int error = 0;
  for (size_t i = 0; i < writing_.size(); ++i) {
    const int64_t number = writing_[i];
    Segment& segment = segments_[number];
    int result = EINPROGRESS;
    if (wait || segment.write->is_done()) result = segment.write->wait();
    if (result != 0 && result != EINPROGRESS) {
      const int64_t bytes = round_up(segment.used * stride_);
      segment.write = io_->submit({{number * segment_bytes_, bytes, segment.buffer->data()}}, true, true);
      result = segment.write->wait();
      if (result != 0) error = result;
    }
    if (result != 0) {
      writing_[kept++] = number;
      continue;
    }
    segment.buffer.reset();
    segment.write.reset();
    --buffers_;
    segment.state = State::kWritten;
    if (segment.live == 0 && segment.pins == 0) recycle(number);
  }
  writing_.resize(kept);
  if (error != 0) fail("cannot write records", error);
}

void DiskLog::release(int64_t slot) {
  const int64_t number = slot / slots_;
  Segment& segment = segments_[number];
  --segment.live;
  --live_;
  if (segment.live == 0 && segment.pins == 0 && segment.state == State::kWritten && number != compacted_) {
    recycle(number);
  }
}

// Makes the space of a segment without current records available. Of the free segments some are kept, and the others
// are given back to the file system.
void DiskLog::recycle(int64_t segment) {
  Segment& unused = segments_[segment];
  used_ -= unused.used;
  unused.used = 0;
  unused.last_step = kNoStep;
  unused.is_unreadable = false;
  unused.state = State::kFree;
  if (free_.size() >= kKeptFree + segments_.size() / 8 && free_space(file_, segment * segment_bytes_, segment_bytes_)) {
    unused.state = State::kHole;
    holes_.push_back(segment);
    --allocated_;
    return;
  }
  free_.push_back(segment);
}

const char* DiskLog::in_memory(int64_t slot) const {
  const Segment& segment = segments_[slot / slots_];
  return segment.buffer == nullptr ? nullptr : segment.buffer->data() + slot % slots_ * stride_;
}

LogRead DiskLog::read(const std::vector<int64_t>& slots, bool urgent) {
  LogRead found;
  std::vector<Transfer> transfers;
  int64_t bytes = 0;
  const int64_t gap = alignment_ == kWord ? kGapInMemory : kGap;
  for (const int64_t slot : slots) {
    const int64_t offset = slot / slots_ * segment_bytes_ + slot % slots_ * stride_;
    const int64_t first = offset / alignment_ * alignment_;
    const int64_t end = round_up(offset + stride_, alignment_);
    if (!transfers.empty()) {
      Transfer& last = transfers.back();
      const int64_t longer = end - last.offset;
      if (first <= last.offset + last.bytes + gap && longer <= kLongestRead) {
        bytes += std::max<int64_t>(longer - last.bytes, 0);
        last.bytes = std::max(last.bytes, longer);
        found.places.push_back(bytes - last.bytes + offset - last.offset);
        continue;
      }
    }
    transfers.push_back({first, end - first, nullptr});
    bytes += end - first;
    found.places.push_back(bytes - (end - first) + offset - first);
  }
  found.buffer = std::make_unique<PageBuffer>(bytes);
  char* memory = found.buffer->data();
  for (Transfer& transfer : transfers) {
    transfer.memory = memory;
    memory += transfer.bytes;
  }
  found.batch = io_->submit(std::move(transfers), false, urgent);
  return found;
}

LogRead DiskLog::read_segment(int64_t segment) {
  LogRead whole;
  const int64_t bytes = round_up(segments_[segment].used * stride_);
  whole.buffer = std::make_unique<PageBuffer>(bytes);
  std::vector<Transfer> transfers;
  for (int64_t first = 0; first < bytes; first += kLongestRead) {
    transfers.push_back(
        {segment * segment_bytes_ + first, std::min(kLongestRead, bytes - first), whole.buffer->data() + first});
  }
  whole.batch = io_->submit(std::move(transfers), false, false);
  return whole;
}

void DiskLog::wait(const LogRead& read) const { check_read(read.batch->wait()); }

// Throws if a read has ended with an errno.
void DiskLog::check_read(int error) const {
  if (error == ENODATA) {
    throw std::runtime_error("table " + name_ + ": the file of its records in " + path_ +
                             " is shorter than it was written; load a checkpoint, and check the disk");
  }
  if (error != 0) fail("cannot read records", error);
}

int64_t DiskLog::row_of(const char* record) const {
  uint64_t marked = 0;
  std::memcpy(&marked, record + record_bytes_, sizeof(marked));
  return static_cast<int64_t>(marked ^ mark_);
}

void DiskLog::check(const char* record, int64_t row) const {
  if (row_of(record) != row) {
    throw std::runtime_error("table " + name_ + ": the file of its records in " + path_ + " does not hold row " +
                             std::to_string(row) + " where it was written; load a checkpoint, and check the disk");
  }
}

void DiskLog::write_all() {
  if (filling_ != kNone) start_write(filling_);
  take_written(true);
}

int64_t DiskLog::pin() {
  std::vector<int64_t> pinned;
  for (int64_t s = 0; s < static_cast<int64_t>(segments_.size()); ++s) {
    if (segments_[s].state != State::kWritten || segments_[s].live == 0) continue;
    ++segments_[s].pins;
    pinned.push_back(s);
  }
  pins_.emplace(next_pin_, std::move(pinned));
  return next_pin_++;
}

void DiskLog::unpin(int64_t pin) {
  const auto found = pins_.find(pin);
  if (found == pins_.end()) return;
  for (const int64_t number : found->second) {
    Segment& segment = segments_[number];
    --segment.pins;
    if (segment.pins == 0 && segment.live == 0 && segment.state == State::kWritten && number != compacted_) {
      recycle(number);
    }
  }
  pins_.erase(found);
}

// Starts to read the segment with the smallest share of current records, if more than a third of the log is not
// current.
void DiskLog::start_compaction() {
  if (used_ - live_ <= live_ / 2 + 2 * slots_) return;
  int64_t best = kNone;
  for (int64_t s = 0; s < static_cast<int64_t>(segments_.size()); ++s) {
    const Segment& segment = segments_[s];
    if (segment.state != State::kWritten || segment.pins > 0 || segment.is_unreadable) continue;
    if (best == kNone || segment.live * segments_[best].used < segments_[best].live * segment.used) best = s;
  }
  if (best == kNone || segments_[best].live * 4 > segments_[best].used * 3) return;
  compacting_ = read_segment(best);
  compacted_ = best;
}

// The bytes of the segment that is being compacted, which ends its compaction. A failed read is tried once more.
LogRead DiskLog::compacted_segment() {
  const int64_t number = compacted_;
  LogRead whole;
  std::swap(whole, compacting_);
  compacted_ = kNone;
  int error = whole.batch->wait();
  if (error != 0) {
    whole = read_segment(number);
    error = whole.batch->wait();
  }
  Segment& segment = segments_[number];
  if (error != 0) {
    segment.is_unreadable = true;
    if (segment.live == 0 && segment.pins == 0) recycle(number);
    check_read(error);
  }
  return whole;
}

void DiskLog::end_compaction(int64_t segment) {
  Segment& done = segments_[segment];
  if (done.live != 0) {
    done.is_unreadable = true;
    throw std::runtime_error("table " + name_ + ": the file of its records in " + path_ + " lacks " +
                             std::to_string(done.live) + " records; load a checkpoint, and check the disk");
  }
  // The last of its records were released while it was not kept for this compaction any more.
  if (done.state == State::kWritten && done.pins == 0 && done.used > 0) recycle(segment);
}

}  // namespace recis
