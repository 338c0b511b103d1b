// Tests of tables, to be run under the sanitizers (scripts/sanitize.sh): many threads insert the same ids concurrently,
// gather and update their rows, erase them and count them.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "core/blocks.h"
#include "core/cache.h"
#include "core/distinct.h"
#include "core/for_each.h"
#include "core/gather.h"
#include "core/group.h"
#include "core/id_map.h"
#include "core/insert.h"
#include "core/rules/adagrad.h"
#include "core/rules/rowwise_adagrad.h"
#include "core/update.h"
#include "test/expect.h"
#include "test/slots.h"

namespace {

using namespace recis;
using recis_test::Slots;

#define CHECK(condition) recis_test::expect(condition, #condition, __LINE__)

constexpr int kThreads = 4;
constexpr int64_t kDim = 20;
constexpr int kMetaOffset = kDim * 4;
constexpr int64_t kSumOffset = kMetaOffset + 16;
constexpr int64_t kRecordBytes = kSumOffset + kDim * 4;
constexpr int kBlockShift = 7;

// The host-side owner of a table, in place of Python's HashTable.
struct Table {
  explicit Table(int64_t capacity) : slots(capacity) {}

  IdMapRef map() { return slots.map(); }

  BlocksRef blocks(int64_t rows) {
    while (static_cast<int64_t>(memory.size()) << kBlockShift < rows) {
      void* block = std::aligned_alloc(64, kRecordBytes << kBlockShift);
      memory.emplace_back(block, &std::free);
      addresses.push_back(reinterpret_cast<int64_t>(block));
    }
    return {addresses.data(), kBlockShift, kMetaOffset, kRecordBytes};
  }

  Slots slots;
  int64_t counters[kCounters] = {};
  std::vector<int64_t> free_rows;
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory;
  std::vector<int64_t> addresses;
};

template <class T>
Segments<T> segments(const std::vector<T>& parts, int64_t total) {
  Segments<T> result;
  result.count = static_cast<int32_t>(parts.size());
  result.far = parts.data();
  result.total = total;
  return result;
}

RecordStart record_start() {
  RecordStart start{};
  start.dim = kDim;
  start.fields = 1;
  start.field[0] = {kSumOffset, kDim, 4, 0x3f000000};  // 0.5
  return start;
}

// Training lookups: ids of many features, each several times, some of them inserted before.
void grouped_inserts() {
  constexpr int64_t kFeatures = 9;
  constexpr int64_t kEach = 6000;  // more than one part
  Table table(1 << 16);
  const BlocksRef blocks = table.blocks(kFeatures * kEach);
  const std::vector<Initializer> inits(8, Initializer{InitKind::kNormal, 0.0f, 1.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0, 42});
  std::mt19937_64 random(3);
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < kFeatures * kEach; ++i) ids.push_back(static_cast<int64_t>(random() % 3000) - 1500);
  std::vector<KeySpan> features;
  std::vector<IdSpan> spans;
  std::set<std::pair<int64_t, int64_t>> distinct;
  for (int64_t f = 0; f < kFeatures; ++f) {
    const int64_t member = f % 8;  // two features share one
    features.push_back({ids.data() + f * kEach, kEach, member});
    spans.push_back({f * kEach, ids.data() + f * kEach, member, nullptr});
    for (int64_t i = 0; i < kEach; ++i) distinct.insert({member, ids[f * kEach + i]});
  }
  const int64_t n = kFeatures * kEach;
  std::vector<int64_t> rows(n), lookup(n), unique(n), starts(n + 1), sources(n), before;
  int64_t groups = 0;
  for (const int tasks : {kThreads, 1}) {
    std::vector<float> vectors(n * kDim);
    std::vector<float*> parts;
    for (int64_t f = 0; f < kFeatures; ++f) parts.push_back(vectors.data() + f * kEach * kDim);
    const InsertKeys<float> keys{{table.map(), table.counters, table.free_rows.data()},
                                 blocks,
                                 inits.data(),
                                 record_start(),
                                 {parts.data(), kDim, false}};
    group_cpu(Threads{tasks}, GroupInputs{features, nullptr, nullptr}, keys,
              GroupOutputs{rows.data(), unique.data(), starts.data(), sources.data(), nullptr, &groups});
    CHECK(table.counters[kFresh] == (tasks == kThreads ? static_cast<int64_t>(distinct.size()) : 0));
    for_each_cpu(Serial{}, 1, 1, CommitInserts{table.counters});
    CHECK(groups == static_cast<int64_t>(distinct.size()) && starts[groups] == n);
    for_each_cpu(Threads{kThreads}, n, 1, FindIds<false>{{segments(spans, n), table.map()}, lookup.data()});
    CHECK(lookup == rows);
    for (int64_t i = 0; i < n; ++i) {
      const float* embedding = reinterpret_cast<const float*>(blocks.record(rows[i]));
      CHECK(std::equal(embedding, embedding + kDim, vectors.data() + i * kDim));
    }
    for (int64_t u = 0; u < groups; ++u) {
      for (int64_t k = starts[u]; k < starts[u + 1]; ++k) {
        const int64_t position = (sources[k] >> kSourceShift) * kEach + (sources[k] & kSourceVector);
        CHECK(rows[position] == unique[u] && (k == starts[u] || sources[k - 1] < sources[k]));
      }
    }
    CHECK(before.empty() || before == sources);  // for any number of threads
    before = sources;
  }
  for (int64_t i = 0; i < n; ++i) {
    float values[4];
    first_values(inits[0], ids[i], 0, values);
    const char* record = blocks.record(rows[i]);
    CHECK(reinterpret_cast<const float*>(record)[0] == values[0]);
    CHECK(reinterpret_cast<const float*>(record + kSumOffset)[kDim - 1] == 0.5f);
  }
}

