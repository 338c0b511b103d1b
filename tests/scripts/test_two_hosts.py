"""The loss of one of two hosts during training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_loss_of_a_host_raises_on_the_other(root: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "two_hosts.py"), "--timeout", "12"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] >= 20
    assert "the exchange of" in result["message"]


def test_a_machine_without_namespaces_is_skipped_with_a_message(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "two_hosts.py")]
    done = subprocess.run(
        command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 77
    assert "skipped: " in done.stdout
