"""What all tests share: who runs where, the data folder, hypothesis profiles."""

import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest

from tests.support import gpu

ROOT = Path(__file__).resolve().parents[1]

# No deadline: a shared machine is slow at times, and how fast things are is the benchmarks' business.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what this machine cannot run, and fails what it ought to be able to run."""
    needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
    if needed:
        verdict = gpu.verdict(needed, gpu.this_machine())
        if verdict.action == "fail":
            pytest.fail(verdict.reason, pytrace=False)
        if verdict.action == "skip":
            pytest.skip(verdict.reason)
    if item.get_closest_marker("jax") and importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed (pip install 'recis_hybrid[jax]')")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, shared/data beside the repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the real data sets are not at {path}")
    return path
