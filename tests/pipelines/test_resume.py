"""Interrupted or stopped runs, when resumed, finish bitwise identical to uninterrupted ones."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from recis_hybrid.columnio import ColumnDataset, Window, Windows
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import (
    Callback,
    Evaluate,
    Mixture,
    PeriodicCheckpoint,
    SaveCheckpoint,
    Stage,
    TorchStep,
    Train,
    Trainer,
    WindowStages,
)
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Saver
from recis_hybrid.saver.storage.step_directory import step_name
from tests.support.devices import on_devices
from tests.support.small import assert_same, make_batches, make_step, state_of
from tests.support.workers import FORKED


def epochs(trainer: Trainer) -> Iterator[Stage]:
    for number in range(4):
        yield Train(epochs=1, name=f"epoch {number}")
        yield Evaluate()
        if trainer.figures["eval"]["auc"] > 0.7:
            yield Evaluate(name="again")
        yield SaveCheckpoint()


class Interrupt(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def after_step(self, trainer: Trainer) -> None:
        if trainer.steps_done == self.at:
            raise KeyboardInterrupt


def make_trainer(folder: Path | None, data: Any, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    device = options.pop("device", "cpu")
    step = make_step(device=device)
    saver = None if folder is None else Saver(folder, keep=None)
    checkpoint = options.pop("checkpoint", None) or PeriodicCheckpoint(steps=5)
    more = [] if folder is None else [checkpoint]
    step.schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.97) for o in step.optimizers.values()]
    options = {"metrics": {"auc": AUC()}, "seed": 3, **options}
    return Trainer(step, data, make_batches(2, device=device), saver=saver, callbacks=[*more, *callbacks], **options)


def fit_until_interrupt(trainer: Trainer, stages: Any, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(stages, **options)
    trainer.saver = None  # releases the folder, like the exit of a process


def dataset(tmp_path: Path, **options: Any) -> ColumnDataset:
    if not (tmp_path / "rows").exists():
        batches = make_batches(8)
        columns = {name: torch.cat([batch[name] for batch in batches]).numpy() for name in ("id", "label")}  # type: ignore[misc]
        (tmp_path / "rows").mkdir()
        pq.write_table(pa.table(columns), tmp_path / "rows" / "part.parquet", row_group_size=100)
    return ColumnDataset(tmp_path / "rows", ["id", "label"], 60, shuffle=True, **options)


def workers(tmp_path: Path) -> DataLoader[Batch]:
    return DataLoader(dataset(tmp_path), batch_size=None, num_workers=1, multiprocessing_context="fork")


def mixture(tmp_path: Path) -> Mixture:
    return Mixture({"a": dataset(tmp_path), "b": make_batches(3, seed=5)}, {"a": 2, "b": 1}, seed=2)


@FORKED
@pytest.mark.parametrize(
    ("kind", "at"),
    [*((kind, at) for kind in ("list", "dataset") for at in (3, 7, 9, 20)), ("loader", 7)],
)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resumed_run_finishes_bitwise_identical(tmp_path: Path, kind: str, at: int, prefetch: int) -> None:
    def data() -> Any:
        return make_batches(9) if kind == "list" else {"dataset": dataset, "loader": workers}[kind](tmp_path)

    whole = make_trainer(None, data())
    stages = [stage for stage in epochs_of(whole)]
    whole.fit([stage for stage in stages if not isinstance(stage, SaveCheckpoint)])
    stopped = make_trainer(tmp_path / "run", data(), [Interrupt(at)], prefetch=prefetch)
    fit_until_interrupt(stopped, epochs(stopped))
    resumed = make_trainer(tmp_path / "run", data(), prefetch=prefetch)
    resumed.fit(epochs(resumed), resume="latest")
    assert resumed.steps_done == 36
    assert_same(state_of(whole.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]
    assert resumed.figures["eval"] == whole.figures["eval"]
    assert resumed.figures["again"] == resumed.figures["eval"]


def epochs_of(trainer: Trainer) -> list[Stage]:
    return [stage for number in range(4) for stage in (Train(epochs=1, name=f"epoch {number}"), Evaluate())]


@on_devices
def test_a_run_resumes_from_an_incremental_checkpoint(tmp_path: Path, device: str) -> None:
    data = make_batches(9, device=device)

    def train(*callbacks: Callback) -> Trainer:
        deltas = PeriodicCheckpoint(steps=2, whole_every=50)
        return make_trainer(tmp_path / "run", data, callbacks, checkpoint=deltas, device=device)

    stages = [Train(epochs=4)]
    whole = make_trainer(None, data, device=device)
    whole.fit(stages)
    fit_until_interrupt(train(Interrupt(15)), stages)
    fit_until_interrupt(train(Interrupt(25)), stages, resume="latest")
    assert "previous" in json.loads((tmp_path / "run" / step_name(24) / "manifest.json").read_text())
    resumed = train()
    resumed.fit(stages, resume="latest")
    assert resumed.steps_done == 36
    assert_same(state_of(whole.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]


def test_a_mixture_resumes_at_its_position(tmp_path: Path) -> None:
    whole = make_trainer(None, mixture(tmp_path))
    whole.fit([Train(max_steps=23)])
    stopped = make_trainer(tmp_path / "run", mixture(tmp_path), [Interrupt(14)])
    fit_until_interrupt(stopped, [Train(max_steps=23)])
    resumed = make_trainer(tmp_path / "run", mixture(tmp_path))
    resumed.fit([Train(max_steps=23)], resume="latest")
    assert_same(state_of(whole.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [None, 2, 6, 8, 13])
def test_test_then_train_resumes_in_its_window(tmp_path: Path, at: int | None) -> None:
    opened: list[str] = []

    def open_window(window: Window) -> list[Batch]:
        opened.append(window.name)
        return make_batches(4, seed=int(window.name))

    def run(folder: Path | None, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
        trainer = make_trainer(folder, None, callbacks, open_window=open_window)
        stages = WindowStages(
            Windows([["a"], ["b"], ["c"], ["d"]]),
            lambda w: [Evaluate(window=w), Train(window=w), *([] if folder is None else [SaveCheckpoint()])],
        )
        if callbacks:
            fit_until_interrupt(trainer, stages)
        else:
            trainer.fit(stages, **options)
        return trainer

    whole = run(None)
    assert opened == [name for name in "0123" for _ in range(2)]
    if at is not None:
        run(tmp_path / "run", [Interrupt(at)])
    opened.clear()
    resumed = run(tmp_path / "run", resume="latest")
    # Checkpoints are saved every five steps and at the end of each window.
    assert "".join(opened) == {None: "00112233", 2: "00112233", 6: "12233", 8: "12233", 13: "33"}[at]
    assert_same(state_of(whole.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]
    assert resumed.figures == whole.figures


class StopAt(Interrupt):
    def after_step(self, trainer: Trainer) -> None:
        if trainer.steps_done == self.at:
            trainer.stop("the machine is wanted back")


@pytest.mark.parametrize("own", [False, True])
def test_a_stopped_run_is_saved_and_continues_in_its_stage(tmp_path: Path, own: bool) -> None:
    def run(folder: Path | None, *callbacks: Callback, **options: Any) -> Trainer:
        trainer = make_trainer(folder, make_batches(9), callbacks)
        trainer.fit([Train(data=dataset(tmp_path) if own else "train", epochs=2), Evaluate()], **options)
        trainer.saver = None
        return trainer

    whole = run(None)
    stopped = run(tmp_path / "run", StopAt(7))
    assert (stopped.steps_done, stopped.figures) == (7, {})
    assert Saver(tmp_path / "run").steps() == [5, 7]
    resumed = run(tmp_path / "run", resume="latest")
    assert_same(state_of(whole.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]
    assert resumed.figures == whole.figures


def test_resume_starts_from_scratch_without_checkpoints_and_never_overwrites_them(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_batches(3))
    trainer.fit([Train(), SaveCheckpoint()], resume="latest")
    assert trainer.saver is not None
    assert trainer.saver.steps() == [3]
    again = make_trainer(tmp_path, make_batches(3))
    with pytest.raises(ValueError, match=r'there are checkpoints of the steps \[3\]; continue .* resume="latest"'):
        again.fit([Train(), SaveCheckpoint()])
    again.fit([Train(), SaveCheckpoint()], resume="latest")
    assert again.steps_done == 3
    with pytest.raises(ValueError, match="resume needs a saver"):
        make_trainer(None, make_batches(3)).fit([Train()], resume="latest")
    with pytest.raises(ValueError, match="there is no saver; pass"):
        make_trainer(None, make_batches(3)).fit([SaveCheckpoint()])


def test_a_resumed_trainer_uses_the_saved_learning_rates_unless_a_callback_sets_others(tmp_path: Path) -> None:
    def rates(lr: float, *callbacks: Callback) -> list[float]:
        step = make_step(lr=lr)
        trainer = Trainer(step, make_batches(2), saver=Saver(tmp_path, keep=None), callbacks=callbacks)
        trainer.fit([Train(), SaveCheckpoint(), Train()], resume="latest")
        return [optimizer.param_groups[0]["lr"] for optimizer in step.optimizers.values()]

    class SetRates(Callback):
        def before_fit(self, trainer: Trainer) -> None:
            for optimizer in step_of(trainer).optimizers.values():
                optimizer.param_groups[0]["lr"] = 0.7

    assert rates(0.5) == [0.5, 0.5]
    assert rates(0.1) == [0.5, 0.5]  # like torch's load_state_dict
    assert rates(0.1, SetRates()) == [0.7, 0.7]


def step_of(trainer: Trainer) -> TorchStep:
    (step,) = trainer.steps.values()
    assert isinstance(step, TorchStep)
    return step


@pytest.mark.parametrize("wrapped", [False, True])
def test_evaluating_the_training_data_does_not_move_the_training_position(tmp_path: Path, wrapped: bool) -> None:
    ids = torch.randint(0, 40, (320,), generator=torch.Generator().manual_seed(0))
    pq.write_table(pa.table({"id": ids.numpy(), "label": (ids % 2).float().numpy()}), tmp_path / "a.parquet")

    def run(stages: list[Stage], folder: str, resume: str | None = None) -> Trainer:
        data: Any = ColumnDataset(str(tmp_path / "a.parquet"), ["id", "label"], 16, shuffle=True)
        data = DataLoader(data, batch_size=None) if wrapped else data
        trainer = make_trainer(tmp_path / folder, data, checkpoint=PeriodicCheckpoint(steps=1000))
        trainer.fit(stages, resume="latest" if resume else None)  # type: ignore[arg-type]
        return trainer

    train, evaluate = Train(max_steps=13), Evaluate(data="train", name="train")
    first_half = [evaluate, train, evaluate, SaveCheckpoint()]
    stages = [*first_half, evaluate, train, evaluate, train, SaveCheckpoint()]
    whole = run(stages, "a")
    without_evaluation = run([train, SaveCheckpoint(), train, train, SaveCheckpoint()], "b")
    assert_same(state_of(whole.steps[""]), state_of(without_evaluation.steps[""]))  # type: ignore[arg-type]
    run(first_half, "c")
    gc.collect()  # the first half's saver, which would otherwise lock the folder
    resumed = run(stages, "c", "latest")
    assert_same(state_of(whole.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]
    assert resumed.figures["train"] == whole.figures["train"]
    list(whole.predict("train"))
    assert_same(state_of(whole.steps[""]), state_of(without_evaluation.steps[""]))  # type: ignore[arg-type]
