"""Runs every fault once; ``make faults`` runs each twenty times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_fault_is_survived(root: Path) -> None:
    # In a separate process, which forks before it has threads.
    command = [sys.executable, "-m", "tests.saver.faults", "--times", "1", "--seed", "ci", "--json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert set(results) == {
        *("kill_in_save", "kill_in_async_save", "kill_in_load", "kill_between_base_and_delta"),
        *("disk_full", "damaged_file", "malicious_manifest", "two_jobs"),
    }
    assert all(result == {"tried": 1, "survived": 1, "failures": []} for result in results.values())
