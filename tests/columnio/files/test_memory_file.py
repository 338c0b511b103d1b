"""In-memory data: every kind of table is read, shuffled, shared, filtered and resumed like a file."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from recis_hybrid.columnio import Column, ColumnDataset, Dense, Ragged, ReadOptions, ShardOptions, Text
from recis_hybrid.ragged import RaggedTensor
from tests.support.columns import dense
from tests.support.workers import FEW_CORES, FORKED

ROWS = 53


def table() -> Any:
    return pa.table(
        {
            "row": range(ROWS),
            "label": [row % 2 / 4 for row in range(ROWS)],
            "list": [[row] * (row % 3) for row in range(ROWS)],
        }
    )


def rows_of(data: ColumnDataset) -> list[int]:
    return list(chain.from_iterable(dense(batch).tolist() for batch in data))


def lists(column: Any) -> Any:
    assert isinstance(column, RaggedTensor)
    column.validate()
    return column.to_strings(decode=False) if column.dtype == torch.uint8 else column.to_lists()


def batches() -> Iterator[Any]:
    for first in range(0, ROWS, 10):
        yield table().slice(first, 10)


class Batches:
    def __iter__(self) -> Iterator[Any]:
        return batches()


def chunked() -> Any:
    return pa.concat_tables([table().slice(first, 1) for first in range(ROWS)])


KINDS: dict[str, Any] = {
    "table": table,
    "chunks": chunked,
    "batch": lambda: table().combine_chunks().to_batches()[0],
    "reader": lambda: table().to_reader(max_chunksize=7),
    "pandas": lambda: table().to_pandas(),
    "dictionary": lambda: {"row": np.arange(ROWS), "label": table()["label"].to_pylist(), "list": table()["list"]},
    "list": lambda: list(batches()),
    "function": lambda: batches,
    "iterable": Batches,
}


@FORKED
@FEW_CORES
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("shuffle", [False, True])
def test_in_memory_data_is_read_like_a_file(tmp_path: Path, kind: str, shuffle: bool) -> None:
    pq.write_table(table(), tmp_path / "a.parquet")

    def opened(**options: Any) -> ColumnDataset:
        return ColumnDataset.from_arrow(KINDS[kind](), ["row", "label", "list"], 4, shuffle=shuffle, seed=3, **options)

    want = list(ColumnDataset(tmp_path, ["row", "label", "list"], 4, shuffle=shuffle, seed=3))
    got = list(opened())
    assert len(opened()) == len(want) == len(got)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(dense(one), dense(other))
        assert torch.equal(dense(one, "label"), dense(other, "label"))
        assert lists(one["list"]) == lists(other["list"])
    # Ranks, and then another number of ranks.
    whole = rows_of(opened())
    ranks = [opened(shard=ShardOptions(rank=rank, world_size=2)) for rank in range(2)]
    passes = [iter(rank) for rank in ranks]
    seen = [dense(next(each)).tolist() for _ in range(3) for each in passes]
    assert list(chain.from_iterable(seen)) == whole[:24]
    rest = opened(read=ReadOptions(num_threads=2))
    rest.load_state_dict(ranks[0].state_dict())
    assert rows_of(rest) == whole[24:]
    rest.set_epoch(1)
    assert sorted(rows_of(rest)) == list(range(ROWS))
    filtered = rows_of(opened(filters=[("row", ">", 50)], transforms=lambda batch: {"row": batch["row"] + 1}))
    assert sorted(filtered) == [52, 53]
    loader = DataLoader(opened(), batch_size=None, num_workers=2)
    assert [row for batch in loader for row in batch["row"].tolist()] == whole


@pytest.mark.slow
def test_workers_that_are_not_forked_get_a_copy() -> None:
    spawned: dict[str, Any] = {"batch_size": None, "num_workers": 1, "multiprocessing_context": "spawn"}
    for data in (table(), batches):
        loader = DataLoader(ColumnDataset.from_arrow(data, ["row"], 10), **spawned)
        assert [row for batch in loader for row in batch["row"].tolist()] == list(range(ROWS))


def test_tensors_share_memory() -> None:
    numbers = np.arange(1000)
    (batch,) = ColumnDataset.from_arrow({"x": numbers}, ["x"], 1000)
    assert dense(batch, "x").data_ptr() == numbers.ctypes.data
    frame = pd.DataFrame({"x": np.arange(1000)})
    (batch,) = ColumnDataset.from_arrow(frame, ["x"], 1000)
    assert dense(batch, "x").data_ptr() == frame["x"].to_numpy().ctypes.data
    first, second = ColumnDataset.from_arrow(pa.table({"x": numbers}), ["x"], 500)
    assert dense(second, "x").data_ptr() - dense(first, "x").data_ptr() == 500 * 8


class Foreign:
    """Array of another framework."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.arange(5, 9)

    def __len__(self) -> int:
        return 4


