"""Eviction: which rows are given up, and what is known of rows to decide it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from recis_hybrid.validation import check_integer


@dataclass(frozen=True, eq=False)
class Rows:
    """All rows of a table, in no particular order; int64 ``[n]`` each, on the table's device."""

    ids: Tensor
    members: Tensor
    """Numbers of the member tables."""
    updated_step: Tensor
    """The step that last updated the row; 0: none has."""
    seen_step: Tensor
    """The step whose training lookup last met the row; 0: none has."""
    frequency: Tensor
    """How often training lookups met the row."""
    step: int
    """Steps that the table has done."""


class Eviction(Protocol):
    """A rule that says which rows are given up."""

    def unwanted(self, rows: Rows) -> Tensor:
        """Return bool ``[n]``: True for the rows to give up."""


@dataclass(frozen=True)
class Unused:
    """Gives up rows that no training lookup has met in the last ``steps`` steps.

    Example:
        >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2)})
        >>> _ = engine({"item": torch.tensor([1, 2])})
        >>> engine.evict(Unused(steps=1000))
        0
    """

    steps: int
    """Steps of the optimizer, at least 1."""

    def __post_init__(self) -> None:
        check_integer("Unused", "steps", self.steps, low=1)

    def unwanted(self, rows: Rows) -> Tensor:
        """Return which rows were last met ``steps`` or more steps ago."""
        return rows.seen_step <= rows.step - self.steps
