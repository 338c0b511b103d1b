import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gpu import Machine, count_listed, verdict


@pytest.mark.parametrize(
    ("needed", "machine", "action"),
    [
        (1, Machine(usable=0, listed=0, required=False), "skip"),
        (1, Machine(usable=0, listed=1, required=False), "fail"),
        (1, Machine(usable=0, listed=0, required=True), "fail"),
        (1, Machine(usable=1, listed=1, required=True), "run"),
        (2, Machine(usable=1, listed=1, required=True), "skip"),
        (2, Machine(usable=2, listed=2, required=False), "run"),
        (2, Machine(usable=0, listed=4, required=False), "fail"),
    ],
)
def test_a_gpu_that_is_there_must_be_usable(needed: int, machine: Machine, action: str) -> None:
    decided = verdict(needed, machine)
    assert decided.action == action
    assert bool(decided.reason) == (action != "run")


def test_gpus_are_counted_in_the_drivers_listing() -> None:
    listing = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA L4\n"
    assert count_listed(listing) == 2
    assert count_listed("No devices were found\n") == 0


@pytest.mark.parametrize(("required", "closing"), [("0", "1 skipped"), ("1", "1 error")])
def test_a_required_gpu_fails_the_run(tmp_path: Path, root: Path, required: str, closing: str) -> None:
    # CUDA_VISIBLE_DEVICES hides a GPU from torch, and an empty PATH hides the driver's tool: no GPU on any machine.
    test = tmp_path / "test_kernel.py"
    test.write_text("import pytest\n\n@pytest.mark.gpu\ndef test_kernel():\n    pass\n")
    environment = os.environ | {"RECIS_REQUIRE_GPU": required, "CUDA_VISIBLE_DEVICES": "", "PATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-c", str(root / "pyproject.toml"), "-p", "tests.conftest"]
    command += ["-p", "no:cacheprovider", str(test)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert closing in done.stdout, done.stdout + done.stderr
    assert done.returncode == int(required)
    assert ("RECIS_REQUIRE_GPU=1" in done.stdout) == (required == "1")
