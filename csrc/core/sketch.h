// A count-min sketch in blocks: approximate counts of ids in fixed memory, never too low.
//
// G. Cormode, S. Muthukrishnan: An improved data stream summary: the count-min sketch and its applications. Journal of
// Algorithms 55, 2005. F. Putze, P. Sanders, J. Singler: Cache-, hash- and space-efficient Bloom filters. WEA 2007 (one
// cache line for each id). L. Fan, P. Cao, J. Almeida, A. Broder: Summary cache. SIGCOMM 1998 (small saturating cells).
//
// An id has one block of 64 bytes, four rows of cells of 2, 4, 8 or 16 bits, and a cell in each row. Its count is at
// most the least of the four. Blocks are in the order of the ids' bucket hashes, so a sketch is split by bucket. From
// 65,536 blocks on, none belongs to two buckets.
#pragma once

#include <cstdint>

#include "core/atomics.h"
#include "core/for_each.h"
#include "core/hash/mix.h"
#include "core/id_map.h"
#include "core/segments.h"

namespace recis {

inline constexpr int kSketchRows = 4;
inline constexpr int kSketchWords = 8;  // of a block: two for each row

struct SketchRef {
  uint64_t* words;       // [member tables][blocks][kSketchWords]
  uint64_t first_block;  // number of the first block of each member table among those of all buckets
  uint64_t blocks;
  int32_t block_shift;  // 64 - log2(blocks of all buckets), at least 24
  int32_t cell_bits;    // 2, 4, 8 or 16

  RECIS_HD uint64_t most() const { return (uint64_t{1} << cell_bits) - 1; }

  // The block of an id, or null if its bucket is not here.
  RECIS_HD uint64_t* block(uint64_t hash, int64_t member) const {
    const uint64_t number = (hash >> block_shift) - first_block;
    if (number >= blocks) return nullptr;
    return words + kSketchWords * (static_cast<uint64_t>(member) * blocks + number);
  }

  // The cell of an id in a row: the position of its lowest bit.
  RECIS_HD int32_t cell(uint64_t hash, int row) const {
    const uint64_t cells = 128 / static_cast<uint64_t>(cell_bits);
    return static_cast<int32_t>((hash >> (6 * row)) & (cells - 1)) * cell_bits;
  }
};

// The base of the kernels of a sketch: the ids of all features, and their rows; those that have one are not counted.
struct SketchIds {
  Segments<IdSpan> segments;
  SketchRef sketch;
  const int64_t* rows;

  static constexpr int64_t fetched_bytes() { return 64; }
  static constexpr int64_t lanes() { return kSketchRows; }

  RECIS_HD void prefetch(int32_t part, int64_t i) const {
    const IdSpan& span = segments[part];
    if (rows[i] >= 0) return;
    if (const uint64_t* block = sketch.block(bucket_hash(span.id(i)), span.member)) prefetch_bytes<true>(block, 64);
  }
};

// Adds counts[i], or 1, to the cells of ids[i], up to the most that a cell can hold. The sums do not depend on the
// order of the ids.
struct CountInSketch : SketchIds {
  const int64_t* counts;  // [n], each at least 1; null: 1

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes lanes) const {
    const IdSpan& span = segments[part];
    if (rows[i] >= 0 || !span.has(i)) return;
    const uint64_t hash = bucket_hash(span.id(i));
    uint64_t* block = sketch.block(hash, span.member);
    if (block == nullptr) return;
    const uint64_t most = sketch.most();
    const uint64_t count = counts == nullptr ? 1 : static_cast<uint64_t>(counts[i]);
    for (int row = lanes.rank; row < kSketchRows; row += lanes.size) {
      const int32_t at = sketch.cell(hash, row);
      uint64_t* word = block + 2 * row + at / 64;
      uint64_t old = load_relaxed(word);
      for (;;) {
        const uint64_t room = most - ((old >> (at % 64)) & most);
        if (room == 0) break;
        if (compare_exchange(word, old, old + ((count < room ? count : room) << (at % 64)))) break;
      }
    }
  }
};

// admitted[i] = whether ids[i] has a row, or its count may be `least` or more.
struct AdmitSketched : SketchIds {
  uint64_t least;
  uint8_t* admitted;

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes lanes) const {
    const IdSpan& span = segments[part];
    uint64_t count = least;
    if (rows[i] < 0) {
      const uint64_t hash = bucket_hash(span.has(i) ? span.id(i) : 0);
      const uint64_t* block = span.has(i) ? sketch.block(hash, span.member) : nullptr;
      if (block == nullptr) {
        count = 0;
      } else {
        count = sketch.most();
        for (int row = lanes.rank; row < kSketchRows; row += lanes.size) {
          const int32_t at = sketch.cell(hash, row);
          const uint64_t cell = (load_relaxed(block + 2 * row + at / 64) >> (at % 64)) & sketch.most();
          count = cell < count ? cell : count;
        }
      }
      count = lanes_min(count, lanes);
    }
    if (lanes.rank == 0) admitted[i] = count >= least;
  }
};

// Halves every cell `times` times, rounding down. One item for each block.
struct HalveSketch {
  SketchRef sketch;
  int32_t times;

  static constexpr int64_t lanes() { return kSketchWords; }

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    uint64_t kept = sketch.most() >> times;  // the bits that a cell keeps, repeated over a word
    for (int32_t bits = sketch.cell_bits; bits < 64; bits *= 2) kept |= kept << bits;
    uint64_t* block = sketch.words + kSketchWords * i;
    for (int word = lanes.rank; word < kSketchWords; word += lanes.size) {
      // Memory that was never written stays untouched, so that the system need not provide it.
      if (block[word] != 0) block[word] = (block[word] >> times) & kept;
    }
  }
};

}  // namespace recis
