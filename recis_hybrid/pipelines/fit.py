"""fit: trains on a data set, with a progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sized
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from recis_hybrid.pipelines.step import Step
from recis_hybrid.ragged import Batch, batch_size


@dataclass(frozen=True)
class FitFigures:
    """What a training run did."""

    steps: int
    samples: int
    seconds: float
    samples_per_s: float
    loss: float
    """Of the last step."""


def fit(
    step: Step,
    data: Iterable[Batch],
    *,
    epochs: int = 1,
    progress: bool = True,
    log: str | Path | None = None,
    refresh_s: float = 0.5,
) -> FitFigures:
    """Runs a step on every batch.

    The loss is fetched from the device only where it is shown: every ``refresh_s`` seconds, and at the end.

    Args:
        step: Trains on one batch and returns at least ``"loss"``.
        data: Batches; iterated once for each epoch.
        epochs: Passes over the data.
        progress: Shows a bar with loss and samples/s on stderr.
        log: A file to which a line of JSON is appended at each refresh and at the end.
        refresh_s: Seconds between refreshes.

    Returns:
        Counts and rates of the whole run.

    Raises:
        ValueError: If epochs is less than 1 or there is no batch.
        FloatingPointError: If the loss is found to be no finite number.
    """
    if epochs < 1:
        raise ValueError(f"fit: epochs must be at least 1, got {epochs}")
    total = len(data) * epochs if isinstance(data, Sized) else None
    steps = samples = logged = 0
    watched: dict[str, Tensor] = {}
    begin = shown = time.perf_counter()

    def figures() -> FitFigures:
        loss = watched["loss"].item()  # waits for the device
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"fit: the loss is {loss} at step {steps}; lower the learning rate or clip gradients"
            )
        seconds = time.perf_counter() - begin
        return FitFigures(steps, samples, seconds, samples / seconds, loss)

    def show(now: FitFigures) -> None:
        nonlocal logged
        bar.set_postfix_str(f"loss {now.loss:.4f}, {now.samples_per_s:,.0f} samples/s")
        if log is not None and logged < now.steps:
            with open(log, "a") as file:
                file.write(json.dumps(asdict(now)) + "\n")
            logged = now.steps

    with tqdm(total=total, unit="batch", disable=not progress, dynamic_ncols=True) as bar:
        for _ in range(epochs):
            for batch in data:
                watched = step(batch)
                steps, samples = steps + 1, samples + batch_size(batch)
                bar.update()
                if time.perf_counter() - shown > refresh_s:
                    show(figures())
                    shown = time.perf_counter()
        if steps == 0:
            raise ValueError("fit: the data gave no batch")
        done = figures()
        show(done)
    return done
