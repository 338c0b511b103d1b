"""Logs of trackers, written by the real packages without a network, and the digests of checkpoints in all logs."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import (
    Callback,
    CallbackError,
    Evaluate,
    JsonLog,
    MLflow,
    PeriodicCheckpoint,
    SaveCheckpoint,
    TensorBoard,
    Train,
    Trainer,
    WandB,
)
from recis_hybrid.saver import CheckpointError, Saver
from recis_hybrid.saver.storage.step_directory import step_name
from tests.support.small import Records, make_batches, make_step

CONFIG = {"train": {"epochs": 1}, "run": "here"}


def trainer_of(folder: Path, callbacks: list[Callback], *, asynchronous: bool = False) -> Trainer:
    batches = make_batches(6)
    saver = Saver(folder, keep=None, async_save=asynchronous)
    every = PeriodicCheckpoint(steps=2)
    return Trainer(
        make_step(), batches, batches, metrics={"auc": AUC()}, saver=saver, callbacks=[every, *callbacks], log_every=1
    )


def digests(folder: Path) -> dict[int, str]:
    return {
        step: hashlib.sha256((folder / step_name(step) / "manifest.json").read_bytes()).hexdigest()
        for step in Saver(folder).steps()
    }


class Crash(Callback):
    def after_step(self, trainer: Trainer) -> None:
        if trainer.steps_done == 5:
            raise KeyboardInterrupt


@pytest.fixture
def mlflow_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlruns").as_uri()


@pytest.fixture
def wandb_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, save_code=False, disable_git=True)
    yield {"mode": "offline", "dir": str(tmp_path), "settings": settings}
    wandb.teardown()


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """Return the values that offline runs have logged."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in folder.glob("**/offline-run-*/*.wandb"):
        for data in leveldb_log(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format: blocks of 32 KiB, in which a record may be divided."""
    at, record = 7, b""  # after wandb's own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too short for a header
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_digest_is_logged_once(tmp_path: Path, asynchronous: bool) -> None:
    records, log = Records(), JsonLog(tmp_path / "log.jsonl")
    trainer = trainer_of(tmp_path, [records, log], asynchronous=asynchronous)
    trainer.fit([Train(), Evaluate(), SaveCheckpoint()])
    saved = digests(tmp_path)
    assert sorted(saved) == [2, 4, 6]
    assert {record["step"]: record["digest"] for record in records.of("saved")} == saved
    assert len(records.of("saved")) == 3
    assert [record["path"] for record in records.of("saved")] == [str(tmp_path / step_name(step)) for step in saved]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["step"]: line["digest"] for line in lines if line["event"] == "saved"} == saved


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_interrupted_training_logs_the_digest_of_its_last_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    records = Records()
    trainer = trainer_of(tmp_path, [records, Crash()], asynchronous=asynchronous)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit([Train()])
    assert {record["step"]: record["digest"] for record in records.of("saved")} == digests(tmp_path)
    trainer.saver = None
    resumed = Records()
    trainer_of(tmp_path, [resumed]).fit([Train()], resume="latest")
    (loaded,) = resumed.of("loaded")
    assert loaded["step"] == 4
    assert loaded["digest"] == digests(tmp_path)[4]


def test_a_failed_save_in_the_background_has_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records()
    trainer = trainer_of(tmp_path, [records], asynchronous=True)

    def fail(*args: Any) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr("recis_hybrid.saver.saver.write_checkpoint", fail)
    with pytest.raises(CallbackError, match="PeriodicCheckpoint raised in after_step .* the disk is full"):
        trainer.fit([Train()])
    assert len(records.of("save")) == 1
    assert records.of("saved") == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within tensorboard
def test_tensorboard_has_the_digests(tmp_path: Path) -> None:
    trainer_of(tmp_path / "run", [TensorBoard(tmp_path / "tensorboard")]).fit([Train()])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    texts = events.Tensors("checkpoint/digest/text_summary")
    assert {event.step: event.tensor_proto.string_val[0].decode() for event in texts} == digests(tmp_path / "run")


def test_mlflow_has_figures_configuration_and_digests_across_a_restart(tmp_path: Path, mlflow_uri: str) -> None:
    from mlflow import MlflowClient

    run, records = tmp_path / "run", Records()
    first = MLflow("clicks", config=CONFIG, name="first", tracking_uri=mlflow_uri)
    interrupted = trainer_of(run, [first, Crash()])
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit([Train(), Evaluate()])
    interrupted.saver = None
    client = MlflowClient(mlflow_uri)
    assert first.run_id is not None
    assert client.get_run(first.run_id).info.status == "FAILED"

    changed = CONFIG | {"train": {"epochs": 2, "lr": 0.5}}
    second = MLflow("clicks", config=changed, tracking_uri=mlflow_uri)
    trainer = trainer_of(run, [second, records])
    trainer.fit([Train(), Evaluate()], resume="latest")
    assert second.run_id == first.run_id
    found = client.get_run(first.run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "first")
    assert found.data.params == {"train.epochs": "1", "run": "here", "train.lr": "0.5"}
    assert found.data.tags["resumed.train.epochs"] == "2"
    assert found.data.metrics["eval/auc"] == trainer.figures["eval"]["auc"]
    losses = client.get_metric_history(first.run_id, "train/loss")
    # Step 5 was trained by both, bitwise equally.
    assert [metric.step for metric in losses] == [1, 2, 3, 4, 5, 5, 6]
    assert losses[-1].value == records.of("train")[-1]["loss"]
    saved = digests(run)
    assert {step: found.data.tags[f"checkpoint.step_{step:06d}"] for step in saved} == saved
    assert found.data.tags["checkpoint.digest"] == saved[6]
    # The digest in a bundle finds the run.
    (experiment,) = client.search_experiments(filter_string="name = 'clicks'")
    by_digest = client.search_runs([experiment.experiment_id], f"tags.`checkpoint.step_000004` = '{saved[4]}'")
    assert [each.info.run_id for each in by_digest] == [first.run_id]


def test_wandb_has_figures_configuration_and_digests_across_a_restart(
    tmp_path: Path, wandb_options: dict[str, Any]
) -> None:
    import wandb

    run, records = tmp_path / "run", Records()
    first = WandB("clicks", config=CONFIG, **wandb_options)
    interrupted = trainer_of(run, [first, Crash()])
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit([Train(), Evaluate()])
    interrupted.saver = None
    # Runs of one id that begin within a second would share a folder.
    (tmp_path / "second").mkdir()
    second = WandB("clicks", config=CONFIG, **{**wandb_options, "dir": str(tmp_path / "second")})
    trainer = trainer_of(run, [second, records])
    trainer.fit([Train(), Evaluate()], resume="latest")
    assert second.run_id == first.run_id is not None
    wandb.teardown()  # files are complete once wandb's service has ended
    history = wandb_history(tmp_path)
    # Each of the two trainings has a file.
    assert sorted(row["step"] for row in history if "train/loss" in row) == [1, 2, 3, 4, 5, 5, 6]
    losses = {row["step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert losses[6] == records.of("train")[-1]["loss"]
    assert [row["eval/auc"] for row in history if "eval/auc" in row] == [trainer.figures["eval"]["auc"]]
    assert {row["step"]: row["checkpoint/digest"] for row in history if "checkpoint/digest" in row} == digests(run)


def test_only_rank_0_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_uri: str, wandb_options: dict[str, Any]
) -> None:
    callbacks: list[Callback] = [MLflow("clicks", tracking_uri=mlflow_uri), WandB("clicks", **wandb_options)]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr("recis_hybrid.embedding.engine.group_of", lambda group: None)  # there is no group of ranks
    Trainer(make_step(), make_batches(2), callbacks=callbacks, log_every=1).fit([Train()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("make", "package"), [(MLflow, "mlflow"), (WandB, "wandb")])
def test_a_missing_package_is_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, make: Any, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{make.__name__}: there is no module .*install recis_hybrid\[{package}\]"):
        make("clicks")
