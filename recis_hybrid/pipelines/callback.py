"""Callback: the base class of objects that a trainer calls while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from recis_hybrid.pipelines.stages import Run, Stage
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Location

Record: TypeAlias = dict[str, Any]
"""One line of the log: an ``event`` (``train``, ``eval``, ``evict``, ``save``, ``tables``), ``step``, and figures by
name."""


class Callback:
    """Base class of callbacks; override the methods to be called. The defaults do nothing.

    State that a restarted run needs goes through ``state_dict``. A method that raises ends the training: the trainer
    saves, then raises a CallbackError that names the callback.
    """

    def before_fit(self, trainer: Run) -> None:
        """Run once, after the checkpoint is loaded if the run resumes."""

    def after_fit(self, trainer: Run) -> None:
        """Run once at the end, also if an exception ends the training."""

    def before_stage(self, trainer: Run, stage: Stage) -> None:
        """Run before each stage."""

    def after_stage(self, trainer: Run, stage: Stage) -> None:
        """Run after each stage that has ended without an exception."""

    def before_step(self, trainer: Run, batches: Sequence[Batch]) -> None:
        """Run before each training step."""

    def after_step(self, trainer: Run) -> None:
        """Run after each training step."""

    def before_backward(self, trainer: Run) -> None:
        """Run before each backward pass of a torch step."""

    def after_backward(self, trainer: Run) -> None:
        """Run after each backward pass of a torch step, before gradients are clipped and applied."""

    def before_save(self, trainer: Run) -> None:
        """Run before each checkpoint."""

    def after_save(self, trainer: Run, path: Location) -> None:
        """Run after each checkpoint, with its directory."""

    def on_log(self, trainer: Run, record: Record) -> None:
        """Run for each line of the log."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a restarted run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""


class CallbackError(RuntimeError):
    """A callback raised; the message names it, the method, and what was saved."""
