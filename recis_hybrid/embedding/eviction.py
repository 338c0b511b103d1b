"""Eviction: rules that select rows to erase, and the metadata they are based on."""

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
    """Step of the last update of the row; 0: none."""
    seen_step: Tensor
    """Step of the last training lookup of the row; 0: none."""
    frequency: Tensor
    """Number of training lookups of the row."""
    step: int
    """Number of steps done on the table."""


class Eviction(Protocol):
    """A rule that selects rows to erase."""

    def unwanted(self, rows: Rows) -> Tensor:
        """Return bool ``[n]``: True for the rows to erase."""


@dataclass(frozen=True)
class Unused:
    """Erases rows without a training lookup in the last ``steps`` steps.

    Example:
        >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2)})
        >>> _ = engine({"item": torch.tensor([1, 2])})
        >>> engine.evict(Unused(steps=1000))
        0
    """

    steps: int
    """Number of optimizer steps, at least 1."""

    def __post_init__(self) -> None:
        check_integer("Unused", "steps", self.steps, low=1)

    def unwanted(self, rows: Rows) -> Tensor:
        """Return the rows whose last lookup was ``steps`` or more steps ago."""
        return rows.seen_step <= rows.step - self.steps
