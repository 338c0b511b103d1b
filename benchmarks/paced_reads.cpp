// Holds the reads of a process to a rate, as a faster disk than the machine has would: loaded before the C library,
// this `pread` reads, and then waits until the disk would have had the time for all reads so far.
//
//     g++ -O2 -shared -fPIC paced_reads.cpp -o paced_reads.so
//     PACED_READS_PER_SECOND=450000 LD_PRELOAD=./paced_reads.so python …
#include <dlfcn.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace {

// Waits shorter than this are left to a later read, since a thread sleeps 50 µs longer than asked.
constexpr int64_t kShortestWait = 100'000;  // ns

std::atomic<int64_t> next_read{0};  // when the disk has time for another one, in ns

int64_t now() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

int64_t ns_of_a_read() {
  const char* rate = std::getenv("PACED_READS_PER_SECOND");
  const int64_t reads = rate == nullptr ? 0 : std::atoll(rate);
  return reads > 0 ? 1'000'000'000 / reads : 0;
}

void wait_for_turn() {
  static const int64_t ns = ns_of_a_read();
  if (ns == 0) return;
  const int64_t time = now();
  int64_t before = next_read.load();
  int64_t end = 0;
  do {
    // A disk that had nothing to do does not save the time.
    end = (before > time ? before : time) + ns;
  } while (!next_read.compare_exchange_weak(before, end));
  if (end - time < kShortestWait) return;
  const timespec until{end / 1'000'000'000, end % 1'000'000'000};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr) != 0) {
  }
}

}  // namespace

extern "C" ssize_t pread(int file, void* memory, size_t bytes, off_t offset) {
  using Pread = ssize_t (*)(int, void*, size_t, off_t);
  static const auto real = reinterpret_cast<Pread>(dlsym(RTLD_NEXT, "pread"));
  const ssize_t result = real(file, memory, bytes, offset);
  if (result > 0) wait_for_turn();
  return result;
}
