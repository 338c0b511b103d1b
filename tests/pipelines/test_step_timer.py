"""The time of a step by phase; a step that is not logged does not synchronize."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import dense_parameters
from recis_hybrid.pipelines import (
    Callback,
    TorchStep,
    Train,
    Trainer,
)
from recis_hybrid.pipelines.step_timer import StepTimer
from recis_hybrid.ragged import Batch
from tests.support import emulated
from tests.support.devices import late_streams, on_accelerators
from tests.support.small import Model, Records, bce, make_batches, make_step


def test_the_time_of_a_step_is_split_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    step, records = make_step(), Records()
    pauses = {"data": 0.02, "features": 0.03, "lookup": 0.04, "towers": 0.05, "update": 0.06}

    def with_pause(phase: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            time.sleep(pauses[phase])
            return function(*args)

        return call

    class Slow(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                time.sleep(pauses["data"])
                yield batch

    model = step.model
    monkeypatch.setattr(model.engine, "forward", with_pause("lookup", model.engine.forward))  # type: ignore[union-attr]
    monkeypatch.setattr(model.tower, "forward", with_pause("towers", model.tower.forward))  # type: ignore[union-attr]
    monkeypatch.setattr(step.optimizers["sparse"], "step", with_pause("update", step.optimizers["sparse"].step))
    trainer = Trainer(
        step,
        Slow(make_batches(1)),
        callbacks=[records],
        log_every=1,
        transform=with_pause("features", lambda batch: batch),
    )
    start = time.perf_counter()
    trainer.fit([Train()])
    elapsed = time.perf_counter() - start
    (line,) = records.of("train")
    seconds = {phase: line[f"time/{phase}"] for phase in pauses}
    assert all(seconds[phase] >= pause for phase, pause in pauses.items())
    assert sum(seconds.values()) <= elapsed  # no time is counted twice


def test_a_step_that_is_not_logged_reads_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step()
    reading_steps: set[int] = set()
    # torch's Adam reads a counter that it keeps on the host.
    step.optimizers["dense"] = torch.optim.SGD(dense_parameters(step.model), lr=0.1)
    trainer = Trainer(step, make_batches(6), callbacks=[Records()], log_every=3)
    # On a CPU, where reading does not block, the loss and the range of labels are read immediately; not on a GPU.
    monkeypatch.setattr("recis_hybrid.pipelines.steps.loss_guard.LossGuard.watch", lambda *args: None)
    monkeypatch.setattr("recis_hybrid.pipelines.steps.model_outputs.check_labels", lambda *args, **kwargs: None)

    def recorded(function: Any) -> Any:
        def call(self: torch.Tensor, *args: Any) -> Any:
            reading_steps.add(trainer.steps_done)
            return function(self, *args)

        return call

    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, recorded(getattr(torch.Tensor, name)))
    trainer.fit([Train()])  # growing tables read their number of rows
    reading_steps.clear()
    trainer.fit([Train()])
    assert reading_steps == {9, 12}


class ForbidSynchronization(Callback):
    def __init__(self, device: str) -> None:
        self.device = device

    def before_step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        if self.device == "emulated":
            emulated.clear_counts()
        elif trainer.steps_done >= 10:  # the first steps allocate workspaces
            torch.cuda.set_sync_debug_mode("error")

    def after_step(self, trainer: Trainer) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        elif trainer.steps_done >= 10:
            assert emulated.counts()["synchronizations"] == 0


@on_accelerators
def test_a_step_on_a_gpu_does_not_synchronize(device: str) -> None:
    model = Model(device=device)
    optimizers = [torch.optim.Adam(dense_parameters(model)), optim.Adam(model.engine.parameters())]
    step = TorchStep(model, bce, optimizers, clip_grad_norm=1.0)
    callbacks = [ForbidSynchronization(device)]
    trainer = Trainer(step, make_batches(30, device=device), callbacks=callbacks, log_every=1000)
    trainer.fit([Train()])
    assert trainer.steps_done == 30


@on_accelerators
def test_a_phase_includes_the_work_that_it_queues(device: str) -> None:
    queued = torch.zeros(3).pin_memory()
    with late_streams(device):
        timer = StepTimer()
        with timer.measure([]), timer.phase("towers"):
            queued.copy_(torch.ones(3, device=device), non_blocking=True)
        assert queued.tolist() == [1.0] * 3
        assert timer.seconds["towers"] > 0
