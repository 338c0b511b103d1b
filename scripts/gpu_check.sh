#!/usr/bin/env bash
# Run everything that requires a GPU (build, tests, compute-sanitizer, benchmark), then print a table of the results.
#
#     scripts/gpu_check.sh [LOG_DIR]
#
# The machine must have a GPU, a torch that can use it, and nvcc; tests also need pytest and hypothesis. The script
# needs no network, installs nothing, and writes only to build/, recis_hybrid/lib/ and LOG_DIR (build/gpu_check). PYTHON
# is the interpreter (python3). It ends within nine minutes: each step has a time limit, and the others still run if one
# exceeds it. The exit status is 0 only if every step passed, and every case of the benchmark reached what it must. A
# step that could not run counts as failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
logs=${1:-build/gpu_check}
mkdir -p "$logs"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 RECIS_REQUIRE_GPU=1
# torch and JAX share the GPU in these tests, and by default JAX preallocates three quarters of its memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# Time limits in seconds; `grace` seconds later a step is killed. The benchmark gets the rest, at least 110 seconds.
total=540 grace=5
declare -A limits=([device]=20 [build]=150 [tests]=110 [memcheck]=65 [racecheck]=50)
# Few tests, because each call is far slower under compute-sanitizer: those of `--quick` in these files.
checked=(tests/ops/test_{id_map,update,blocks,cache,many_features,program,ragged}.py tests/embedding/table
  tests/embedding/test_combiners.py tests/optim/test_optimizers.py)
raced=(tests/ops/test_{id_map,update,many_features}.py)
table=()
all_passed=1

# row NAME RESULT SECONDS DETAIL
row() {
  table+=("$(printf '%-24s %-11s %6s  %s' "$1" "$2" "$3" "$4")")
  case $2 in passed | must | aim) ;; *) all_passed=0 ;; esac
}

finish() {
  printf '\n%-24s %-11s %6s  %s\n' 'step or case' result s detail
  printf '%s\n' "${table[@]}"
  printf 'logs: %s\n' "$logs"
  exit $((1 - all_passed))
}

# not_run DETAIL STEP...
not_run() {
  for step in "${@:2}"; do row "$step" "not run" 0 "$1"; done
}

# attempt STEP COMMAND...: run a command within the step's time limit, show its output and keep it in $logs/STEP.log;
# set status, seconds and late, which is the time limit if it was exceeded.
attempt() {
  local step=$1 begin=$SECONDS
  local limit=${limits[$step]}
  shift
  printf '\n== %s, at most %s s\n' "$step" "$limit"
  timeout -k "$grace" "$limit" "$@" 2>&1 | tee "$logs/$step.log"
  status=${PIPESTATUS[0]} seconds=$((SECONDS - begin)) late=''
  # 137 also if the step was killed for another reason, such as lack of memory.
  if [ "$status" = 124 ] || { [ "$status" = 137 ] && [ "$seconds" -ge "$limit" ]; }; then
    late="timed out after $limit s"
  fi
}

# tests STEP COMMAND...: a step that runs pytest; it passes only if at least one test passed.
tests() {
  local step=$1 summary
  if [ -n "$missing" ]; then
    row "$step" absent 0 "$python has no $missing"
    return
  fi
  attempt "$@"
  # Of pytest's output, the last line with counts, without its decoration; or, without such a line, the share of tests
  # that have run.
  summary=$(grep -E '[0-9]+ (passed|failed|errors?|skipped|deselected)\b.* in [0-9.]+s' "$logs/$step.log" |
    tail -1 | tr -d '=' | sed -E 's/^ +| +$//g')
  if [ -n "$late" ]; then
    row "$step" failed "$seconds" "$late, at $(grep -oE '[0-9]+%\]' "$logs/$step.log" | tail -1 | tr -d ']')"
  elif [ "$status" = 0 ] && grep -qE '[0-9]+ passed' <<<"$summary"; then
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
  row device failed "$seconds" "${late:-$(tail -1 "$logs/device.log")}"
  not_run "there is no GPU" build tests memcheck racecheck benchmark
  finish
fi
row device passed "$seconds" "$(tail -1 "$logs/device.log")"
# Code for this GPU alone, which takes half the time.
arch=$(grep -oE 'sm_[0-9]+' "$logs/device.log" | head -1)

if nvcc=$(scripts/find_nvcc.sh); then
  attempt build env RECIS_CUDA=1 NVCC="$nvcc" RECIS_CUDA_ARCHS="${arch#sm_}" \
    "$python" setup.py --quiet build_ext --inplace
else
  status=1 seconds=0 late=''
  echo "nvcc is neither in NVCC nor on PATH nor in /usr/local/cuda/bin" | tee "$logs/build.log"
fi
if [ "$status" != 0 ]; then
  row build failed "$seconds" "${late:-$(tail -1 "$logs/build.log")}"
  not_run "the CUDA library was not built" tests memcheck racecheck benchmark
  finish
fi
row build passed "$seconds" \
  "$("$nvcc" --version | grep -oE 'release [0-9.]+'), $arch, $(ls recis_hybrid/lib/librecis_cuda.so)"

missing=$("$python" -c 'from importlib.util import find_spec
print(*[name for name in ("pytest", "hypothesis") if not find_spec(name)], sep=" and no ")')
# Files that cannot be imported, for lack of another package, do not stop the others.
pytest=("$python" -m pytest -m gpu -q --continue-on-collection-errors)
# Several processes also keep tests apart from one after which the GPU refuses all further work of its process.
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(--numprocesses=4 --dist=loadfile); fi
tests tests "${pytest[@]}" "${workers[@]}"

if sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer); then
  sanitizer=("$sanitizer" --target-processes all --error-exitcode 86)
  # torch's caching allocator returns pieces of large blocks, in which out-of-bounds accesses would go undetected.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    tests memcheck "${sanitizer[@]}" --tool memcheck "${pytest[@]}" --quick "${checked[@]}"
  tests racecheck "${sanitizer[@]}" --tool racecheck "${pytest[@]}" --quick "${raced[@]}"
else
  for step in memcheck racecheck; do
    row "$step" absent 0 "compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
  done
fi

limits[benchmark]=$((total - SECONDS - 2 * grace))
attempt benchmark "$python" -m benchmarks.gpu --time-limit $((limits[benchmark] - grace))
cases=$(grep -c '^{"bench"' "$logs/benchmark.log")
if [ -n "$late" ]; then
  row benchmark failed "$seconds" "$late, $cases cases"
elif [ "$status" = 0 ] && [ "$cases" -gt 0 ]; then
  row benchmark passed "$seconds" "$cases cases"
else
  row benchmark failed "$seconds" "$cases cases (exit status $status)"
fi
# The table that the benchmark prints at its end.
while IFS='|' read -r _ name unit _ must aim measured verdict detail _; do
  row "$name" "$verdict" '' "${measured:+$measured $unit, }must $must, aim $aim${detail:+; $detail}"
done < <(grep -E '^\| [a-z_]+/' "$logs/benchmark.log" | sed 's/ *| */|/g')
finish
