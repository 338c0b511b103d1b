"""Tables with updates, compared with dictionaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recis_hybrid.checkpointing import PartState, TableState
from recis_hybrid.saver.actions.write import CapturedPart, publish
from recis_hybrid.saver.export import exported_tables
from recis_hybrid.serving import Reader, bucket_of
from recis_hybrid.serving.files import Tensor
from recis_hybrid.serving.tables import IndexedTable
from recis_hybrid.serving.updates.overlay import Level, UpdatedTable, merged

DIM = 5


def state_of(rows: dict[int, Any]) -> TableState:
    ids = torch.tensor(list(rows), dtype=torch.int64)
    vectors = torch.tensor(np.array(list(rows.values()), np.float32).reshape(len(rows), DIM))
    buckets = torch.from_numpy(bucket_of(ids.numpy()))
    return TableState({"ids": ids, "embedding": vectors}, buckets, {"dim": DIM, "dtype": "float32"})


def table_of(folder: Path, rows: dict[int, Any], dtype: str) -> IndexedTable:
    tables, _ = exported_tables({"t": state_of(rows)}, dtype)
    publish(folder, 1, {"engine": CapturedPart("saveable", lambda: PartState(tables))})
    return IndexedTable(Reader(folder).table("t"))


def level_of(rows: dict[int, Any], removed: set[int], dtype: str) -> Level:
    tables, _ = exported_tables({"t": state_of(rows | dict.fromkeys(removed, np.zeros(DIM)))}, dtype)
    state = tables["t"]
    ids = state.columns["ids"].numpy()
    order = np.argsort(ids)
    columns = {}
    for name, column in state.columns.items():
        if name != "ids":
            is_bfloat16 = column.dtype == torch.bfloat16
            values = (column.view(torch.uint16) if is_bfloat16 else column).numpy()
            columns[name] = Tensor(values[order], is_bfloat16)
    return Level(ids[order], columns, ~np.isin(ids[order], sorted(removed)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("base", [0, 1, 3000])
def test_many_updates_yield_the_rows_of_a_dictionary(tmp_path: Path, dtype: str, base: int) -> None:
    random = np.random.default_rng(base)
    every = np.concatenate([random.integers(-(2**63), 2**63, 5000), [-1, 0, 2**63 - 1, -(2**63)]])

    def rows_of(count: int) -> dict[int, Any]:
        chosen = random.choice(every, min(count, len(every)), replace=False)
        return {int(each): random.normal(size=DIM).astype(np.float32) for each in chosen}

    expected = rows_of(base)
    indexed = table_of(tmp_path / "0", expected, dtype)
    table, first = UpdatedTable(indexed.table, indexed), UpdatedTable(indexed.table, indexed)
    before = first.read(every)
    folded = False
    for number in range(60):
        rows = rows_of(int(random.integers(0, 120)))
        removed = {int(each) for each in random.choice(every, 20)} - rows.keys()
        table = table.updated(level_of(rows, removed, dtype))
        expected = {each: row for each, row in (expected | rows).items() if each not in removed}
        # Each level is at least twice the next, and together they are at most half of the base.
        sizes = table.levels
        assert all(a >= 2 * b for a, b in zip(sizes, sizes[1:], strict=False))
        folded |= number > 0 and not sizes
        if number % 10 == 9:
            vectors, exists = table.read(every)
            assert {int(each) for each in every[exists]} == expected.keys()
            whole = table_of(tmp_path / str(number), expected, dtype)
            assert np.array_equal(vectors[exists], whole.read(every)[0][exists])
            for id, vector, has_row in zip(every.tolist(), vectors, exists, strict=True):
                for one in (table.read_one(id), whole.read_one(id)):
                    assert (one is not None) == has_row
                    assert one is None or (one.dtype == np.float32 and np.array_equal(one, vector[None]))
    assert folded
    # Earlier versions are as they were.
    after = first.read(every)
    assert np.array_equal(before[1], after[1])
    assert np.array_equal(before[0][before[1]], after[0][after[1]])


def test_memory_is_bounded_by_the_changed_rows(tmp_path: Path) -> None:
    rows = {each: np.full(DIM, each) for each in range(10_000)}
    indexed = table_of(tmp_path, rows, "float32")
    table = UpdatedTable(indexed.table, indexed)
    for number in range(200):
        hot = {each: np.full(DIM, number) for each in range(number % 7, 1000, 7)}
        table = table.updated(level_of(hot, set(), "float32"))
        assert sum(table.levels) <= 3 * 1000  # the same thousand rows again and again
    assert np.array_equal(table.read(np.arange(1000, 1002))[0][:, 0], [1000, 1001])


def test_an_empty_update_and_no_ids(tmp_path: Path) -> None:
    indexed = table_of(tmp_path, {7: np.ones(DIM)}, "float32")
    table = UpdatedTable(indexed.table, indexed).updated(level_of({}, set(), "float32"))
    vectors, exists = table.read(np.array([7, 8]))
    assert exists.tolist() == [True, False]
    assert vectors[0].tolist() == [1.0] * DIM
    vectors, exists = table.read(np.empty(0, np.int64))
    assert vectors.shape == (0, DIM)
    assert exists.shape == (0,)


def test_newer_rows_replace_older_ones() -> None:
    older = level_of({1: np.ones(DIM), 2: np.ones(DIM)}, {3}, "float32")
    newer = level_of({3: np.zeros(DIM)}, {2}, "float32")
    both = merged(older, newer)
    assert both.ids.tolist() == [1, 2, 3]
    assert both.exists.tolist() == [True, False, True]
    assert both.columns["embedding"].values[[0, 2], 0].tolist() == [1.0, 0.0]
