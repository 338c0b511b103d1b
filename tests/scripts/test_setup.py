"""Error messages of setup.py on machines that cannot build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def build(root: Path, torch: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the build up to its first error, with a fake torch."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    environment = {**os.environ, "PYTHONPATH": str(torch), "CXX": "g++", "RECIS_CUDA": "auto", **environment}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def fake_torch(folder: Path, version: str) -> Path:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(f"class version:\n    cuda = None\n\n\n__version__ = {version!r}\n")
    return folder


@pytest.mark.parametrize(
    ("version", "environment", "message"),
    [
        ("2.13.0", {"CXX": "no-such-compiler"}, "the C++ compiler 'no-such-compiler' was not found; install one"),
        ("2.10.1+cpu", {}, "torch 2.10.1+cpu is too old; this library needs torch 2.11 or newer"),
        ("2.13.0", {"RECIS_CUDA": "yes"}, "RECIS_CUDA must be 0, 1 or auto, got 'yes'"),
        (
            "2.13.0",
            {"RECIS_CUDA": "1", "NVCC": "no-such-nvcc"},
            "RECIS_CUDA=1 requests the CUDA library, but no-such-nvcc was not found; put nvcc on PATH, set",
        ),
    ],
)
def test_a_build_that_cannot_start_prints_the_reason_in_one_line(
    root: Path, tmp_path: Path, version: str, environment: dict[str, str], message: str
) -> None:
    done = build(root, fake_torch(tmp_path, version), **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"recis_hybrid: {message}")
