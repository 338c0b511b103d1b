"""Parts of a step's time; a step that is not logged waits for nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, dense_parameters
from recis_hybrid.pipelines import (
    Callback,
    TorchStep,
    Train,
    Trainer,
)
from recis_hybrid.ragged import Batch, batch_to
from tests.support.small import Model, Records, bce, make_batches, make_step


def test_the_time_of_a_step_is_booked_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    step, seen = make_step(), Records()
    pauses = {"data": 0.02, "features": 0.03, "lookup": 0.04, "towers": 0.05, "update": 0.06}

    def pausing(phase: str, function: Any) -> Any:
        def paused(*args: Any) -> Any:
            time.sleep(pauses[phase])
            return function(*args)

        return paused

    class Slow(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                time.sleep(pauses["data"])
                yield batch

    model = step.model
    monkeypatch.setattr(model.engine, "forward", pausing("lookup", model.engine.forward))  # type: ignore[union-attr]
    monkeypatch.setattr(model.tower, "forward", pausing("towers", model.tower.forward))  # type: ignore[union-attr]
    monkeypatch.setattr(step.optimizers["sparse"], "step", pausing("update", step.optimizers["sparse"].step))
    trainer = Trainer(
        step, Slow(make_batches(1)), callbacks=[seen], log_every=1, transform=pausing("features", lambda batch: batch)
    )
    begin = time.perf_counter()
    trainer.fit([Train()])
    elapsed = time.perf_counter() - begin
    (line,) = seen.of("train")
    booked = {phase: line[f"time/{phase}"] for phase in pauses}
    assert all(booked[phase] >= pause for phase, pause in pauses.items())
    assert sum(booked.values()) <= elapsed  # no time is booked twice


def test_a_step_that_does_not_log_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step()
    fetched: set[int] = set()
    # torch's Adam keeps a counter on the host and reads that.
    step.optimizers["dense"] = torch.optim.SGD(dense_parameters(step.model), lr=0.1)
    trainer = Trainer(step, make_batches(6), callbacks=[Records()], log_every=3)
    # On a CPU, where nothing has to be waited for, the loss and the range of labels are read at once; not on a GPU.
    monkeypatch.setattr("recis_hybrid.pipelines.steps.loss_guard.LossGuard.watch", lambda *args: None)
    monkeypatch.setattr("recis_hybrid.pipelines.steps.model_outputs.check_labels", lambda *args, **kwargs: None)

    def counted(function: Any) -> Any:
        def count(self: torch.Tensor, *args: Any) -> Any:
            fetched.add(trainer.steps_done)
            return function(self, *args)

        return count

    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    trainer.fit([Train()])  # tables that grow look at how many rows they have
    fetched.clear()
    trainer.fit([Train()])
    assert fetched == {9, 12}


class NoWaiting(Callback):
    def before_step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        if trainer.steps_done >= 10:  # the first steps make workspaces
            torch.cuda.set_sync_debug_mode("error")

    def after_step(self, trainer: Trainer) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_on_a_gpu_does_not_wait() -> None:
    class OnGpu(Model):
        def __init__(self) -> None:
            super().__init__()
            self.engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4)}, optimizer=optim.Adam, device="cuda")
            self.tower.cuda()

    model = OnGpu()
    optimizers = [torch.optim.Adam(dense_parameters(model)), optim.Adam(model.engine.parameters())]
    step = TorchStep(model, bce, optimizers, clip_grad_norm=1.0)
    batches = [batch_to(batch, "cuda") for batch in make_batches(30)]
    trainer = Trainer(step, batches, callbacks=[NoWaiting()], log_every=1000)
    trainer.fit([Train()])
    assert trainer.steps_done == 30
