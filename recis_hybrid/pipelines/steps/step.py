"""Step: what a pipeline does with batches, whatever leads the program. Letters: B rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from recis_hybrid.embedding import EmbeddingEngine
from recis_hybrid.metrics import Metric
from recis_hybrid.ragged import Batch, RaggedTensor
from recis_hybrid.ragged.arrays import as_column

Metrics: TypeAlias = "Mapping[str, Metric] | Mapping[str, Mapping[str, Metric]]"
"""Metrics by name, for each objective; or by objective and name."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Predictions and what they are to be compared with, as metrics take them."""

    scores: Tensor
    """Floating ``[B]``."""
    labels: Tensor | None
    """``[B]``; None where the step has no labels."""
    groups: Tensor | None = None
    """int64 ``[B]``: the user, session or query of each row, for metrics by group."""


class Step(Protocol):
    """One training step. Whatever leads the program, torch or JAX, a pipeline sees only this."""

    @property
    def engines(self) -> Sequence[EmbeddingEngine]:
        """The engines whose tables it trains."""

    def __call__(self, *batches: Batch) -> Mapping[str, Tensor | Metric]:
        """Does one update from the batches: one of them, unless gradients are accumulated.

        Returns:
            What to watch, one number each, ``"loss"`` among it, without waiting for a device; the log has its mean over
            steps. A metric, which the step updates, is computed and reset for each line of the log.
        """

    def predict(self, batch: Batch) -> Mapping[str, Scored]:
        """Return predictions by objective (``""`` where there is only one); changes nothing."""

    def parts(self) -> Mapping[str, object]:
        """Return what a checkpoint has to hold, by name, as ``Saver.save`` takes it."""


@runtime_checkable
class Rehearsing(Protocol):
    """A step that tries the metrics of evaluations on its first training batch."""

    def rehearse(self, metrics: Metrics) -> None:
        """Receives the metrics of evaluations before the first step."""


@runtime_checkable
class Prefetching(Protocol):
    """A step that is told of batches before their turn comes."""

    def prefetch(self, batch: Batch) -> None:
        """Begins to send the batch's ids to the ranks that own them, by ``EmbeddingEngine.prefetch``.

        In the mode, of training and of gradients, in which the step looks them up.
        """


@runtime_checkable
class Replicated(Protocol):
    """A step that keeps its towers bitwise equal on several ranks; a Trainer of several ranks requires it."""

    def synchronise(self) -> None:
        """Copy rank 0's parameters and buffers; collective, before the first step."""

    def expect(self, rows: Sequence[Sequence[int]]) -> None:
        """Receives each rank's rows before each step, so that gradients can be averaged over the samples.

        A rank may have an empty batch, and no gradient.

        Args:
            rows: For each batch of the step, its rows on each rank.
        """


class Observer(Protocol):
    """Who looks on while a step runs; a step that has an attribute ``observer`` is given one."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time what is done within as a phase: ``lookup``, ``exchange``, ``towers``, ``update``."""

    def backward(self, when: Literal["before", "after"]) -> None:
        """Is told of each backward pass."""


class NoObserver:
    """Looks away."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time nothing."""
        return nullcontext()

    def backward(self, when: Literal["before", "after"]) -> None:
        """Tells nobody."""


def column_of(batch: Batch, name: str, what: str = "label") -> Tensor:
    """Return a dense column, ``[B]`` or ``[B, ...]``; an array of numpy or JAX, or a list, is copied into a tensor.

    Args:
        batch: Columns by name.
        name: Of the column.
        what: It is for, for messages.

    Raises:
        KeyError: The batch has no such column.
        TypeError: Its rows are lists, text or complex numbers.
        ValueError: It is a list of lists.
    """
    column: Any = batch.get(name)
    if isinstance(column, list | tuple):
        column = as_column(f"the {what} column {name!r}", column)
    if hasattr(column, "__array__") and not isinstance(column, Tensor):
        column = torch.from_numpy(np.array(column))
    if isinstance(column, Tensor):
        if column.is_complex():
            raise TypeError(f"the {what} column {name!r} must hold real numbers, got {column.dtype}; take a part of it")
        return column
    if name not in batch:
        raise KeyError(f"the {what} column {name!r} must be a dense column of the batch, which has {sorted(batch)}")
    kind = f"a RaggedTensor of {column.dtype}" if isinstance(column, RaggedTensor) else f"a {type(column).__name__}"
    raise TypeError(
        f"the {what} column {name!r} must be a dense column of numbers, got lists or text, {kind}; read it as Dense(), "
        f"or make numbers of it by a transform"
    )


def loss_of(watched: Mapping[str, Tensor | Metric]) -> Tensor:
    """Return the loss among a step's figures.

    Raises:
        TypeError: There is none.
    """
    loss = watched.get("loss") if isinstance(watched, Mapping) else None
    if not isinstance(loss, Tensor):
        raise TypeError(f"a step must return a mapping with a tensor of one number as 'loss', got {watched!r}")
    return loss
