"""Callback: the base class of objects that a trainer calls while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from recis_hybrid.pipelines.stages import Run, Stage
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Location

Record: TypeAlias = dict[str, Any]
"""One record of the log: an ``event`` (``train``, ``eval``, ``evict``, ``save``, ``stop``, ``tables``), the ``step``,
and figures by name. On rank 0 also ``saved``, once a checkpoint is complete, and ``loaded``, when a run is resumed,
with the ``digest`` of the checkpoint (:meth:`Saver.digest`)."""


class Callback:
    """Base class of callbacks. All methods do nothing by default.

    A callback returns the state that a restart must restore from ``state_dict``. If a method raises, the trainer saves
    a checkpoint and raises a CallbackError that names the callback.
    """

    def before_fit(self, trainer: Run) -> None:
        """Run once before the first stage. A resumed run has loaded its checkpoint."""

    def after_fit(self, trainer: Run) -> None:
        """Run once at the end, even if an exception ends the training."""

    def before_stage(self, trainer: Run, stage: Stage) -> None:
        """Run before each stage."""

    def after_stage(self, trainer: Run, stage: Stage) -> None:
        """Run after each stage that ended without an exception."""

    def before_step(self, trainer: Run, batches: Sequence[Batch]) -> None:
        """Run before each training step."""

    def after_step(self, trainer: Run) -> None:
        """Run after each training step."""

    def before_backward(self, trainer: Run) -> None:
        """Run before each backward pass of a torch step."""

    def after_backward(self, trainer: Run) -> None:
        """Run after each backward pass of a torch step, before gradients are clipped and applied."""

    def before_save(self, trainer: Run) -> None:
        """Run before each checkpoint is written."""

    def after_save(self, trainer: Run, path: Location) -> None:
        """Run after each checkpoint is written to its directory ``path``."""

    def on_log(self, trainer: Run, record: Record) -> None:
        """Run for each record of the log."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""


class CallbackError(RuntimeError):
    """A callback raised. The message names the callback and its method, and says whether the state was saved."""
