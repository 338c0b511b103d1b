// Tests of calls inside jit, to be run under the sanitizers (scripts/sanitize.sh): threads that take the same turn, and
// inserts into a table that may not grow.
#include <algorithm>
#include <atomic>
#include <vector>

#include "core/bounded_insert.h"
#include "core/chain.h"
#include "core/for_each.h"
#include "test/expect.h"

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

// Threads insert `distinct` ids, each several times, into a table with room for `rows` rows; `reused` of them are free.
void inserts_are_all_or_none(int64_t distinct, int64_t rows, int64_t reused) {
  constexpr int64_t kSlots = 256;
  Chain chain(1);
  float token[2] = {1.0f, 0.0f};
  std::vector<uint64_t> memory(2 * kSlots + 1, 0);
  uint64_t* slots = memory.data() + (reinterpret_cast<uintptr_t>(memory.data()) % 16 == 0 ? 0 : 1);
  std::vector<int64_t> free_rows(static_cast<size_t>(reused));
  for (int64_t i = 0; i < reused; ++i) free_rows[i] = i;
  std::vector<int64_t> counters = {0, reused, reused, 0, 0, 0};
  const std::vector<int64_t> counters_before = counters;
  const int64_t n = 5 * distinct;
  std::vector<int64_t> ids, found(n), fresh(n), fresh_slots(n);
  for (int64_t i = 0; i < n; ++i) ids.push_back(i % distinct - 3);
  CallFlags flags;
  StartLookup{chain.turn(0, token, token), &flags}(0, OneLane{});
  const Room room{counters.data(), rows, kSlots * 3 / 4};
  InsertWithin insert{};
  insert.segments.count = 1;
  insert.segments.total = n;
  insert.segments.near[0] = {0, ids.data(), 0, nullptr};
  insert.map = {slots, kSlots - 1};
  insert.room = room;
  insert.free_rows = free_rows.data();
  insert.rows = found.data();
  insert.fresh = fresh.data();
  insert.fresh_slots = fresh_slots.data();
  insert.flags = &flags;
  for_each_cpu(Threads{kThreads}, n, 1, insert);
  CommitWithin{room, chain.turn(0, token, token), &flags}(0, OneLane{});
  for_each_cpu(Threads{kThreads}, flags.undone, 1, UndoInserts{slots, fresh_slots.data()});
  if (distinct <= std::min(rows, room.max_slots)) {
    CHECK(flags.refused == 0 && flags.fresh == distinct && flags.undone == 0);
    CHECK(counters[kFresh] == 0 && counters[kLive] == distinct && counters[kUsedSlots] == distinct);
    CHECK(counters[kFree] == std::max<int64_t>(reused - distinct, 0));
    std::vector<int64_t> rows_of(found.begin(), found.begin() + distinct);
    for (int64_t i = 0; i < n; ++i) CHECK(found[i] == rows_of[i % distinct]);
    std::sort(rows_of.begin(), rows_of.end());
    CHECK(std::adjacent_find(rows_of.begin(), rows_of.end()) == rows_of.end());
    CHECK(rows_of.front() >= 0 && rows_of.back() < rows);
  } else {
    CHECK(flags.refused == 1 && flags.fresh == 0 && flags.undone > 0);
    CHECK(chain.ref.state().status == static_cast<int64_t>(Status::kNoRoom));
    CHECK(counters == counters_before);
    CHECK(std::all_of(slots, slots + 2 * kSlots, [](uint64_t word) { return word == 0; }));
  }
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
  return recis_test::finish("chain_test", "turns, unseen lookups, and inserts into a table that may not grow");
}
