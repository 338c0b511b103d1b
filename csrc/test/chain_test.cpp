// Tests of calls inside jit, to be run under the sanitizers (scripts/sanitize.sh): threads that take the same turn, and
// inserts into a table that may not grow.
#include <algorithm>
#include <atomic>
#include <map>
#include <set>
#include <vector>

#include "core/bounded_insert.h"
#include "core/chain.h"
#include "core/for_each.h"
#include "test/expect.h"
#include "test/slots.h"

namespace {

using namespace recis;

#define CHECK(condition) recis_test::expect(condition, #condition, __LINE__)

constexpr int kThreads = 4;

struct Chain {
  explicit Chain(int64_t tables) : words(ChainRef::size(tables), 0), ref{words.data(), tables} {
    ref.state() = {1, 0, -1};
  }

  Turn turn(int64_t table, const float* token, float* next) { return {ref, table, token, next}; }

  std::vector<int64_t> words;
  ChainRef ref;
};

void one_of_several_threads_takes_a_turn() {
  Chain chain(2);
  const float token[2] = {1.0f, 0.0f};
  std::atomic<int> taken = 0;
  for_each_cpu(Threads{kThreads}, kThreads, 1, [&](int64_t, OneLane) {
    float next[2];
    if (chain.turn(1, token, next).take()) ++taken;
  });
  CHECK(taken == 1);
  CHECK(chain.ref.state().serial == 2);
  CHECK(chain.ref.state().status == static_cast<int64_t>(Status::kStaleToken));
  CHECK(chain.ref.state().failed == 1);
}

void a_lookup_is_unseen_until_its_first_update() {
  Chain chain(2);
  float token[2] = {1.0f, 0.0f};
  int64_t context[Context::kUnique] = {};
  CallFlags flags;
  const auto update = [&](int64_t generation) {
    StartUpdate{chain.turn(1, token, token), &flags, context, generation}(0, OneLane{});
    EndUpdate{chain.turn(1, token, token), &flags}(0, OneLane{});
  };
  StartLookup{chain.turn(1, token, token), &flags}(0, OneLane{});
  EndLookup{chain.turn(1, token, token), &flags, context, 7, 1, 10}(0, OneLane{});
  CHECK(flags.refused == 0 && flags.cleared == 0);
  CHECK(token[0] == 2.0f && context[0] == 2 && context[1] == 7);
  CHECK(chain.ref.table(1).unseen == 1 && chain.ref.table(0).unseen == 0);
  update(7);
  CHECK(flags.refused == 0 && flags.repeated == 0);
  CHECK(chain.ref.table(1).unseen == 0 && chain.ref.table(1).steps == 1);
  update(7);
  CHECK(flags.refused == 0 && flags.repeated == 1);
  CHECK(chain.ref.table(1).unseen == 0 && chain.ref.table(1).steps == 2);
  update(8);
  CHECK(flags.refused == 1 && chain.ref.table(1).steps == 2);
  CHECK(token[1] == static_cast<float>(Status::kStaleLookup));
  StartLookup{chain.turn(0, token, token), &flags}(0, OneLane{});
  EndLookup{chain.turn(0, token, token), &flags, context, 7, 1, 10}(0, OneLane{});
  CHECK(flags.refused == 1 && flags.cleared == 10 && chain.ref.state().failed == 1);
}

// The serial number after the last one that float32 holds is 1.
void serial_numbers_start_again() {
  Chain chain(1);
  chain.ref.state().serial = kSerials - 1;
  float token[2] = {static_cast<float>(kSerials - 1), 0.0f};
  const Turn turn = chain.turn(0, token, token);
  CHECK(turn.take());
  turn.end();
  CHECK(token[0] == 1.0f && token[1] == 0.0f);
}

// The slots of a map, word by word.
std::vector<uint64_t> words_of(const IdMapRef& map) {
  std::vector<uint64_t> words;
  for (uint64_t number = 0; number < kLineSlots * map.lines(); ++number) {
    const uint64_t* slot = map.slot(number);
    words.insert(words.end(), slot, slot + 2);
  }
  return words;
}

// Threads insert `ids`, each several times, of which `distinct` are new, within the room that a table has left.
void insert_all_or_none(const IdMapRef& map, int64_t* counters, const Room& room, const std::vector<int64_t>& free_rows,
                        const std::vector<int64_t>& ids, int64_t distinct) {
  Chain chain(1);
  float token[2] = {1.0f, 0.0f};
  const auto n = static_cast<int64_t>(ids.size());
  const std::vector<int64_t> before(counters, counters + kCounters);
  const std::vector<uint64_t> words_before = words_of(map);
  std::vector<int64_t> found(n), fresh(n);
  std::vector<uint64_t*> fresh_slots(n);
  CallFlags flags;
  StartLookup{chain.turn(0, token, token), &flags}(0, OneLane{});
  InsertWithin insert{};
  insert.segments.count = 1;
  insert.segments.total = n;
  insert.segments.near[0] = {0, ids.data(), 0, nullptr};
  insert.map = map;
  insert.room = room;
  insert.free_rows = free_rows.data();
  insert.rows = found.data();
  insert.fresh = fresh.data();
  insert.fresh_slots = fresh_slots.data();
  insert.flags = &flags;
  const int64_t size = room.size();
  for_each_cpu(Threads{kThreads}, n, 1, insert);
  CommitWithin{room, chain.turn(0, token, token), &flags}(0, OneLane{});
  for_each_cpu(Threads{kThreads}, flags.undone, 1, UndoInserts{fresh_slots.data()});
  if (distinct <= size) {
    CHECK(flags.refused == 0 && flags.fresh == distinct && flags.undone == 0);
    CHECK(counters[kFresh] == 0 && counters[kLive] == before[kLive] + distinct);
    CHECK(counters[kUsedSlots] == before[kUsedSlots] + distinct);
    CHECK(counters[kFree] == std::max<int64_t>(before[kFree] - distinct, 0));
    std::map<int64_t, int64_t> rows;
    std::set<int64_t> distinct_rows;
    for (int64_t i = 0; i < n; ++i) {
      CHECK(rows.emplace(ids[i], found[i]).first->second == found[i]);
      CHECK(found[i] >= 0 && found[i] < room.max_rows);
      distinct_rows.insert(found[i]);
    }
    CHECK(distinct_rows.size() == rows.size());
  } else {
    CHECK(flags.refused == 1 && flags.fresh == 0 && flags.undone > 0);
    CHECK(chain.ref.state().status == static_cast<int64_t>(Status::kNoRoom));
    CHECK(std::equal(before.begin(), before.end(), counters));
    CHECK(words_of(map) == words_before);
  }
}

// An empty table with room for `rows` rows; `reused` of them are free.
void inserts_are_all_or_none(int64_t distinct, int64_t rows, int64_t reused) {
  recis_test::Slots slots(256);
  std::vector<int64_t> free_rows(static_cast<size_t>(reused));
  for (int64_t i = 0; i < reused; ++i) free_rows[i] = i;
  int64_t counters[kCounters] = {0, reused, reused, 0, 0, 0};
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 5 * distinct; ++i) ids.push_back(i % distinct - 3);
  insert_all_or_none(slots.map(), counters, {counters, rows, 256 * 3 / 4}, free_rows, ids, distinct);
}

