"""Each example, copied to a separate folder and run there: it needs only the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from tests.support.programs import Program

PROGRAMS = [
    "demo.py",
    "frappe.py",
    "jax_led.py",
    "jax_tower.py",
    "jit_lookup.py",
    "minilm.py",
    "online.py",
    "posters.py",
    "two_tower.py",
]


def output_of(root: Path, folder: Path, program: str, *arguments: str) -> str:
    copy = Path(shutil.copy(root / "examples" / program, folder))
    done = Program(copy, arguments, folder=folder).finish(600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def figures_of(output: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


def test_all_examples_are_listed(root: Path) -> None:
    assert sorted(path.name for path in (root / "examples").glob("*.py")) == PROGRAMS


@pytest.mark.jax
@pytest.mark.slow
def test_demo_learns_and_reloads_exactly(root: Path, tmp_path: Path) -> None:
    arguments = ["--rows", "60000", "--epochs", "1", "--batch-size", "512"]
    figures = figures_of(output_of(root, tmp_path, "demo.py", *arguments))
    assert figures["reload_exact"] is True
    assert 0.7 < figures["auc"] < figures["bayes_auc"]
    assert {"logloss", "samples_per_s", "seconds"} <= set(figures)


@pytest.mark.jax
@pytest.mark.slow
@pytest.mark.parametrize(("data", "tower"), [("x1", "torch"), ("strings", "jax")])
def test_frappe_learns_in_one_epoch(root: Path, data_dir: Path, data: str, tower: str, tmp_path: Path) -> None:
    for split, rows in (("train", 60_000), ("valid", 4000), ("test", 12_000)):
        (tmp_path / "data" / split).mkdir(parents=True)
        source = parquet.ParquetDataset(data_dir / "frappe" / data / split).read()
        chosen = np.random.default_rng(0).choice(source.num_rows, rows, replace=False)
        parquet.write_table(source.take(chosen), tmp_path / "data" / split / "part.parquet")
    arguments = ["--data", str(tmp_path / "data"), "--tower", tower, "--run", str(tmp_path / "run")]
    arguments += ["--epochs", "1", "--batch-size", "512", "--quiet"]
    assert figures_of(output_of(root, tmp_path, "frappe.py", *arguments))["auc"] > 0.9
    assert list(tmp_path.glob("run/step_*/manifest.json"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(root: Path, program: str, tmp_path: Path) -> None:
    if program in ("jax_led.py", "jit_lookup.py"):
        pytest.importorskip("jax", reason="jax is not installed (pip install 'recis_hybrid[examples]')")
    if program == "posters.py":
        pytest.importorskip("PIL", reason="Pillow is not installed (pip install 'recis_hybrid[examples]')")
    assert "usage" in output_of(root, tmp_path, program, "--help")


@pytest.mark.jax
def test_jit_lookup_learns_and_saves(root: Path, tmp_path: Path) -> None:
    output = output_of(
        root, tmp_path, "jit_lookup.py", "--rows", "60000", "--epochs", "1", "--save", str(tmp_path / "run")
    )
    figures = figures_of(output)
    assert 0.65 < figures["auc"] < figures["best_auc"]
    assert figures["steps"] == 48
    assert figures["rows_in_tables"] == 2000
    assert list(tmp_path.glob("run/step_*/manifest.json"))
