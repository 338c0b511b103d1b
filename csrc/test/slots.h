// The slots of an IDMap for native tests, in place of Python's Slots.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "core/for_each.h"
#include "core/id_map.h"
#include "test/expect.h"

namespace recis_test {

using namespace recis;

// The host-side owner of an IDMap's slots, in chunks of 64 lines.
class Slots {
 public:
  static constexpr int kShift = 6;

  explicit Slots(int64_t capacity) : header_(kHeaderWords) {
    header_[kLines] = header_[kOldLines] = capacity / kLineSlots;
    header_[kChunkShift] = kShift;
    add_chunks(capacity / kLineSlots);
  }

  IdMapRef map() { return {header_.data()}; }
  int64_t capacity() const { return static_cast<int64_t>(header_[kLines] * kLineSlots); }

  // Moves all lines, `piece` at a time, with a check after each.
  template <class Check>
  void grow(int64_t capacity, uint64_t piece, int64_t* counters, Check&& check) {
    const uint64_t old = header_[kLines];
    const uint64_t lines = capacity / kLineSlots;
    const uint64_t room = piece + 64;
    add_chunks(lines);
    std::vector<uint64_t> lifted(2 * kLineSlots * room);
    for (uint64_t end = old; end > 0;) {
      const uint64_t first = end > piece ? end - piece : 0;
      const auto last = static_cast<uint64_t>(((static_cast<unsigned __int128>(first) << 64) + old - 1) / old - 1);
      for_each_cpu(Serial{}, 1, 1, PrepareMove{header_.data(), lines, first, end, last, room});
      expect(header_[kStuck] == 0, "lines were moved", __LINE__);
      const auto count = static_cast<int64_t>(header_[kMoveCount]);
      for_each_cpu(Threads{4}, count, 1, LiftLines{map(), lifted.data(), counters});
      for_each_cpu(Threads{4}, count, 1, PlaceLines{map(), lifted.data()});
      end = first;
      check();
    }
  }

 private:
  void add_chunks(uint64_t lines) {
    while (chunks_.size() << kShift < lines) {
      chunks_.emplace_back(std::aligned_alloc(64, 64 << kShift), &std::free);
      std::fill_n(static_cast<char*>(chunks_.back().get()), 64 << kShift, 0);
      header_.push_back(reinterpret_cast<uint64_t>(chunks_.back().get()));
    }
  }

  std::vector<uint64_t> header_;
  std::vector<std::unique_ptr<void, void (*)(void*)>> chunks_;
};

}  // namespace recis_test
