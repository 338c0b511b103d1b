"""scripts/gpu_check.sh on a fake machine: its table must report the actual results."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PASSED = "===== 12 passed, 3 deselected in 4.56s ====="
CASE = '{"bench": "embedding", "case": "65k/d64/adam"}'


class Machine:
    """A folder with the scripts, a PATH of fake commands, and a fake Python that runs a script for each step."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        shutil.copytree(root / "scripts", folder / "scripts")
        (folder / "recis_hybrid" / "lib").mkdir(parents=True)
        self.command("nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
        self.command("compute-sanitizer", 'while [ "$1" != python ]; do shift; done; SANITIZED=1 exec "$@"')
        self.steps = {
            "device": "echo 'NVIDIA Something, sm_90, 80 GiB; torch 2.11.0, CUDA 13.0'",
            "build": "touch recis_hybrid/lib/librecis_cuda.so",
            "tests": f"echo '{PASSED}'",
            "sanitizer": f"echo '{PASSED}'",
            "benchmark": f"echo '{CASE}'",
        }

    def command(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def check(self) -> tuple[int, dict[str, tuple[str, str]]]:
        """Run the script and return its exit status and its table: (result, detail) by step."""
        steps = self.steps
        self.command(
            "python",
            f"""case "${{SANITIZED:-}} $*" in
  *" -c "*) {steps["device"]} ;;
  *" setup.py "*) {steps["build"]} ;;
  "1 -m pytest tests/ops -m gpu"*) {steps["sanitizer"]} ;;
  " -m pytest -m gpu"*) {steps["tests"]} ;;
  *" benchmarks/embedding.py --device cuda --quick") {steps["benchmark"]} ;;
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
        begin = max(number for number, line in enumerate(lines) if line.split()[:2] == ["step", "result"])
        table = {}
        for line in lines[begin + 1 : -1]:
            table[line[:12].strip()] = (line[13:21].strip(), line[30:].strip())
        assert list(table) == ["device", "build", "tests", "sanitizer", "benchmark"]
        return done.returncode, table


@pytest.fixture
def machine(root: Path, tmp_path: Path) -> Machine:
    return Machine(root, tmp_path)


def test_a_passing_check(machine: Machine) -> None:
    status, table = machine.check()
    assert status == 0
    assert {result for result, _ in table.values()} == {"passed"}
    assert table["device"][1].startswith("NVIDIA Something")
    assert table["build"][1] == "release 13.0, recis_hybrid/lib/librecis_cuda.so"
    assert table["tests"][1] == table["sanitizer"][1] == "12 passed, 3 deselected in 4.56s"
    assert table["benchmark"][1] == "1 cases"
    assert (machine.folder / "build" / "gpu_check" / "tests.log").read_text() == PASSED + "\n"


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
        ("sanitizer", f"echo '{PASSED}'; exit 86", "12 passed, 3 deselected in 4.56s (exit status 86)"),
        ("benchmark", "echo 'no case'", "0 cases (exit status 0)"),
        ("benchmark", f"echo '{CASE}'; exit 1", "1 cases (exit status 1)"),
    ],
)
def test_a_failed_step_is_reported_and_the_other_steps_run(
    machine: Machine, step: str, script: str, detail: str
) -> None:
    machine.steps[step] = script
    status, table = machine.check()
    assert status == 1
    assert table.pop(step) == ("failed", detail)
    assert {result for result, _ in table.values()} == {"passed"}


def test_a_failed_build_stops_the_other_steps(machine: Machine) -> None:
    machine.steps["build"] = "echo 'blocks.cu(12): error: expected a declaration'; exit 1"
    status, table = machine.check()
    assert status == 1
    assert table["build"] == ("failed", "blocks.cu(12): error: expected a declaration")
    assert table["tests"][0] == table["sanitizer"][0] == table["benchmark"][0] == "not run"


@pytest.mark.skipif(
    shutil.which("compute-sanitizer", path="/usr/bin:/bin:/usr/local/cuda/bin") is not None,
    reason="the fake PATH cannot hide a real compute-sanitizer",
)
def test_a_missing_sanitizer_fails(machine: Machine) -> None:
    (machine.bin / "compute-sanitizer").unlink()
    status, table = machine.check()
    assert status == 1
    assert table["sanitizer"][0] == "absent"
    assert table["benchmark"][0] == "passed"
