"""What becomes of a test that needs a GPU: it runs, it is skipped, or it fails because a GPU is there but unusable."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Machine:
    """What is known of the GPUs of this machine.

    Args:
        usable: CUDA devices that torch can use.
        listed: GPUs that the driver lists.
        required: Whether RECIS_REQUIRE_GPU=1 says that there has to be one.
    """

    usable: int
    listed: int
    required: bool


@dataclass(frozen=True)
class Verdict:
    """``action`` is "run", "skip" or "fail"; ``reason`` says why it does not run."""

    action: str
    reason: str = ""


def verdict(needed: int, machine: Machine) -> Verdict:
    """Decides about a test that needs ``needed`` GPUs.

    A machine with a GPU on which GPU tests are skipped would look healthy for ever, so there a GPU that torch cannot
    use is a failure. A machine with fewer GPUs than a test of several asks for is no fault of its own.
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
    """Count the GPUs in what ``nvidia-smi -L`` printed, one a line: "GPU 0: NAME (UUID: ...)"."""
    return sum(line.startswith("GPU ") for line in listing.splitlines())


@cache
def this_machine() -> Machine:
    """Return what is known of this machine."""
    listing = ""
    if shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(usable, count_listed(listing), os.environ.get("RECIS_REQUIRE_GPU") == "1")
