#!/usr/bin/env python3
"""Check that the tests on the emulated device catch faults of the CUDA kernels.

Each mutant is one fault in a copy of ``csrc``. The script builds the emulated device from the copy, and runs the tests
that should fail. A mutant survives if they pass. The exit status is 0 if none survives.

    python scripts/mutants.py [NAME ...]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 600
IDS = "tests/ops/test_thread_schedules.py::test_an_id_map_behaves_like_a_dict"
COUNTS = "tests/ops/test_thread_schedules.py::test_ids_are_counted_exactly"
FULL = "tests/ops/test_thread_schedules.py::test_a_full_map_refuses_ids_and_ends"
GROUPS = "tests/ops/test_thread_schedules.py::test_groups_and_sums_are_those_of_the_cpu"
LOOKUPS = "tests/ops/test_thread_schedules.py::test_a_training_lookup_is_that_of_the_cpu"
CACHE = "tests/ops/test_thread_schedules.py::test_a_cache_loses_no_record"
ADAM = "tests/optim/test_thread_schedules.py::test_training_is_that_of_the_cpu[adam]"
ROWWISE = "tests/optim/test_thread_schedules.py::test_training_is_that_of_the_cpu[rowwise_adagrad]"
ALL = [IDS, COUNTS, FULL, GROUPS, LOOKUPS, CACHE, ADAM, ROWWISE]


@dataclass(frozen=True)
class Mutant:
    """A fault, made by replacing text that occurs once in a file.

    Attributes:
        name: What is wrong.
        file: The file.
        old: The text.
        new: The text in its place.
        kernels: The files of ``csrc/cuda`` to compile again: all that have the kernels in question, because of equal
            functions the linker takes the first. The others keep the original, which saves time.
        tests: The tests that should fail.
    """

    name: str
    file: str
    old: str
    new: str
    kernels: list[str]
    tests: list[str]


MUTANTS = [
    Mutant(
        "id_published_after_its_entry",
        "csrc/core/id_map.h",
        "store_relaxed(slot, static_cast<uint64_t>(id));\n          store_release(slot + 1, entry);",
        "store_release(slot + 1, entry);\n          store_relaxed(slot, static_cast<uint64_t>(id));",
        ["group", "id_map"],
        [IDS, LOOKUPS],
    ),
    Mutant(
        "no_wait_for_a_claimed_slot",
        "csrc/core/id_map.h",
        "while (entry_state(entry) == SlotState::kClaimed);",
        "while (false);",
        ["group", "id_map"],
        [IDS, LOOKUPS],
    ),
    Mutant(
        "slot_claimed_without_comparing",
        "csrc/core/id_map.h",
        "if (compare_exchange(slot + 1, entry, make_entry(SlotState::kClaimed, key, 0))) {",
        "if (store_release(slot + 1, make_entry(SlotState::kClaimed, key, 0)); true) {",
        ["group", "id_map"],
        [IDS, LOOKUPS],
    ),
    Mutant(
        "probe_without_an_end",
        "csrc/core/id_map.h",
        "for (uint64_t passed = 0; passed < order.lines; ++passed) {\n    for (uint64_t* slot",
        "for (uint64_t passed = 0;; ++passed) {\n    for (uint64_t* slot",
        ["group", "id_map"],
        [FULL],
    ),
    Mutant(
        "slot_moved_without_comparing",
        "csrc/core/id_map.h",
        "if (compare_exchange(slot + 1, expected, entry)) {",
        "if (load_acquire(slot + 1) == expected && (store_release(slot + 1, entry), true)) {",
        ["id_map"],
        [IDS],
    ),
    Mutant(
        "shuffle_mask_of_the_whole_warp",
        "csrc/core/for_each.h",
        "const unsigned mask = group << (threadIdx.x % 32 - lanes.rank);",
        "const unsigned mask = 0xffffffffu;",
        ["update"],
        [ROWWISE],
    ),
    Mutant(
        "shuffle_mask_of_the_first_group",
        "csrc/core/for_each.h",
        "const unsigned mask = group << (threadIdx.x % 32 - lanes.rank);",
        "const unsigned mask = group;",
        ["update"],
        [ROWWISE],
    ),
    Mutant(
        "last_tile_dropped",
        "csrc/core/for_each.h",
        "for (; d + W <= dim; d += int64_t{lanes.size} * W) f(d, Const<W>{});",
        "for (; d + W < dim; d += int64_t{lanes.size} * W) f(d, Const<W>{});",
        ["update"],
        [ADAM, GROUPS],
    ),
    Mutant(
        "tiles_of_lanes_overlap",
        "csrc/core/for_each.h",
        "for (; d + W <= dim; d += int64_t{lanes.size} * W) f(d, Const<W>{});",
        "for (; d + W <= dim; d += int64_t{lanes.size}) f(d, Const<W>{});",
        ["update"],
        [ADAM],
    ),
    Mutant(
        "stride_of_the_grid_in_threads",
        "csrc/cuda/device.cuh",
        "const int64_t groups = static_cast<int64_t>(gridDim.x) * blockDim.x / lanes;",
        "const int64_t groups = static_cast<int64_t>(gridDim.x) * blockDim.x;",
        ["gather", "group", "update"],
        [GROUPS, LOOKUPS],
    ),
    Mutant(
        "stride_of_the_grid_in_blocks",
        "csrc/cuda/device.cuh",
        "const int64_t groups = static_cast<int64_t>(gridDim.x) * blockDim.x / lanes;",
        "const int64_t groups = static_cast<int64_t>(blockDim.x) / lanes;",
        ["id_map", "update"],
        [COUNTS, ROWWISE],
    ),
    Mutant(
        "scratch_of_positions_never_written",
        "csrc/cuda/group.cu",
        "    positions[i] = static_cast<uint32_t>(i);\n",
        "",
        ["group"],
        [GROUPS, LOOKUPS],
    ),
    Mutant(
        "scratch_of_scales_never_written",
        "csrc/cuda/group.cu",
        "tiles, sources, scales);",
        "tiles, sources, nullptr);",
        ["group"],
        [GROUPS, LOOKUPS],
    ),
    Mutant(
        "replaced_records_not_written_back",
        "csrc/core/cache.h",
        "if (old != nullptr) reinterpret_cast<Word<16>*>(old)[w] = *at;",
        "",
        ["cache"],
        [CACHE, ADAM],
    ),
    Mutant(
        "way_claimed_without_comparing",
        "csrc/core/cache.h",
        "if (!compare_exchange(cache.states + first + way, seen, now.used(1, false))) return Claim::kLost;",
        "store_relaxed(cache.states + first + way, now.used(1, false));",
        ["cache"],
        [CACHE],
    ),
    Mutant(
        "way_of_this_lookup_replaced",
        "csrc/core/cache.h",
        "if (now.is_used_now({state})) continue;",
        "",
        ["cache"],
        [CACHE],
    ),
    Mutant(
        "state_changed_while_lanes_read_it",
        "csrc/core/cache.h",
        "const uint64_t state = lanes_min(lanes.rank == 0 ? cache.states[way] : ~uint64_t{0}, lanes);",
        "const uint64_t state = cache.states[way];",
        ["cache"],
        [CACHE],
    ),
    Mutant(
        "positions_without_a_row_grouped",
        "csrc/cuda/group.cu",
        "if (lanes.rank == 0 && unique[*count - 1] == row_bound) --*count;",
        "",
        ["group"],
        [GROUPS],
    ),
]


def copy_sources(to: Path) -> None:
    """Copy what the build of the emulated device reads, and what was built before."""
    shutil.copytree(ROOT / "csrc", to / "csrc")
    shutil.copy2(ROOT / "setup.py", to)
    if (built := ROOT / "build" / "emulated").is_dir():
        shutil.copytree(built, to / "build" / "emulated")


def build(folder: Path) -> Path:
    """Build the emulated device of a copy of the sources, and return the library."""
    command = [sys.executable, "setup.py", "--quiet", "build_emulated"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mutants: the build failed:\n{done.stdout}{done.stderr}")
    return folder / "build" / "emulated" / "librecis_emulated.so"


def failed_tests(library: Path, tests: list[str]) -> str | None:
    """Run tests with a library, and return how they failed; None if all passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=0", *tests]
    environment = {**os.environ, "EMULATED_LIBRARY": str(library), "CI": ""}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT_S} s"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    if done.returncode == 1:
        failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        return failures[0].removeprefix("FAILED ") if failures else "failed"
    if done.returncode:
        sys.exit(f"mutants: pytest could not run the tests (status {done.returncode}):\n{done.stdout}{done.stderr}")
    if "passed" not in done.stdout.splitlines()[-1] or "skipped" in done.stdout.splitlines()[-1]:
        sys.exit(f"mutants: tests were skipped:\n{done.stdout}")
    return None


