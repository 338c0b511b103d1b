"""Decision whether a test that needs a GPU runs, is skipped, or fails because torch cannot use the machine's GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Machine:
    """The GPUs of a machine.

    Args:
        usable: Number of CUDA devices that torch can use.
        listed: Number of GPUs that the driver lists.
        required: Whether RECIS_REQUIRE_GPU=1 is set.
    """

    usable: int
    listed: int
    required: bool


@dataclass(frozen=True)
class Verdict:
    """Decision about a test: ``action`` is "run", "skip" or "fail", and ``reason`` explains the latter two."""

    action: str
    reason: str = ""


def verdict(needed: int, machine: Machine) -> Verdict:
    """Return the decision about a test that needs ``needed`` GPUs.

    A GPU that torch cannot use is a failure, because skipped tests would hide the problem forever. On a machine with
    fewer GPUs than needed the test is skipped.
    """
    if machine.usable >= needed:
        return Verdict("run")
    if machine.usable == 0 and machine.listed > 0:
        return Verdict("fail", f"the driver lists {machine.listed} GPU(s), but torch {torch.__version__} can use none")
    if machine.usable == 0 and machine.required:
        return Verdict("fail", "RECIS_REQUIRE_GPU=1, but torch sees no CUDA device")
    if machine.usable == 0:
        return Verdict("skip", "no GPU on this machine")
    return Verdict("skip", f"needs {needed} GPUs, this machine has {machine.usable}")


def count_listed(listing: str) -> int:
    """Return the number of GPUs in the output of ``nvidia-smi -L``, with lines "GPU 0: NAME (UUID: ...)"."""
    return sum(line.startswith("GPU ") for line in listing.splitlines())


@cache
def this_machine() -> Machine:
    """Return the GPUs of this machine."""
    listing = ""
    if shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(usable, count_listed(listing), os.environ.get("RECIS_REQUIRE_GPU") == "1")
