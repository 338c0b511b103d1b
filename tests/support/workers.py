"""Filters for warnings that tests with DataLoader workers may ignore."""

from __future__ import annotations

import pytest

FORKED = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")
"""If an earlier test has started JAX, it warns about any fork, but workers that read files do not use it."""

FEW_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")
"""torch advises against two workers on one core; these tests do not measure speed."""
