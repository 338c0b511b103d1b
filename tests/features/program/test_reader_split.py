"""The split of features into those that readers compute in their threads and the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.features import Feature, FeatureEngine, Hash, Mod, MultiHash, Truncate
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.features import assert_same


class Double:
    def __init__(self, in_reader: bool) -> None:
        self.in_reader = in_reader

    def fault(self) -> str | None:
        return None

    def kernel(self) -> Any:
        return lambda column: column._replace(values=column.values * 2)


def batch() -> Batch:
    return {
        "user": RaggedTensor.from_strings(["ann", "bob"]),
        "item": torch.tensor([5, 6]),
        "clicks": RaggedTensor.from_lists([[1, 2, 3], [4]]),
        "label": torch.tensor([0.0, 1.0]),
    }


def features(in_reader: bool) -> list[Feature]:
    double = Double(in_reader)
    return [
        Feature("item_double", ops=[double, Mod(7)], source="item"),
        Feature("user", ops=[Hash(), MultiHash([100, 200])]),
        Feature("clicks", ops=[Truncate(2)]),
        Feature("item", ops=[Hash(), Mod(9)]),
    ]


@pytest.mark.parametrize("in_reader", [True, False])
def test_both_parts_together_equal_the_whole_engine(in_reader: bool) -> None:
    engine = FeatureEngine(features(in_reader))
    reading, remaining = engine.reading_part(), engine.remaining_part()
    assert_same(remaining(reading(batch())), engine(batch()))
    names = [feature.name for feature in reading.features]
    # ``item`` would replace a column that the custom operation still has to read.
    assert names == (["item_double", "user", "clicks", "item"] if in_reader else ["user", "clicks"])


def test_both_parts_keep_the_columns_of_the_whole_engine() -> None:
    double = Double(False)
    for others in ([], [Feature("y", ops=[double], source="item")]):
        engine = FeatureEngine([Feature("x", ops=[Mod(3)], source="item"), *others], keep=["item"])
        both = engine.remaining_part()(engine.reading_part()(batch()))
        assert_same(both, engine(batch()))
        assert "item" in both


@pytest.mark.parametrize("in_reader", [True, False])
def test_a_compound_operation_runs_where_its_parts_do(in_reader: bool) -> None:
    class Twice:
        def fault(self) -> str | None:
            return None

        def expand(self) -> Any:
            return [[Mod(100), Double(in_reader)]]

    twice: Any = Twice()
    names = [f.name for f in FeatureEngine([Feature("z", ops=[twice], source="item")]).reading_part().features]
    assert names == (["z"] if in_reader else [])


def test_a_reader_runs_its_part_in_its_threads(tmp_path: Path) -> None:
    table = pa.table(
        {"user": ["ann", "bob", "cy"], "item": [5, 6, 7], "clicks": [[1, 2, 3], [], [4]], "label": [0.0, 1.0, 1.0]}
    )
    pq.write_table(table, tmp_path / "log.parquet")
    engine = FeatureEngine(features(False))
    read = list(ColumnDataset(tmp_path, ["user", "item", "clicks", "label"], 3, transforms=engine.reading_part()))
    whole = list(ColumnDataset(tmp_path, ["user", "item", "clicks", "label"], 3))
    for part, raw in zip(read, whole, strict=True):
        assert_same(engine.remaining_part()(part), engine(raw))
