// Inserting ids into a table that may not grow: all new ids of a call get rows, or none does.
//
// On a device the host cannot count the new ids first without waiting. So InsertWithin inserts as long as there is
// room, and CommitWithin then commits, or lets UndoInserts empty the slots again, which were empty before. Nothing else
// may use the table in between.
#pragma once

#include <cstdint>

#include "core/chain.h"
#include "core/id_map.h"

namespace recis {

// The rows that a table without growth has left.
struct Room {
  int64_t* counters;
  int64_t max_rows;   // rows that fit into the blocks
  int64_t max_slots;  // slots that may be in use

  RECIS_HD int64_t size() const {
    return min64(max_rows - counters[kRows] + counters[kFree], max_slots - counters[kUsedSlots]);
  }
  // Whether a row may be left while others are being inserted.
  RECIS_HD explicit operator bool() const { return load_acquire(counters + kFresh) < size(); }
};

// rows[i] = row of ids[i], or -1 at a position that is not in use. An id without a row gets one if there is room;
// otherwise, the overflow is noted. `fresh` and `fresh_slots` receive the position and the slot of each new row.
struct InsertWithin : LookUpIds {
  Room room;
  const int64_t* free_rows;  // [counters[kFree]]
  int64_t* rows;
  int64_t* fresh;          // [n]
  uint64_t** fresh_slots;  // [n]
  CallFlags* flags;

  template <class Lanes>
  RECIS_HD void operator()(int32_t part, int64_t i, Lanes lanes) const {
    const IdSpan& span = segments[part];
    if (!span.has(i)) {
      if (lanes.rank == 0) rows[i] = -1;
      return;
    }
    int64_t number = 0;
    const auto new_row = [&] {
      number = fetch_add_release(room.counters + kFresh, 1);
      return fresh_row(room.counters, free_rows, number);
    };
    const Probe probe = find_or_claim(map, span.id(i), span.member, room, new_row, lanes);
    if (lanes.rank != 0) return;
    rows[i] = probe.slot == nullptr ? -1 : entry_row(probe.entry);
    if (probe.claimed) {
      fresh[number] = i;
      fresh_slots[number] = probe.slot;
    }
    if (probe.slot == nullptr) store_relaxed(reinterpret_cast<uint64_t*>(&flags->overflow), 1);
  }
};

// Commits the new rows of InsertWithin or, if there was not room for all, refuses the call. One item.
struct CommitWithin {
  Room room;
  Turn turn;
  CallFlags* flags;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    if (lanes.rank != 0) return;
    const int64_t fresh = room.counters[kFresh];
    if (flags->overflow == 0 && fresh <= room.size()) {
      flags->fresh = fresh;
      return CommitInserts{room.counters}(i, lanes);
    }
    turn.fail(Status::kNoRoom);
    flags->refused = 1;
    flags->undone = fresh;
    room.counters[kFresh] = 0;
  }
};

// Empties the slots of rows that were not committed; the items are counted by CallFlags::undone.
//
// The slots of a line are filled in order, and none is erased or moved by a call. So those that the call filled are the
// last ones of their lines, and every probe for an older id ends before them: no probe is cut short.
struct UndoInserts {
  uint64_t* const* fresh_slots;

  template <class Lanes>
  RECIS_HD void operator()(int64_t i, Lanes lanes) const {
    if (lanes.rank != 0) return;
    uint64_t* slot = fresh_slots[i];
    slot[0] = 0;
    slot[1] = make_entry(SlotState::kEmpty, 0, 0);
  }
};

}  // namespace recis
