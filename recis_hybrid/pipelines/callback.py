"""Callback: what is called as a training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Location

if TYPE_CHECKING:
    from recis_hybrid.pipelines.stages import Stage
    from recis_hybrid.pipelines.trainer import Trainer

Record: TypeAlias = dict[str, Any]
"""What a log has a line of: an ``event`` (``train``, ``eval``, ``evict``, ``save``, ``tables``), ``step``, and figures
by name."""


class Callback:
    """Called at the points that it has methods for; these do nothing.

    What it needs to go on after a resumption, it hands out by ``state_dict``. A call that raises ends the training, by
    a CallbackError that names it, after the state was saved.
    """

    def before_fit(self, trainer: Trainer) -> None:
        """Is called once, after a checkpoint was loaded if there was one to resume."""

    def after_fit(self, trainer: Trainer) -> None:
        """Is called once, also where an exception ends the training."""

    def before_stage(self, trainer: Trainer, stage: Stage) -> None:
        """Is called before each stage."""

    def after_stage(self, trainer: Trainer, stage: Stage) -> None:
        """Is called after each stage that has come to its end."""

    def before_step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        """Is called before each training step."""

    def after_step(self, trainer: Trainer) -> None:
        """Is called after each training step."""

    def before_backward(self, trainer: Trainer) -> None:
        """Is called before each backward pass of a torch step."""

    def after_backward(self, trainer: Trainer) -> None:
        """Is called after each backward pass of a torch step, before gradients are clipped and used."""

    def before_save(self, trainer: Trainer) -> None:
        """Is called before each checkpoint."""

    def after_save(self, trainer: Trainer, path: Location) -> None:
        """Is called after each checkpoint, with its directory."""

    def on_log(self, trainer: Trainer, record: Record) -> None:
        """Is called with each line of the log."""

    def state_dict(self) -> dict[str, Any]:
        """Hands out what a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""


class CallbackError(RuntimeError):
    """A callback has raised; the message names it, when it was called, and what was saved."""
