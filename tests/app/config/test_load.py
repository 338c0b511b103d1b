from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from recis_hybrid.app.build import dataset_of, features_of, step_of
from recis_hybrid.app.config import Config, ConfigError, load_config
from recis_hybrid.ragged import RaggedTensor, to_arrow
from tests.support.columns import dense

BASE: dict[str, Any] = {"run": "run", "data": {"train": "a.csv"}, "features": {"user": {"dim": 4}}}


def load(folder: Path, overrides: list[str] | None = None, **changes: Any) -> Config:
    path = folder / "c.yaml"
    path.write_text(json.dumps({**BASE, **changes}))  # JSON is YAML
    return load_config(path, overrides or [])


def test_paths_are_relative_to_the_file_and_in_overrides_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    data = {"train": ["a/*.csv", "s3://bucket/b", "/abs/c"], "evaluate": "~/e.csv"}
    features = {"user": {"dim": 4, "ops": [{"vocabulary": {"source": "words.txt"}}, {"vocabulary": {"source": [1]}}]}}
    found = load(Path("project"), run="../runs/r", data=data, features=features)
    assert found.run == "runs/r"
    assert found.data.train == ["project/a/*.csv", "s3://bucket/b", "/abs/c"]
    assert found.data.evaluate == "/home/somebody/e.csv"
    assert found.features["user"].ops[0] == {"vocabulary": {"source": "project/words.txt"}}
    assert found.features["user"].ops[1] == {"vocabulary": {"source": [1]}}
    found = load(Path("project"), ["run=here", "data.train=b.csv", "data.evaluate=memory://x/y"])
    assert (found.run, found.data.train, found.data.evaluate) == ("here", "b.csv", "memory://x/y")
    monkeypatch.chdir(tmp_path / "project")
    assert load(Path()).data.train == "a.csv"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed must be at least 0, got -1"),
        ("seed=true", "seed must be an integer, got True"),
        ("seed=1.0", "seed must be an integer, got 1.0; write 1$"),
        ("seed=1_000", "seed must be an integer, got '1_000'; write 1000, without underscores"),
        ("seed='7'", "seed must be an integer, got '7'; write 7, without quotes"),
        ("seed=99999999999999999999", "seed must be less than 9223372036854775808"),
        ("train.epochs=1e3", "train.epochs must be an integer, got 1000.0; write 1000"),
        ("train.epochs=3000000000", "train.epochs must be less than 2147483648"),
        ("optimizer.dense_lr='1e-3'", "optimizer.dense_lr must be a number, got '1e-3'; write 1e-3, without quotes"),
        ("optimizer.dense_lr=.inf", "optimizer.dense_lr must be finite, at least 0, got inf"),
        ("optimizer.dense_lr=1e400", "optimizer.dense_lr must be finite"),
        ("optimizer.dense_lr=1" + "0" * 400, "optimizer.dense_lr must be finite"),
        ("optimizer.clip_grad_norm=0", "optimizer.clip_grad_norm must be above 0, got 0"),
        ("data.batch_size=0", "data.batch_size must be at least 1, got 0"),
        ("data.shuffle=yes", "data.shuffle must be true or false, got 'yes'"),
        ("run=2024", "run must be a string, got 2024; put it in quotes"),
        ("run=", "run must be a string, got null"),
        ("run=''", "run must name a folder, got ''"),
        ("data.train=[a.csv, 3]", r"data.train\[1\] must be a string, got 3"),
        ("data.train=3", "data.train must be a string or a list, got 3"),
        ("data.train=[]", "data: train and evaluate must name a file"),
        ("data.train=*.csv", r"""put a string in quotes that the shell preserves, data.train="'\*.csv'\""""),
        ("data={train: x, train: y}", "the key 'train' occurs twice"),
        ("epochs=3", "unknown key epochs; did you mean train.epochs"),
        ("zzz=3", r"unknown key zzz\. Valid keys are \['data', 'features'"),
        ("features.user.ops=[hash]", r"features.user.ops\[0\] must be a mapping of keys, got 'hash'; write {hash: {}}"),
        ("features.price={std: 1}", "features.price: std applies to embeddings only; give the feature a dim"),
        ("features.price={table: t}", "features.price: table applies to embeddings only"),
        ("features.label={dim: 2}", "features.label reads 'label', the label"),
        ("features.x={source: [user, label], dim: 2}", "features.x reads 'label', the label"),
        ("data.columns={usr: {default: 0}}", "data.columns.usr is not used; did you mean user"),
        ("data.columns.user.default=[1]", "data.columns.user.default must be true or false, an integer, a number or a"),
        ("train.metrics=[auc, auc]", "train: metrics must be distinct"),
        ("train={metrics: [], patience: 2}", "train.patience needs a metric"),
        ("train.checkpoint_whole_every=3", "train: checkpoint_whole_every counts the checkpoints of checkpoint_steps"),
    ],
)
def test_invalid_values_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, [override])


