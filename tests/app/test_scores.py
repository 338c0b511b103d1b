"""Scores written to a folder: ``recis-hybrid predict --out FOLDER`` and ``LoadedRun.write_scores``."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import dataset, parquet

from recis_hybrid.app import cli, load_run
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import scores
from tests.support.configs import COLUMNS, small_config, write_csv
from tests.support.near import assert_near
from tests.support.programs import on_two_ranks

ROWS, BATCH = 104, 16
FILES = [
    "rows-000000000000-000000000032.00000-of-00001.parquet",
    "rows-000000000032-000000000064.00000-of-00001.parquet",
    "rows-000000000064-000000000096.00000-of-00001.parquet",
    "rows-000000000096-000000000104.00000-of-00001.parquet",
]
KILLED = """
import os, signal, sys
from recis_hybrid.app import cli
from recis_hybrid.pipelines import scores

publish, published = scores._publish, []


def die_after_two(partial, path):
    if os.environ["RANK"] == "1" and len(published) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    published.append(path)
    publish(partial, path)


scores._publish = die_after_two
cli.main(ARGUMENTS)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run``, and with ``data.csv`` of as many rows as in ROWS."""
    folder = tmp_path_factory.mktemp("scored")
    assert cli.main(["train", str(small_config(folder)), "--quiet"]) == 0
    write_csv(folder / "data.csv", {"row": lambda row: row, **COLUMNS}, rows=ROWS)
    return folder


def arguments(run: Path, out: Path, columns: str = "row,label") -> list[str]:
    where = [str(run / "run"), str(run / "data.csv"), "--out", str(out)]
    return ["predict", *where, "--columns", columns, "--rows-per-file", "30", "--quiet"]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.parquet"))


def rows_of(out: Path) -> dict[str, Any]:
    """Return the columns of all files, by row."""
    found: dict[str, Any] = dataset.dataset(out, format="parquet").to_table().sort_by("row").to_pydict()
    assert found["row"] == list(range(ROWS))
    return found


@pytest.fixture(scope="module")
def expected(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The columns that a single file has."""
    out = tmp_path_factory.mktemp("file") / "scores.parquet"
    assert cli.main([*arguments(run, out)[:-3], "--quiet"]) == 0
    columns: dict[str, Any] = parquet.read_table(out).to_pydict()
    return columns


def test_a_folder_has_the_scores_of_a_file(
    run: Path, expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    assert cli.main(arguments(run, out)) == 0
    assert f"{out}: {ROWS} rows, scored by step 4 of" in capsys.readouterr().out
    assert names(out) == FILES
    assert rows_of(out) == expected
    record = json.loads((out / scores.RECORD).read_text())
    assert (record["complete"], record["rows"], record["source"]["step"]) == (True, ROWS, 4)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix}
    assert cli.main(arguments(run, out)) == 0  # nothing is left to do
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix}


def test_scores_have_the_metrics_of_the_evaluation_bitwise(run: Path, tmp_path: Path) -> None:
    loaded = load_run(run / "run")
    assert loaded.write_scores(tmp_path / "out", run / "eval.csv", columns=["label"], rows_per_file=16) == 40
    found = dataset.dataset(tmp_path / "out", format="parquet").to_table().to_pydict()
    auc = AUC()
    auc.update(torch.tensor(found["score"]), torch.tensor(found["label"]))
    assert float(auc.compute()) == loaded.evaluate()["auc"]


def test_the_progress_is_shown(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(run, tmp_path / "out")[:-1]) == 0
    assert f"{ROWS}/{ROWS}" in capsys.readouterr().err


@pytest.mark.parametrize("turns", [1, 3, 5])
def test_an_interrupted_run_continues(
    run: Path, expected: dict[str, Any], turns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, convert, scored, limit = tmp_path / "scores", scores.arrow_batch, list[int](), turns

    def fails(batch: Any, types: Any) -> Any:
        if len(scored) == limit:
            raise OSError("no space left on device")
        table = convert(batch, types)
        scored.append(table.num_rows)
        return table

    monkeypatch.setattr(scores, "arrow_batch", fails)
    assert cli.main(arguments(run, out)) == 1
    assert names(out) == FILES[: turns // 2]
    assert not list(out.glob(".*.partial"))
    assert json.loads((out / scores.RECORD).read_text())["complete"] is False
    limit, scored[:] = 100, []
    (out / ".00000-of-00001.partial").write_bytes(b"left behind by a kill")
    assert cli.main(arguments(run, out)) == 0
    assert sum(scored) == ROWS - 2 * BATCH * (turns // 2)
    assert names(out) == FILES
    assert rows_of(out) == expected


def test_two_ranks_and_a_kill(run: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "scores"
    killed = KILLED.replace("ARGUMENTS", repr(arguments(run, out)))
    assert on_two_ranks(killed, tmp_path).returncode != 0
    before = names(out)
    assert {name for name in before if "00001-of-00002" in name} == {
        "rows-000000000000-000000000032.00001-of-00002.parquet",
        "rows-000000000032-000000000064.00001-of-00002.parquet",
    }
    done = on_two_ranks(f"from recis_hybrid.app import cli\nassert cli.main({arguments(run, out)!r}) == 0", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{ROWS} rows") == 1
    found = rows_of(out)
    assert found["label"] == expected["label"]
    assert_near(found["score"], expected["score"])
    assert len(names(out)) == 8


def test_other_ranks_continue(run: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    """Continue on one rank what two ranks have begun; ranges of which a rank's file is missing are scored again."""
    out = tmp_path / "scores"
    done = on_two_ranks(f"from recis_hybrid.app import cli\nassert cli.main({arguments(run, out)!r}) == 0", tmp_path)
    assert done.returncode == 0, done.stderr
    (out / "rows-000000000064-000000000096.00001-of-00002.parquet").unlink()
    assert cli.main(arguments(run, out)) == 0
    found = names(out)
    assert [name for name in found if "of-00002" in name] == [name for name in found if name < "rows-000000000064"]
    assert found[4:] == FILES[2:]
    assert_near(rows_of(out)["score"], expected["score"])


def test_scores_of_something_else_are_not_continued(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    assert cli.main(arguments(run, out)) == 0
    for change, message in (
        (arguments(run, out, "row"), "has other scores: columns was ['row', 'label'] and is ['row']"),
        ([*arguments(run, out)[:2], str(run / "eval.csv"), *arguments(run, out, "label")[3:]], "order was"),
    ):
        assert cli.main(change) == 1
        assert message in capsys.readouterr().err
    (out / scores.RECORD).write_text('{"source": ')
    assert cli.main(arguments(run, out)) == 1
    assert "_scores.json is damaged; remove the folder" in capsys.readouterr().err
    assert names(out) == FILES


def test_folders_that_cannot_be_used_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "busy").mkdir()
    for name, message in (
        ("mine", "has files that are not of these scores (notes.txt); choose an empty folder"),
        ("file", "is a file; name a folder"),
        ("no/scores", "there is no folder"),
    ):
        assert cli.main(arguments(run, tmp_path / name)) == 1
        assert message in capsys.readouterr().err
    with (tmp_path / "busy" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.main(arguments(run, tmp_path / "busy")) == 1
    assert "another process is writing scores there" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_shuffled_data_is_refused(run: Path, tmp_path: Path) -> None:
    data = load_run(run / "run").data(run / "data.csv", shuffle=True)

    def score(batches: Any) -> Iterator[Any]:
        yield from batches

    with pytest.raises(ValueError, match="open it with shuffle=False"):
        scores.write_scores(tmp_path / "out", data, score, source={})
    assert not (tmp_path / "out").exists()
