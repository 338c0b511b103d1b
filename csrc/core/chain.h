// The chain of calls inside jit on one device: its state, and the kernels that start and end a call.
//
// csrc/xla/README.md explains tokens. A chain's state is memory of the tables' device, which only calls change while
// the tables are lent. So each call learns there whether it may run, and the host need not wait for a device.
#pragma once

#include <cstdint>

#include "core/atomics.h"
#include "core/bags.h"
#include "core/segments.h"

namespace recis {

enum class Status : int64_t {
  kOk = 0,
  kNoRoom = 1,       // a lookup had more new ids than there was room for
  kStaleToken = 2,   // the token was not the last call's
  kStaleLookup = 3,  // rows were removed or moved since the lookup of an update
  kBadOffsets = 4,   // a lookup's offsets do not start with 0, decrease, or exceed its ids
};

// A token is float32 [2]: the serial number of the last call, and a Status. Integers up to kSerials are exact in it.
inline constexpr int64_t kSerials = int64_t{1} << 24;

struct ChainState {
  int64_t serial;  // of the last call
  int64_t status;
  int64_t failed;  // table of the first call that was refused, or -1
};

struct TableState {
  int64_t steps;   // updates since the tables were lent
  int64_t unseen;  // training lookups whose rows no update has marked as seen
};

// A chain's state as int64 words: ChainState, a TableState for each table, and a bit for each serial number, which is
// set while the lookup of that number is unseen.
struct ChainRef {
  int64_t* words;
  int64_t tables;

  static constexpr int64_t kHead = sizeof(ChainState) / 8;
  static constexpr int64_t kPerTable = sizeof(TableState) / 8;

  static constexpr int64_t size(int64_t tables) { return kHead + kPerTable * tables + kSerials / 64; }

  RECIS_HD ChainState& state() const { return *reinterpret_cast<ChainState*>(words); }
  RECIS_HD TableState& table(int64_t number) const { return reinterpret_cast<TableState*>(words + kHead)[number]; }
  RECIS_HD uint64_t& unseen_word(int64_t serial) const {
    return reinterpret_cast<uint64_t*>(words + kHead + kPerTable * tables)[serial / 64];
  }
  RECIS_HD static uint64_t unseen_bit(int64_t serial) { return uint64_t{1} << (serial % 64); }
};

// A call's place in its chain.
struct Turn {
  ChainRef chain;
  int64_t table;       // number of the call's table
  const float* token;  // [2], of the call before
  float* next;         // [2]

  // Takes the turn, so that no other call can take it. Returns false if the call may change nothing.
  RECIS_HD bool take() const {
    ChainState& state = chain.state();
    if (load_relaxed(&state.status) != 0) return false;
    const int64_t serial = load_relaxed(&state.serial);
    auto expected = static_cast<uint64_t>(serial);
    if (token[0] == static_cast<float>(serial) &&
        compare_exchange(word(state.serial), expected, static_cast<uint64_t>(serial % (kSerials - 1) + 1))) {
      return true;
    }
    fail(Status::kStaleToken);
    return false;
  }

  // Refuses all later calls. The first failure counts.
  RECIS_HD void fail(Status why) const {
    uint64_t ok = 0;
    if (compare_exchange(word(chain.state().status), ok, static_cast<uint64_t>(why))) chain.state().failed = table;
  }

  RECIS_HD void end() const {
    next[0] = static_cast<float>(chain.state().serial);
    next[1] = static_cast<float>(chain.state().status);
  }

 private:
  RECIS_HD static uint64_t* word(int64_t& value) { return reinterpret_cast<uint64_t*>(&value); }
};

// What the kernels of a call tell later ones. StartLookup and StartUpdate set all of it.
struct CallFlags {
  int64_t refused;   // 1 if the call may change nothing
  int64_t overflow;  // 1 if an id found no room
  int64_t fresh;     // rows that the lookup has inserted
  int64_t undone;    // rows that it has withdrawn, because there was not room for all
  int64_t cleared;   // words of its outputs to clear
  int64_t repeated;  // 1 if an earlier update has marked the rows of the lookup as seen
};

// A training lookup as an update finds it in a buffer: [number, generation, count, unique [N], starts [N + 1],
// sources [N], scales float32 [N] if scaled]. The number is the lookup's serial number.
struct Context {
  static constexpr int64_t kUnique = 3;

