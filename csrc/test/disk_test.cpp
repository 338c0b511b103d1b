// Records on disk under the sanitizers: transfers by a ring and by threads, eviction, staging, compaction, and a thread
// that reads pinned records meanwhile.
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "expect.h"
#include "ops/disk_io.cpp"
#include "ops/disk_log.cpp"
#include "ops/disk_records.cpp"

namespace {

constexpr int64_t kRows = 300;
constexpr int64_t kRecord = 48;

int64_t value_at(const char* record) {
  int64_t value = 0;
  std::memcpy(&value, record, sizeof(value));
  return value;
}

void run(bool ring) {
  recis::DiskRecords disk({"test", "/tmp", kRecord, 32, 40, 4096, ring});
  std::vector<int64_t> words(kRows, 0);
  std::vector<int64_t> values(kRows, 0);
  const recis::Locations locations{words.data(), kRows};
  std::mt19937 random(1);
  for (int64_t step = 1; step <= 300; ++step) {
    std::vector<int64_t> rows;
    for (int i = 0; i < 30; ++i) rows.push_back(static_cast<int64_t>(random() % kRows * (random() % kRows) / kRows));
    if (step % 2 == 0) disk.stage(locations, rows.data(), 30);
    disk.fetch(locations, rows.data(), 30, true, true);
    for (const int64_t row : rows) {
      char* record = reinterpret_cast<char*>(words[row]);
      recis_test::expect(value_at(record) == values[row], "a record in a frame is not current", row);
    }
    for (const int64_t row : rows) {
      values[row] = step * kRows + row;
      std::memcpy(reinterpret_cast<char*>(words[row]), &values[row], sizeof(int64_t));
    }
    if (step % 60 != 0) continue;
    std::vector<int64_t> known;
    for (int64_t row = 0; row < kRows; ++row) {
      if (words[row] != recis::kNoRecord) known.push_back(row);
    }
    std::vector<int64_t> slots(kRows);
    const int64_t pin = disk.pin(locations, slots.data());
    std::vector<int64_t> pinned;
    for (const int64_t row : known) pinned.push_back(slots[row]);
    const std::vector<int64_t> then = values;
    std::vector<char> copies(known.size() * kRecord);
    std::thread reader(
        [&] { disk.read_pinned(known.data(), pinned.data(), static_cast<int64_t>(known.size()), copies.data()); });
    for (int i = 0; i < 20; ++i) {
      std::vector<int64_t> more;
      for (int k = 0; k < 20; ++k) more.push_back(known[random() % known.size()]);
      disk.fetch(locations, more.data(), 20, true, true);
    }
    reader.join();
    for (size_t i = 0; i < known.size(); ++i) {
      recis_test::expect(value_at(copies.data() + i * kRecord) == then[known[i]], "a pinned record has changed",
                         known[i]);
    }
    disk.unpin(pin);
    disk.forget(locations, known.data(), static_cast<int64_t>(known.size()) / 4);
    for (size_t i = 0; i < known.size() / 4; ++i) values[known[i]] = 0;
  }
  int64_t figures[recis::DiskRecords::kFigures];
  disk.figures(figures);
  recis_test::expect(figures[recis::DiskRecords::kStaged] > 0, "nothing was read ahead", 0);
  recis_test::expect(figures[recis::DiskRecords::kMoved] > 0, "nothing was compacted", 0);
}

}  // namespace

int main() {
  run(true);
  run(false);
  return recis_test::finish("disk_test", "records on disk, by io_uring and by threads");
}
