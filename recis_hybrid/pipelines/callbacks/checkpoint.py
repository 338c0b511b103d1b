"""PeriodicCheckpoint: saves within a training stage."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from recis_hybrid import distributed
from recis_hybrid.pipelines.arguments import refuse_no_count, refuse_no_number
from recis_hybrid.pipelines.callback import Callback

if TYPE_CHECKING:
    from recis_hybrid.pipelines.trainer import Trainer


class PeriodicCheckpoint(Callback):
    """Saves every so many steps, or seconds; a run that is resumed goes on in the middle of its stage.

    Args:
        steps: Between two checkpoints; None does not count steps.
        seconds: Between two checkpoints, for one process; None does not look at the time.
        whole_every: Of so many checkpoints one is whole. The others hold of tables only what changed since the
            checkpoint before, of whatever kind, and build on it (``delta`` of :meth:`Saver.save`); 1: all are whole.

    Raises:
        ValueError: If there is not one of ``steps`` and ``seconds``, above 0, or ``whole_every`` is below 1.
    """

    def __init__(self, *, steps: int | None = None, seconds: float | None = None, whole_every: int = 1) -> None:
        if steps is not None:
            refuse_no_count("PeriodicCheckpoint", "steps", steps)
        if seconds is not None:
            refuse_no_number("PeriodicCheckpoint", "seconds", seconds)
        given = steps if seconds is None else seconds
        if (steps is None) == (seconds is None) or given is None or not given > 0:
            raise ValueError(
                f"PeriodicCheckpoint: give steps or seconds, above 0, got steps={steps} and seconds={seconds}"
            )
        if type(whole_every) is not int or whole_every < 1:
            raise ValueError(
                f"PeriodicCheckpoint: whole_every must be an integer from 1, got {whole_every!r}; 1: all are whole"
            )
        self._steps, self._seconds, self._whole_every = steps, seconds, whole_every
        self._saves = 0
        self._last = time.monotonic()

    def before_fit(self, trainer: Trainer) -> None:
        """Count from here; ranks, which save together, cannot go by their clocks."""
        if self._seconds is not None and distributed.world_size() > 1:
            raise ValueError("PeriodicCheckpoint: ranks save at the same step; give steps in the place of seconds")
        self._last = time.monotonic()

    def after_step(self, trainer: Trainer) -> None:
        """Save if it is time to."""
        due = self._steps is not None and trainer.steps_done % self._steps == 0
        if due or (self._seconds is not None and time.monotonic() - self._last >= self._seconds):
            # Counted over the whole training, so that a job that is often begun anew has whole ones.
            self._saves = self._saves + 1 if self._steps is None else trainer.steps_done // self._steps
            trainer.save(delta=self._saves % self._whole_every != 0)
            self._last = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Hands out how many checkpoints it has written."""
        return {"saves": self._saves}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._saves = int(state["saves"])
