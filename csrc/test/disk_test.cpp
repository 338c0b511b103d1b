// Records on disk under the sanitizers: transfers by a ring, by threads, and by a ring that fails, eviction, staging,
// compaction, and a thread that reads pinned records meanwhile.
#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
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

void run(const char* path, bool ring) {
  recis::DiskRecords disk({"test", path, kRecord, 32, 40, 4096, ring});
  std::vector<int64_t> words(kRows, 0);
  std::vector<int64_t> values(kRows, 0);
  const recis::Locations locations{words.data(), kRows};
  std::mt19937 random(1);
  for (int64_t step = 1; step <= 300; ++step) {
    std::vector<int64_t> rows;
    for (int i = 0; i < 30; ++i) rows.push_back(static_cast<int64_t>(random() % kRows * (random() % kRows) / kRows));
    if (step % 2 == 0) disk.stage(locations, rows.data(), 30);
    std::vector<int64_t> frames(30);
    disk.fetch(locations, rows.data(), 30, true, true, frames.data());
    for (size_t i = 0; i < rows.size(); ++i) {
      const char* record = disk.frames() + frames[i] * kRecord;
      recis_test::expect(value_at(record) == values[rows[i]], "a record in a frame is not current", rows[i]);
    }
    for (size_t i = 0; i < rows.size(); ++i) {
      values[rows[i]] = step * kRows + rows[i];
      std::memcpy(disk.frames() + frames[i] * kRecord, &values[rows[i]], sizeof(int64_t));
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
      disk.fetch(locations, more.data(), 20, true, true, frames.data());
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

// The descriptor of the only io_uring of this process, or -1 if the system permits none.
int find_ring() {
  int found = -1;
  DIR* folder = opendir("/proc/self/fd");
  if (folder == nullptr) return -1;  // not on this system
  for (const dirent* entry = readdir(folder); entry != nullptr; entry = readdir(folder)) {
    char target[64] = {};
    const std::string link = std::string("/proc/self/fd/") + entry->d_name;
    if (readlink(link.c_str(), target, sizeof(target) - 1) > 0 && std::strstr(target, "[io_uring]") != nullptr) {
      found = std::atoi(entry->d_name);
    }
  }
  closedir(folder);
  return found;
}

// Makes every later call of the ring fail, while transfers that it has started go on.
void break_ring(int ring) {
  const int other = open("/dev/null", O_RDONLY);
  dup2(other, ring);
  close(other);
}

// Transfers that are in flight when the ring fails, and those that follow: all bytes arrive, by threads, and none after
// its batch has ended.
void run_failing_transfers(int64_t delay_us) {
  constexpr int64_t kCount = 400;
  constexpr int64_t kBytes = 65536;
  const int file = recis::open_unnamed("/tmp");
  recis::PageBuffer memory(kCount * kBytes);
  const auto byte_of = [](int64_t i) { return static_cast<char>(i % 100); };
  const auto holds = [&](int64_t i, char byte) {
    const char* bytes = memory.data() + i * kBytes;
    return bytes[0] == byte && std::memcmp(bytes, bytes + 1, kBytes - 1) == 0;
  };
  for (int64_t i = 0; i < kCount; ++i) std::memset(memory.data() + i * kBytes, byte_of(i), kBytes);
  const bool written = pwrite(file, memory.data(), kCount * kBytes, 0) == kCount * kBytes && fsync(file) == 0;
  recis_test::expect(written, "the file of the transfers cannot be written", errno);
  recis::bypass_page_cache(file);  // where it is possible, transfers are slow enough to be in flight
  {
    recis::DiskIo io(file, true);
    const int ring = find_ring();
    recis_test::expect(io.uses_ring() == (ring >= 0), "the ring of the transfers was not found", ring);
    for (const bool first : {true, false}) {
      std::memset(memory.data(), -1, kCount * kBytes);
      std::vector<recis::TransferBatchPtr> batches;
      for (int64_t i = 0; i < kCount; ++i) {
        batches.push_back(io.submit({{i * kBytes, kBytes, memory.data() + i * kBytes}}, false, false));
      }
      if (first && ring >= 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
        break_ring(ring);
      }
      for (int64_t i = 0; i < kCount; ++i) {
        recis_test::expect(batches[i]->wait() == 0, "a transfer has failed with the ring", i);
        recis_test::expect(holds(i, byte_of(i)), "a batch has ended before its bytes have arrived", i);
        std::memset(memory.data() + i * kBytes, -1, kBytes);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      for (int64_t i = 0; i < kCount; ++i)
        recis_test::expect(holds(i, -1), "bytes arrive after their batch has ended", i);
    }
    recis_test::expect(!io.uses_ring(), "the ring that has failed is still used", ring);
  }
  close(file);
}

}  // namespace

int main() {
  run("/tmp", true);
  run("/tmp", false);
  if (access("/dev/shm", W_OK) == 0) run("/dev/shm", true);  // a tmpfs, as a rule, where reads only copy memory
  for (const int64_t delay_us : {0, 100, 300, 1000, 3000}) run_failing_transfers(delay_us);
  return recis_test::finish("disk_test", "records on disk, by io_uring, by threads, and by an io_uring that fails");
}
