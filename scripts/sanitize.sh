#!/usr/bin/env bash
# Compile and run every native test program with ThreadSanitizer, and with AddressSanitizer and
# UndefinedBehaviorSanitizer. The programs use std::thread, because ThreadSanitizer reports false races over libgomp.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cxx=${CXX:-g++}
out=build/sanitize
mkdir -p "$out"
shopt -s nullglob
programs=(csrc/test/*.cpp)
if [ ${#programs[@]} -eq 0 ]; then
  echo "scripts/sanitize.sh: no programs found in csrc/test/*.cpp" >&2
  exit 1
fi
# GCC's thread sanitizer cannot start if addresses are randomized by more bits than it reserves.
fixed=()
if command -v setarch >/dev/null && setarch -R true 2>/dev/null; then fixed=(setarch -R); fi

failed=0
for source in "${programs[@]}"; do
  name=$(basename "$source" .cpp)
  for sanitizer in thread address,undefined; do
    program=$out/$name-${sanitizer%,*}
    echo "== $name, -fsanitize=$sanitizer"
    "$cxx" -std=c++20 -O1 -g -pthread -Wall -Wextra -Wno-unknown-pragmas -fno-omit-frame-pointer \
      "-fsanitize=$sanitizer" -fno-sanitize-recover=all -Icsrc "$source" -o "$program"
    TSAN_OPTIONS=halt_on_error=1 ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 \
      ${fixed[@]+"${fixed[@]}"} "$program" || { echo "FAILED: $program" >&2; failed=1; }
  done
done
exit "$failed"
