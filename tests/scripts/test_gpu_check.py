"""scripts/gpu_check.sh on a fake machine: its table must report the actual results."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu

PASSED = "===== 12 passed, 3 deselected in 4.56s ====="
TOTAL = 540
STEPS = ["device", "build", "tests", "memcheck", "racecheck", "benchmark"]
# A part of the command line of each step.
COMMANDS = {
    "device": "get_device_properties",
    "build": "setup.py",
    "tests": "-m pytest -m gpu",
    "memcheck": "--tool memcheck",
    "racecheck": "--tool racecheck",
    "benchmark": "-m benchmarks.gpu",
}


def benchmark(values: dict[str, float]) -> str:
    """Return a command that prints what the benchmark prints for these figures."""
    run = gpu.Run("cuda", tiny=False)
    lines = [run.line(gpu.Measured(case, value, "64 ids"), "NVIDIA Something") for case, value in values.items()]
    return f"echo '{{\"bench\": \"gpu\"}}'; echo '{gpu.markdown(lines)}' >&2"


REACHED = {case: target.must for case, target in gpu.TARGETS.items()}


class Machine:
    """A folder with the scripts, a PATH of fake commands, and a fake Python that runs a script for each step."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        shutil.copytree(root / "scripts", folder / "scripts")
        (folder / "recis_hybrid" / "lib").mkdir(parents=True)
        self.command("nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
        self.command("compute-sanitizer", 'tool="$*"; while [ "$1" != python ]; do shift; done; TOOL=$tool exec "$@"')
        self.limits = folder / "limits"
        self.limit("nothing")
        self.missing = ""
        self.has_xdist = True
        self.steps = {
            "device": "echo 'NVIDIA Something, sm_90, 80 GiB; torch 2.11.0, CUDA 13.0'",
            "build": 'touch recis_hybrid/lib/librecis_cuda.so; echo "$RECIS_CUDA $RECIS_CUDA_ARCHS $NVCC"',
            "tests": f"echo '{PASSED}'",
            "memcheck": f"echo '{PASSED}'",
            "racecheck": f"echo '{PASSED}'",
            "benchmark": benchmark(REACHED),
        }

    def command(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def limit(self, hanging: str) -> None:
        """Write down the time limits, and let that of the commands with a text pass quickly."""
        timeout = shutil.which("timeout")
        self.command(
            "timeout",
            f"""echo "$3" >> {self.limits}
case "$*" in
  *"{hanging}"*) exec {timeout} -k 1 0.5 "${{@:4}}" ;;
  *) exec {timeout} "$@" ;;
esac""",
        )

    def check(self) -> tuple[int, dict[str, tuple[str, str]]]:
        """Run the script and return its exit status and its table: (result, detail) by step or case."""
        steps = self.steps
        self.command(
            "python",
            f"""case "${{TOOL:-}} $*" in
  *get_device_properties*) {steps["device"]} ;;
  *find_spec*) echo "{self.missing}" ;;
  *"import xdist"*) exit {1 - self.has_xdist} ;;
  *" setup.py "*) {steps["build"]} ;;
  *"--tool memcheck "*" -m pytest -m gpu "*tests/ops/*) {steps["memcheck"]} ;;
  *"--tool racecheck "*" -m pytest -m gpu "*tests/ops/*) {steps["racecheck"]} ;;
  " -m pytest -m gpu"*) {steps["tests"]} ;;
  *" -m benchmarks.gpu --time-limit "*) {steps["benchmark"]} ;;
  *) echo "unexpected: $*"; exit 99 ;;
esac""",
        )
        environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "PYTHON": "python", "HOME": os.environ.get("HOME", "/")}
        done = subprocess.run(
            ["bash", str(self.folder / "scripts" / "gpu_check.sh")],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = done.stdout.splitlines()
        begin = max(number for number, line in enumerate(lines) if line.startswith("step or case "))
        table = {}
        for line in lines[begin + 1 : -1]:
            table[line[:24].strip()] = (line[25:36].strip(), line[45:].strip())
        assert list(table)[: len(STEPS)] == STEPS
        return done.returncode, table


@pytest.fixture
def machine(root: Path, tmp_path: Path) -> Machine:
    return Machine(root, tmp_path)


def test_a_passing_check(machine: Machine) -> None:
    status, table = machine.check()
    assert status == 0
    assert [table[step][0] for step in STEPS] == ["passed"] * len(STEPS)
    assert table["device"][1].startswith("NVIDIA Something")
    assert table["build"][1] == "release 13.0, sm_90, recis_hybrid/lib/librecis_cuda.so"
    assert table["tests"][1] == table["memcheck"][1] == "12 passed, 3 deselected in 4.56s"
    assert table["benchmark"][1] == "1 cases"
    logs = machine.folder / "build" / "gpu_check"
    assert (logs / "tests.log").read_text() == PASSED + "\n"
    assert (logs / "build.log").read_text() == f"1 90 {machine.bin}/nvcc\n"


def test_the_table_has_the_cases_of_the_benchmark(machine: Machine) -> None:
    missed = {**REACHED, "step/uniform": 1.45, "find/0.5/uniform": 4.5}
    del missed["hybrid/JAX tower"]
    machine.steps["benchmark"] = benchmark(missed)
    status, table = machine.check()
    assert status == 1
    assert list(table)[len(STEPS) :] == list(gpu.TARGETS)
    assert table["step/uniform"] == ("missed", "1.45 ms, must 1.3, aim 0.9; 64 ids")
    assert table["find/0.5/uniform"] == ("aim", "4.5 G ids/s, must 2, aim 4; 64 ids")
    assert table["hybrid/JAX tower"] == ("not yet run", "must 1.1, aim 1.03")
    assert table["host/zipf"][0] == "must"


@pytest.mark.parametrize(("has_xdist", "options"), [(True, " --numprocesses=4 --dist=loadfile"), (False, "")])
def test_tests_run_in_several_processes_if_they_can(machine: Machine, has_xdist: bool, options: str) -> None:
    machine.has_xdist = has_xdist
    machine.steps["tests"] = f'echo "$*"; echo "{PASSED}"'
    assert machine.check()[0] == 0
    command = (machine.folder / "build" / "gpu_check" / "tests.log").read_text().splitlines()[0]
    assert command.endswith(f"--continue-on-collection-errors{options}")


def test_a_missing_gpu_fails(machine: Machine) -> None:
    machine.steps["device"] = "echo 'torch 2.13.0+cpu sees no CUDA device' >&2; exit 1"
    status, table = machine.check()
    assert status == 1
    assert table.pop("device") == ("failed", "torch 2.13.0+cpu sees no CUDA device")
    assert {result for result, _ in table.values()} == {"not run"}


@pytest.mark.parametrize(
    ("step", "script", "detail"),
    [
        ("tests", "echo '== 1 failed, 11 passed in 4.56s =='; exit 1", "1 failed, 11 passed in 4.56s (exit status 1)"),
        ("tests", "echo '== 12 skipped in 4.56s =='", "12 skipped in 4.56s (exit status 0)"),
        ("tests", "echo '== 15 deselected in 0.56s =='; exit 5", "15 deselected in 0.56s (exit status 5)"),
        ("tests", "echo 'Segmentation fault'; exit 139", "no test ran (exit status 139)"),
        ("tests", "kill -9 $$", "no test ran (exit status 137)"),
        ("memcheck", f"echo '{PASSED}'; exit 86", "12 passed, 3 deselected in 4.56s (exit status 86)"),
        ("racecheck", f"echo '{PASSED}'; exit 86", "12 passed, 3 deselected in 4.56s (exit status 86)"),
        ("benchmark", "echo 'no case'", "0 cases (exit status 0)"),
        ("benchmark", f"{benchmark(REACHED)}; exit 1", "1 cases (exit status 1)"),
    ],
)
def test_a_failed_step_is_reported_and_the_other_steps_run(
    machine: Machine, step: str, script: str, detail: str
) -> None:
    machine.steps[step] = script
    status, table = machine.check()
    assert status == 1
    assert table.pop(step) == ("failed", detail)
    assert {table[other][0] for other in STEPS if other != step} == {"passed"}


@pytest.mark.parametrize(
    ("step", "detail"),
    [
        ("tests", "timed out after 110 s, at 37%"),
        ("memcheck", "timed out after 65 s, at 37%"),
        ("benchmark", "1 cases"),
    ],
)
def test_a_step_that_hangs_is_ended_and_the_other_steps_run(machine: Machine, step: str, detail: str) -> None:
    machine.limit(COMMANDS[step])
    machine.steps[step] = "echo '..... [ 37%]'; echo '{\"bench\": \"gpu\"}'; sleep 60"
    status, table = machine.check()
    result, found = table.pop(step)
    assert (status, result) == (1, "failed")
    assert found.startswith("timed out after ")
    assert found.endswith(detail)
    assert {table[other][0] for other in STEPS if other != step} == {"passed"}


def test_a_build_that_hangs_stops_the_other_steps(machine: Machine) -> None:
    machine.limit(COMMANDS["build"])
    machine.steps["build"] = "sleep 60"
    status, table = machine.check()
    assert status == 1
    assert table["build"] == ("failed", "timed out after 150 s")
    assert table["tests"][0] == table["benchmark"][0] == "not run"


def test_the_time_limits_end_the_check_in_nine_minutes(machine: Machine) -> None:
    machine.check()
    *before, last = map(int, machine.limits.read_text().split())
    assert len(before) == len(STEPS) - 1
    grace = 5
    assert last <= TOTAL - grace
    assert TOTAL - sum(before) - grace * len(STEPS) >= 110


def test_a_failed_build_stops_the_other_steps(machine: Machine) -> None:
    machine.steps["build"] = "echo 'blocks.cu(12): error: expected a declaration'; exit 1"
    status, table = machine.check()
    assert status == 1
    assert table["build"] == ("failed", "blocks.cu(12): error: expected a declaration")
    assert {table[step][0] for step in STEPS[2:]} == {"not run"}


def test_tests_without_pytest_are_absent_and_the_benchmark_runs(machine: Machine) -> None:
    machine.missing = "pytest and no hypothesis"
    status, table = machine.check()
    assert status == 1
    for step in ("tests", "memcheck", "racecheck"):
        assert table[step] == ("absent", "python has no pytest and no hypothesis")
    assert table["benchmark"][0] == "passed"


def test_a_case_that_failed_fails_the_check(machine: Machine) -> None:
    lines = [gpu.TARGETS["find/0.5/zipf"].line(None, "failed", detail="RuntimeError: CUDA: out of memory")]
    machine.steps["benchmark"] = f"echo '{{\"bench\": \"gpu\"}}'; echo '{gpu.markdown(lines)}'; exit 1"
    status, table = machine.check()
    assert status == 1
    assert table["find/0.5/zipf"] == ("failed", "must 2, aim 4; RuntimeError: CUDA: out of memory")


@pytest.mark.skipif(
    shutil.which("compute-sanitizer", path="/usr/bin:/bin:/usr/local/cuda/bin") is not None,
    reason="the fake PATH cannot hide a real compute-sanitizer",
)
def test_a_missing_sanitizer_fails(machine: Machine) -> None:
    (machine.bin / "compute-sanitizer").unlink()
    status, table = machine.check()
    assert status == 1
    assert table["memcheck"][0] == table["racecheck"][0] == "absent"
    assert table["benchmark"][0] == "passed"
