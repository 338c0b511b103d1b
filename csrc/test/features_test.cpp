// Tests of fused programs and ragged kernels, to be run under the sanitizers. Hashing strings in bulk yields the hash
// of each string, no offsets cause a kernel to read or write outside its buffers, and results do not depend on tiles,
// threads or the contents of scratch space.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "core/for_each.h"
#include "core/hash/mix.h"
#include "core/program.h"
#include "core/ragged.h"
#include "test/expect.h"

namespace {

using recis::Instruction;
using recis::Step;
using recis_test::expect;

// Heap memory that ends with its last element, so that AddressSanitizer reports any access beyond it.
template <class T>
struct Exact {
  std::unique_ptr<T[]> memory;
  int64_t size;

  explicit Exact(const std::vector<T>& from) : memory(new T[from.size()]), size(static_cast<int64_t>(from.size())) {
    if (!from.empty()) std::memcpy(memory.get(), from.data(), from.size() * sizeof(T));
  }
  T* data() const { return memory.get(); }
};

// Offsets of `rows` rows over `total` values; unless `good`, some are invalid.
std::vector<int64_t> offsets_of(int64_t rows, int64_t total, uint64_t seed, bool good) {
  std::vector<int64_t> offsets(static_cast<size_t>(rows) + 1);
  for (size_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<int64_t>(i) * total / rows;
  if (good) return offsets;
  for (size_t i = 0; i < offsets.size(); ++i) {
    const uint64_t random = recis::mix64(seed << 32 | i);
    if (random % 4 == 0) offsets[i] = static_cast<int64_t>(random >> 8) % (total + 64) - 32;
    if (random % 64 == 1) offsets[i] = static_cast<int64_t>(recis::mix64(random));
    if (random % 64 == 2) offsets[i] = random & 64 ? INT64_MIN : INT64_MAX;
  }
  return offsets;
}

template <class Hasher>
void check_strings(const char* name) {
  for (uint64_t seed = 0; seed < 40; ++seed) {
    for (const int64_t total : {0, 1, 3, 7, 8, 9, 16, 17, 40, 1000}) {
      const int64_t rows = 1 + static_cast<int64_t>(recis::mix64(seed) % 60);
      std::vector<uint8_t> bytes(static_cast<size_t>(total));
      for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(recis::mix64(seed * 977 + i));
      const Exact<uint8_t> values(bytes);
      const Exact<int64_t> offsets(offsets_of(rows, total, seed, seed % 2 == 0));
      Exact<int64_t> out(std::vector<int64_t>(static_cast<size_t>(rows), -1));
      const int64_t bad = recis::hash_strings<Hasher>(values.data(), total, offsets.data(), rows, out.data());
      bool any_bad = false;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t begin = offsets.data()[i];
        const int64_t end = offsets.data()[i + 1];
        const bool good = begin >= 0 && begin <= end && end <= total;
        any_bad = any_bad || !good;
        const uint64_t want = good ? Hasher{}(recis::Bytes{values.data() + begin, end - begin}) : 0;
        expect(out.data()[i] == static_cast<int64_t>(want), name, i);
      }
      expect(any_bad == (bad != 0), "bad offsets of strings were not reported", static_cast<int64_t>(seed));
    }
  }
}

Instruction instruction(Step step, int64_t out, int64_t a, int64_t b, int64_t p0 = 0, int64_t p1 = 0, int64_t p2 = 0) {
  return {static_cast<int64_t>(step), out, a, b, {p0, p1, p2, 0}};
}

// A program that hashes strings, takes the remainder, and crosses the hash with ids; compared element by element.
template <int W, class Executor>
void check_program(const Executor& executor, int64_t rows, bool good) {
  const int64_t total = rows * 5;
  std::vector<uint8_t> bytes(static_cast<size_t>(total));
  std::vector<int64_t> ids(static_cast<size_t>(rows));
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(recis::mix64(i));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(recis::mix64(i + 99));
  const Exact<uint8_t> values(bytes);
  const Exact<int64_t> offsets(offsets_of(rows, total, 5, good));
  const Exact<int64_t> numbers(ids);
  const Exact<int64_t> modulo(std::vector<int64_t>(ids.size(), -1));
  const Exact<int64_t> pairs(std::vector<int64_t>(ids.size(), -1));
  const recis::Divisor by = recis::Divisor::of(1000);
  const std::vector<Instruction> code{
      instruction(Step::kHashString, 0, -1, -2),
      instruction(Step::kMod, -4, 0, 0, static_cast<int64_t>(by.divisor), static_cast<int64_t>(by.magic),
                  by.shift1 | by.shift2 << 8),
      instruction(Step::kCross, -5, 0, -3),
  };
  const int64_t params[] = {0};
  void* tensors[] = {values.data(), offsets.data(), numbers.data(), modulo.data(), pairs.data()};
  const int64_t sizes[] = {total, rows + 1, rows, rows, rows};
  std::vector<int64_t> faults(code.size(), 0);
  const std::vector<recis::ProgramPart> parts{{0, rows, 0, static_cast<int64_t>(code.size()), nullptr, 1}};
  recis::RunProgram<W> program{};
  program.segments.count = 1;
  program.segments.total = (rows + W - 1) / W;
  program.segments.far = parts.data();
  program.code = code.data();
  program.params = params;
  program.tensors = tensors;
  program.sizes = sizes;
  program.faults = faults.data();
  recis::for_each_cpu(executor, program.segments.total, 1, program);
  bool any_bad = false;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t begin = offsets.data()[i];
    const int64_t end = offsets.data()[i + 1];
    const bool row_good = begin >= 0 && begin <= end && end <= total;
    any_bad = any_bad || !row_good;
    const uint64_t hash = row_good ? recis::Farm{}(recis::Bytes{values.data() + begin, end - begin}) : 0;
    expect(modulo.data()[i] == static_cast<int64_t>(hash % 1000), "hash and mod in a program", i);
    const uint64_t pair = recis::cross_ids(hash, static_cast<uint64_t>(ids[static_cast<size_t>(i)]));
    expect(pairs.data()[i] == static_cast<int64_t>(pair), "cross in a program", i);
  }
  expect(any_bad == (faults[0] != 0), "a program did not report bad offsets", faults[0]);
  expect(faults[1] == 0 && faults[2] == 0, "a program reported a valid element", faults[1]);
}

