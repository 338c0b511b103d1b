// Frames: memory for the records of a table whose rows are on disk, and which of them are given up for others.
//
// A row has a location, a word of 8 bytes: 0 without a record, the address of its frame, or its slot in the log. Frames
// are aligned to 16 bytes, so bit 0 tells a slot from an address. Locations are an address table of blocks of one row
// (BlocksRef with block_shift 0), so kernels reach the records in frames without a copy of the table's code.
//
// A frame is given up by a clock: a hand passes over the frames, halving the uses of each, and takes the first that has
// none. Frames that a row has just got wait in a queue first, and are given up at its end unless they were used again:
// most rows that come from the disk are not used again soon (S3-FIFO, Yang et al., 2023).
//
// Used by one thread at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

#include "core/macros.h"

namespace recis {

inline constexpr int64_t kNoRecord = 0;

inline bool in_frame(int64_t location) { return location != kNoRecord && (location & 1) == 0; }
inline bool in_log(int64_t location) { return (location & 1) != 0; }
inline int64_t slot_of(int64_t location) { return location >> 1; }
inline int64_t location_of_slot(int64_t slot) { return slot << 1 | 1; }

class Frames {
 public:
  static constexpr int64_t kNone = -1;

  // Bytes of a frame in addition to its record.
  static constexpr int64_t kOverhead = 2 * sizeof(int64_t) + sizeof(uint32_t) + 2;

  Frames(char* memory, int64_t count, int64_t record_bytes)
      : memory_(memory),
        record_bytes_(record_bytes),
        rows_(count, kNone),
        slots_(count, kNone),
        used_(count, 0),
        uses_(count, 0),
        is_new_(count, 0) {}

  int64_t count() const { return static_cast<int64_t>(rows_.size()); }
  int64_t held() const { return held_; }

  char* record(int64_t frame) const { return memory_ + frame * record_bytes_; }
  int64_t location(int64_t frame) const { return reinterpret_cast<int64_t>(record(frame)); }
  int64_t frame_at(int64_t location) const { return (location - reinterpret_cast<int64_t>(memory_)) / record_bytes_; }

  // The row whose record a frame holds, or kNone.
  int64_t row(int64_t frame) const { return rows_[frame]; }
  void set_row(int64_t frame, int64_t row) { rows_[frame] = row; }

  // The slot of the log with the same record; kNone if there is none, because the record is new or has changed.
  int64_t slot(int64_t frame) const { return slots_[frame]; }
  void set_slot(int64_t frame, int64_t slot) { slots_[frame] = slot; }

  // Starts a new use of several rows, during which no frame that it uses is given up.
  void next_use() {
    if (++now_ == 0) {  // wrapped around
      std::fill(used_.begin(), used_.end(), 0);
      now_ = 1;
    }
    used_now_ = 0;
  }

  // Marks a frame as used now; `counts` if that makes its row worth keeping.
  void use(int64_t frame, bool counts) {
    if (used_[frame] == now_) return;
    used_[frame] = now_;
    ++used_now_;
    if (counts && uses_[frame] < kMostUses) ++uses_[frame];
  }

  // The frames that are free or can be given up now.
  int64_t room() const { return count() - used_now_; }

  // Returns a frame that is free or that is to be given up, which the caller empties; room() must be positive.
  int64_t choose() {
    if (next_unused_ < count()) return next_unused_++;
    if (!free_.empty()) {
      const int64_t frame = free_.back();
      free_.pop_back();
      return frame;
    }
    while (static_cast<int64_t>(queue_.size()) > count() / kShareOfNew) {
      const int64_t frame = queue_.front();
      queue_.pop_front();
      if (is_new_[frame] == 0) continue;  // was freed
      if (used_[frame] == now_) {
        queue_.push_back(frame);
        break;
      }
      is_new_[frame] = 0;
      if (uses_[frame] == 0 && rows_[frame] != kNone) return frame;
    }
    for (int64_t passed = 0;; ++passed) {
      const int64_t frame = hand_;
      hand_ = hand_ + 1 == count() ? 0 : hand_ + 1;
      if (used_[frame] == now_ || rows_[frame] == kNone) continue;
      // After two rounds all that is left is in use or in the queue.
      if (is_new_[frame] != 0 && passed < 2 * count()) continue;
      if (uses_[frame] > 0 && passed < 64 * count()) {
        --uses_[frame];
        continue;
      }
      is_new_[frame] = 0;
      return frame;
    }
  }

  // Gives a frame from choose() to a row that is used now.
  void hold(int64_t frame, int64_t row, int64_t slot) {
    if (rows_[frame] == kNone) ++held_;
    rows_[frame] = row;
    slots_[frame] = slot;
    used_[frame] = now_;
    ++used_now_;
    uses_[frame] = 0;
    is_new_[frame] = 0;
    // Rows that find unused frames stay, except the last: a queue of all would give up the first for any later row.
    if (next_unused_ + count() / kShareOfNew < count()) return;
    is_new_[frame] = 1;
    queue_.push_back(frame);
  }

  // Empties a frame.
  void free(int64_t frame) {
    --held_;
    rows_[frame] = slots_[frame] = kNone;
    if (used_[frame] == now_) --used_now_;
    used_[frame] = 0;
    uses_[frame] = is_new_[frame] = 0;
    free_.push_back(frame);
  }

  // Calls f(frame) for each frame that holds a record.
  template <class F>
  void for_each_held(F&& f) const {
    for (int64_t frame = 0; frame < next_unused_; ++frame) {
      if (rows_[frame] != kNone) f(frame);
    }
  }

 private:
  static constexpr uint8_t kMostUses = 31;
  static constexpr int64_t kShareOfNew = 10;

  char* memory_;
  int64_t record_bytes_;
  std::vector<int64_t> rows_;
  std::vector<int64_t> slots_;
  std::vector<uint32_t> used_;  // the use that it was last in
  std::vector<uint8_t> uses_;
  std::vector<uint8_t> is_new_;
  std::vector<int64_t> free_;
  std::deque<int64_t> queue_;
  int64_t next_unused_ = 0;
  int64_t held_ = 0;
  int64_t hand_ = 0;
  int64_t used_now_ = 0;
  uint32_t now_ = 0;
};

}  // namespace recis