// Every thread inserts every id, to maximize contention on slots.
void same_ids_at_once(int64_t distinct, int repeats, bool grow) {
  std::mt19937_64 random(distinct);
  std::vector<int64_t> pool;
  for (int64_t i = 0; i < distinct; ++i) pool.push_back(static_cast<int64_t>(random()));
  pool[0] = 0;
  pool[1] = -1;
  pool[2] = INT64_MIN;
  pool[3] = INT64_MAX;
  std::vector<int64_t> ids;
  for (int r = 0; r < repeats * kThreads; ++r) ids.insert(ids.end(), pool.begin(), pool.end());
  const int64_t n = static_cast<int64_t>(ids.size());
  const std::vector<Initializer> inits(8, Initializer{InitKind::kNormal, 0.0f, 1.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0, 42});
  const Initializer& init = inits[0];

  // Two member tables over the same ids: twice the rows.
  const int64_t half = n / 2;
  const std::vector<IdSpan> spans{{0, ids.data(), 0, nullptr}, {half, ids.data() + half, 7, nullptr}};
  std::set<std::pair<int64_t, int64_t>> keys;
  for (int64_t i = 0; i < n; ++i) keys.insert({i < half ? 0 : 7, ids[i]});
  int64_t capacity = 1024;
  while (capacity * 3 < static_cast<int64_t>(keys.size()) * 4) capacity *= 2;
  Table table(capacity);

  std::vector<int64_t> rows(n), fresh(n), lookup(n);
  const Threads threads{kThreads};
  for_each_cpu(threads, n, 1,
               FindOrInsertIds{{segments(spans, n), table.map()},
                               table.counters,
                               table.free_rows.data(),
                               nullptr,
                               rows.data(),
                               fresh.data()});
  const int64_t count = table.counters[kFresh];
  CHECK(count == static_cast<int64_t>(keys.size()));

  const BlocksRef blocks = table.blocks(count);
  const RecordStart start = record_start();
  for_each_cpu(threads, count, 1,
               InitFreshRows<float>{segments(spans, n), blocks, inits.data(), rows.data(), fresh.data(), start});
  for_each_cpu(Serial{}, 1, 1, CommitInserts{table.counters});
  CHECK(table.counters[kRows] == count && table.counters[kLive] == count && table.counters[kFresh] == 0);

  const auto check_rows = [&] {
    for_each_cpu(threads, n, 1, FindIds<false>{{segments(spans, n), table.map()}, lookup.data()});
    CHECK(lookup == rows);
  };
  check_rows();
  if (grow) {
    capacity += capacity / 8;
    table.slots.grow(capacity, 500, table.counters, check_rows);
    CHECK(table.counters[kUsedSlots] == count);
  }
  std::vector<int64_t> listed(count), listed_members(count), listed_rows(count), listed_slots(count);
  int64_t listed_count = 0;
  for_each_cpu(threads, capacity, 1,
               ListIds{table.map(), listed.data(), listed_members.data(), listed_rows.data(), listed_slots.data(),
                       &listed_count});
  CHECK(listed_count == count);
  CHECK(std::set<int64_t>(listed_rows.begin(), listed_rows.end()).size() == static_cast<size_t>(count));

  // Gather bags of three ids; then reduce and apply their gradients.
  const int64_t bags = n / 3;
  std::vector<int64_t> offsets;
  for (int64_t b = 0; b <= bags; ++b) offsets.push_back(b == bags ? n : 3 * b);
  std::vector<float> out(bags * kDim);
  const Bags mean{offsets.data(), nullptr, Combiner::kMean, 0};
  const std::vector<BagSpan> bag_spans{{0, 0, mean, ids.data(), out.data(), nullptr, &init}};
  GatherBags<float, 16> gather{};
  gather.segments = segments(bag_spans, bags);
  gather.blocks = blocks;
  gather.rows = rows.data();
  gather.dim = kDim;
  for_each_cpu(threads, bags, 1, gather);
  float values[4];
  first_values(init, ids[0], 0, values);
  float sum = 0.0f;
  for (int64_t p = 0; p < 3; ++p) {
    first_values(init, ids[p], 0, values);
    sum += values[0];
  }
  CHECK(out[0] == sum * (1.0f / 3.0f));

  std::vector<int64_t> sources(n);
  std::vector<float> scales(n);
  const std::vector<SourceSpan> source_spans{{0, 0, mean}};
  for_each_cpu(threads, bags, 1, FillSources{segments(source_spans, bags), sources.data(), scales.data()});

  // Reduce and update on one thread and on several: the results must be equal.
  std::vector<std::vector<float>> updated;
  for (const int tasks : {1, kThreads}) {
    std::vector<int64_t> unique(n), starts(n + 1), grouped(n);
    std::vector<float> grouped_scales(n);
    int64_t groups = 0;
    const std::vector<KeySpan> features{{rows.data(), half, 0}, {rows.data() + half, n - half, 7}};
    group_cpu(Threads{tasks}, GroupInputs{features, sources.data(), scales.data()}, RowsAsKeys{},
              GroupOutputs{nullptr, unique.data(), starts.data(), grouped.data(), grouped_scales.data(), &groups});
    CHECK(groups == count);
    const std::vector<GradientSpan> gradients{{0, out.data(), kDim}};
    GroupedGradients all{};
    all.features = segments(gradients, 1);
    all.count = &groups;
    all.unique = unique.data();
    all.offsets = starts.data();
    all.sources = grouped.data();
    all.scales = grouped_scales.data();
    std::vector<float> reduced(groups * kDim);
    for_each_cpu(threads, groups, 1, ReduceRows<16>{all, kDim, reduced.data()});
    updated.push_back(reduced);
    for_each_cpu(threads, groups, 1, SeeRows{blocks, unique.data(), starts.data(), 1});
    for_each_cpu(threads, groups, 1,
                 UpdateRows<AdagradRule<false>, float, float, kDim>{
                     all, blocks, kDim, 1, true, Rounding{7},
                     AdagradRule<false>::of({RuleKind::kAdagrad, {kSumOffset}, {0.1, 0.0, 0.0, 1e-10}}, 1)});
    for_each_cpu(threads, groups, 1,
                 UpdateRows<RowwiseAdagradRule<true>, float, float, kAnyDim>{
                     all, blocks, kDim, 1, false, Rounding{7},
                     RowwiseAdagradRule<true>::of({RuleKind::kRowwiseAdagrad, {kSumOffset}, {0.1, 1e-10, 0.01}}, 1)});
    int64_t frequency = 0;
    for (int64_t row = 0; row < count; ++row) frequency += blocks.meta(row)->frequency();
    CHECK(frequency == 2 * n * static_cast<int64_t>(updated.size()));
  }
  CHECK(updated[0] == updated[1]);

  // Erase on all threads at once, each slot several times; then insert again, into the same rows.
  std::vector<int64_t> numbers;
  for (int t = 0; t < kThreads; ++t) numbers.insert(numbers.end(), listed_slots.begin(), listed_slots.end());
  table.free_rows.resize(count);
  for_each_cpu(threads, static_cast<int64_t>(numbers.size()), 1,
               EraseSlots{table.map(), numbers.data(), table.counters, table.free_rows.data()});
  CHECK(table.counters[kLive] == 0 && table.counters[kFree] == count);
  if (grow) {  // dropping the erased slots in place, or copying the others
    table.slots.grow(capacity, 500, table.counters, [] {});
    CHECK(table.counters[kUsedSlots] == 0);
  } else {
    Slots fresh_slots(capacity);
    for_each_cpu(threads, capacity, 1, RehashSlots{table.map(), fresh_slots.map()});
    table.slots = std::move(fresh_slots);
    table.counters[kUsedSlots] = 0;
  }
  const std::vector<uint8_t> admitted(n, 1);
  for_each_cpu(threads, n, 1,
               FindOrInsertIds{{segments(spans, n), table.map()},
                               table.counters,
                               table.free_rows.data(),
                               admitted.data(),
                               rows.data(),
                               fresh.data()});
  for_each_cpu(Serial{}, 1, 1, CommitInserts{table.counters});
  CHECK(table.counters[kRows] == count && table.counters[kFree] == 0 && table.counters[kLive] == count);

  // Count on all threads at once: the counts are exact.
  Table counts(capacity);
  const std::vector<int64_t> none(n, -1);
  for_each_cpu(threads, n, 1, CountIds{{segments(spans, n), counts.map()}, counts.counters, none.data(), nullptr});
  CHECK(counts.counters[kLive] == count);
  int64_t total = 0;
  for (int64_t slot = 0; slot < capacity; ++slot) {
    const uint64_t entry = counts.map().slot(slot)[1];
    if (entry_state(entry) == SlotState::kFull) total += entry_row(entry);
  }
  CHECK(total == n);
}