// Resizes rows with good and bad offsets: bad rows are refused, and good ones are copied.
template <class T>
void check_resize(int64_t rows, int64_t least, int64_t most, bool drop_first, bool pad_first) {
  const int64_t total = rows * 3 + 1;
  std::vector<T> from(static_cast<size_t>(total));
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<T>(i + 1);
  const Exact<T> values(from);
  for (const bool good : {true, false}) {
    const Exact<int64_t> offsets(offsets_of(rows, total, static_cast<uint64_t>(rows + most), good));
    const recis::Rows source{offsets.data(), 0, total};
    Exact<int64_t> sums(std::vector<int64_t>(static_cast<size_t>(rows) + 1, -1));
    const std::vector<recis::SumPart<recis::ResizeRule>> columns{{{source, least, most, 0}, rows, sums.data()}};
    int64_t fault = 0;
    recis::for_each_cpu(recis::Serial{}, 1, 1, recis::SumRows<recis::ResizeRule>{columns.data(), &fault});
    bool any_bad = false;
    for (int64_t i = 0; i < rows; ++i) any_bad = any_bad || !source.good(i);
    expect(any_bad == (fault != 0), "resize did not report bad offsets", fault);
    Exact<T> out(std::vector<T>(static_cast<size_t>(sums.data()[rows]), 0));
    const std::vector<recis::CopyPart> parts{{0,
                                              source,
                                              rows,
                                              nullptr,
                                              {sums.data(), 0, sums.data()[rows]},
                                              {values.data(), out.data(), sizeof(T), 1},
                                              77,
                                              drop_first ? 1 : 0,
                                              pad_first ? 1 : 0}};
    recis::CopyRows kernel{};
    kernel.segments.count = 1;
    kernel.segments.total = rows;
    kernel.segments.far = parts.data();
    recis::for_each_cpu(recis::Threads{3}, rows, 8, kernel);
    for (int64_t row = 0; row < rows; ++row) {
      // A refused row is neither read nor written. Here, as on a GPU, nothing raises.
      if (!source.good(row)) {
        expect(sums.data()[row] == sums.data()[row + 1], "the length of a refused row", row);
        continue;
      }
      const int64_t size = source.size(row);
      const int64_t length = std::max(least, std::min(most, size));
      const int64_t count = std::min(size, length);
      for (int64_t k = 0; k < length; ++k) {
        const int64_t at = pad_first ? k - (length - count) : k;
        const bool inside = at >= 0 && at < count;
        const int64_t place = source.begin(row) + at + (drop_first ? size - count : 0);
        const T want = inside ? from[static_cast<size_t>(place)] : static_cast<T>(77);
        expect(out.data()[sums.data()[row] + k] == want, "resized rows", row);
      }
    }
  }
}

template <class Kernel, class Part>
void run_rows(const Part& part, int64_t rows, Kernel kernel = {}) {
  const std::vector<Part> parts{part};
  kernel.segments.count = 1;
  kernel.segments.total = rows;
  kernel.segments.far = parts.data();
  recis::for_each_cpu(recis::Threads{3}, rows, 8, kernel);
}

