"""A small click log and its configuration, for tests of the commands."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLUMNS: dict[str, Callable[[int], Any]] = {
    "user": lambda row: row % 7,
    "site": lambda row: f"s{row % 3}",
    "price": lambda row: row % 5 + 0.5,
    "label": lambda row: random.Random(row).randrange(2),
}


def write_csv(path: Path, columns: dict[str, Callable[[int], Any]] | None = None, rows: int = 64) -> None:
    """Write a file whose cells are functions of the row index."""
    columns = columns or COLUMNS
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([[cell(row) for cell in columns.values()] for row in range(rows)])


def small_config(folder: Path, **changes: Any) -> Path:
    """Write train.csv (64 rows, 4 batches), eval.csv (40 rows) and a configuration; return its path."""
    write_csv(folder / "train.csv")
    write_csv(folder / "eval.csv", rows=40)
    config = {
        "run": "run",
        "data": {"train": "train.csv", "evaluate": "eval.csv", "batch_size": 16},
        "features": {"user": {"dim": 4}, "site": {"ops": [{"hash": {"kind": "farm"}}], "dim": 4}, "price": {}},
        "model": {"hidden": [4], "dropout": 0.1},
        "optimizer": {"sparse": "sgd", "sparse_lr": 0.1, "dense_lr": 0.01},
        "train": {"log_every": 1},
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path
