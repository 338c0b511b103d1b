from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import (
    Callback,
    Evaluate,
    JsonLog,
    PeriodicCheckpoint,
    Profile,
    ProgressBar,
    SaveCheckpoint,
    TensorBoard,
    Train,
    Trainer,
)
from recis_hybrid.saver import Saver
from recis_hybrid.saver.storage.step_directory import step_name
from tests.support.small import make_batches, make_step


def run(callbacks: list[Callback], **options: Any) -> Trainer:
    batches = make_batches(5)
    trainer = Trainer(make_step(), batches, batches, metrics={"auc": AUC()}, callbacks=callbacks, log_every=2)
    trainer.fit([Train(), Evaluate()], **options)
    return trainer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_order_of_calls(tmp_path: Path) -> None:
    calls: list[str] = []

    def record(hook: str) -> Any:
        return lambda self, trainer, *args: calls.append(hook)

    hooks = [name for name in vars(Callback) if name.startswith(("before_", "after_"))]
    recorder = type("Recorder", (Callback,), {hook: record(hook) for hook in hooks})()
    trainer = Trainer(make_step(), make_batches(1), saver=Saver(tmp_path), callbacks=[recorder])
    trainer.fit([Train(), SaveCheckpoint()])
    assert calls == [
        "before_fit",
        "before_stage",
        "before_step",
        "before_backward",
        "after_backward",
        "after_step",
        "after_stage",
        "before_stage",
        "before_save",
        "after_save",
        "after_stage",
        "after_fit",
    ]
    assert set(calls) == set(hooks)


def test_the_log_is_a_json_lines_file(tmp_path: Path) -> None:
    trainer = run([JsonLog(tmp_path / "run" / "log.jsonl")])
    records = lines(tmp_path / "run" / "log.jsonl")
    assert [(record["event"], record["step"]) for record in records] == [
        ("train", 2),
        ("train", 4),
        ("train", 5),
        ("eval", 5),
        ("tables", 5),
    ]
    assert records[3]["eval/auc"] == trainer.figures["eval"]["auc"]
    assert math.isfinite(records[0]["loss"])


def test_non_finite_numbers_are_null_in_the_log(tmp_path: Path) -> None:
    batches = make_batches(1)
    batches[0]["label"] = batches[0]["label"] * 0  # type: ignore[operator]
    log = JsonLog(tmp_path / "log.jsonl")
    trainer = Trainer(make_step(), eval_data=batches, metrics={"auc": AUC()}, callbacks=[log])
    with pytest.warns(RuntimeWarning, match="AUC is undefined, returning NaN: it needs both classes"):
        trainer.fit([Evaluate()])
    assert lines(tmp_path / "log.jsonl")[0]["eval/auc"] is None


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    class Crash(Callback):
        def after_step(self, trainer: Trainer) -> None:
            if trainer.steps_done == 7:
                raise KeyboardInterrupt

    def trainer(*more: Callback) -> Trainer:
        callbacks = [JsonLog(tmp_path / "log.jsonl"), PeriodicCheckpoint(steps=4), *more]
        return Trainer(make_step(), make_batches(10), saver=Saver(tmp_path), callbacks=callbacks, log_every=1)

    crashed = trainer(Crash())
    with pytest.raises(KeyboardInterrupt):
        crashed.fit([Train()])
    crashed.saver = None
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"event": "train", "st')  # truncated by a crash
    trainer().fit([Train()], resume="latest")
    assert [record["step"] for record in lines(tmp_path / "log.jsonl") if record["event"] == "train"] == [*range(1, 11)]


def test_the_bar_shows_loss_samples_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    run([ProgressBar()])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "5/5" in captured.err
    assert "samples/s" in captured.err
    assert "step 5, eval: auc 1.00000" in captured.err


def test_only_rank_0_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr("recis_hybrid.embedding.engine.group_of", lambda group: None)  # there is no group of ranks
    callbacks = [ProgressBar(), JsonLog(tmp_path / "log"), TensorBoard(tmp_path / "tb"), Profile(tmp_path / "trace")]
    run(callbacks)
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within tensorboard
def test_tensorboard_has_every_figure(tmp_path: Path) -> None:
    run([TensorBoard(tmp_path), log := JsonLog(tmp_path / "log.jsonl")])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert log is not None
    tags = set(events.Tags()["scalars"])
    assert {
        "train/loss",
        "train/samples_per_s",
        "time/data",
        "time/lookup",
        "time/towers",
        "time/update",
        "rows/id",
        "train/admitted",
        "train/evicted",
        "memory/tables",
        "memory/process",
        "eval/auc",
        "lr/sparse",
    } <= tags
    logged = [r["loss"] for r in lines(tmp_path / "log.jsonl") if r["event"] == "train"]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 5]


def test_the_trace_covers_the_requested_steps(tmp_path: Path) -> None:
    run([Profile(tmp_path / "trace.json", first=2, steps=2)])
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert sum(name.startswith("Optimizer.step#Adam") for name in names) == 2 * 2
    assert all({"ts", "dur", "pid", "tid"} <= event.keys() for event in trace["traceEvents"] if event.get("ph") == "X")


def is_delta(path: Path) -> bool:
    return "previous" in json.loads((path / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("whole_every", "deltas"),
    [
        # The first has no base, and that of step 9 is the stage's. Steps are counted, not checkpoints.
        (3, {2: False, 4: True, 6: False, 8: True, 9: False, 10: True, 12: False, 14: True}),
        (1, dict.fromkeys([2, 4, 6, 8, 9, 10, 12, 14], False)),
    ],
)
def test_incremental_checkpoints_by_step(tmp_path: Path, whole_every: int, deltas: dict[int, bool]) -> None:
    saver = Saver(tmp_path, keep=None)
    callbacks = [PeriodicCheckpoint(steps=2, whole_every=whole_every)]
    trainer = Trainer(make_step(), make_batches(9), saver=saver, callbacks=callbacks)
    trainer.fit([Train(), SaveCheckpoint(), Train(max_steps=6)])
    assert {step: is_delta(tmp_path / step_name(step)) for step in saver.steps()} == deltas


def test_checkpoints_by_time_are_counted_across_restarts(tmp_path: Path) -> None:
    for number in range(1, 4):
        callbacks = [PeriodicCheckpoint(seconds=1e-9, whole_every=4)]
        trainer = Trainer(make_step(), make_batches(9), saver=Saver(tmp_path, keep=None), callbacks=callbacks)
        trainer.fit([Train(max_steps=3 * number)], resume="latest")
        assert trainer.steps_done == 3 * number
        trainer.saver = None
    # The fourth and the eighth are whole, and so is the first, which has no base.
    deltas = [step for step in range(1, 10) if is_delta(tmp_path / step_name(step))]
    assert deltas == [2, 3, 5, 6, 7, 9]


def test_incremental_checkpoints_by_time(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=None)
    callbacks = [PeriodicCheckpoint(seconds=1e-9, whole_every=2)]
    Trainer(make_step(), make_batches(4), saver=saver, callbacks=callbacks).fit([Train()])
    assert [is_delta(tmp_path / step_name(step)) for step in saver.steps()] == [False, False, True, False]
