"""The rehearsal of two hosts, of which one is cut off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_host_that_is_cut_off_ends_the_other_with_an_error(root: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "two_hosts.py"), "--timeout", "3"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] >= 20
    assert found["error_after_s"] < 3 + 5
    assert "the exchange of" in found["said"]


def test_a_machine_that_cannot_make_namespaces_is_told(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "two_hosts.py")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 77
    assert "left out: it needs" in done.stdout
