"""A decorator that runs tests of operators on every device, and edge-case ids."""

from __future__ import annotations

import pytest

on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
"""Parametrize a test over the CPU and, if there is a GPU, CUDA."""

EDGE_IDS = [0, -1, 1, -(2**63), 2**63 - 1, 2**32, -(2**32), 2**52 + 1]
"""Ids that other systems reserve, truncate or confuse."""
