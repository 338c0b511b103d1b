"""Shared setup: markers, the sample of ``make test-quick``, the data folder, hypothesis profiles."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.support import emulated, gpu
from tests.support.quick import cross_section

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("sample", "quick")
"""The property, in test reports, of the tests of the sample; processes of pytest-xdist report it, too."""

MOST_BYTES = pytest.StashKey[int]()
"""Bytes of memory beyond which the process frees some after a module."""

# No deadline, because a shared machine may be slow; benchmarks measure speed.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="run a sample of the tests, in at most a fifth of the time")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of the sample, and deselect all other tests with --quick."""
    kept = cross_section(items, lambda item: item.nodeid, lambda item: {mark.name for mark in item.iter_markers()})
    for item in kept:
        item.user_properties.append(QUICK)
    if emulated.is_usable() and any(item.get_closest_marker("emulated") for item in items):
        emulated.load()
    if config.getoption("quick"):
        config.hook.pytest_deselected(items=[item for item in items if QUICK not in item.user_properties])
        items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Report, after a full run, the share of its time that ``make test-quick`` would take."""
    reports = [each for kind in terminalreporter.stats.values() for each in kind if isinstance(each, pytest.TestReport)]
    total = sum(report.duration for report in reports)
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS or config.getoption("quick") or not total:
        return
    sample = [report for report in reports if QUICK in map(tuple, report.user_properties)]
    share = sum(report.duration for report in sample) / total
    count = len({report.nodeid for report in sample})
    terminalreporter.write_line(f"`make test-quick` would run {count} of these tests in {share:.0%} of this time")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that this machine cannot run, and fail those that it should but cannot run."""
    needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
    if needed:
        verdict = gpu.verdict(needed, gpu.this_machine())
        if verdict.action == "fail":
            pytest.fail(verdict.reason, pytrace=False)
        if verdict.action == "skip":
            pytest.skip(verdict.reason)
    if item.get_closest_marker("emulated") and (reason := emulated.reason_to_skip()):
        # CI builds the device first.
        (pytest.fail if os.environ.get("CI") and not emulated.LIBRARY.exists() else pytest.skip)(reason)
    if item.get_closest_marker("jax") and importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed (pip install 'recis_hybrid[jax]')")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Seed torch, so that a test draws the same numbers alone, after other tests, and in any process of pytest-xdist.

    Tests draw from generators of their own with numpy and ``random``.
    """
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_freed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Free what JAX has compiled, and what the C library keeps, beyond 2 GiB, and whenever 1 GiB has been added.

    Otherwise a process that runs half of the tests grows to 4 GB.
    """
    yield
    if "jax" in sys.modules and _resident_bytes() > request.config.stash.setdefault(MOST_BYTES, 2 << 30):
        sys.modules["jax"].clear_caches()
        ctypes.CDLL(None).malloc_trim(0)
        request.config.stash[MOST_BYTES] = max(2 << 30, _resident_bytes() + (1 << 30))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real datasets, shared/data next to the repository."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"there are no real datasets in {path}")
    return path


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Share compiled programs between the tests of a module, if compiling takes nearly all of their time."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield


@pytest.fixture(scope="module")
def compiled_fast() -> Iterator[None]:
    """Compile without most optimizations, in a module whose tests compare the results of programs of small arrays."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """Yield the address of an S3 server."""
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed (pip install 'recis_hybrid[test]')")
    started = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    started.start()
    host, port = started.get_host_and_port()
    yield f"{host}:{port}"
    started.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Return the URL of an empty directory in a bucket."""
    from pyarrow.fs import S3FileSystem

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mine")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem(endpoint_override=s3_server, scheme="http", region="us-east-1", allow_bucket_creation=True).create_dir(
        "bucket"
    )
    name = request.function.__name__
    return f"s3://bucket/{name}?endpoint_override={s3_server}&scheme=http&region=us-east-1"
