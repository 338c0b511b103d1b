"""A model with the interface of a bundle: its scores are sums, so that tests know them."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recis_hybrid.serving.columns import InputColumn, Rows, read_column
from recis_hybrid.serving.errors import InputError, ServingError


class SumModel:
    """Scores ``user + sum(items) + len(text)`` of each row, times ``factor``; refuses negative users at run time."""

    inputs = (
        InputColumn(name="user", dtype="int64"),
        InputColumn(name="items", dtype="int64", levels=1),
        InputColumn(name="text", dtype="string", default=""),
        InputColumn(name="price", dtype="float32", length=2),
    )
    outputs = ("score", "pair")
    output_shapes: ClassVar[Mapping[str, tuple[int, ...]]] = {"score": (), "pair": (2,)}

    def __init__(self, path: Path) -> None:
        folder = max(path.glob("step_*"))
        document = json.loads((folder / "manifest.json").read_text())
        if "factor" not in document:
            raise ServingError(f"{folder}: is damaged.")
        self.factor = document["factor"]
        self.step = int(folder.name.removeprefix("step_"))
        self.digest = f"digest of {self.factor}"
        self.path = folder
        self.runs: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def check(self, columns: Mapping[str, Any]) -> Rows:
        known = {column.name for column in self.inputs}
        for name in columns:
            if name not in known:
                raise InputError(f"there is no column {name!r}")
        for name in known:
            if name not in columns:
                raise InputError(f"column {name!r} is missing")
        read = {column.name: read_column(column, columns[column.name]) for column in self.inputs}
        rows = {column.rows for column in read.values()}
        if len(rows) != 1:
            raise InputError("unequal numbers of rows")
        return Rows(read, rows.pop())

    def run(self, rows: Rows) -> dict[str, Any]:
        self.entered.release()
        assert self.gate.wait(60)
        self.runs.append(rows.rows)
        user, items, text, price = (rows.columns[column.name] for column in self.inputs)
        if (user.values < 0).any():
            raise InputError("column 'user': must not be negative")
        if (user.values == 13).any():
            raise RuntimeError("a fault of the model")
        assert items.offsets is not None
        assert text.offsets is not None
        sums = np.concatenate([[0], np.cumsum(items.values)])[items.offsets]
        score = (user.values + np.diff(sums) + np.diff(text.offsets)).astype(np.float32) * self.factor
        return {"score": score, "pair": price.values * np.float32(self.factor)}


class SumSource:
    """The newest model of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.bundle = SumModel(folder)

    def poll(self) -> SumModel | None:
        newest = SumModel(self._folder)
        if newest.digest == self.bundle.digest:
            return None
        self.bundle = newest
        return newest


def write_model(folder: Path, step: int, factor: float | None) -> None:
    """Write a model; without a factor it is damaged."""
    place = folder / f"step_{step:06d}"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(json.dumps({} if factor is None else {"factor": factor}))
