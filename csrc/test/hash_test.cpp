// Tests of hashes. They read only the bytes of their string, at every length and alignment: each string is in a heap
// buffer that ends with it, so that AddressSanitizer reports any read beyond it. To check the values, MurmurHash64A is
// compared with the string hash of GNU libstdc++, and both hashes with checksums over all lengths.
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/for_each.h"
#include "core/hash.h"
#include "core/hash/mix.h"
#include "test/expect.h"

namespace {

using recis::Bytes;
using recis::Farm;
using recis::Murmur;
using recis_test::expect;

// Bytes i * 37 + 11: the strings with which the Python tests pin both hashes, too.
std::vector<uint8_t> steps(int64_t size) {
  std::vector<uint8_t> bytes(static_cast<size_t>(size));
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * 37 + 11);
  return bytes;
}

std::vector<uint8_t> noise(int64_t size, uint64_t seed) {
  std::vector<uint8_t> bytes(static_cast<size_t>(size));
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(recis::mix64(seed + i));
  return bytes;
}

template <class Hasher>
uint64_t hash(const std::vector<uint8_t>& bytes) {
  return Hasher{}(Bytes{bytes.data(), static_cast<int64_t>(bytes.size())});
}

// Compares the checksum of the hashes with that of the original implementation over the same strings.
template <class Hasher>
void check_sum(uint64_t want, const char* what) {
  uint64_t sum = 0;
  for (int64_t size = 0; size <= 512; ++size) sum = sum * 31 + hash<Hasher>(steps(size));
  expect(sum == want, what, 512);
}

void check_lengths_and_alignments() {
  for (int64_t size = 0; size <= 512; ++size) {
    const std::vector<uint8_t> bytes = noise(size, static_cast<uint64_t>(size) << 32);
    const uint64_t farm = hash<Farm>(bytes);
    const uint64_t murmur = hash<Murmur>(bytes);
#if defined(__GLIBCXX__) && __SIZEOF_SIZE_T__ == 8
    expect(murmur == std::_Hash_bytes(bytes.data(), bytes.size(), 0), "murmur is not libstdc++'s", size);
#endif
    for (int64_t shift = 0; shift < 16; ++shift) {
      // `new` aligns to 16, so the shift is the alignment. The buffer ends with the string.
      const std::unique_ptr<uint8_t[]> buffer(new uint8_t[static_cast<size_t>(shift + size)]);
      std::memset(buffer.get(), 0xa5, static_cast<size_t>(shift));
      if (size > 0) std::memcpy(buffer.get() + shift, bytes.data(), static_cast<size_t>(size));
      const Bytes moved{buffer.get() + shift, size};
      expect(Farm{}(moved) == farm, "farm depends on the alignment", size);
      expect(Murmur{}(moved) == murmur, "murmur depends on the alignment", size);
    }
  }
}

void check_ids() {
  const int64_t edges[] = {0, 1, -1, INT64_MIN, INT64_MAX, int64_t{1} << 52, -(int64_t{1} << 32)};
  for (const int64_t id : edges) {
    std::vector<uint8_t> bytes(8);
    std::memcpy(bytes.data(), &id, 8);
    const recis::WordBytes word{static_cast<uint64_t>(id)};
    expect(Farm{}(word) == hash<Farm>(bytes), "farm of an id is not that of its bytes", id);
    expect(Murmur{}(word) == hash<Murmur>(bytes), "murmur of an id is not that of its bytes", id);
  }
}

// Hashes rows some of whose offsets are invalid: good rows are hashed, and nothing outside the values is read.
template <class Executor>
void check_offsets(const Executor& executor) {
  constexpr int64_t kRows = 20'000;
  constexpr int64_t kTotal = 4'099;
  const std::unique_ptr<uint8_t[]> values(new uint8_t[kTotal]);
  std::memcpy(values.get(), noise(kTotal, 7).data(), kTotal);
  const auto run = [&](const std::vector<int64_t>& offsets) {
    std::vector<int64_t> out(kRows, -1);
    int64_t fault = 0;
    int64_t* const word = &fault;
    recis::for_each_cpu(executor, kRows, 64,
                        recis::HashBytes<Farm>{values.get(), kTotal, offsets.data(), out.data(), nullptr, &word});
    bool any_bad = false;
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t begin = offsets[static_cast<size_t>(i)];
      const int64_t end = offsets[static_cast<size_t>(i) + 1];
      const bool bad = begin < 0 || end < begin || end > kTotal;
      any_bad = any_bad || bad;
      const uint64_t want = bad ? 0 : Farm{}(Bytes{values.get() + begin, end - begin});
      expect(out[static_cast<size_t>(i)] == static_cast<int64_t>(want), "a row has the wrong hash", i);
    }
    expect(any_bad == (fault != 0), "bad offsets were not reported", fault);
    if (fault != 0) {
      const size_t row = static_cast<size_t>(fault - 1);
      expect(offsets[row] < 0 || offsets[row + 1] < offsets[row] || offsets[row + 1] > kTotal, "a good row was refused",
             fault - 1);
    }
  };

  std::vector<int64_t> offsets(kRows + 1);
  for (size_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<int64_t>(i) * kTotal / kRows;
  run(offsets);
  for (uint64_t seed = 0; seed < 8; ++seed) {
    for (size_t i = 0; i < offsets.size(); ++i) {
      const uint64_t random = recis::mix64(seed << 32 | i);
      const int64_t near = static_cast<int64_t>(random % (kTotal + 64)) - 32;
      offsets[i] = random >> 60 == 0 ? static_cast<int64_t>(random * 0x9e3779b97f4a7c15ull) : near;
    }
    run(offsets);
  }
}

}  // namespace

int main() {
  // From fingerprint64 of pyfarmhash 0.5.1 (PyPI), and from libstdc++'s _Hash_bytes, which other libraries lack.
  check_sum<Farm>(0x7737a9fbe66d7165ull, "farm's checksum is not FarmHash's");
  check_sum<Murmur>(0x192e57bb0262cff6ull, "murmur's checksum is not MurmurHash64A's");
  check_lengths_and_alignments();
  check_ids();
  check_offsets(recis::Serial{});
  check_offsets(recis::Threads{4});
  return recis_test::finish("hash_test", "lengths 0 to 512 at 16 alignments, ids, and good and bad offsets");
}
