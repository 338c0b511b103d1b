#!/usr/bin/env bash
# Run everything that requires a GPU (build, tests, compute-sanitizer, benchmark), then print a table of the results.
#
#     scripts/gpu_check.sh [LOG_DIR]
#
# The machine must have a GPU, a torch that can use it, nvcc, pytest and hypothesis. The script needs no network, installs
# nothing, and writes only to build/, recis_hybrid/lib/ and LOG_DIR (build/gpu_check). PYTHON is the interpreter (python3).
# The exit status is 0 only if every line of the table says "passed". A step that could not run counts as failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
logs=${1:-build/gpu_check}
mkdir -p "$logs"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 RECIS_REQUIRE_GPU=1
# torch and JAX share the GPU in these tests, and by default JAX preallocates three quarters of its memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
table=()
all_passed=1

# row STEP RESULT SECONDS DETAIL
row() {
  table+=("$(printf '%-12s %-8s %6s  %s' "$1" "$2" "$3" "$4")")
  [ "$2" = passed ] || all_passed=0
}

finish() {
  printf '\n%-12s %-8s %6s  %s\n' step result s detail
  printf '%s\n' "${table[@]}"
  printf 'logs: %s\n' "$logs"
  exit $((1 - all_passed))
}

# attempt STEP COMMAND...: run a command, show its output and keep it in $logs/STEP.log; set status and seconds.
attempt() {
  local step=$1 begin=$SECONDS
  shift
  printf '\n== %s\n' "$step"
  "$@" 2>&1 | tee "$logs/$step.log"
  status=${PIPESTATUS[0]}
  seconds=$((SECONDS - begin))
}

# counts LOG: print pytest's summary line, without its decoration.
counts() { grep -E '[0-9]+ (passed|failed|errors?|skipped|deselected)\b.* in [0-9.]+s' "$1" | tail -1 | tr -d '='; }

# tests STEP COMMAND...: a step that runs pytest; it passes only if at least one test passed.
tests() {
  local step=$1 summary
  attempt "$@"
  summary=$(counts "$logs/$step.log" | sed -E 's/^ +| +$//g')
  if [ "$status" = 0 ] && grep -qE '[0-9]+ passed' <<<"$summary"; then
    row "$step" passed "$seconds" "$summary"
  else
    row "$step" failed "$seconds" "${summary:-no test ran} (exit status $status)"
  fi
}

find_device='
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device")
p = torch.cuda.get_device_properties(0)
print(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB;", end=" ")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
'
attempt device "$python" -c "$find_device"
if [ "$status" != 0 ]; then
  row device failed "$seconds" "$(tail -1 "$logs/device.log")"
  for step in build tests sanitizer benchmark; do row "$step" "not run" 0 "there is no GPU"; done
  finish
fi
row device passed "$seconds" "$(tail -1 "$logs/device.log")"

if nvcc=$(scripts/find_nvcc.sh); then
  RECIS_CUDA=1 NVCC=$nvcc attempt build "$python" setup.py --quiet build_ext --inplace
else
  status=1 seconds=0
  echo "nvcc is neither in NVCC nor on PATH nor in /usr/local/cuda/bin" | tee "$logs/build.log"
fi
if [ "$status" != 0 ]; then
  row build failed "$seconds" "$(tail -1 "$logs/build.log")"
  for step in tests sanitizer benchmark; do row "$step" "not run" 0 "the CUDA library was not built"; done
  finish
fi
row build passed "$seconds" "$("$nvcc" --version | grep -oE 'release [0-9.]+'), $(ls recis_hybrid/lib/librecis_cuda.so)"

tests tests "$python" -m pytest -m gpu -q

sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer)
if [ -n "$sanitizer" ]; then
  # torch's caching allocator returns pieces of large blocks, in which out-of-bounds accesses would go undetected.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 tests sanitizer "$sanitizer" --tool memcheck --target-processes all \
    --error-exitcode 86 "$python" -m pytest tests/ops -m gpu -q
else
  row sanitizer absent 0 "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
fi

attempt benchmark "$python" benchmarks/embedding.py --device cuda --quick
lines=$(grep -c '^{"bench"' "$logs/benchmark.log")
if [ "$status" = 0 ] && [ "$lines" -gt 0 ]; then
  row benchmark passed "$seconds" "$lines cases"
else
  row benchmark failed "$seconds" "$lines cases (exit status $status)"
fi
finish
