"""Stages: what a pipeline consists of. A list of them, or a generator, is a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import nn

from recis_hybrid.columnio import Window
from recis_hybrid.embedding import Eviction
from recis_hybrid.metrics import Metric
from recis_hybrid.pipelines.arguments import (
    modules_of,
    refuse_no_batches,
    refuse_no_callable,
    refuse_no_count,
    refuse_other_than,
)
from recis_hybrid.pipelines.evaluate import refuse_no_metrics
from recis_hybrid.ragged import Batch
from recis_hybrid.validation import check_method

if TYPE_CHECKING:
    from recis_hybrid.pipelines.trainer import Trainer

Source: TypeAlias = "str | Iterable[Batch]"
"""The name of one of the trainer's sources, which are read on from stage to stage; or batches, read from the start."""


class Stage(Protocol):
    """One step of a pipeline."""

    def run(self, trainer: Trainer) -> None:
        """Does it."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains for a number of steps, of passes, or on a window.

    Without a bound it is one pass; over a source that has no length it must have one, or be ``endless``. A pass that
    an earlier stage has begun is gone on with, and counts when it ends.

    Raises:
        ValueError: If a bound is less than 1, or there are both data and a window.

    Example:
        >>> Train(max_steps=100).max_steps
        100
    """

    data: Source = "train"
    """Where batches come from."""
    max_steps: int | None = None
    """Updates, over as many passes as that takes."""
    epochs: int | None = None
    """Passes."""
    window: Window | None = None
    """Files that the trainer's ``open_window`` opens, read once."""
    endless: bool = False
    """Allows a stage that ends only if a callback stops it."""
    step: str | None = None
    """Which of the trainer's steps; None: the first."""
    freeze: Sequence[nn.Module] = ()
    """Modules whose parameters do not change in this stage (their buffers, as batch norm's statistics, do)."""
    transform: Callable[[Batch], Batch] | None = None
    """Made of each batch before the step."""
    name: str = "train"
    """What logs call the stage."""

    def __post_init__(self) -> None:
        for bound, value in (("max_steps", self.max_steps), ("epochs", self.epochs)):
            if value is not None:
                refuse_no_count("Train", bound, value)
        _refuse_kinds(self)
        object.__setattr__(self, "freeze", modules_of("Train", "freeze", self.freeze, "freeze=[model.tower]"))
        if self.window is not None and self.data != "train":
            raise ValueError("Train: give data or a window, not both")

    def run(self, trainer: Trainer) -> None:
        """Trains; see :meth:`Trainer.train`."""
        frozen = [p for module in self.freeze for p in module.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            trainer.train(self)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Computes metrics over all batches of a source; tables insert nothing.

    Example:
        >>> Evaluate(name="test").name
        'test'
    """

    data: Source = "eval"
    """Where batches come from; always read from the start."""
    window: Window | None = None
    """Files that the trainer's ``open_window`` opens."""
    metrics: Mapping[str, Metric] | Mapping[str, Mapping[str, Metric]] | None = None
    """By name, for each objective; or by objective and name. None: the trainer's."""
    step: str | None = None
    """Which of the trainer's steps; None: the first."""
    transform: Callable[[Batch], Batch] | None = None
    """Made of each batch before the step."""
    name: str = "eval"
    """Under which figures are kept and logged."""

    def __post_init__(self) -> None:
        _refuse_kinds(self)
        if self.metrics is not None:
            refuse_no_metrics("Evaluate", self.metrics)
        if self.window is not None and self.data != "eval":
            raise ValueError("Evaluate: give data or a window, not both")

    def run(self, trainer: Trainer) -> None:
        """Evaluate; see :meth:`Trainer.evaluate`."""
        trainer.evaluate(self)


@dataclass(frozen=True)
class Evict:
    """Gives up the rows that a rule names, in every table that is trained.

    Example:
        >>> from recis_hybrid.embedding import Unused
        >>> Evict(Unused(steps=1000)).name
        'evict'
    """

    rule: Eviction
    """Which rows."""
    compact: bool = False
    """Whether to move the remaining rows together, which gives memory back."""
    name: str = "evict"
    """What logs call the stage."""

    def __post_init__(self) -> None:
        check_method("Evict", "rule", self.rule, "unwanted", "Unused(steps=1000)")

    def run(self, trainer: Trainer) -> None:
        """Evicts; see :meth:`Trainer.evict`."""
        trainer.evict(self)


@dataclass(frozen=True)
class SaveCheckpoint:
    """Writes a checkpoint, unless there is one of this step.

    Example:
        >>> SaveCheckpoint().name
        'save'
    """

    name: str = "save"
    """What logs call the stage."""

    def __post_init__(self) -> None:
        refuse_other_than(
            "SaveCheckpoint", "name", self.name, str, "a name; Trainer(saver=, parts=) decides what is saved and where"
        )

    def run(self, trainer: Trainer) -> None:
        """Save; see :meth:`Trainer.save`."""
        trainer.save()


def _refuse_kinds(stage: Train | Evaluate) -> None:
    where = type(stage).__name__
    if not isinstance(stage.data, str):
        refuse_no_batches(where, "data", stage.data)
    refuse_other_than(where, "window", stage.window, (Window, type(None)), "a Window, or None")
    refuse_other_than(where, "step", stage.step, (str, type(None)), "the name of one of Trainer's steps, or None")
    refuse_other_than(where, "name", stage.name, str, "a name")
    if stage.transform is not None:
        refuse_no_callable(where, "transform", stage.transform, "a function of a batch, or None")
