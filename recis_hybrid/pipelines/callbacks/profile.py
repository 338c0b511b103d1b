"""Profile: a trace of a few steps."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch.profiler import ProfilerActivity, profile, supported_activities

from recis_hybrid import distributed
from recis_hybrid.pipelines.arguments import check_path
from recis_hybrid.pipelines.callback import Callback
from recis_hybrid.pipelines.stages import Run
from recis_hybrid.ragged import Batch
from recis_hybrid.validation import check_integer


class Profile(Callback):
    """Records steps with torch.profiler and writes a trace for Perfetto (ui.perfetto.dev), on rank 0.

    Args:
        path: File of the trace, ``*.json`` or ``*.json.gz``.
        first: First step to record, counted from 1; choose one after the warm-up.
        steps: Number of steps to record.
    """

    def __init__(self, path: str | os.PathLike[str], *, first: int = 10, steps: int = 3) -> None:
        self._path = check_path("Profile", path)
        check_integer("Profile", "first", first, low=1)
        check_integer("Profile", "steps", steps, low=1)
        self._steps = range(first, first + steps)
        self._profiler: profile | None = None

    def before_step(self, trainer: Run, batches: Sequence[Batch]) -> None:
        """Start recording before the first step to record."""
        if self._profiler is None and distributed.rank() == 0 and trainer.steps_done + 1 == self._steps.start:
            activities = supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA}
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def after_step(self, trainer: Run) -> None:
        """Write the trace after the last step to record."""
        if self._profiler is not None and trainer.steps_done >= self._steps.stop - 1:
            self._write()

    def after_fit(self, trainer: Run) -> None:
        """Write the recorded steps if the training ended early."""
        if self._profiler is not None:
            self._write()

    def _write(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(os.fspath(self._path))
        self._profiler = None