def test_long_values_are_shortened_in_messages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, seed="x" * 10_000)
    assert len(str(caught.value)) < 200


def test_numbers_without_a_point_or_with_a_leading_zero(tmp_path: Path) -> None:
    found = load(tmp_path, ["optimizer.dense_lr=1e-3", "features.user.dim=010", "optimizer.sparse_lr=1", "seed=0x1F"])
    assert (found.optimizer.dense_lr, found.features["user"].dim, found.seed) == (0.001, 10, 31)
    assert isinstance(found.optimizer.sparse_lr, float)


def test_feature_names_that_yaml_1_1_would_convert(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run: r\ndata: {train: x}\nfeatures:\n  no: {dim: 2}\n  012: {dim: 2}\n  1:30: {dim: 2}\n  on:\n")
    found = load_config(path, ["features.012.dim=3"])
    assert list(found.features) == ["no", "012", "1:30", "on"]
    assert (found.features["012"].dim, found.features["on"].dim) == (3, None)


def test_names_with_dots_can_be_overridden(tmp_path: Path) -> None:
    found = load(tmp_path, ["features.a.b.dim=3"], features={"a": {"dim": 1}, "a.b": {"dim": 2}})
    assert [feature.dim for feature in found.features.values()] == [1, 3]


def test_the_last_override_of_a_key_wins(tmp_path: Path) -> None:
    assert load(tmp_path, ["train.epochs=3", "train.epochs=5"]).train.epochs == 5


def test_empty_sections_use_defaults(tmp_path: Path) -> None:
    found = load(tmp_path, ["model.kind=mlp"], model=None, train=None)
    assert found == load(tmp_path)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text, message in (
        ("", "the file is empty; `recis-hybrid init`"),
        ("a: [", "cannot be read as YAML"),
        ("a:\n\tb: 1", "indent with spaces"),
        ("a: 1\na: 1", "occurs twice"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(path)
    with pytest.raises(ConfigError, match="must be a YAML file, but is a folder; did you mean .*config.yaml"):
        load_config(tmp_path)


def batch_of(folder: Path, columns: dict[str, pa.Array], specs: dict[str, Any]) -> Any:
    parquet.write_table(pa.table({"label": [0.0, 1.0, 1.0], **columns}), folder / "d.parquet")
    features = {name: {} for name in columns} | {"id": {"dim": 2, "source": next(iter(columns))}}
    config = load(folder, data={"train": "d.parquet", "columns": specs}, features=features)
    return next(iter(dataset_of(config, features_of(config), config.data.train)))


def test_defaults_replace_nulls(tmp_path: Path) -> None:
    batch = batch_of(
        tmp_path,
        {
            "whole": pa.array([3, None, 5]),
            "part": pa.array([0.5, None, 1.5]),
            "flag": pa.array([True, None, False]),
            "text": pa.array(["a", None, ""]),
            "vector": pa.array([[1.0, 2.0], None, [5.0, None]]),
            "bag": pa.array([[7, None], None, []]),
            "halves": pa.array([1, None, 2]),
        },
        {
            "whole": {"default": 9},
            "part": {"default": 0},
            "flag": {"default": True},
            "text": {"default": "none"},
            "vector": {"default": -1, "length": 2},
            "bag": {"default": 4, "null_as_empty": True},
            "halves": {"default": 0.5},
        },
    )
    assert dense(batch, "whole").tolist() == [3, 9, 5]
    assert dense(batch, "whole").dtype == torch.int64
    assert dense(batch, "part").tolist() == [0.5, 0.0, 1.5]
    assert dense(batch, "flag").tolist() == [True, True, False]
    assert batch["text"].to_strings(decode=False) == [b"a", b"none", b""]
    assert dense(batch, "vector").tolist() == [[1, 2], [-1, -1], [5, -1]]
    assert isinstance(batch["bag"], RaggedTensor)
    assert to_arrow(batch["bag"]).to_pylist() == [[7, 4], [], []]
    assert dense(batch, "halves").tolist() == [1.0, 0.5, 2.0]


def test_null_lists_are_read_as_empty(tmp_path: Path) -> None:
    columns = {"bag": pa.array([[7], None, [8, 9]]), "words": pa.array([["a"], None, ["b", None]])}
    batch = batch_of(
        tmp_path, columns, {"bag": {"null_as_empty": True}, "words": {"default": "", "null_as_empty": True}}
    )
    assert to_arrow(batch["bag"]).to_pylist() == [[7], [], [8, 9]]
    assert to_arrow(batch["words"]).to_pylist() == [[b"a"], [], [b"b", b""]]


@pytest.mark.parametrize(
    ("column", "spec", "message"),
    [
        (["a", None, "b"], {"default": 3}, "data.columns.x.default must be a string, because the column holds strings"),
        ([1, None, 2], {"default": "a"}, "Text"),
        (["a", None, "b"], {"length": 3}, "data.columns.x: length applies to lists of numbers"),
    ],
)
def test_options_that_do_not_fit_the_type_are_refused(tmp_path: Path, column: Any, spec: Any, message: str) -> None:
    with pytest.raises((ConfigError, TypeError), match=message):
        batch_of(tmp_path, {"x": pa.array(column)}, {"x": spec})


def test_labels_may_be_of_any_numeric_type_but_not_strings(tmp_path: Path) -> None:
    for values in ([0, 1, 1], [0.0, 1.0, 1.0], [False, True, True], pa.array([0, 1, 1], pa.uint8())):
        parquet.write_table(pa.table({"label": values, "user": [1, 2, 3]}), tmp_path / "l.parquet")
        config = load(tmp_path, data={"train": "l.parquet"})
        (batch,) = dataset_of(config, features_of(config), config.data.train)
        assert dense(batch, "label").tolist() == [0.0, 1.0, 1.0]
        # The step casts labels to the dtype of its outputs.
        assert dense(batch, "label").dtype in (torch.float32, torch.bool)
    (tmp_path / "l.csv").write_text("label,user\nfalse,1\ntrue,2\ntrue,3\n")
    config = load(tmp_path, data={"train": "l.csv"})
    (batch,) = dataset_of(config, features_of(config), config.data.train)
    assert dense(batch, "label").tolist() == [0.0, 1.0, 1.0]
    (tmp_path / "l.csv").write_text("label,user\nno,1\nyes,2\n")
    with pytest.raises(
        ConfigError, match="data.label 'label' contains strings in .*l.csv; it must be a number, 0 or 1"
    ):
        dataset_of(config, features_of(config), config.data.train)


def test_csv_dialects_are_read(tmp_path: Path) -> None:
    text = "# a log\n1;\u00e9;0,5;1\n2;-;;0\n"
    (tmp_path / "d.csv").write_bytes(text.replace("0,5", "0.5").encode("latin-1"))
    csv = {
        "delimiter": ";",
        "encoding": "latin-1",
        "comment": "#",
        "null_values": ["-", ""],
        "column_names": ["id", "name", "price", "label"],
    }
    columns = {"name": {"default": "?"}, "price": {"default": 0.25}}
    features = {"id": {"dim": 2}, "name": {}, "price": {}}
    config = load(tmp_path, data={"train": "d.csv", "csv": csv, "columns": columns}, features=features)
    (batch,) = dataset_of(config, features_of(config), config.data.train)
    assert dense(batch, "id").tolist() == [1, 2]
    assert batch["name"].to_strings(decode=False) == ["\u00e9".encode(), b"?"]  # type: ignore[union-attr]
    assert dense(batch, "price").tolist() == [0.5, 0.25]
    assert dense(batch, "label").tolist() == [1.0, 0.0]
    for wrong, message in ((";;", "delimiter must be one ASCII character"), ('"', "must differ")):
        with pytest.raises(ConfigError, match=f"data.csv: CsvOptions: .*{message}"):
            load(tmp_path, data={"train": "d.csv", "csv": {"delimiter": wrong}})


def test_dates_and_decimals_are_read_in_the_configured_unit(tmp_path: Path) -> None:
    columns = {
        "day": pa.array(["1970-01-03", None, "1970-01-01"]),
        "german": pa.array(["03.01.1970", "01.01.1970", None]),
        "at": pa.array([1500, None, 0], pa.timestamp("ms")),
        "cost": pa.array([Decimal("1.25"), None, Decimal("2.00")]),
    }
    specs = {
        "day": {"unit": "D", "default": -1},
        "german": {"unit": "D", "format": "%d.%m.%Y", "default": -1},
        "at": {"unit": "ms", "default": -1},
        "cost": {"scale": 2, "default": -1},
    }
    batch = batch_of(tmp_path, columns, specs)
    assert dense(batch, "day").tolist() == [2, -1, 0]
    assert dense(batch, "german").tolist() == [2, 0, -1]
    assert dense(batch, "at").tolist() == [1500, -1, 0]
    assert dense(batch, "cost").tolist() == [125, -1, 200]
    with pytest.raises(ConfigError, match="data.columns.day: unit, format and scale need a default that is a number"):
        batch_of(tmp_path, columns, {**specs, "day": {"unit": "D", "default": "never"}})


def test_partitions_can_be_ignored(tmp_path: Path) -> None:
    (tmp_path / "p" / "user=7").mkdir(parents=True)
    parquet.write_table(pa.table({"user": [1, 2], "label": [0.0, 1.0]}), tmp_path / "p" / "user=7" / "a.parquet")
    config = load(tmp_path, data={"train": "p"})
    with pytest.raises(ValueError, match="its folder name has 7"):
        next(iter(dataset_of(config, features_of(config), config.data.train)))
    config = load(tmp_path, ["data.partitions=false"], data={"train": "p"})
    (batch,) = dataset_of(config, features_of(config), config.data.train)
    assert dense(batch, "user").tolist() == [1, 2]


def test_options_that_do_not_apply_to_weights_are_refused(tmp_path: Path) -> None:
    column = pa.array([[(1, 0.5)], [], [(3, 1.0)]], pa.map_(pa.int64(), pa.float32()))
    for options in ({"length": 2}, {"unit": "s"}, {"scale": 1}):
        with pytest.raises(
            ConfigError, match="data.columns.x: length, unit, format and scale do not apply to ids with"
        ):
            batch_of(tmp_path, {"x": column}, {"x": options})


def test_lists_of_lists_are_refused_even_if_they_are_as_many_as_the_rows(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"user": [[[1], [2]], []], "label": [0.0, 1.0]}), tmp_path / "n.parquet")
    config = load(tmp_path, data={"train": "n.parquet"})
    (batch,) = dataset_of(config, features_of(config), config.data.train)
    with pytest.raises(TypeError, match=r"features.user has 2 levels of lists: a row must be one list of ids"):
        step_of(config)(batch)
