"""Problems that ``recis-hybrid train --check`` reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from recis_hybrid.app import cli
from tests.support.configs import COLUMNS, small_config, write_csv

HASHED = {"ops": [{"hash": {"kind": "farm"}}], "dim": 4}


def check(folder: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> tuple[int, str]:
    """Write and check a configuration that reads existing files; return the exit status and stderr."""
    existing = {path: path.read_bytes() for path in folder.glob("*.csv")}
    path = small_config(folder, **changes)
    for file, data in existing.items():
        file.write_bytes(data)
    before = sorted(folder.rglob("*"))
    status = cli.main(["train", str(path), "--check"])
    assert sorted(folder.rglob("*")) == before  # nothing is written
    output = capsys.readouterr()
    assert ("no problems found" in output.out) == (status == 0)
    return status, output.err


def test_a_valid_configuration_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, error = check(tmp_path, capsys)
    assert status == 0
    assert "data.train: 64 rows, 4 batches; the first has a loss of 0." in error
    assert "data.evaluate: 40 rows, 3 batches; the first has a loss of 0." in error


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"user": {"dim": 4}, "site": {"dim": 4}}, "features.site is text: ids must be integers; hash it with ops"),
        ({"user": {"dim": 4}, "site": {}}, "features.site is text and has no dim: hash it and give it a dim"),
        ({"price": {"dim": 4}}, "features.price is torch.float64: ids must be integers; bucketize it"),
        ({"user": {"dim": 4}, "prize": {}}, "has no column 'prize'; it has user, site, price, label"),
        (
            {"user": {"dim": 4, "ops": [{"hash": 3}]}},
            "features.user.ops[0].hash must be a mapping of parameters, got 3",
        ),
        ({"user": {"dim": 4, "ops": [{"vocabulary": {"source": "w.txt"}}]}}, "features.user.ops[0]: [Errno 2] No such"),
        ({"user": {"dim": 4, "table": "t"}, "site": {**HASHED, "dim": 8, "table": "t"}}, "share the table 't'"),
        ({"user": {}}, "features: at least one must have a dim"),
    ],
)
def test_features_that_do_not_fit_are_named(
    tmp_path: Path, features: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = check(tmp_path, capsys, features=features)
    assert status in (1, 2)
    assert message in error


def test_all_problems_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "train.csv", {**COLUMNS, "label": lambda row: row})
    status, error = check(tmp_path, capsys, features={"user": {"dim": 4}, "site": {"dim": 4}, "price": {"dim": 4}})
    assert status == 2
    faults = [line.strip().split()[0] for line in error.splitlines()[1:]]
    assert faults == ["data.label", "features.site", "features.price"]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            lambda row: row % 5 + 1,
            "data.label 'label' must be 0 or 1 for binary cross entropy, got values from 1 to 5",
        ),
        (lambda row: -(row % 2), "got values from -1 to 0"),
        (lambda row: 1, "data.label 'label' is 1 in all 64 rows: there is nothing to learn"),
        (lambda row: "yes" if row % 2 else "no", "data.label 'label' contains strings in"),
        (lambda row: "" if row == 3 else row % 2, "in a configuration it is data.columns.label.default"),
        (lambda row: "inf" if row == 3 else row % 2, "data.label 'label' contains NaN or infinities"),
    ],
)
def test_invalid_labels_are_named(tmp_path: Path, label: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "train.csv", {**COLUMNS, "label": label})
    status, error = check(tmp_path, capsys, data={"train": "train.csv"})
    assert status in (1, 2)
    assert message in error


def test_valid_labels_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in (
        lambda row: row % 2,
        lambda row: row % 2 == 1,
        lambda row: f"{bool(row % 2)}".lower(),
        lambda row: row % 3 / 2,
        lambda row: int(row == 63),
    ):
        write_csv(tmp_path / "train.csv", {**COLUMNS, "label": label})
        assert check(tmp_path, capsys, data={"train": "train.csv", "batch_size": 16})[0] == 0


def test_labels_of_evaluation_data_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "eval.csv", {**COLUMNS, "label": lambda row: 0}, rows=40)
    status, error = check(tmp_path, capsys)
    assert status == 2
    assert "data.evaluate" in error
    assert "is 0 in all 40 rows" in error


def test_nulls_and_nonfinite_numbers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "train.csv", {**COLUMNS, "price": lambda row: "" if row % 3 else 1.5})
    data = {"train": "train.csv"}
    status, error = check(tmp_path, capsys, data=data)
    assert (status, "in a configuration it is data.columns.price.default" in error) == (1, True)
    assert check(tmp_path, capsys, data={**data, "columns": {"price": {"default": 0.25}}})[0] == 0
    write_csv(tmp_path / "train.csv", {**COLUMNS, "price": lambda row: "inf" if row % 3 else 1.5})
    status, error = check(tmp_path, capsys, data=data)
    assert (status, "'price' (42 of 64 values) not finite" in error) == (2, True)


def test_negative_ids_cause_a_remark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "train.csv", {**COLUMNS, "user": lambda row: -1 if row % 4 == 0 else row})
    status, error = check(tmp_path, capsys, data={"train": "train.csv"})
    assert (status, "features.user: 16 of 64 ids are negative, such as -1" in error) == (0, True)
    # Negative hashes and large unsigned ids are not reported.
    columns = {"id": pa.array([2**63 + 1, 2], pa.uint64()), "site": ["a", "b"], "label": [0, 1]}
    parquet.write_table(pa.table(columns), tmp_path / "u.parquet")
    status, error = check(tmp_path, capsys, data={"train": "u.parquet"}, features={"id": {"dim": 2}, "site": HASHED})
    assert (status, "negative" in error) == (0, False)


def test_lists_and_groups_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"user": [1, 2], "bag": [[1, 2], [3]], "name": ["a", "b"], "label": [0, 1], "pair": [[1.0, 2.0]] * 2}
    parquet.write_table(pa.table(columns), tmp_path / "l.parquet")
    for features, more, message in (
        ({"bag": {}}, {}, "features.bag is a list of any length and has no dim"),
        ({}, {"groups": "name"}, "data.groups 'name' must be one integer per row, got text"),
        ({}, {"groups": "bag"}, "data.groups 'bag' must be one integer per row, got lists of torch.int64"),
        ({}, {"label": "bag"}, "bag"),
        ({"pair": {}}, {"columns": {"pair": {"length": 3}}}, "has 2 lists of length 2 instead of 3"),
    ):
        status, error = check(
            tmp_path, capsys, data={"train": "l.parquet", **more}, features={"user": {"dim": 4}, **features}
        )
        assert status in (1, 2)
        assert message in error
    pair = {"train": "l.parquet", "columns": {"pair": {"length": 2}}}
    assert check(tmp_path, capsys, data=pair, features={"user": {"dim": 4}, "pair": {}, "bag": {"dim": 2}})[0] == 0


def test_a_configuration_is_compared_with_the_run_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_config(tmp_path)
    assert cli.main(["train", str(path), "--quiet"]) == 0
    assert cli.main(["train", str(path), "--check", "--resume", "model.hidden=[8]"]) == 2
    assert "model.hidden is [4] in the run, got [8]" in capsys.readouterr().err
    assert cli.main(["train", str(path), "--check"]) == 0
    assert cli.main(["train", str(path), "--check", "data.train=nowhere.csv"]) == 1
    assert "nowhere.csv" in capsys.readouterr().err
