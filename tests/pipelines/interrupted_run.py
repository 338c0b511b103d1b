"""A training that receives a signal at a given point, run as a process by test_interruption."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from recis_hybrid import distributed
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import Callback, Evaluate, PeriodicCheckpoint, SaveCheckpoint, Stage, Train, Trainer
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Saver
from tests.support.small import make_batches, make_step


class SendSignal(Callback):
    """Sends this process a signal before the fit, after a step, or before a save."""

    def __init__(self, where: str, number: int, rank: int) -> None:
        self.where, self.number = where, number if distributed.rank() == rank else None

    def _send(self, where: str) -> None:
        if where == self.where and self.number is not None:
            os.kill(os.getpid(), self.number)

    def before_fit(self, trainer: Trainer) -> None:
        self._send("before_fit")

    def after_step(self, trainer: Trainer) -> None:
        self._send(f"step{trainer.steps_done}")

    def before_save(self, trainer: Trainer) -> None:
        self._send("save")


class SignallingSource:
    """Batches, one of which sends a signal, or blocks until one arrives."""

    def __init__(self, batches: list[Batch], at: int | None, number: int | None = None) -> None:
        self.batches, self.at, self.number = batches, at, number

    def __iter__(self) -> Iterator[Batch]:
        for place, batch in enumerate(self.batches):
            if place == self.at:
                self.at = None  # once
                if self.number is None:
                    print("waits", flush=True)
                    time.sleep(600)
                else:
                    os.kill(os.getpid(), self.number)
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


def trainer_of(folder: Path, where: str, number: int, *, rank: int = 0, saver: bool = True) -> Trainer:
    ranks, own = distributed.world_size(), distributed.rank()
    batches = make_batches(9)
    if ranks > 1:
        # The ranks have different numbers of batches, rank 0 the fewest.
        batches = make_batches(9, seed=own)[: 5 + 2 * own]
    signals = where == "evaluate" and own == rank
    evaluation_data = SignallingSource(make_batches(3), 1, number) if signals else make_batches(3)
    data: Any = SignallingSource(batches, 4) if where == "reading" else batches
    step = make_step()
    step.schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.97) for o in step.optimizers.values()]
    return Trainer(
        step,
        data,
        evaluation_data,
        metrics={"auc": AUC()},
        seed=3,
        accumulate=2,
        saver=Saver(folder, keep=None, async_save=where == "save") if saver else None,
        callbacks=[PeriodicCheckpoint(steps=4), SendSignal(where, number, rank)],
    )


STAGES: list[Stage] = [Train(epochs=1), Evaluate(), SaveCheckpoint()] * 3


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    distributed.join("test")
    trainer = trainer_of(
        Path(sys.argv[1]),
        options["where"],
        signal.Signals[options.get("signal", "SIGTERM")],
        rank=options.get("rank", 0),
        saver=options.get("saver", True),
    )
    trainer.fit(STAGES, resume="latest" if options.get("saver", True) else None)
