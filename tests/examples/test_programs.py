"""The examples, run as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(root: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


@pytest.mark.jax
@pytest.mark.slow
def test_demo_learns_and_reloads_exactly(root: Path) -> None:
    figures = run(root, "examples/demo.py", "--rows", "60000", "--epochs", "1", "--batch-size", "512")
    assert figures["reload_exact"] is True
    assert 0.7 < figures["auc"] < figures["bayes_auc"]
    assert {"logloss", "samples_per_s", "seconds"} <= set(figures)


@pytest.mark.jax
@pytest.mark.slow
@pytest.mark.parametrize(("folder", "tower"), [("x1", "torch"), ("strings", "jax")])
def test_frappe_learns_in_one_epoch(root: Path, data_dir: Path, folder: str, tower: str, tmp_path: Path) -> None:
    figures = run(
        root,
        "examples/frappe.py",
        "--data",
        str(data_dir / "frappe" / folder),
        "--tower",
        tower,
        "--epochs",
        "1",
        "--batch-size",
        "1024",
        "--quiet",
        "--run",
        str(tmp_path),
    )
    assert figures["auc"] > 0.93
    assert list(tmp_path.glob("step_*/manifest.json"))


@pytest.mark.parametrize("program", ["demo.py", "frappe.py", "ctr_log.py", "jax_led.py", "jax_tower.py"])
def test_help(root: Path, program: str) -> None:
    done = subprocess.run(
        [sys.executable, f"examples/{program}", "--help"], cwd=root, capture_output=True, text=True, check=True
    )
    assert "usage" in done.stdout