def test_columns_of_a_dictionary() -> None:
    columns = {
        "i": np.arange(4, dtype=np.int32),
        "strided": np.arange(8)[::2],
        "swapped": np.arange(4, dtype=">i8"),
        "matrix": np.arange(8, dtype=np.float32).reshape(4, 2),
        "deep": np.arange(8).reshape(4, 2, 1),
        "flags": np.array([True, False, True, True]),
        "words": np.array(["a", "é", "", "d"]),
        "objects": np.array([[1], [2, 3], [], [4]], dtype=object),
        "arrays": [np.array([1, 2]), np.array([], np.int64), np.array([3]), np.array([4])],
        "hours": np.array(["2024-01-01T01"] * 4, "datetime64[h]"),
        "masked": np.ma.MaskedArray([1, 2, 3, 4], [False, True, False, False]),
        "tensor": torch.arange(4),
        "ragged": RaggedTensor.from_lists([[1], [], [2], [3]]),
        "series": pd.Series([1.0, np.nan, 2.0, 3.0], index=[5, 6, 7, 8]),
        "none": ["a", None, "b", "c"],
        "foreign": Foreign(),
    }
    specs: dict[str, Column | None] = dict.fromkeys(columns)
    specs |= {"masked": Dense(default=-1), "series": Dense(default=-1), "none": Text(default="?"), "deep": Ragged()}
    (batch,) = ColumnDataset.from_arrow(columns, specs, 10)
    got = {
        name: column.tolist() if isinstance(column, torch.Tensor) else lists(column) for name, column in batch.items()
    }
    assert got == {
        "i": [0, 1, 2, 3],
        "strided": [0, 2, 4, 6],
        "swapped": [0, 1, 2, 3],
        "matrix": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]],
        "deep": [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]],
        "flags": [True, False, True, True],
        "words": [b"a", "é".encode(), b"", b"d"],
        "objects": [[1], [2, 3], [], [4]],
        "arrays": [[1, 2], [], [3], [4]],
        "hours": [19_723 * 86_400 + 3600] * 4,
        "masked": [1, -1, 3, 4],
        "tensor": [0, 1, 2, 3],
        "ragged": [[1], [], [2], [3]],
        "series": [1.0, -1.0, 2.0, 3.0],
        "none": [b"a", b"?", b"b", b"c"],
        "foreign": [5, 6, 7, 8],
    }
    assert dense(batch, "i").dtype == torch.int32


def test_pandas() -> None:
    frame = pd.DataFrame(
        {
            "row": [1, 2, 3],
            "float": [0.5, np.nan, 1.0],
            "text": ["a", None, "c"],
            "kind": pd.Categorical(["u", "v", "u"]),
            "when": pd.to_datetime(["2024-01-01"] * 3),
            "maybe": pd.array([1, None, 3], dtype="Int64"),
        },
        index=[5, 6, 7],
    )
    specs: dict[str, Column | None] = {
        "row": None,
        "float": Dense(default=0),
        "text": Text(default=""),
        "kind": None,
        "when": None,
        "maybe": Dense(default=-1),
    }
    (batch,) = ColumnDataset.from_arrow(frame[frame["row"] > 1], specs, 10)
    assert dense(batch).tolist() == [2, 3]
    assert dense(batch, "float").tolist() == [0.0, 1.0]
    assert lists(batch["text"]) == [b"", b"c"]
    assert lists(batch["kind"]) == [b"v", b"u"]
    assert dense(batch, "when").tolist() == [19_723 * 86_400] * 2
    assert dense(batch, "maybe").tolist() == [-1, 3]
    with pytest.raises(TypeError, match=r"this DataFrame cannot become an Arrow table .*column x.*values of one type"):
        ColumnDataset.from_arrow(pd.DataFrame({"x": [1, "a"]}), ["x"], 2)


