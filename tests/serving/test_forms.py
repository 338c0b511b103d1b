"""Columns of every form, from files to scores: strings, dates, lists, weights and nulls, as the trainer scores them."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from recis_hybrid.app import cli, load_run
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.serving import Bundle, InputColumn, InputError, Ragged, Rows

ROWS = 48
FEATURES: dict[str, Any] = {
    "user": {"ops": [{"hash": {"kind": "murmur"}}, {"mod": {"n": 1000}}], "dim": 4},
    "tags": {"ops": [{"truncate": {"length": 3, "side": "left"}}], "dim": 4, "combiner": "mean"},
    "words": {"ops": [{"hash": {"kind": "farm"}}], "dim": 4, "combiner": "sqrtn"},
    "prefs": {"ops": [{"top_k": {"k": 2}}], "dim": 4, "combiner": "mean"},
    "city": {"ops": [{"vocabulary": {"source": ["rome", "oslo"], "unknown": 2}}], "dim": 4, "table": "places"},
    "pair": {"source": ["user", "site"], "ops": [{"cross": {}}], "dim": 4},
    "hour": {"source": "seen", "ops": [{"date_part": {"part": "hour", "utc_offset": "+01:00"}}], "dim": 4},
    "bucket": {"source": "price", "ops": [{"bucketize": {"boundaries": [0.5, 1.5, 9]}}], "dim": 4},
    "price": {"ops": [{"log": {"plus": 1.0}}]},
    "age": {
        "source": "seen",
        "ops": [
            {"age": {"until": "2024-03-01"}},
            {"cast": {"dtype": torch.float32}},
            {"normalize": {"mean": 9e5, "std": 5e5}},
        ],
    },
    "position": {},
    "clicked": {},
    "vector": {},
}


def table() -> pa.Table:
    random = np.random.default_rng(5)
    start = datetime.datetime(2024, 2, 20, tzinfo=datetime.UTC)
    rows = range(ROWS)
    columns: dict[str, Any] = {
        "label": pa.array([int(random.integers(2)) for _ in rows]),
        "user": pa.array([int(random.integers(-(2**62), 2**62)) for _ in rows]),
        "site": pa.array([row % 5 for row in rows], pa.int32()),
        "tags": pa.array(
            [None if row % 7 == 0 else [row % 3, None, 5, row][: row % 5] for row in rows], pa.list_(pa.int64())
        ),
        "words": pa.array([[f"w{n}" for n in range(row % 4)] for row in rows], pa.list_(pa.string())),
        "prefs": pa.array(
            [[(n, 0.25 * n + 0.1) for n in range(row % 5)] for row in rows], pa.map_(pa.int64(), pa.float32())
        ),
        "city": pa.array([["rome", "oslo", None, "paris"][row % 4] for row in rows]),
        "seen": pa.array([start + datetime.timedelta(hours=7.3 * row) for row in rows], pa.timestamp("us", "UTC")),
        "price": pa.array([None if row % 6 == 0 else 0.3 * row for row in rows], pa.float32()),
        "position": pa.array([row % 9 for row in rows], pa.int16()),
        "clicked": pa.array([row % 3 == 0 for row in rows]),
        "vector": pa.array([[0.1 * row, 1.0, -row] for row in rows], pa.list_(pa.float64())),
    }
    return pa.table(columns)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    parquet.write_table(table(), folder / "rows.parquet")
    features = json.loads(json.dumps(FEATURES, default=lambda dtype: "float32"))
    del features["age"]["ops"][1]
    config = {
        "run": "run",
        "data": {
            "train": "rows.parquet",
            "batch_size": 16,
            "columns": {
                "tags": {"default": 7, "null_as_empty": True},
                "city": {"default": "oslo"},
                "price": {"default": 2.5},
                "vector": {"length": 3},
            },
        },
        "features": features,
        "model": {"hidden": [8]},
        "optimizer": {"sparse": "adagrad", "sparse_lr": 0.2, "dense_lr": 0.05},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    assert cli.main(["train", str(folder / "config.yaml"), "--quiet"]) == 0
    assert cli.main(["export", str(folder / "run"), "--bundle", str(folder / "b")]) == 0
    return folder


def expected(trained: Path) -> np.ndarray[Any, Any]:
    batches = load_run(trained / "run").predict(str(trained / "rows.parquet"))
    return torch.cat([batch["score"] for batch in batches]).numpy()


def test_the_batches_of_the_reader_have_the_scores_of_the_trainer(trained: Path) -> None:
    bundle = Bundle(trained / "b")
    parts: list[Rows] = []
    for batch in load_run(trained / "run").data(str(trained / "rows.parquet"), batch_size=10):
        columns: dict[str, Any] = {}
        for name, column in batch.items():
            if not isinstance(column, RaggedTensor):
                columns[name] = column.numpy()
            elif column.dtype == torch.uint8:
                columns[name] = column.to_strings()
            else:
                weights = None if column.weights is None else column.weights.numpy()
                columns[name] = Ragged(column.values.numpy(), column.lengths().numpy(), weights)
        parts.append(bundle.check(columns))
    scores = bundle.run(Rows.concat(parts))["score"]
    np.testing.assert_allclose(scores, expected(trained), rtol=0, atol=1e-6)


def test_plain_values_with_nulls_have_the_scores_of_the_trainer(trained: Path) -> None:
    columns = table().drop_columns("label").to_pydict()
    columns["seen"] = [int(moment.timestamp()) for moment in columns["seen"]]
    bundle = Bundle(trained / "b")
    np.testing.assert_allclose(bundle.predict(columns)["score"], expected(trained), rtol=0, atol=1e-6)
    # JSON carries ids of 64 bits.
    again = bundle.predict(json.loads(json.dumps(columns)))["score"]
    np.testing.assert_allclose(again, expected(trained), rtol=0, atol=1e-6)


def test_the_inputs_describe_the_columns(trained: Path) -> None:
    inputs = {column.name: column for column in Bundle(trained / "b", verify=False).inputs}
    assert inputs == {
        column.name: column
        for column in (
            InputColumn(name="user", dtype="int64"),
            InputColumn(name="tags", dtype="int64", levels=1, default=7, null_as_empty=True),
            InputColumn(name="words", dtype="string", levels=1),
            InputColumn(name="prefs", dtype="int64", levels=1, weighted=True),
            InputColumn(name="city", dtype="string", default="oslo"),
            InputColumn(name="site", dtype="int32"),
            InputColumn(name="seen", dtype="int64"),
            InputColumn(name="price", dtype="float64", default=2.5),
            InputColumn(name="position", dtype="int64"),
            InputColumn(name="clicked", dtype="bool"),
            InputColumn(name="vector", dtype="float64", length=3),
        )
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tags", [[1], 2], "column 'tags': row 1: must be a list, got 2; send a list of int64 values for each row"),
        ("tags", [[1], ["a"]], "column 'tags': row 1: must be int64, got 'a'"),
        ("tags", Ragged([1, 2], [1, 2]), "column 'tags': the lengths add up to 3, but there are 2 values"),
        ("tags", Ragged([1, 2], [3, -1]), "column 'tags': lengths must be 0 to 2, the number of values"),
        ("tags", Ragged([1, 2], [[1], [1]]), r"column 'tags': lengths must be integers .B., got int64 .2, 1."),
        ("words", [["a"], [None]], "column 'words': row 1 has a null, and the column has no default"),
        ("words", [["a"], ["\ud800"]], "column 'words': row 1: must be valid Unicode"),
        ("prefs", [[[1, 0.5]], [[2]]], "column 'prefs': value 1: must be a pair .id, weight., got .2."),
        ("prefs", [[[1, 0.5]], [[2, float("nan")]]], "feature 'prefs'.*row 1 has a weight that is NaN"),
        ("site", [1, 2**31], "column 'site': row 1: must be a 32-bit integer, got 2147483648"),
        ("price", [1.0, -2.0], "feature 'price', column 'price', log: row 1: has no logarithm, got -2.0; put Clip"),
        ("price", [1.0, float("nan")], "feature 'bucket'.*bucketize: row 1: must be a number, got nan"),
        ("clicked", [1, 0], "column 'clicked': row 0: must be bool, got 1 .int64.; send true or false"),
        ("vector", [[1.0, 2.0, 3.0], [1.0]], "column 'vector': row 1: must be a list of 3 values, got 1 values"),
        (
            "vector",
            np.ones((2, 4)),
            r"column 'vector': takes a list of 3 float64 values for each row, got an array .2, 4.",
        ),
        ("vector", [1.0, 2.0], "column 'vector': row 0: must be a list of 3 values, got 1.0"),
    ],
)
def test_bad_input_is_named(trained: Path, name: str, value: Any, message: str) -> None:
    columns = {key: values[1:3] for key, values in table().drop_columns("label").to_pydict().items()}
    columns["seen"] = [0, 0]
    with pytest.raises(InputError, match=message):
        Bundle(trained / "b", verify=False).predict({**columns, name: value})
