"""Checkpoint: saves within a training stage."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from recis_hybrid.pipelines.callback import Callback, ranks

if TYPE_CHECKING:
    from recis_hybrid.pipelines.trainer import Trainer


class Checkpoint(Callback):
    """Saves every so many steps, or seconds; a run that is resumed goes on in the middle of its stage.

    Args:
        steps: Between two checkpoints; None does not count steps.
        seconds: Between two checkpoints, for one process; None does not look at the time.

    Raises:
        ValueError: If there is not one of the two, above 0.
    """

    def __init__(self, *, steps: int | None = None, seconds: float | None = None) -> None:
        given = steps if seconds is None else seconds
        if (steps is None) == (seconds is None) or given is None or not given > 0:
            raise ValueError(f"Checkpoint: give steps or seconds, above 0, got steps={steps} and seconds={seconds}")
        self._steps, self._seconds = steps, seconds
        self._last = time.monotonic()

    def before_fit(self, trainer: Trainer) -> None:
        """Counts from here; ranks, which save together, cannot go by their clocks."""
        if self._seconds is not None and ranks() > 1:
            raise ValueError("Checkpoint: ranks save at the same step; give steps in the place of seconds")
        self._last = time.monotonic()

    def after_step(self, trainer: Trainer) -> None:
        """Saves if it is time to."""
        due = self._steps is not None and trainer.steps_done % self._steps == 0
        if due or (self._seconds is not None and time.monotonic() - self._last >= self._seconds):
            trainer.save()
            self._last = time.monotonic()