def test_polars() -> None:
    polars = pytest.importorskip("polars", reason="polars is not installed")
    frame = polars.DataFrame(
        {
            "row": [1, 2, 3],
            "text": ["a", None, "c"],
            "list": [[1], [], [2, 3]],
            "tags": [["a"], [], ["b", "c"]],
            "kind": polars.Series(["u", "v", "u"], dtype=polars.Categorical),
            "day": [datetime.date(2024, 1, 1)] * 3,
            "big": polars.Series([1, 2, 2**64 - 1], dtype=polars.UInt64),
            "pair": [{"a": 1}, {"a": 2}, {"a": 3}],
            "array": polars.Series([[1, 2], [3, 4], [5, 6]], dtype=polars.Array(polars.Int32, 2)),
            "bytes": [b"a", b"b", b"c"],
        }
    )
    specs: dict[str, Column | None] = dict.fromkeys(name for name in frame.columns if name != "pair")
    specs |= {"text": Text(default="?"), "pair.a": None}
    # The strings are views, for which Arrow has neither take nor sort.
    for shuffle in (False, True):
        data = ColumnDataset.from_arrow(frame, specs, 10, shuffle=shuffle, filters=[("kind", "!=", "v")])
        (batch,) = data
        order = [row - 1 for row in dense(batch).tolist()]
        assert sorted(order) == [0, 2]
        assert lists(batch["text"]) == [[b"a", b"?", b"c"][row] for row in order]
        assert lists(batch["list"]) == [[[1], [], [2, 3]][row] for row in order]
        assert lists(batch["tags"]) == [[[b"a"], [], [b"b", b"c"]][row] for row in order]
        assert lists(batch["kind"]) == [b"u", b"u"]
        assert dense(batch, "day").tolist() == [19_723 * 86_400] * 2
        assert dense(batch, "big").tolist() == [[1, 2, -1][row] for row in order]
        assert dense(batch, "pair.a").tolist() == [row + 1 for row in order]
        assert dense(batch, "array").tolist() == [[[1, 2], [3, 4], [5, 6]][row] for row in order]
        assert lists(batch["bytes"]) == [[b"a", b"b", b"c"][row] for row in order]
    numbers = polars.DataFrame({"x": np.arange(100)})
    (batch,) = ColumnDataset.from_arrow(numbers, ["x"], 100)
    assert dense(batch, "x").data_ptr() == numbers["x"].to_numpy().ctypes.data
    with pytest.raises(TypeError, match=r"got LazyFrame; collect\(\) it first"):
        ColumnDataset.from_arrow(numbers.lazy(), ["x"], 10)


def test_hugging_face_datasets() -> None:
    datasets = pytest.importorskip("datasets", reason="datasets (Hugging Face) is not installed")
    data = datasets.Dataset.from_dict({"row": list(range(10)), "text": [str(row) for row in range(10)]})
    for each, want in (
        (data, list(range(10))),
        (data.select([3, 1, 9]), [3, 1, 9]),
        (data.with_format("torch").select([1, 2]), [1, 2]),
        (data.filter(lambda row: row["row"] > 6), [7, 8, 9]),
        (data.to_iterable_dataset(num_shards=2), list(range(10))),
    ):
        dataset = ColumnDataset.from_arrow(each, ["row", "text"], 4)
        assert rows_of(dataset) == want
        assert [text for batch in dataset for text in lists(batch["text"])] == [str(row).encode() for row in want]
    with pytest.raises(TypeError, match=r"got several datasets, 'train'; pass one of them, data\['train'\]"):
        ColumnDataset.from_arrow(datasets.DatasetDict({"train": data}), ["row"], 4)


class Selected:
    """A Hugging Face dataset after ``select``, whose underlying table has more rows."""

    def __init__(self, whole: Any, rows: list[int]) -> None:
        self.whole, self.rows, self.format = whole, rows, "python"

    def with_format(self, name: str) -> Selected:
        formatted = Selected(self.whole, self.rows)
        formatted.format = name
        return formatted

    def flatten_indices(self) -> None: ...

    def __getitem__(self, key: slice) -> Any:
        assert self.format == "arrow"
        assert key == slice(None)
        return self.whole.take(self.rows)

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.whole.__arrow_c_stream__(requested_schema)


def test_only_selected_rows_are_read() -> None:
    assert rows_of(ColumnDataset.from_arrow(Selected(table(), [3, 1, 9]), ["row"], 4)) == [3, 1, 9]


def test_any_object_with_an_arrow_stream() -> None:
    relation = type(
        "Relation", (), {"__arrow_c_stream__": lambda self, schema=None: table().__arrow_c_stream__(schema)}
    )()
    assert rows_of(ColumnDataset.from_arrow(relation, ["row"], 10)) == list(range(ROWS))
    batch = table().combine_chunks().to_batches()[0]
    array = type("Batch", (), {"__arrow_c_array__": lambda self, schema=None: batch.__arrow_c_array__(schema)})()
    assert rows_of(ColumnDataset.from_arrow(array, ["row"], 10)) == list(range(ROWS))


# States


