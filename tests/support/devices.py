"""A decorator that runs tests of operators on every device, and edge-case ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.support import emulated

accelerators = [pytest.param("emulated", marks=pytest.mark.emulated), pytest.param("cuda", marks=pytest.mark.gpu)]
"""Devices whose kernels are those of csrc/cuda: the emulated one, and CUDA if there is a GPU."""

on_devices = pytest.mark.parametrize("device", ["cpu", *accelerators])
"""Parametrize a test over the CPU and the accelerators."""

on_dlpack_devices = pytest.mark.parametrize("device", ["cpu", accelerators[-1]])
"""Parametrize a test over the devices that DLPack knows: all but the emulated one."""

on_accelerators = pytest.mark.parametrize("device", accelerators)
"""Parametrize a test over the accelerators."""

EDGE_IDS = [0, -1, 1, -(2**63), 2**63 - 1, 2**32, -(2**32), 2**52 + 1]
"""Ids that other systems reserve, truncate or confuse."""


@contextmanager
def late_streams(device: str, how: int = 1) -> Iterator[None]:
    """Let the streams of the emulated device run as late as they may; ``how`` as in ``emulated.configure``."""
    if device != "emulated":
        yield
        return
    emulated.load()
    with emulated.schedule(late=how):
        yield


@contextmanager
def no_synchronization(device: str) -> Iterator[None]:
    """Fail if the host waits for the accelerator in the block."""
    if device == "emulated":
        emulated.clear_counts()
        yield
        assert emulated.counts()["synchronizations"] == 0
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
