// Expectations of the native tests: a failure is printed and counted, and the program continues.
#pragma once

#include <cstdint>
#include <cstdio>

namespace recis_test {

inline int failures = 0;

inline void expect(bool good, const char* what, int64_t detail) {
  if (good) return;
  std::printf("FAILED: %s (%lld)\n", what, static_cast<long long>(detail));
  ++failures;
}

// Prints the outcome and returns the exit status of the program.
inline int finish(const char* program, const char* scope) {
  if (failures == 0) {
    std::printf("%s: passed: %s\n", program, scope);
  } else {
    std::printf("%s: %d failures\n", program, failures);
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace recis_test
