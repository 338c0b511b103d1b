"""Evaluation and prediction: load_run, Trainer.predict, and the commands evaluate and predict."""

from __future__ import annotations

import csv
import gc
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from recis_hybrid.app import cli, load_run
from recis_hybrid.app.config import Config, ConfigError
from recis_hybrid.columnio import ColumnDataset, Dense, ShardOptions
from recis_hybrid.embedding import EmbeddingEngine
from recis_hybrid.features import FeatureEngine
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import Objective, Trainer, predict, write_predictions
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.saver import CheckpointError
from tests.support.columns import dense
from tests.support.configs import COLUMNS, small_config, write_csv
from tests.support.small import bce, make_batches, make_step

FEATURES: dict[str, Any] = {
    "user": {"dim": 4, "min_frequency": 2},
    "site": {"ops": [{"hash": {"kind": "farm"}}], "dim": 4, "combiner": "mean"},
    "price": {},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder with a run of two epochs, and the figures that training printed."""
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(
        folder,
        features=FEATURES,
        model={"hidden": []},
        optimizer={"sparse": "adam", "sparse_lr": 0.05},
        train={
            "epochs": 2,
            "checkpoint_steps": 3,
            "keep": 5,
            "precision": "bfloat16",
            "metrics": ["auc", "logloss", "mse"],
        },
    )
    figures: dict[str, Any] = {}
    for epochs in (1, 2):
        gc.collect()
        capture = pytest.MonkeyPatch()
        lines: list[str] = []
        capture.setattr("builtins.print", lambda *args, lines=lines, **_: lines.append(str(args[0])))
        resume = ["--resume"] if epochs == 2 else []
        assert cli.main(["train", str(config), "--quiet", f"train.epochs={epochs}", *resume]) == 0
        capture.undo()
        figures[str(epochs)] = json.loads(lines[-1])
    return folder, figures


def test_evaluation_reproduces_the_figures_of_training_bitwise(
    trained: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, figures = trained
    for step, epochs in ((8, "2"), (4, "1")):
        assert cli.main(["evaluate", str(folder / "run"), "--step", str(step)]) == 0
        found = json.loads(capsys.readouterr().out)
        expected = {name: value for name, value in figures[epochs].items() if name.startswith("eval/")}
        assert len(expected) == 3
        assert found == {"step": step, **expected}
    # The same rows by path, with another metric.
    run = load_run(folder / "run")
    assert run.step == 8
    again = run.evaluate([folder / "eval.csv"], {"auc": AUC()})
    assert again == {"auc": figures["2"]["eval/auc"]}


def test_an_earlier_checkpoint_has_the_figures_of_its_step(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = trained
    steps = sorted(int(path.name[5:]) for path in (folder / "run").glob("step_*"))
    assert steps == [3, 4, 6, 8]
    early, late = (load_run(folder / "run", step=step) for step in (6, 8))
    assert (early.step, late.step) == (6, 8)
    assert late.evaluate()["mse"] == figures["2"]["eval/mse"] != early.evaluate()["mse"]
    assert load_run(folder / "run" / "step_000006").evaluate() == early.evaluate()
    with pytest.raises(CheckpointError, match="is not of step 8; name the run's folder"):
        load_run(folder / "run" / "step_000006", step=8)
    with pytest.raises(CheckpointError, match=r"complete checkpoint of step 7, it holds \[3, 4, 6, 8\]"):
        load_run(folder / "run", step=7)


def test_a_loaded_run_has_model_features_and_data(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = load_run(folder / "run")
    assert run.columns == ("user", "site", "price")
    assert isinstance(run.features, FeatureEngine)
    assert not run.model.training
    assert not any(parameter.requires_grad for parameter in run.model.parameters())
    engine = run.model.engine
    assert isinstance(engine, EmbeddingEngine)
    assert all(table.read_only and not table.layout.state for table in engine.tables)
    rows = sum(len(table) for table in engine.tables)
    data = run.data(folder / "eval.csv", columns=["label"], batch_size=7)
    batches = list(data)
    assert [len(dense(batch, "user")) for batch in batches] == [7, 7, 7, 7, 7, 5]
    scores = torch.cat([run(batch) for batch in batches])
    # Reference: the same features, the model's logits in bfloat16, a sigmoid.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = torch.cat([run.model(run.features(batch)).float() for batch in batches])
    assert torch.equal(scores, logits.sigmoid())
    # Prediction does not insert unseen ids.
    run({"user": torch.tensor([10**9]), "site": RaggedTensor.from_strings(["new"]), "price": torch.tensor([1.0])})
    assert sum(len(table) for table in engine.tables) == rows


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_predictions_keep_the_order_of_the_rows(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    unlabelled = {name: cell for name, cell in COLUMNS.items() if name != "label"}
    write_csv(tmp_path / "data.csv", {"row": lambda row: 1000 - row, **unlabelled}, rows=50)
    out = tmp_path / f"scores{suffix}"
    arguments = ["predict", str(folder / "run"), str(tmp_path / "data.csv"), "--out", str(out)]
    assert cli.main([*arguments, "--columns", "row,site"]) == 0
    assert f"{out}: 50 rows, scored by step 8 of" in capsys.readouterr().out
    if suffix == ".csv":
        with open(out, newline="") as file:
            rows = [{**row, "row": int(row["row"]), "score": float(row["score"])} for row in csv.DictReader(file)]
    else:
        rows = parquet.read_table(out).to_pylist()
    assert list(rows[0]) == ["row", "site", "score"]
    assert [row["row"] for row in rows] == [1000 - number for number in range(50)]
    assert [row["site"] for row in rows] == [f"s{number % 3}" for number in range(50)]
    run = load_run(folder / "run")
    expected = torch.cat([run(batch) for batch in run.data(tmp_path / "data.csv")])
    assert torch.tensor([row["score"] for row in rows], dtype=torch.float32).tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", out.name]


def test_columns_of_every_type_are_passed_through(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = trained
    columns = {
        "user": pa.array([1, 2, 3]),
        "site": pa.array(["s0", "s1", "é"]),
        "price": pa.array([0.5, 1.5, 2.5]),
        "big": pa.array([2**63, 2**64 - 1, 5], pa.uint64()),
        "bag": pa.array([[1, 2], [], [3]]),
        "words": pa.array([["a", "b"], [], ["é"]]),
        "raw": pa.array([b"\xff", b"", b"x"]),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "bigs": pa.array([[2**63], [], [1]], pa.list_(pa.uint64())),
        "flag": pa.array([True, False, True]),
        "pair": pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2)),
    }
    parquet.write_table(pa.table(columns), tmp_path / "d.parquet")
    out = tmp_path / "out.parquet"
    names = list(columns)
    arguments = ["predict", str(folder / "run"), str(tmp_path / "d.parquet"), "--out", str(out)]
    assert cli.main([*arguments, "--columns", ",".join(names)]) == 0
    found = parquet.read_table(out)
    assert found.column_names == [*names, "score"]
    for name in names:
        assert found[name].to_pylist() == columns[name].to_pylist(), name
    assert found["site"].type == pa.large_string()


def test_invalid_predictions_are_named_and_leave_no_file(
    trained: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = trained
    run, data = str(folder / "run"), str(folder / "eval.csv")
    parquet.write_table(
        pa.table({"user": [1], "site": ["a"], "price": [1.0], "bag": [[1]], "score": [1.0]}), tmp_path / "lists.parquet"
    )
    (tmp_path / "there.csv").write_text("mine")
    lists = str(tmp_path / "lists.parquet")
    for arguments, status, message in (
        ([data, "--out", "a.txt"], 1, "the suffix of a file must be one of .parquet, .csv, got '.txt'"),
        ([data, "--out", str(tmp_path / "there.csv")], 1, "already exists; remove it, or choose another name"),
        ([data, "--out", str(tmp_path / "no" / "a.csv")], 1, "there is no folder"),
        ([data, "--out", str(tmp_path / "a.csv"), "--columns", "usr"], 1, "has no column 'usr'"),
        (
            [lists, "--out", str(tmp_path / "a.csv"), "--columns", "bag"],
            1,
            "CSV cannot hold lists, but the columns ['bag']",
        ),
        ([lists, "--out", str(tmp_path / "a.csv"), "--columns", "score"], 1, "have the names of scores"),
        ([str(tmp_path / "no.csv"), "--out", str(tmp_path / "a.csv")], 1, "no.csv does not exist"),
    ):
        assert cli.main(["predict", run, *arguments]) == status, arguments
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lists.parquet", "there.csv"]
    assert (tmp_path / "there.csv").read_text() == "mine"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["predict", run, data, "--out", str(tmp_path / "a.csv")]) == 2
    assert "needs a single process: start it without torchrun" in capsys.readouterr().err


def test_folders_that_are_not_runs_are_named(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="did you mean .*/run, the run of .*config.yaml"):
        load_run(folder)
    with pytest.raises(CheckpointError, match="has no complete checkpoint; train first"):
        load_run(tmp_path)
    moved = tmp_path / "moved"
    shutil.copytree(folder / "run", moved)
    assert load_run(moved).evaluate() == load_run(folder / "run").evaluate()
    with pytest.raises(
        ConfigError, match="finds no GPU" if not torch.cuda.is_available() else "must be a torch device"
    ):
        load_run(moved, device="cuda" if not torch.cuda.is_available() else "tpux")
    (moved / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="has no config.yaml, which `recis-hybrid train` writes"):
        load_run(moved)
    without = small_config(tmp_path, data={"train": "train.csv", "batch_size": 32})
    assert cli.main(["train", str(without), "--quiet"]) == 0
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    assert "has no data.evaluate; name the files to evaluate on" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "run"), str(tmp_path / "eval.csv")]) == 0
    write_csv(tmp_path / "bare.csv", {name: cell for name, cell in COLUMNS.items() if name != "label"})
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), str(tmp_path / "bare.csv")]) == 1
    assert "has no column 'label'" in capsys.readouterr().err


def test_undefined_metrics_are_null_in_json(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    write_csv(tmp_path / "ones.csv", {**COLUMNS, "label": lambda row: 1})
    with pytest.warns(RuntimeWarning):
        assert cli.main(["evaluate", str(folder / "run"), str(tmp_path / "ones.csv")]) == 0
    assert json.loads(capsys.readouterr().out)["eval/auc"] is None


def test_a_trainer_predicts(tmp_path: Path) -> None:
    batches = make_batches(3, rows=8)
    step = make_step()
    trainer = Trainer(step, batches, batches, transform=lambda batch: {**batch, "user": batch["id"] * 0})  # type: ignore[operator]
    found = list(trainer.predict(columns=["user"]))
    assert [list(batch) for batch in found] == [["user", "score"]] * 3
    for batch, source in zip(found, batches, strict=True):
        assert torch.equal(dense(batch, "user"), dense(source, "user"))  # not the transformed column
        assert torch.equal(dense(batch, "score"), step.predict(source)[""].scores)
    bare = [{"id": batch["id"]} for batch in batches]
    assert [batch["score"].tolist() for batch in trainer.predict(bare)] == [b["score"].tolist() for b in found]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="there is no source 'test'"):
        trainer.predict("test")
    with pytest.raises(KeyError, match="has no columns .*'usr'"):
        list(trainer.predict(columns=["usr"]))
    assert write_predictions(tmp_path / "a.parquet", trainer.predict(columns=["user"])) == 24


def test_objectives_are_scored_by_name() -> None:
    loss = {"click": Objective(loss=bce), "buy": Objective(loss=bce, label="other", link=torch.relu)}
    step = make_step(loss, ("click", "buy"))
    (batch,) = make_batches(1, rows=8)
    (found,) = predict(step, [{"id": batch["id"]}])
    assert list(found) == ["score.click", "score.buy"]
    assert torch.equal(dense(found, "score.buy"), step.predict(batch)["buy"].scores)


def test_padding_rows_are_not_predicted(tmp_path: Path) -> None:
    table = pa.table({"id": range(10), "name": [f"n{row}" for row in range(10)]})
    parquet.write_table(table, tmp_path / "a.parquet")
    step, rows = make_step(), {}
    for rank in (0, 1):
        data = ColumnDataset(
            tmp_path / "a.parquet",
            {"id": Dense(), "name": None},
            4,
            shard=ShardOptions(rank=rank, world_size=2, uneven="pad"),
        )
        for number, batch in enumerate(predict(step, data, columns=["id", "name"])):
            ids = dense(batch, "id").tolist()
            assert batch["name"].to_strings(decode=False) == [f"n{row}".encode() for row in ids]  # type: ignore[union-attr]
            assert len(dense(batch, "score")) == len(ids)
            rows[number, rank] = ids
    # Batches are assigned to ranks in turn, so sorting by (number, rank) restores the order.
    assert [row for key in sorted(rows) for row in rows[key]] == list(range(10))


def test_a_run_may_be_at_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path)
    url = f"memory://{tmp_path.name}/run"
    before = sorted(tmp_path.iterdir())
    assert cli.main(["train", str(config), f"run={url}", "--quiet", "train.checkpoint_steps=2"]) == 0
    gc.collect()
    more = ["train.epochs=2", "optimizer.sparse_lr=0.5", "train.keep=1"]
    capsys.readouterr()
    assert cli.main(["train", str(config), f"run={url}", "--quiet", "--resume", *more]) == 0
    output = capsys.readouterr()
    assert "continues from step 4 with optimizer.sparse_lr from 0.1 to 0.5" in output.err
    figures = {name: value for name, value in json.loads(output.out).items() if name.startswith("eval/")}
    assert cli.main(["evaluate", url]) == 0
    assert json.loads(capsys.readouterr().out) == {"step": 8, **figures}
    assert load_run(f"{url}/step_000008").step == 8
    assert load_config_of(url).optimizer.sparse_lr == 0.5
    assert sorted(tmp_path.iterdir()) == before  # no local folder is named like the URL
    assert cli.main(["report", url, "--out", str(tmp_path / "page.html")]) == 0
    assert "optimizer.sparse_lr from 0.1 to 0.5 at step 4" in (tmp_path / "page.html").read_text()
    for arguments, message in (
        (["report", url], "is not a local folder; name the page with --out"),
        (["evaluate", f"{url}-not"], "there is no such folder"),
        (["train", str(config), f"run={url}", "train.tensorboard=true"], "train.tensorboard needs a folder"),
    ):
        assert cli.main(arguments) in (1, 2)
        assert message in capsys.readouterr().err


def load_config_of(run: str) -> Config:
    return load_run(run).config