// Distinct ids by owner: the same for any number of threads, and each position maps to its id.
void distinct_by_owner() {
  constexpr int64_t n = 30000;
  constexpr int64_t kRanks = 3;
  std::vector<int64_t> ids(n);
  for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int64_t>(mix64(static_cast<uint64_t>(i) % 7000 + 1));
  std::vector<std::vector<int64_t>> results;
  for (const int tasks : {1, kThreads}) {
    std::vector<int64_t> distinct(n), counts(n), places(n), sizes(2 * kRanks), offsets(n + 1), sources(n);
    int64_t count = 0;
    const std::vector<KeySpan> features{
        {ids.data(), 20000, 0}, {ids.data() + 20000, 0, 1}, {ids.data() + 20000, 10000, 1}};
    distinct_cpu(Threads{tasks}, DistinctInputs{{features, nullptr, nullptr}, {-1, 1}, kRanks},
                 DistinctOutputs{distinct.data(), counts.data(), places.data(), sizes.data(), offsets.data(),
                                 sources.data(), nullptr, &count});
    CHECK(count == 14000 && offsets[count] == n);
    int64_t place = 0;
    for (int64_t share = 0; share < 2 * kRanks; ++share) {
      for (int64_t k = 0; k < sizes[share]; ++k, ++place) {
        CHECK(share % 2 == 1 ? share / 2 == 1 : bucket_of(distinct[place]) * kRanks >> 16 == share / 2);
        CHECK(counts[place] == offsets[place + 1] - offsets[place]);
      }
    }
    CHECK(place == count);
    for (int64_t i = 0; i < n; ++i) CHECK(distinct[places[i]] == ids[i]);
    results.push_back(std::move(sources));
    results.push_back(std::move(places));
  }
  CHECK(results[0] == results[2] && results[1] == results[3]);
}

