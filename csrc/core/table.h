// The table descriptor: everything a kernel may know about a HashTable, as plain data.
//
// IDMap: slots of two words. Word 0 is the id, all 64 bits of it. Word 1 is the entry:
//
//     63..62 state | 61..46 member table | 45..6 row | 5..0 tag of the hash
//
// The state determines what a slot holds, so that every id is legal and none is reserved. States only advance, kEmpty
// -> kClaimed -> kFull -> kErased, until the slot's line is moved (core/id_map.h), which drops erased slots.
//
// The slots are in lines of four, and the lines in equal chunks. A header, uint64 [kHeaderWords + chunks], has the
// words named below, followed by the addresses of the chunks; the last chunk may be shorter.
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

// Words of the header of an IDMap.
enum HeaderWord : int {
  kLines = 0,       // lines in use, at least one
  kOldLines = 1,    // lines over which the old ids are spread; kLines except while lines are being moved
  kLastOld = 2,     // the greatest hash of an old id; of no matter unless kOldLines differs
  kChunkShift = 3,  // log2 of the lines of a chunk
  kMoveFirst = 4,   // lines that are being moved: [kMoveFirst, kMoveEnd) and [0, kMoveWrapped)
  kMoveEnd = 5,
  kMoveWrapped = 6,
  kMoveCount = 7,  // the number of these lines
  kStuck = 8,      // 1 if lines could not be moved, because too many in a row are full
  kHeaderWords = 16,
};

// Lines are in the order of the ids' hashes: line = hash * lines / 2^64. So a map grows in place, by moving the lines
// from the last one down, each to a line after it.
//
// LineOrder holds the values of a header, read once for many ids.
struct LineOrder {
  const uint64_t* chunks;
  uint64_t lines;
  uint64_t old_lines;
  uint64_t last_old;
  uint64_t chunk_shift;

  // The line at which the probe for an id starts.
  RECIS_HD uint64_t first_line(uint64_t hash) const {
    return multiply_high(hash, hash <= last_old ? old_lines : lines);
  }

  RECIS_HD uint64_t next_line(uint64_t number) const { return number + 1 == lines ? 0 : number + 1; }

  RECIS_HD uint64_t* line(uint64_t number) const {
    uint64_t* chunk = reinterpret_cast<uint64_t*>(chunks[number >> chunk_shift]);
    return chunk + 2 * kLineSlots * (number & ((uint64_t{1} << chunk_shift) - 1));
  }
};

struct IdMapRef {
  uint64_t* header;

  RECIS_HD LineOrder order() const {
    return {header + kHeaderWords, header[kLines], header[kOldLines], header[kLastOld], header[kChunkShift]};
  }

  RECIS_HD uint64_t lines() const { return header[kLines]; }

  RECIS_HD uint64_t* line(uint64_t number) const { return order().line(number); }

  RECIS_HD uint64_t* slot(uint64_t number) const { return line(number / kLineSlots) + 2 * (number % kLineSlots); }

  // Where the probe for an id starts, to prefetch it.
  RECIS_HD const uint64_t* start(uint64_t hash) const { return line(order().first_line(hash)); }
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
