// Training lookups on the CPU: ids are grouped first, and only the distinct ones are looked up in the IDMap.
//
// An id that occurs many times in a batch is looked up once, and while a part of the ids is being grouped, the slots of
// its distinct ids are loaded. Where each id yields one vector, the vectors of the part are written next, while its
// records are in the cache: one loop prefetches all of them before the first is read.
//
// On CUDA all positions are looked up in parallel, and rows are grouped afterwards.
#pragma once

#include <algorithm>

#include "core/blocks.h"
#include "core/bounded_insert.h"
#include "core/for_each.h"
#include "core/gather.h"
#include "core/group.h"
#include "core/id_map.h"

namespace recis {

// The outputs of a lookup in which each id yields one vector.
struct PlainOutputs {
  float* const* parts;  // [ids, dim] for each feature; null: gathered later
  int64_t dim;
  bool streams;  // as in GatherBags
};

// Commits the rows of InsertKeys at the end of its scope, even if an exception ends it, because every allocated row has
// its initial values.
struct InsertCommit {
  int64_t* counters;

  ~InsertCommit() { CommitInserts{counters}(0, OneLane{}); }
};

inline constexpr int64_t kGathered = 256 << 10;  // bytes of embeddings to prefetch at once

// Ids as keys of group_cpu, for types that derive from this one: insert(id, member) returns the row of an id that may
// have none.
struct IdKeys {
  IdMapRef map;
  int64_t* counters;
  const int64_t* free_rows;  // [counters[kFree]]

  static uint64_t hash(int64_t id, int64_t member) { return slot_hash(id, member); }

  void prefetch(uint64_t hash) const { prefetch_bytes<false>(map.start(hash), 1); }

  // Replaces distinct ids of a member table by their rows.
  template <class Insert>
  void find_rows(int64_t* keys, int64_t count, int64_t member, const Insert& insert) const {
    int64_t ids[FindBlock::kIds];
    for (int64_t first = 0; first < count; first += FindBlock::kIds) {
      const int n = static_cast<int>(std::min<int64_t>(FindBlock::kIds, count - first));
      int64_t* found = keys + first;
      std::copy_n(found, n, ids);
      FindBlock{map}(n, member, [&](int k) { return ids[k]; }, [&](int k, int64_t, int64_t row) { found[k] = row; });
      for (int k = 0; k < n; ++k) {
        if (__builtin_expect(found[k] < 0, 0)) found[k] = insert(ids[k], member);
      }
    }
  }

  // The row of an id, which gets one if it has none: created(probe, number) is called then, with the number of rows
  // created before it since the last commit. -1 if the map is full; the operator raises then.
  template <class Created>
  int64_t find_or_create(int64_t id, int64_t member, const Created& created) const {
    int64_t number = 0;
    const Probe probe = find_or_claim(map, id, member, true, [&] {
      number = fetch_add(counters + kFresh, 1);
      return fresh_row(counters, free_rows, number);
    });
    if (probe.slot == nullptr) {
      store_relaxed(reinterpret_cast<uint64_t*>(counters + kOverflow), 1);
      return -1;
    }
    if (probe.claimed) created(probe, number);
    return entry_row(probe.entry);
  }
};

// Ids as keys, of which an id without a row gets one, with its initial values. An InsertCommit must be in scope.
template <class E>
struct InsertKeys : IdKeys {
  BlocksRef blocks;
  const Initializer* initializers;  // by member table
  RecordStart start;
  PlainOutputs outputs;

  void rows(int64_t* keys, int64_t count, int64_t member) const {
    find_rows(keys, count, member, [this](int64_t id, int64_t table) { return insert(id, table); });
  }

  // The number of records to prefetch before the first is read; all of them fit into the L2 cache. 0: nothing is
  // gathered.
  int64_t gathered_at_once() const {
    if (outputs.parts == nullptr) return 0;
    return std::max<int64_t>(64, kGathered / (outputs.dim * static_cast<int64_t>(sizeof(E))));
  }

  // Always inlined, because the compiler treats a function that only prefetches as free of side effects and drops its
  // calls.
  __attribute__((always_inline)) void fetch(int64_t row) const {
    const char* record = blocks.record(row);
    const int64_t bytes = outputs.dim * static_cast<int64_t>(sizeof(E));
    prefetch_bytes<false>(record, bytes);
    prefetch_bytes<false>(record + bytes - 1, 1);  // small records do not start at a cache line
  }

  __attribute__((always_inline)) void gather(int64_t row, int64_t feature, int64_t i) const {
    copy_vector<E, 16>(outputs.parts[feature] + i * outputs.dim, reinterpret_cast<const E*>(blocks.record(row)),
                       outputs.dim, outputs.streams, OneLane{});
  }

  __attribute__((noinline)) int64_t insert(int64_t id, int64_t member) const {
    const int64_t row = find_or_create(id, member, [&](const Probe& probe, int64_t) {
      const int64_t created = entry_row(probe.entry);
      start.template write<E>(blocks.record(created), blocks.meta(created), initializers[member], id, OneLane{});
    });
    return row < 0 ? 0 : row;  // row 0 exists if the map is full
  }
};

// A row that was created for an id.
struct CreatedRow {
  int64_t id;
  int64_t member;
  int64_t row;
  uint64_t* slot;
};

// Ids as keys, of which an id without a row gets one, whose record is still to be made: `created` lists such rows.
struct ListKeys : IdKeys {
  CreatedRow* created;  // [ids] upper bound

  void rows(int64_t* keys, int64_t count, int64_t member) const {
    find_rows(keys, count, member, [this](int64_t id, int64_t table) {
      return find_or_create(id, table, [&](const Probe& probe, int64_t number) {
        created[number] = {id, table, entry_row(probe.entry), probe.slot};
      });
    });
  }

  static constexpr int64_t gathered_at_once() { return 0; }
  void fetch(int64_t) const {}
  void gather(int64_t, int64_t, int64_t) const {}

  // Takes the rows back that were created since the last commit; nothing else may have used the map since.
  void undo() const {
    for (int64_t i = 0; i < counters[kFresh]; ++i) UndoInserts{&created[i].slot}(0, OneLane{});
    counters[kFresh] = 0;
  }
};

}  // namespace recis
