// Groups equal rows on the CPU, keeping input order within a group: a stable radix sort of (row, position) words.
//
// CUDA has its own (cuda/group.cu, over CUB's radix sort): sorting is where one source would serve neither well.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace recis {

struct GroupOutputs {
  int64_t* unique;           // [n] upper bound: distinct rows, ascending
  int64_t* offsets;          // [n + 1] upper bound
  int64_t* grouped_sources;  // [n]
  float* grouped_scales;     // [n], or null
  int64_t* count;            // [1]
};

inline int bits_for(uint64_t bound) { return bound <= 1 ? 1 : 64 - __builtin_clzll(bound - 1); }

// Sorts `words` by bits [shift, shift + bits), stably; `spare` is as large. Returns the array that holds the result.
// Each of `tasks` workers counts and moves one range, so the result does not depend on how many there are.
template <class Executor>
uint64_t* radix_sort(const Executor& executor, int64_t tasks, uint64_t* words, uint64_t* spare, int64_t n, int shift,
                     int bits) {
  constexpr int kMaxDigit = 8;  // as many streams as a first-level cache has room for
  const int passes = (bits + kMaxDigit - 1) / kMaxDigit;
  const int digit = (bits + passes - 1) / passes;
  const int64_t radix = int64_t{1} << digit;
  const uint64_t mask = static_cast<uint64_t>(radix - 1);
  const int64_t chunk = (n + tasks - 1) / tasks;
  std::vector<int64_t> starts(tasks * radix);
  for (int pass = 0; pass < passes; ++pass, shift += digit) {
    std::fill(starts.begin(), starts.end(), 0);
    executor(tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        int64_t* counts = starts.data() + t * radix;
        for (int64_t i = t * chunk; i < std::min(n, (t + 1) * chunk); ++i) ++counts[(words[i] >> shift) & mask];
      }
    });
    int64_t sum = 0;
    for (int64_t d = 0; d < radix; ++d) {
      for (int64_t t = 0; t < tasks; ++t) {
        const int64_t here = starts[t * radix + d];
        starts[t * radix + d] = sum;
        sum += here;
      }
    }
    executor(tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        int64_t* next = starts.data() + t * radix;
        for (int64_t i = t * chunk; i < std::min(n, (t + 1) * chunk); ++i) {
          spare[next[(words[i] >> shift) & mask]++] = words[i];
        }
      }
    });
    std::swap(words, spare);
  }
  return words;
}

// rows: [n], each below row_bound; positions whose row is below 0 belong to no group.
// bits_for(row_bound + 1) + bits_for(n) must not exceed 64.
template <class Executor>
void group_rows_cpu(const Executor& executor, int64_t max_tasks, const int64_t* rows, const int64_t* sources,
                    const float* scales, int64_t n, int64_t row_bound, const GroupOutputs& out) {
  constexpr int64_t kItemsATask = 16384;
  const int64_t tasks = std::max<int64_t>(1, std::min(max_tasks, n / kItemsATask));
  const int64_t chunk = (n + tasks - 1) / tasks;
  const int position_bits = bits_for(static_cast<uint64_t>(std::max<int64_t>(n, 1)));
  const uint64_t position_mask = (uint64_t{1} << position_bits) - 1;

  std::unique_ptr<uint64_t[]> memory(new uint64_t[2 * std::max<int64_t>(n, 1)]);  // not value-initialised
  uint64_t* words = memory.get();
  executor(tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first * chunk; i < std::min(n, last * chunk); ++i) {
      const int64_t row = rows[i] < 0 ? row_bound : rows[i];
      words[i] = (static_cast<uint64_t>(row) << position_bits) | static_cast<uint64_t>(i);
    }
  });
  words =
      radix_sort(executor, tasks, words, words + n, n, position_bits, bits_for(static_cast<uint64_t>(row_bound) + 1));

  // A group begins wherever the row differs from the one before; count them a range, then fill.
  const auto begins = [&](int64_t i) {
    return i == 0 || (words[i] >> position_bits) != (words[i - 1] >> position_bits);
  };
  std::vector<int64_t> base(tasks + 1, 0);
  if (tasks > 1) {
    executor(tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        int64_t groups = 0;
        for (int64_t i = t * chunk; i < std::min(n, (t + 1) * chunk); ++i) groups += begins(i);
        base[t + 1] = groups;
      }
    });
    for (int64_t t = 0; t < tasks; ++t) base[t + 1] += base[t];
  }
  executor(tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      int64_t group = base[t];
      for (int64_t i = t * chunk; i < std::min(n, (t + 1) * chunk); ++i) {
        const int64_t position = static_cast<int64_t>(words[i] & position_mask);
        if (begins(i)) {
          out.unique[group] = static_cast<int64_t>(words[i] >> position_bits);
          out.offsets[group] = i;
          ++group;
        }
        out.grouped_sources[i] = sources[position];
        if (scales != nullptr) out.grouped_scales[i] = scales[position];
      }
      if (t == tasks - 1) {
        out.count[0] = group;
        out.offsets[group] = n;
      }
    }
  });
  // The positions without a row have sorted to the end, as a last group; it is not counted.
  if (n > 0 && out.unique[out.count[0] - 1] == row_bound) --out.count[0];
}

}  // namespace recis