def is_caught(mutant: Mutant, folder: Path) -> bool:
    """Build a mutant in a copy of the sources, run its tests, restore the copy, and print the result."""
    path, begin = folder / mutant.file, time.monotonic()
    text, times = path.read_text(), (path.stat().st_atime, path.stat().st_mtime)
    if text.count(mutant.old) != 1:
        sys.exit(f"mutants: {mutant.name}: the text to replace occurs {text.count(mutant.old)} times in {mutant.file}")
    objects = [folder / "build" / "emulated" / f"{name}.o" for name in mutant.kernels]
    originals = [(object_, object_.read_bytes(), object_.stat().st_mtime) for object_ in objects]
    path.write_text(text.replace(mutant.old, mutant.new))
    os.utime(path, times)  # a header is no newer than the objects that stay
    for object_ in objects:
        object_.unlink()
    how = failed_tests(build(folder), mutant.tests)
    path.write_text(text)
    os.utime(path, times)
    for object_, content, modified in originals:
        object_.write_bytes(content)
        os.utime(object_, (modified, modified))
    (folder / "build" / "emulated" / "librecis_emulated.so").unlink()
    result, seconds = "survived" if how is None else "caught", time.monotonic() - begin
    print(f"{mutant.name:36} {result:9} {seconds:4.0f} s  {how or ''}", flush=True)
    return how is not None


def main() -> None:
    """Run the mutants of the command line, by default all."""
    names = [mutant.name for mutant in MUTANTS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"mutants to run: {', '.join(names)}")
    chosen = parser.parse_args().names or names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"unknown mutants {', '.join(unknown)}; there are {', '.join(names)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sources(folder)
        if how := failed_tests(build(folder), ALL):
            sys.exit(f"mutants: without a mutant, the tests fail: {how}")
        caught = [is_caught(mutant, folder) for mutant in MUTANTS if mutant.name in chosen]
    print(f"{sum(caught)} of {len(caught)} mutants caught")
    sys.exit(0 if all(caught) else 1)


if __name__ == "__main__":
    main()
