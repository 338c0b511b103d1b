// CRC-32, as in zlib, of the pages of a buffer.
//
// Processors with carry-less multiplication fold 64 bytes at a time: V. Gopal et al., "Fast CRC Computation for Generic
// Polynomials Using PCLMULQDQ Instruction", Intel, 2009. Others use eight tables, as do the last bytes: M. Kounavis and
// F. Berry, "A Systematic Approach to Building High Performance Software-Based CRC Generators", 2005. The choice is
// made at run time, not when the library is compiled.
#include <algorithm>
#include <array>
#include <cstring>

#include "ops/common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(recis, m) { m.def("crc32_pages(Tensor data, int page_bytes, Tensor(a!) sums) -> ()"); }

namespace recis {
namespace {

constexpr uint32_t kPolynomial = 0xedb88320;  // bit 31 is the coefficient of x^0

constexpr uint32_t times_x(uint32_t value) { return value >> 1 ^ (value & 1 ? kPolynomial : 0); }

// x^n modulo the polynomial.
constexpr uint32_t power_of_x(int n) {
  uint32_t value = uint32_t{1} << 31;
  for (int i = 0; i < n; ++i) value = times_x(value);
  return value;
}

using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = times_x(value);
    tables[0][byte] = value;
  }
  for (int k = 1; k < 8; ++k) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = before >> 8 ^ tables[0][before & 255];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t by_tables(uint32_t state, const uint8_t* data, int64_t size) {
  for (; size >= 8; data += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    word ^= state;
    state = 0;
    for (int k = 0; k < 8; ++k) state ^= kTables[7 - k][word >> 8 * k & 255];
  }
  for (; size > 0; ++data, --size) state = state >> 8 ^ kTables[0][(state ^ *data) & 255];
  return state;
}

#if defined(__x86_64__)

#define RECIS_CLMUL __attribute__((target("pclmul,sse4.1")))

// Advances 128 bits by `distance` bits and adds them to `onto`. The low half comes first. Products of reflected
// polynomials are one bit too low; the factors compensate for that.
template <int distance>
RECIS_CLMUL inline __m128i folded(__m128i value, __m128i onto) {
  constexpr int64_t kLow = int64_t{power_of_x(distance + 32)} << 1;
  constexpr int64_t kHigh = int64_t{power_of_x(distance - 32)} << 1;
  const __m128i factors = _mm_set_epi64x(kHigh, kLow);
  const __m128i low = _mm_clmulepi64_si128(value, factors, 0x00);
  const __m128i high = _mm_clmulepi64_si128(value, factors, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), onto);
}

RECIS_CLMUL inline __m128i loaded(const uint8_t* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// `size` must be at least 64.
RECIS_CLMUL uint32_t by_folding(uint32_t state, const uint8_t* data, int64_t size) {
  __m128i a = _mm_xor_si128(loaded(data), _mm_cvtsi32_si128(static_cast<int>(state)));
  __m128i b = loaded(data + 16), c = loaded(data + 32), d = loaded(data + 48);
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
    a = folded<512>(a, loaded(data));
    b = folded<512>(b, loaded(data + 16));
    c = folded<512>(c, loaded(data + 32));
    d = folded<512>(d, loaded(data + 48));
  }
  d = folded<128>(folded<128>(folded<128>(a, b), c), d);
  for (; size >= 16; data += 16, size -= 16) d = folded<128>(d, loaded(data));
  // The 16 bytes in d have the same remainder as all bytes read so far.
  alignas(16) uint8_t rest[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(rest), d);
  return by_tables(by_tables(0, rest, 16), data, size);
}

bool can_fold() {
  static const bool can = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  return can;
}

#endif

uint32_t crc32(const uint8_t* data, int64_t size) {
#if defined(__x86_64__)
  if (size >= 64 && can_fold()) return ~by_folding(~uint32_t{0}, data, size);
#endif
  return ~by_tables(~uint32_t{0}, data, size);
}

void crc32_pages(const Tensor& bytes, int64_t page_bytes, const Tensor& sums) {
  RECIS_CHECK(page_bytes > 0, "page_bytes must be positive, got ", page_bytes);
  const int64_t size = bytes.numel();
  RECIS_CHECK(sums.numel() == (size + page_bytes - 1) / page_bytes, "sums must hold one element for each page");
  const uint8_t* content = data<uint8_t>(bytes, "data");
  int64_t* out = data<int64_t>(sums, "sums");
  // Single-threaded, because callers that read or write files already use several threads.
  for (int64_t begin = 0; begin < size; begin += page_bytes) {
    *out++ = crc32(content + begin, std::min(page_bytes, size - begin));
  }
}

}  // namespace
}  // namespace recis

STABLE_TORCH_LIBRARY_IMPL(recis, CPU, m) { m.impl("crc32_pages", TORCH_BOX(&recis::crc32_pages)); }