// Lookups through a cache of a few sets: no record is lost, and every row is read as it was written last.
void cached_records() {
  constexpr int64_t kRows = 1000;
  constexpr int64_t kSets = 5;
  constexpr int64_t kAll = kSets * kWays;
  Table table(64);
  // Rows of the cache follow those of the table, from the next block on.
  const int64_t first_place = (kRows + (1 << kBlockShift) - 1) >> kBlockShift << kBlockShift;
  const BlocksRef blocks = table.blocks(first_place + kAll);
  std::vector<uint32_t> tags(kAll + 4, kNoTag);
  uint32_t* aligned = tags.data() + (16 - reinterpret_cast<uintptr_t>(tags.data()) % 16) % 16 / 4;
  std::vector<uint64_t> states(kAll, 0);
  std::vector<int64_t> counters(kCounterCopies * kCacheCounters, 0);
  const CacheRef cache{aligned, states.data(), counters.data(), kSets, first_place};
  std::vector<uint64_t> expected(kRows, 0);
  const auto word = [&](int64_t place) { return reinterpret_cast<uint64_t*>(blocks.record(place)); };
  for (int64_t row = 0; row < kRows; ++row) std::fill_n(word(row), kRecordBytes / 8, 0);
  std::mt19937_64 random(5);
  const Threads threads{kThreads};
  for (uint64_t number = 1; number <= 40; ++number) {
    std::set<int64_t> distinct;
    const int64_t range = number % 7 == 0 ? kRows : 300;
    while (distinct.size() < 200) distinct.insert(static_cast<int64_t>(random() % range));
    const std::vector<int64_t> rows(distinct.begin(), distinct.end());
    const auto n = static_cast<int64_t>(rows.size());
    std::vector<uint8_t> missing(n);
    std::vector<int64_t> places(n);
    const CacheTime now{number, number / 8};
    for_each_cpu(threads, n, 1, TouchRows{cache, rows.data(), now, missing.data()});
    for_each_cpu(threads, n, 1, ClaimWays{cache, blocks, rows.data(), now, missing.data()});
    for_each_cpu(threads, n, 1, LocateRows<true>{cache, rows.data(), places.data()});
    CHECK(std::set<int64_t>(places.begin(), places.end()).size() == rows.size());
    for (int64_t i = 0; i < n; ++i) {
      CHECK(word(places[i])[0] == expected[rows[i]] && word(places[i])[kRecordBytes / 8 - 1] == expected[rows[i]]);
      expected[rows[i]] = random();
      std::fill_n(word(places[i]), kRecordBytes / 8, expected[rows[i]]);
    }
  }
  for_each_cpu(threads, kAll, 1, WriteBackWays{cache, blocks});
  for (int64_t row = 0; row < kRows; ++row) CHECK(word(row)[0] == expected[row]);
  int64_t sums[kCacheCounters] = {};
  for (size_t k = 0; k < counters.size(); ++k) sums[k % kCacheCounters] += counters[k];
  CHECK(sums[kHits] + sums[kMisses] == 40 * 200 && sums[kHits] > 0 && sums[kBypassed] > 0 && sums[kWrittenBack] > kAll);
}

}  // namespace

int main() {
  cached_records();
  grouped_inserts();
  distinct_by_owner();
  for (int round = 0; round < 5; ++round) {
    same_ids_at_once(50, 40, false);
    same_ids_at_once(5000, 1, round % 2 == 0);
  }
  return recis_test::finish("table_test", "inserts, lookups, updates, erasure and counts on several threads");
}
