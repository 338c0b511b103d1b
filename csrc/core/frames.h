// Frames: memory for the records of a table whose rows are on disk, and which of them are given up for others.
//
// The location of a row is a word of 8 bytes: 0 if it has no record, otherwise a frame or a slot in the log; bit 0 says
// which. All frames have the same size and follow each other in memory, so kernels access their records as those of one
// block (BlocksRef), with frame numbers instead of row numbers.
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
#include <memory>
#include <vector>

#include "core/macros.h"

namespace recis {

inline constexpr int64_t kNoRecord = 0;

inline bool in_frame(int64_t location) { return location != kNoRecord && (location & 1) == 0; }
inline int64_t frame_of(int64_t location) { return (location >> 1) - 1; }
inline int64_t location_of_frame(int64_t frame) { return (frame + 1) << 1; }
inline bool in_log(int64_t location) { return (location & 1) != 0; }
inline int64_t slot_of(int64_t location) { return location >> 1; }
inline int64_t location_of_slot(int64_t slot) { return slot << 1 | 1; }

class Frames {
 public:
  static constexpr int64_t kNone = -1;

  // What is known of a frame, together because a lookup reads most of it.
  struct State {
    int64_t row = kNone;
    int64_t slot = kNone;
    uint32_t used = 0;  // the use that it was last in
    uint8_t uses = 0;
    uint8_t is_new = 0;
  };

  // Bytes of a frame in addition to its record.
  static constexpr int64_t kOverhead = sizeof(State);

  // Bytes of memory for frames.
  static int64_t bytes(int64_t count, int64_t record_bytes) { return count * (record_bytes + kOverhead); }

  Frames(char* memory, int64_t count, int64_t record_bytes)
      : memory_(memory),
        record_bytes_(record_bytes),
        count_(count),
        states_(reinterpret_cast<State*>(memory + count * record_bytes)) {
    std::uninitialized_fill_n(states_, count, State{});
  }

  int64_t count() const { return count_; }
  int64_t held() const { return held_; }

  char* record(int64_t frame) const { return memory_ + frame * record_bytes_; }

  void prefetch(int64_t frame) const { __builtin_prefetch(states_ + frame, 1); }

  // The row whose record a frame holds, or kNone.
  int64_t row(int64_t frame) const { return states_[frame].row; }

  // The slot of the log with the same record; kNone if there is none, because the record is new or has changed.
  int64_t slot(int64_t frame) const { return states_[frame].slot; }
  void set_slot(int64_t frame, int64_t slot) { states_[frame].slot = slot; }

  // Starts a new use of several rows, during which no frame that it uses is given up.
  void next_use() {
    if (++now_ == 0) {  // wrapped around
      for (int64_t frame = 0; frame < count_; ++frame) states_[frame].used = 0;
      now_ = 1;
    }
    used_now_ = 0;
  }

  // Marks a frame as used now; `counts` if that makes its row worth keeping.
  void use(int64_t frame, bool counts) {
    State& state = states_[frame];
    if (state.used == now_) return;
    state.used = now_;
    ++used_now_;
    if (counts && state.uses < kMostUses) ++state.uses;
  }

  // The frames that are free or can be given up now.
  int64_t room() const { return count() - used_now_; }

  // Returns a frame that is free or that is to be given up, which the caller empties; room() must be positive. The
  // frame is not returned again now.
  int64_t choose() {
    const int64_t frame = find();
    states_[frame].used = now_;
    return frame;
  }

  // Gives a frame from choose() to a row that is used now.
  void hold(int64_t frame, int64_t row, int64_t slot) {
    State& state = states_[frame];
    if (state.row == kNone) ++held_;
    state = {row, slot, now_, 0, 0};
    ++used_now_;
    // Rows that find unused frames stay, except the last: a queue of all would give up the first for any later row.
    if (next_unused_ + count() / kShareOfNew < count()) return;
    state.is_new = 1;
    queue_.push_back(frame);
  }

  // Empties a frame.
  void free(int64_t frame) {
    --held_;
    if (states_[frame].used == now_) --used_now_;
    states_[frame] = {};
    free_.push_back(frame);
  }

  // Calls f(frame) for each frame that holds a record.
  template <class F>
  void for_each_held(F&& f) const {
    for (int64_t frame = 0; frame < next_unused_; ++frame) {
      if (states_[frame].row != kNone) f(frame);
    }
  }

 private:
  static constexpr uint8_t kMostUses = 31;
  static constexpr int64_t kShareOfNew = 10;
  static constexpr size_t kAhead = 16;  // frames of the queue that are prefetched

  int64_t find() {
    if (next_unused_ < count()) return next_unused_++;
    if (!free_.empty()) {
      const int64_t frame = free_.back();
      free_.pop_back();
      return frame;
    }
    while (static_cast<int64_t>(queue_.size()) > count() / kShareOfNew) {
      if (queue_.size() > kAhead) prefetch(queue_[kAhead]);
      const int64_t frame = queue_.front();
      queue_.pop_front();
      State& state = states_[frame];
      if (state.is_new == 0) continue;  // was freed
      if (state.used == now_) {
        queue_.push_back(frame);
        break;
      }
      state.is_new = 0;
      if (state.uses == 0 && state.row != kNone) return frame;
    }
    for (int64_t passed = 0;; ++passed) {
      const int64_t frame = hand_;
      hand_ = hand_ + 1 == count() ? 0 : hand_ + 1;
      State& state = states_[frame];
      if (state.used == now_ || state.row == kNone) continue;
      // After two rounds all that is left is in use or in the queue.
      if (state.is_new != 0 && passed < 2 * count()) continue;
      if (state.uses > 0 && passed < 64 * count()) {
        --state.uses;
        continue;
      }
      state.is_new = 0;
      return frame;
    }
  }

  char* memory_;
  int64_t record_bytes_;
  int64_t count_;
  State* states_;
  std::vector<int64_t> free_;
  std::deque<int64_t> queue_;
  int64_t next_unused_ = 0;
  int64_t held_ = 0;
  int64_t hand_ = 0;
  int64_t used_now_ = 0;
  uint32_t now_ = 0;
};

}  // namespace recis