  static constexpr int64_t words(int64_t positions, bool scaled) {
    return kUnique + 3 * positions + 1 + (scaled ? (positions + 1) / 2 : 0);
  }
};

// The kernels below have one item.

struct StartLookup {
  Turn turn;
  CallFlags* flags;

  template <class Lanes>
  RECIS_HD void operator()(int64_t, Lanes lanes) const {
    if (lanes.rank == 0) *flags = {turn.take() ? 0 : 1, 0, 0, 0, 0, 0};
  }
};

struct EndLookup {
  Turn turn;
  CallFlags* flags;
  int64_t* context;      // null unless training
  int64_t generation;    // of the table
  int32_t watched;       // whether an update must follow
  int64_t output_words;  // 32-bit words of vectors and context

  template <class Lanes>
  RECIS_HD void operator()(int64_t, Lanes lanes) const {
    if (lanes.rank != 0) return;
    if (flags->refused != 0) {
      flags->cleared = output_words;
    } else if (context != nullptr) {
      const int64_t serial = turn.chain.state().serial;
      context[0] = serial;
      context[1] = generation;
      if (watched != 0) {
        turn.chain.unseen_word(serial) |= ChainRef::unseen_bit(serial);
        ++turn.chain.table(turn.table).unseen;
      }
    }
    turn.end();
  }
};

struct StartUpdate {
  Turn turn;
  CallFlags* flags;
  const int64_t* context;
  int64_t generation;  // of the table

  template <class Lanes>
  RECIS_HD void operator()(int64_t, Lanes lanes) const {
    if (lanes.rank != 0) return;
    *flags = {1, 0, 0, 0, 0, 0};
    if (!turn.take()) return;
    const int64_t lookup = context[0];
    if (lookup < 1 || lookup >= kSerials || context[1] != generation) return turn.fail(Status::kStaleLookup);
    uint64_t& word = turn.chain.unseen_word(lookup);
    const uint64_t bit = ChainRef::unseen_bit(lookup);
    flags->refused = 0;
    flags->repeated = (word & bit) == 0 ? 1 : 0;
    if ((word & bit) != 0) --turn.chain.table(turn.table).unseen;
    word &= ~bit;
  }
};

struct EndUpdate {
  Turn turn;
  CallFlags* flags;

  template <class Lanes>
  RECIS_HD void operator()(int64_t, Lanes lanes) const {
    if (lanes.rank != 0) return;
    if (flags->refused == 0) ++turn.chain.table(turn.table).steps;
    turn.end();
  }
};

// The offsets of a feature, one item each.
struct OffsetSpan {
  int64_t first;
  const int64_t* offsets;
  int64_t ids;
};

// Refuses a lookup whose offsets do not start with 0, decrease, or exceed the ids: kernels would follow them.
struct CheckOffsets {
  Segments<OffsetSpan> segments;
  Turn turn;
  CallFlags* flags;

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes lanes) const {
    const OffsetSpan& span = segments[part];
    if (lanes.rank != 0) return;
    const int64_t* offset = span.offsets + (i - span.first);
    if ((i == span.first ? *offset == 0 : offset[-1] <= *offset) && *offset <= span.ids) return;
    turn.fail(Status::kBadOffsets);
    store_relaxed(reinterpret_cast<uint64_t*>(&flags->refused), 1);
  }
};

// An output of a lookup as 32-bit words, one item each.
struct OutputSpan {
  int64_t first;
  uint32_t* words;
};

// Clears the outputs of a lookup that was refused; the items are counted by CallFlags::cleared.
struct ClearOutputs {
  Segments<OutputSpan> segments;

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes lanes) const {
    if (lanes.rank == 0) segments[part].words[i - segments[part].first] = 0;
  }
};

}  // namespace recis
