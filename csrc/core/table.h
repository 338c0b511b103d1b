// The table descriptor: everything a kernel may know about a HashTable, as plain data.
//
// IDMap: slots of two words. Word 0 is the id, all 64 bits of it. Word 1 is the entry:
//
//     63..62 state | 61..46 member table | 45..6 row | 5..0 tag of the hash
//
// The state determines what a slot holds, so that every id is legal and none is reserved. Within one slots tensor,
// states only advance: kEmpty -> kClaimed -> kFull -> kErased. A rehash creates a new tensor without erased slots.
//
// Counters: int64 [kCounters] beside the slots, indexed by the names below. Rows that a call allocates are counted in
// kFresh until the call is committed, so that its kernels can tell new rows from old ones.
//
// EmbeddingBlocks: equal blocks of 2^block_shift records; `addresses` holds one address per block. A row never moves.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace recis {

enum class SlotState : uint64_t { kEmpty = 0, kClaimed = 1, kFull = 2, kErased = 3 };

inline constexpr int kRowBits = 40;
inline constexpr int kTagBits = 6;
inline constexpr int kMemberShift = kRowBits + kTagBits;
inline constexpr int kStateShift = 62;
inline constexpr uint64_t kRowMask = (uint64_t{1} << kRowBits) - 1;
// The bits that two entries of one id share even while one of them is being written: member and tag.
inline constexpr uint64_t kKeyMask = (((uint64_t{1} << 16) - 1) << kMemberShift) | ((uint64_t{1} << kTagBits) - 1);

RECIS_HD SlotState entry_state(uint64_t entry) { return static_cast<SlotState>(entry >> kStateShift); }
RECIS_HD int64_t entry_row(uint64_t entry) { return static_cast<int64_t>((entry >> kTagBits) & kRowMask); }
RECIS_HD int64_t entry_member(uint64_t entry) { return static_cast<int64_t>((entry >> kMemberShift) & 0xffff); }
RECIS_HD uint64_t make_entry(SlotState state, uint64_t key, int64_t row) {
  return (static_cast<uint64_t>(state) << kStateShift) | key | (static_cast<uint64_t>(row) << kTagBits);
}

enum Counter : int {
  kFresh = 0,      // rows allocated since the last commit
  kRows = 1,       // rows created so far: an upper bound on every row index
  kFree = 2,       // rows on the free list, to be reused
  kUsedSlots = 3,  // slots that are not empty: full or erased
  kLive = 4,       // ids that have a row
  kOverflow = 5,   // 1 if an insert found no free slot, so that its id has no row
  kCounters = 6,
};

// Slots of a cache line, which a probe compares at once.
inline constexpr uint64_t kLineSlots = 4;

struct IdMapRef {
  uint64_t* slots;  // [mask + 1][2], aligned to 16 bytes; at least one line
  uint64_t mask;    // capacity - 1, the capacity a power of two
};

// The history of a row, 16 bytes of its record: two steps of 40 bits and a frequency of 48 bits, which saturates.
struct RowMeta {
  uint64_t updated;  // step of the last update << 24 | the frequency's high 24 bits
  uint64_t seen;     // step of the last training lookup << 24 | the frequency's low 24 bits

  static constexpr int kShift = 24;
  static constexpr uint64_t kLow = (uint64_t{1} << kShift) - 1;
  static constexpr uint64_t kMostFrequent = (uint64_t{1} << 48) - 1;

  RECIS_HD static RowMeta of(int64_t updated_step, int64_t seen_step, int64_t frequency) {
    const uint64_t f = static_cast<uint64_t>(frequency) < kMostFrequent ? frequency : kMostFrequent;
    return {static_cast<uint64_t>(updated_step) << kShift | f >> kShift,
            static_cast<uint64_t>(seen_step) << kShift | (f & kLow)};
  }

  RECIS_HD int64_t updated_step() const { return static_cast<int64_t>(updated >> kShift); }
  RECIS_HD int64_t seen_step() const { return static_cast<int64_t>(seen >> kShift); }
  RECIS_HD int64_t frequency() const { return static_cast<int64_t>((updated & kLow) << kShift | (seen & kLow)); }
};

struct BlocksRef {
  const int64_t* addresses;  // [number of blocks]
  int32_t block_shift;       // log2 of the rows of a block
  int32_t meta_offset;       // bytes from a record's start to its RowMeta
  int64_t record_bytes;      // a multiple of 16

  RECIS_HD char* record(int64_t row) const {
    const int64_t within = row & ((int64_t{1} << block_shift) - 1);
    return reinterpret_cast<char*>(addresses[row >> block_shift]) + within * record_bytes;
  }

  RECIS_HD RowMeta* meta(int64_t row) const { return reinterpret_cast<RowMeta*>(record(row) + meta_offset); }
};

// Prefetches every cache line of a record, for writing if `write`.
template <bool write>
RECIS_HD void prefetch_record(const BlocksRef& blocks, int64_t row, int64_t bytes) {
  prefetch_bytes<write>(blocks.record(row), bytes);
}

}  // namespace recis
