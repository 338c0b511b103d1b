"""Profile: a trace of a few steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.profiler import ProfilerActivity, profile, supported_activities

from recis_hybrid import distributed
from recis_hybrid.pipelines.arguments import path_of, refuse_no_count
from recis_hybrid.pipelines.callback import Callback
from recis_hybrid.ragged import Batch

if TYPE_CHECKING:
    from recis_hybrid.pipelines.trainer import Trainer


class Profile(Callback):
    """Records steps by torch.profiler and writes a trace that Perfetto (ui.perfetto.dev) opens; on rank 0 alone.

    Args:
        path: The trace, ``*.json`` or ``*.json.gz``.
        first: The first step to record, counted from 1; later than the first few, which warm up.
        steps: How many.
    """

    def __init__(self, path: str | os.PathLike[str], *, first: int = 10, steps: int = 3) -> None:
        self._path = path_of("Profile", path)
        refuse_no_count("Profile", "first", first)
        refuse_no_count("Profile", "steps", steps)
        self._steps = range(first, first + steps)
        self._profiler: profile | None = None

    def before_step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        """Begins to record before the first step."""
        if self._profiler is None and distributed.rank() == 0 and trainer.steps_done + 1 == self._steps.start:
            activities = supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA}
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def after_step(self, trainer: Trainer) -> None:
        """Write the trace after the last step."""
        if self._profiler is not None and trainer.steps_done >= self._steps.stop - 1:
            self._write()

    def after_fit(self, trainer: Trainer) -> None:
        """Write what was recorded where training ended before."""
        if self._profiler is not None:
            self._write()

    def _write(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(os.fspath(self._path))
        self._profiler = None