// A refused call leaves a map as it was while the map grows, with ids and erased slots. Their probes still find the
// ids.
void refused_inserts_leave_a_growing_map() {
  constexpr int64_t kOld = 3000;
  constexpr int64_t kNew = 500;
  recis_test::Slots slots(4096);
  int64_t counters[kCounters] = {};
  std::vector<int64_t> old_ids(kOld), rows(kOld), fresh(kOld);
  for (int64_t i = 0; i < kOld; ++i) old_ids[i] = static_cast<int64_t>(mix64(static_cast<uint64_t>(i)));
  FindOrInsertIds old{};
  old.segments.count = 1;
  old.segments.total = kOld;
  old.segments.near[0] = {0, old_ids.data(), 0, nullptr};
  old.map = slots.map();
  old.counters = counters;
  old.rows = rows.data();
  old.fresh = fresh.data();
  for_each_cpu(Threads{kThreads}, kOld, 1, old);
  CommitInserts{counters}(0, OneLane{});
  std::vector<int64_t> erased;
  for (int64_t i = 0; i < kOld; i += 7) erased.push_back(find_slot(slots.map(), old_ids[i], 0).number);
  std::vector<int64_t> free_rows(kOld);
  for_each_cpu(Serial{}, static_cast<int64_t>(erased.size()), 1,
               EraseSlots{slots.map(), erased.data(), counters, free_rows.data()});
  const int64_t free = counters[kFree];
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 3 * kNew; ++i) ids.push_back(static_cast<int64_t>(mix64(1'000'000 + i % kNew)));
  for (int64_t i = 1; i < 200; i += 7) ids.push_back(old_ids[i]);
  int pieces = 0;
  slots.grow(6144, 100, counters, [&] {
    const IdMapRef map = slots.map();
    insert_all_or_none(map, counters, {counters, counters[kRows], 6000}, free_rows, ids, kNew);
    CHECK(counters[kFree] == free);
    for (int64_t i = 0; i < kOld; ++i) {
      const FoundSlot slot = find_slot(map, old_ids[i], 0);
      CHECK(i % 7 == 0 ? slot.slot == nullptr : slot.slot != nullptr && entry_row(slot.slot[1]) == rows[i]);
    }
    ++pieces;
  });
  CHECK(pieces == 11);
  insert_all_or_none(slots.map(), counters, {counters, kOld + kNew, 6000}, free_rows, ids, kNew);
}

}  // namespace

int main() {
  one_of_several_threads_takes_a_turn();
  a_lookup_is_unseen_until_its_first_update();
  serial_numbers_start_again();
  inserts_are_all_or_none(100, 120, 0);
  inserts_are_all_or_none(100, 120, 30);
  // Room that fits exactly is taken while other threads look for the same ids; rarely at the wrong moment.
  for (int k = 0; k < 2000; ++k) inserts_are_all_or_none(100, 100, 10);
  inserts_are_all_or_none(101, 100, 10);
  inserts_are_all_or_none(192, 1000, 0);
  inserts_are_all_or_none(193, 1000, 0);
  inserts_are_all_or_none(400, 1000, 0);
  refused_inserts_leave_a_growing_map();
  return recis_test::finish("chain_test", "turns, unseen lookups, and inserts into a table that may not grow");
}