template <class Rule>
Exact<int64_t> sums_of(const Rule& rule, int64_t rows) {
  Exact<int64_t> sums(std::vector<int64_t>(static_cast<size_t>(rows) + 1, -1));
  const std::vector<recis::SumPart<Rule>> columns{{rule, rows, sums.data()}};
  int64_t fault = 0;
  recis::for_each_cpu(recis::Serial{}, 1, 1, recis::SumRows<Rule>{columns.data(), &fault});
  return sums;
}

// Runs the kernels that copy values after rows were refused, as on a GPU, with results allocated for their upper bound:
// nothing outside the buffers is read or written, and rows of a fixed length keep their positions.
void check_refused(int64_t rows, uint64_t seed) {
  const int64_t total = rows * 2;
  std::vector<int64_t> from(static_cast<size_t>(total));
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<int64_t>(i + 1);
  const Exact<int64_t> values(from);
  const Exact<float> weights(std::vector<float>(static_cast<size_t>(total), 1.0f));
  const Exact<int64_t> offsets(offsets_of(rows, total, seed, false));
  const recis::Rows source{offsets.data(), 0, total};

  const Exact<int64_t> dense(std::vector<int64_t>(static_cast<size_t>(rows * 3), -1));
  run_rows<recis::CopyRows>(
      recis::CopyPart{0, source, rows, nullptr, {nullptr, 3, rows * 3}, {values.data(), dense.data(), 8, 1}, 77, 0, 0},
      rows);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < 3; ++k) {
      const bool inside = source.good(row) && k < source.size(row);
      const int64_t want = inside ? from[static_cast<size_t>(source.begin(row) + k)] : 77;
      expect(dense.data()[row * 3 + k] == want, "dense rows after refusals", row);
    }
  }

  const int64_t most = 3;
  const int64_t bound = std::min(total, rows * most);
  const Exact<int64_t> short_sums = sums_of(recis::ResizeRule{source, 0, most, 0}, rows);
  const Exact<int64_t> result(std::vector<int64_t>(static_cast<size_t>(bound), 0));
  const recis::Rows target{short_sums.data(), 0, bound};
  const recis::Plane plane{values.data(), result.data(), 8, 1};
  run_rows<recis::CopyRows>(recis::CopyPart{0, source, rows, nullptr, target, plane, 0, 0, 0}, rows);

  const Exact<float> best_weights(std::vector<float>(static_cast<size_t>(bound), 0));
  int64_t nan = 0;
  recis::TopKRows top{};
  top.fault = &nan;
  run_rows(recis::TopKPart{0, source, target, plane, weights.data(), best_weights.data()}, rows, top);

  const Exact<int64_t> pair_sums = sums_of(recis::CrossRule{source, source, 4}, rows);
  const Exact<uint64_t> pairs(std::vector<uint64_t>(static_cast<size_t>(rows * 4), 0));
  const Exact<float> pair_weights(std::vector<float>(static_cast<size_t>(rows * 4), 0));
  const auto* ids = reinterpret_cast<const uint64_t*>(values.data());
  const recis::Rows pair_rows{pair_sums.data(), 0, rows * 4};
  run_rows<recis::CrossRows>(recis::CrossPart{0, source, source, pair_rows, ids, ids, weights.data(), nullptr,
                                              pairs.data(), pair_weights.data()},
                             rows);
}

}  // namespace

int main() {
  check_strings<recis::Farm>("farm of strings");
  check_strings<recis::Murmur>("murmur of strings");
  check_strings<recis::Xxh64>("xxh64 of strings");
  check_strings<recis::Djb2>("djb2 of strings");
  check_strings<recis::Sdbm>("sdbm of strings");
  for (const int64_t rows : {1, 255, 256, 257, 5000}) {
    for (const bool good : {true, false}) {
      check_program<256>(recis::Serial{}, rows, good);
      check_program<256>(recis::Threads{4}, rows, good);
      check_program<1>(recis::Threads{2}, rows, good);
    }
  }
  for (const int64_t rows : {1, 7, 100}) {
    for (const int64_t most : {0, 1, 2, 3, 4, 5, 40}) {
      for (int side = 0; side < 4; ++side) {
        check_resize<uint64_t>(rows, 0, most, (side & 1) != 0, (side & 2) != 0);
        check_resize<uint32_t>(rows, most / 2, most, (side & 1) != 0, (side & 2) != 0);
        check_resize<uint8_t>(rows, most, most, (side & 1) != 0, (side & 2) != 0);
      }
    }
  }
  for (uint64_t seed = 0; seed < 200; ++seed) check_refused(1 + static_cast<int64_t>(seed % 40), seed);
  return recis_test::finish("features_test", "strings, programs and rows, with good and with bad offsets");
}
