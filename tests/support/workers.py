"""Warnings that tests which start workers of a DataLoader do not heed."""

from __future__ import annotations

import pytest

FORKED = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")
"""JAX, where a test before has started it, warns of any fork; workers that read files never come near it."""

FEW_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")
"""torch advises against two workers where there is one core; what is tried here is not their speed."""
