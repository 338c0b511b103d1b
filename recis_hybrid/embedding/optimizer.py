"""OptimizerSpec: the optimizer that an engine is built for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recis_hybrid.embedding.table.record_layout import StateField, check_state_fields
from recis_hybrid.validation import describe_value


@dataclass(frozen=True)
class OptimizerSpec:
    """A sparse optimizer before it is made: its class, its state of a row, and its hyperparameters.

    The optimizers of ``recis_hybrid.optim`` make one by ``spec``, as ``optim.SGD.spec(momentum=0.9)``.
    """

    make: Callable[..., Any]
    """The optimizer's class; called with parameters and hyperparameters."""
    row_state: tuple[StateField, ...] = ()
    """Optimizer state of every row."""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for ``make``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_state", check_state_fields("OptimizerSpec: row_state", self.row_state))

    @staticmethod
    def of(optimizer: object) -> OptimizerSpec | None:
        """Return the spec of an optimizer class; a spec, and None, as they are.

        Raises:
            TypeError: If it is none of these.
        """
        if optimizer is None or isinstance(optimizer, OptimizerSpec):
            return optimizer
        if isinstance(optimizer, type) and callable(row_state := getattr(optimizer, "row_state", None)):
            return OptimizerSpec(optimizer, row_state())
        got = optimizer.__qualname__ if isinstance(optimizer, type) else describe_value(optimizer)
        raise TypeError(
            f"EmbeddingEngine: optimizer must be an optimizer class of recis_hybrid.optim, as optim.Adam, one with "
            f"hyperparameters, as optim.SGD.spec(momentum=0.9), or None, got {got}"
        )
