"""Step: the interface of a training step, run by torch or JAX. Letters: B rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from recis_hybrid import distributed
from recis_hybrid.embedding import EmbeddingEngine
from recis_hybrid.metrics import Metric
from recis_hybrid.ragged import Batch, RaggedTensor
from recis_hybrid.ragged.arrays import as_column


@dataclass(frozen=True, eq=False)
class Predictions:
    """Scores of a batch, and the labels and groups for metrics."""

    scores: Tensor
    """Floating ``[B]``."""
    labels: Tensor | None
    """``[B]``; None if the step has no labels."""
    groups: Tensor | None = None
    """int64 ``[B]``: the user, session or query of each row, for metrics by group."""


class Step(Protocol):
    """Interface of a training step, whether torch or JAX runs it."""

    @property
    def engines(self) -> Sequence[EmbeddingEngine]:
        """Engines whose tables the step trains."""

    def __call__(self, *batches: Batch) -> Mapping[str, Tensor | Metric]:
        """Do one update from one batch, or from several if gradients are accumulated.

        Must not synchronize the device.

        Returns:
            Figures by name, including ``"loss"``. The log shows the means of scalar tensors over steps. A metric, which
            the step updates, is computed and reset for each record of the log.
        """

    def predict(self, batch: Batch) -> Mapping[str, Predictions]:
        """Return predictions by objective (``""`` if there is only one), without changing any state."""

    def parts(self) -> Mapping[str, object]:
        """Return the parts of a checkpoint by name, for ``Saver.save``."""


@runtime_checkable
class Rehearsing(Protocol):
    """A step that tries evaluation metrics on its first training batch."""

    def rehearse(self, metrics: Any) -> None:
        """Set the evaluation metrics to try; called before the first step."""


@runtime_checkable
class Prefetching(Protocol):
    """A step that receives batches in advance."""

    def prefetch(self, batch: Batch) -> None:
        """Start sending the batch's ids to the ranks that own them, with ``EmbeddingEngine.prefetch``.

        Training mode and gradient mode must be the same as when the step looks the ids up.
        """


@runtime_checkable
class Replicated(Protocol):
    """A step that keeps its towers bitwise equal on all ranks; a Trainer on several ranks requires it."""

    def synchronize(self) -> None:
        """Copy rank 0's parameters and buffers to all ranks before the first step; collective."""

    def expect(self, rows: Sequence[Sequence[int]]) -> None:
        """Receive the row counts of all ranks before each step, to average gradients over the samples.

        A rank may have an empty batch and no gradient.

        Args:
            rows: For each batch of the step, its number of rows on each rank.
        """


class Observer(Protocol):
    """Observes a running step. The trainer sets the attribute ``observer`` of a step that has one."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time the block as a phase: ``lookup``, ``exchange``, ``towers`` or ``update``."""

    def backward(self, when: Literal["before", "after"]) -> None:
        """Run before and after each backward pass."""


class NoObserver:
    """An observer that does nothing."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def backward(self, when: Literal["before", "after"]) -> None:
        """Do nothing."""


def check_replicated(where: str, steps: Mapping[str, Step]) -> None:
    """Check that all ranks train equal towers and share their tables.

    Args:
        where: The caller, for messages.
        steps: The steps by name.

    Raises:
        ValueError: There are several ranks, and a step does not average gradients or its tables are not shared.
    """
    ranks = distributed.world_size()
    for name, step in steps.items() if ranks > 1 else ():
        which = f"the step {name!r}" if name else "the step"
        if not isinstance(step, Replicated):
            raise ValueError(
                f"{where}: {ranks} ranks train together, but {which} ({type(step).__name__}) has no synchronize() and "
                f"expect(), which keep the towers equal on all ranks (pipelines.Replicated); add them, or train on one "
                f"process"
            )
        for engine in step.engines:
            shared = 1 if engine.group is None else distributed.world_size(engine.group)
            if shared < ranks and any(not table.read_only for table in engine.tables):
                raise ValueError(
                    f"{where}: {ranks} ranks train together, but the tables of {which} are shared by {shared}, and "
                    f"ranks would train different tables; build the EmbeddingEngine after init_process_group and "
                    f"without group="
                )


def dense_column(batch: Batch, name: str, what: str = "label") -> Tensor:
    """Return a dense column, ``[B]`` or ``[B, ...]``. NumPy and JAX arrays and lists are copied into a tensor.

    Args:
        batch: Columns by name.
        name: Name of the column.
        what: Purpose of the column, for messages.

    Raises:
        KeyError: The batch has no such column.
        TypeError: The rows are lists, text or complex numbers.
        ValueError: The column is a list of lists.
    """
    column: Any = batch.get(name)
    if isinstance(column, list | tuple):
        column = as_column(f"the {what} column {name!r}", column)
    if hasattr(column, "__array__") and not isinstance(column, Tensor):
        column = torch.from_numpy(np.array(column))
    if isinstance(column, Tensor):
        if column.is_complex():
            raise TypeError(
                f"the {what} column {name!r} must hold real numbers, got {column.dtype}; take their real or imaginary "
                f"part"
            )
        return column
    if name not in batch:
        remedy = {"label": "; name the column by `label=`", "group": "; name the column by `groups=`"}.get(what, "")
        raise KeyError(
            f"the {what} column {name!r} must be a dense column of the batch, which has {sorted(batch)}{remedy}"
        )
    kind = f"a {column.dtype} RaggedTensor" if isinstance(column, RaggedTensor) else f"a {type(column).__name__}"
    raise TypeError(
        f"the {what} column {name!r} must be a dense column of numbers, got {kind}; read it as Dense(), or convert "
        f"lists and text to numbers in a transform"
    )


def loss_of(figures: Mapping[str, Tensor | Metric]) -> Tensor:
    """Return the loss among a step's figures.

    Raises:
        TypeError: There is no loss.
    """
    loss = figures.get("loss") if isinstance(figures, Mapping) else None
    if not isinstance(loss, Tensor):
        raise TypeError(f"a step must return a mapping with a scalar tensor 'loss', got {figures!r}")
    return loss
