"""A decorator that runs tests of operators on every device, and edge-case ids."""

from __future__ import annotations

import pytest

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
