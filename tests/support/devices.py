"""One decorator for tests of operators: on every device."""

from __future__ import annotations

import pytest

on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
"""Runs a test on the CPU, and on CUDA where there is one."""

EDGE_IDS = [0, -1, 1, -(2**63), 2**63 - 1, 2**32, -(2**32), 2**52 + 1]
"""Ids that other systems reserve, cut or mistake for something else."""