def test_a_state_belongs_to_its_data() -> None:
    data = ColumnDataset.from_arrow(table(), ["row"], 10)
    next(iter(data))
    state = data.state_dict()
    # Chunks and the kind of table make no difference.
    for kind in ("chunks", "reader", "list"):
        same = ColumnDataset.from_arrow(KINDS[kind](), ["row", "label"], 7)
        same.load_state_dict(state)
        assert rows_of(same) == list(range(10, ROWS))
    changed = table().set_column(0, "row", pa.array([*range(ROWS - 1), 99]))
    for other in (
        changed,
        table().slice(1),
        table().drop_columns(["list"]),
        table().rename_columns(["row", "l", "list"]),
    ):
        with pytest.raises(ValueError, match="the rows are in a different order than when the state was saved"):
            ColumnDataset.from_arrow(other, ["row"], 10).load_state_dict(state)


def test_a_stream_that_changes_is_rejected() -> None:
    calls: list[int] = []

    def shrinking() -> Iterator[Any]:
        calls.append(0)
        # Called twice for the types, and once for the number of rows.
        yield {"row": np.arange(10 if len(calls) < 4 else 7)}

    data = ColumnDataset.from_arrow(shrinking, ["row"], 5)
    with pytest.raises(ValueError, match=r"data in memory has 7 rows, but had 10"):
        list(data)


@pytest.mark.parametrize("bad", ["raise", "skip"])
def test_a_failing_function_is_not_a_damaged_file(bad: Any) -> None:
    fails = False

    def failing() -> Iterator[Any]:
        if fails:
            raise FileNotFoundError("gone")
        yield {"row": np.arange(3)}

    data = ColumnDataset.from_arrow(failing, ["row"], 5, read=ReadOptions(on_bad_file=bad))
    fails = True
    with pytest.raises(RuntimeError, match="the function that makes the batches failed: gone"):
        list(data)


def test_data_instead_of_paths_is_rejected_with_a_remedy() -> None:
    for data in (table(), table().to_pandas(), {"row": [1]}, [table()]):
        with pytest.raises(TypeError, match=r"paths must be paths, got .*ColumnDataset\.from_arrow"):
            ColumnDataset(data, ["row"], 4)


def test_batches_are_cast_to_the_types_of_the_first() -> None:
    batches_of_types = [
        {"a": np.array([1, 2]), "b": ["x", "y"]},
        {"b": ["z"], "a": np.array([3], np.int32)},
        {"a": [4.0], "b": ["w"]},
    ]
    for data in (batches_of_types, lambda: iter(batches_of_types)):
        (batch,) = ColumnDataset.from_arrow(data, ["a", "b"], 10)
        assert dense(batch, "a").tolist() == [1, 2, 3, 4]
        assert lists(batch["b"]) == [b"x", b"y", b"z", b"w"]
    with pytest.raises(ValueError, match=r"all batches must have the columns of the first, a int64, but one has b"):
        ColumnDataset.from_arrow([{"a": [1]}, {"b": [1]}], ["a"], 10)
    with pytest.raises(ValueError, match=r"all batches must have the columns of the first"):
        ColumnDataset.from_arrow([{"a": [1]}, {"a": [1.5]}], ["a"], 10)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((row for row in ()), TypeError, r"a generator can be read only once.*from_arrow\(lambda: batches\(\)\)"),
        (iter([]), TypeError, r"a list_iterator can be read only once"),
        ("clicks.parquet", TypeError, r"takes a table .* got str"),
        (None, TypeError, r"got NoneType"),
        (np.ones((2, 2)), TypeError, r"got ndarray"),
        ({"a": 1}, TypeError, r"column 'a' cannot become an Arrow column \(it is int\)"),
        ({"a": "abc"}, TypeError, r"column 'a' cannot become an Arrow column \(it is str\)"),
        ({"a": np.array(1)}, TypeError, r"it is a single value"),
        ({"a": [1, "b"]}, TypeError, r"column 'a' cannot become an Arrow column"),
        ({"a": np.array([1j])}, TypeError, r"column 'a' cannot become an Arrow column"),
        ({1: [1]}, TypeError, r"column names must be strings, got 1"),
        ([{"a": 1}], TypeError, r"pyarrow\.Table\.from_pylist"),
        ({"a": [1], "b": [1, 2]}, ValueError, r"all columns must have the same number of rows, got \{'a': 1, 'b': 2\}"),
        ({}, ValueError, "at least one column, got none"),
        ([], ValueError, "at least one batch, got an empty sequence"),
        (lambda: iter([]), ValueError, "at least one batch, but the function returned none"),
        (lambda: 7, TypeError, "the function must return an iterable of batches, got int"),
        ({"a": np.array([], np.int64)}, ValueError, r"there are no rows in data in memory"),
    ],
)
def test_data_that_is_not_a_table_is_rejected(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ColumnDataset.from_arrow(data, ["a"], 10)
