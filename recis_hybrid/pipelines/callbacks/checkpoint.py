"""PeriodicCheckpoint: checkpoints within a training stage."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from recis_hybrid import distributed
from recis_hybrid.pipelines.callback import Callback
from recis_hybrid.pipelines.stages import Run
from recis_hybrid.validation import check_integer, check_number


class PeriodicCheckpoint(Callback):
    """Saves every N steps or seconds, so that a restarted run can continue within a stage.

    Args:
        steps: Steps between two checkpoints; None: save by time.
        seconds: Seconds between two checkpoints, on one process only; None: save by steps.
        whole_every: Every ``whole_every``-th checkpoint is full. The others contain only the table rows that changed
            since the previous checkpoint and build on it (``delta`` of :meth:`Saver.save`). With 1, all are full.

    Raises:
        ValueError: Neither or both of ``steps`` and ``seconds`` are set, or a value is out of range.
    """

    def __init__(self, *, steps: int | None = None, seconds: float | None = None, whole_every: int = 1) -> None:
        if (steps is None) == (seconds is None):
            raise ValueError(f"PeriodicCheckpoint: pass either steps or seconds, got steps={steps}, seconds={seconds}")
        if steps is not None:
            check_integer("PeriodicCheckpoint", "steps", steps, low=1)
        if seconds is not None:
            check_number("PeriodicCheckpoint", "seconds", seconds)
            if not seconds > 0:
                raise ValueError(f"PeriodicCheckpoint: seconds must be above 0, got {seconds}")
        check_integer("PeriodicCheckpoint", "whole_every", whole_every, low=1)
        self._steps, self._seconds, self._whole_every = steps, seconds, whole_every
        self._saves = 0
        self._last = time.monotonic()

    def before_fit(self, trainer: Run) -> None:
        """Start the clock. Several ranks must save at the same step, which their clocks cannot ensure."""
        if self._seconds is not None and distributed.world_size() > 1:
            raise ValueError("PeriodicCheckpoint: ranks must save at the same step; pass steps instead of seconds")
        self._last = time.monotonic()

    def after_step(self, trainer: Run) -> None:
        """Save if a checkpoint is due."""
        due = self._steps is not None and trainer.steps_done % self._steps == 0
        if due or (self._seconds is not None and time.monotonic() - self._last >= self._seconds):
            # Counted over the whole training, so that a job that is restarted often also writes full checkpoints.
            self._saves = self._saves + 1 if self._steps is None else trainer.steps_done // self._steps
            trainer.save(delta=self._saves % self._whole_every != 0)
            self._last = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of checkpoints written."""
        return {"saves": self._saves}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the number of checkpoints written."""
        self._saves = int(state["saves"])
