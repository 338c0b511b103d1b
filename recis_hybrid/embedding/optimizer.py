"""Interfaces between tables and optimizers.

``embedding`` imports no optimizer. An engine is built for an :class:`OptimizerSpec`. A :class:`RowOptimizer` updates
its tables, identified by their anchors. :class:`BeforeRead` lets an optimizer change rows before they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from recis_hybrid.embedding.table.record_layout import StateField, check_state_fields
from recis_hybrid.ops.blocks import Blocks
from recis_hybrid.ops.update import Gradients
from recis_hybrid.validation import describe_value


@dataclass(frozen=True)
class OptimizerSpec:
    """Description of a sparse optimizer that is not built yet: class, row state and hyperparameters.

    The optimizers of ``recis_hybrid.optim`` create one with ``spec``, e.g. ``optim.SGD.spec(momentum=0.9)``.
    """

    make: Callable[..., Any]
    """Class of the optimizer; called with parameters and hyperparameters."""
    row_state: tuple[StateField, ...] = ()
    """Optimizer state of every row."""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for ``make``."""

    def __post_init__(self) -> None:
        row_state = check_state_fields("OptimizerSpec: row_state", self.row_state)
        if getattr(self.make, "needs_whole_rows", False):
            row_state = tuple(replace(field, whole_rows=True) for field in row_state)
        object.__setattr__(self, "row_state", row_state)

    @property
    def key(self) -> tuple[object, ...]:
        """A hashable value that is equal for equal specs."""
        settings = {name: tuple(v) if isinstance(v, list) else v for name, v in self.hyperparameters.items()}
        return (self.make, self.row_state, tuple(sorted(settings.items())))

    @staticmethod
    def of(where: str, optimizer: object) -> OptimizerSpec | None:
        """Return the spec of an optimizer class; return a spec or None unchanged.

        Args:
            where: The caller, for messages.
            optimizer: A class, a spec or None.

        Raises:
            TypeError: If the argument is none of these.
        """
        if optimizer is None or isinstance(optimizer, OptimizerSpec):
            return optimizer
        if isinstance(optimizer, type) and callable(row_state := getattr(optimizer, "row_state", None)):
            return OptimizerSpec(optimizer, row_state())
        got = optimizer.__qualname__ if isinstance(optimizer, type) else describe_value(optimizer)
        raise TypeError(
            f"{where}: optimizer must be an optimizer class of recis_hybrid.optim, e.g. optim.Adam, one with "
            f"hyperparameters, e.g. optim.SGD.spec(momentum=0.9), or None, got {got}"
        )


class RowOptimizer(Protocol):
    """Optimizer interface of :meth:`EmbeddingEngine.apply_gradients`, which works without autograd."""

    def check_tables(self, anchors: Sequence[Tensor]) -> None:
        """Raise ValueError unless all given tables are among the optimizer's parameters."""

    def update_table(self, anchor: Tensor, gradients: Gradients) -> None:
        """Do one step on the table of an anchor."""


class BeforeRead(Protocol):
    """Updates rows just before they are read or updated, to catch up on steps without a gradient.

    With it, exact weight decay or moments need no pass over the whole table in each step. A training lookup and a save
    change the rows of the table, evaluation and exports change copies of them. It may be called several times for a row
    within a step, which its ``updated_step`` must tell.
    """

    def __call__(self, blocks: Blocks, count: Tensor, rows: Tensor, step: int) -> None:
        """Change records, and set their ``updated_step``.

        Args:
            blocks: The records.
            count: int64 ``[1]``: number of valid rows.
            rows: int64 ``[n]``: the rows, distinct as far as they are valid.
            step: Number of steps done on the table.
        """
