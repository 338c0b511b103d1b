"""Problems of a machine: one sentence with the remedy for each, never a traceback."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def setup_env(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", root / "scripts" / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(root: Path, subject: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "scripts" / "setup_env.py"), subject]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def executable(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 4), (3, 13, 9), (3, 14, 1)])
def test_supported_pythons(setup_env: ModuleType, version: tuple[int, ...]) -> None:
    assert setup_env.python_fault(version) is None


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 6, 15), (3, 10, 13), (3, 15, 0), (4, 0, 0)])
def test_unsupported_pythons(setup_env: ModuleType, version: tuple[int, ...]) -> None:
    fault = setup_env.python_fault(version)
    assert fault.startswith(f"Python {version[0]}.{version[1]} is not supported")
    assert "3.11 to 3.14" in fault
    assert "PYTHON=" in fault


def test_a_python_without_ensurepip(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup_env.venv_fault((3, 11, 2)) is None
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert "apt-get install python3.11-venv" in setup_env.venv_fault((3, 11, 2))


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0+cpu", "2.13.0a0+git1234", "2.15.0"])
def test_supported_torches(setup_env: ModuleType, version: str) -> None:
    assert setup_env.torch_fault(version) is None


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2.10.0", "torch 2.10.0 in {prefix} is too old"),
        ("1.13.1+cu117", "torch 1.13.1+cu117 in {prefix} is too old"),
        ("2.16.0", "torch 2.16.0 in {prefix} is newer than the supported versions"),
        ("nightly", "torch in {prefix} has the version 'nightly', which cannot be parsed"),
        (None, "torch is not installed in {prefix}"),
    ],
)
def test_unsupported_torches(setup_env: ModuleType, version: str | None, message: str) -> None:
    fault = setup_env.torch_fault(version)
    assert fault.startswith(message.format(prefix=sys.prefix))
    assert "2.11 to 2.15" in fault
    assert 'pip install "torch>=2.11,<2.16"' in fault


def test_all_files_state_the_same_versions(setup_env: ModuleType, root: Path) -> None:
    (low, high), (oldest, newest) = setup_env.PYTHONS, setup_env.TORCHES
    metadata = tomllib.loads((root / "pyproject.toml").read_text())
    project, torch = metadata["project"], f"torch>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"
    assert project["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"
    named = [line for line in project["classifiers"] if line.startswith("Programming Language :: Python :: 3.")]
    assert [line.rpartition(".")[2] for line in named] == [str(minor) for minor in range(low[1], high[1] + 1)]
    assert torch in project["dependencies"]
    assert torch in metadata["build-system"]["requires"]
    setup = (root / "setup.py").read_text()
    assert f"MIN_TORCH = {oldest}" in setup
    assert f"DTORCH_TARGET_VERSION=0x{oldest[0]:02x}{oldest[1]:02x}" in setup
    for name in ("README.md", "CONTRIBUTING.md", "Makefile", ".ci/run"):
        ranges = re.findall(r"3\.\d+ to 3\.\d+", (root / name).read_text())
        assert set(ranges) == {f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"}, name
    tested = re.search(r"python: \[(.*)\]", (root / ".github" / "workflows" / "ci.yml").read_text())
    assert tested is not None
    assert tested[1] == ", ".join(f'"{low[0]}.{minor}"' for minor in range(low[1], high[1] + 1))


def test_the_version_of_the_installed_torch_is_checked(setup_env: ModuleType) -> None:
    assert setup_env.installed_torch() == importlib.metadata.version("torch")


def test_no_compiler(root: Path) -> None:
    done = run(root, "host", CXX="no-such-compiler")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "recis_hybrid: The C++ compiler 'no-such-compiler' was not found; install g++ 10 or newer "
        "(Debian: `apt-get install g++`) or name another one in the environment variable CXX."
    ]


def test_a_compiler_that_is_too_old(root: Path, tmp_path: Path) -> None:
    message = "error: unrecognized command line option -std=c++20"
    done = run(root, "host", CXX=executable(tmp_path / "g++-7", f"echo '{message}' >&2; exit 1"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert "install g++ 10 or newer" in done.stderr


def test_a_machine_without_problems_prints_nothing(root: Path, tmp_path: Path) -> None:
    # The probe is passed on standard input, which the fake compiler must consume.
    done = run(root, "host", CXX=executable(tmp_path / "c++", "cat >/dev/null"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run(root, "torch")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_probe_is_cxx20(setup_env: ModuleType) -> None:
    compiler = os.environ.get("CXX") or "g++"
    assert setup_env.compiler_fault(compiler) is None
    command = [compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input=setup_env.CXX_PROBE, capture_output=True, text=True, check=False)
    assert done.returncode != 0


def test_usage(root: Path) -> None:
    done = run(root, "everything")
    assert (done.returncode, done.stderr) == (2, "usage: setup_env.py host|torch\n")
