#!/usr/bin/env bash
# Compile the native test programs for aarch64 and run them in an emulator; compile the operators for it, if torch is
# installed. disk_test also runs with what takes the place of Linux' own system calls elsewhere (csrc/ops/platform.h).
# Debian: apt-get install g++-aarch64-linux-gnu qemu-user
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export cxx=aarch64-linux-gnu-g++ out=build/aarch64
for program in "$cxx" qemu-aarch64; do
  if ! command -v "$program" >/dev/null; then
    echo "scripts/aarch64.sh: there is no $program; install g++-aarch64-linux-gnu and qemu-user" >&2
    exit 1
  fi
done
export flags="-std=c++20 -O1 -pthread -ffp-contract=off -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter -Wno-unknown-pragmas -Werror -Icsrc"
mkdir -p "$out"

# Compile and run one program, with further flags, then print all of its output.
check() {
  local source=$1 more=${2:-} program status=0
  program=$out/$(basename "$source" .cpp)$more
  # With the libraries inside, the program needs no system for aarch64.
  { $cxx $flags $more -static "$source" -o "$program" && timeout 300 qemu-aarch64 "$program"; } >"$program.log" 2>&1 || status=$?
  printf '== %s, aarch64 %s\n%s\n' "$(basename "$source" .cpp)" "$more" "$(<"$program.log")"
  if [ "$status" != 0 ]; then echo "FAILED: $program" >&2; fi
  return "$status"
}

compile() {
  $cxx $flags -fsyntax-only -isystem "$torch" -DTORCH_TARGET_VERSION=0x020b000000000000 "$1" || return 255
}
export -f check compile

{
  for source in csrc/test/*.cpp; do printf '%s\0%s\0' "$source" ''; done
  printf '%s\0%s\0' csrc/test/disk_test.cpp -DRECIS_PORTABLE
} | xargs -0 -n 2 -P "${MAX_JOBS:-$(nproc)}" bash -c 'check "$@"' check

if torch=$("${VENV:-.venv}/bin/python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])' 2>/dev/null); then
  export torch=$torch/include
  printf '%s\0' csrc/ops/*.cpp | xargs -0 -n 1 -P "${MAX_JOBS:-$(nproc)}" bash -c 'compile "$@"' compile
  echo "== the operators compile for aarch64"
else
  echo "== the operators were not compiled for aarch64: torch is not installed"
fi
