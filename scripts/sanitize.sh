#!/usr/bin/env bash
# Compile and run every native test program with ThreadSanitizer, and with AddressSanitizer and
# UndefinedBehaviorSanitizer. The programs use std::thread, because ThreadSanitizer reports false races over libgomp.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export cxx=${CXX:-g++} out=build/sanitize fixed=
mkdir -p "$out"
shopt -s nullglob
programs=(csrc/test/*.cpp)
if [ ${#programs[@]} -eq 0 ]; then
  echo "scripts/sanitize.sh: no programs found in csrc/test/*.cpp" >&2
  exit 1
fi
# GCC's thread sanitizer cannot start if addresses are randomized by more bits than it reserves.
if command -v setarch >/dev/null && setarch -R true 2>/dev/null; then fixed="setarch -R"; fi

# Compile and run one program with one sanitizer, then print all of its output.
check() {
  local source=$1 sanitizer=$2 name program status=0
  name=$(basename "$source" .cpp)
  program=$out/$name-${sanitizer%,*}
  {
    "$cxx" -std=c++20 -O1 -g -pthread -Wall -Wextra -Wno-unknown-pragmas -fno-omit-frame-pointer \
      "-fsanitize=$sanitizer" -fno-sanitize-recover=all -Icsrc "$source" -o "$program" &&
      TSAN_OPTIONS=halt_on_error=1 ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 $fixed "$program"
  } >"$program.log" 2>&1 || status=$?
  printf '== %s, -fsanitize=%s\n%s\n' "$name" "$sanitizer" "$(<"$program.log")"
  if [ "$status" != 0 ]; then echo "FAILED: $program" >&2; fi
  return "$status"
}
export -f check

for source in "${programs[@]}"; do
  for sanitizer in thread address,undefined; do printf '%s\0%s\0' "$source" "$sanitizer"; done
done | xargs -0 -n 2 -P "${MAX_JOBS:-$(nproc)}" bash -c 'check "$@"' check
