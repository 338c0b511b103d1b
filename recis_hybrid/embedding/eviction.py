"""Eviction: rules that select rows to erase, and the metadata they are based on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
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

    def take(self, positions: Tensor) -> Rows:
        """Return the rows at some positions (int64 ``[m]``)."""
        return Rows(
            self.ids[positions],
            self.members[positions],
            self.updated_step[positions],
            self.seen_step[positions],
            self.frequency[positions],
            self.step,
        )


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


def unwanted_rows(rule: Eviction | Mapping[int, Eviction], rows: Rows) -> Tensor:
    """Return the rows that a rule selects, or that a rule selects in each member table.

    Args:
        rule: A rule for all rows; or rules by number of the member table, of which each gets the rows of its table
            alone. Rows of other member tables stay.
        rows: ``[n]``.

    Returns:
        bool ``[n]``, on the device of the rows.

    Raises:
        TypeError: If a rule is not a rule, or does not return a bool tensor.
        ValueError: If that tensor does not have one element for each row.
    """
    if not isinstance(rule, Mapping):
        return _selected(rule, rows)
    result = torch.zeros_like(rows.ids, dtype=torch.bool)
    for member, each in rule.items():
        positions = (rows.members == member).nonzero().view(-1)
        result[positions] = _selected(each, rows.take(positions))
    return result


def _selected(rule: Eviction, rows: Rows) -> Tensor:
    if isinstance(rule, type) or not callable(getattr(rule, "unwanted", None)):
        raise TypeError(f"evict: a rule must have a method unwanted(rows), e.g. Unused(steps=1000), got {rule!r}")
    unwanted = rule.unwanted(rows)
    name, n = type(rule).__name__, rows.ids.numel()
    if not isinstance(unwanted, Tensor) or unwanted.dtype != torch.bool:
        got = unwanted.dtype if isinstance(unwanted, Tensor) else f"a {type(unwanted).__name__}"
        raise TypeError(f"evict: {name}.unwanted must return a bool tensor [{n}], True for rows to erase, got {got}")
    if list(unwanted.shape) != [n]:
        raise ValueError(
            f"evict: {name}.unwanted must return one element for each of the {n} rows, bool [{n}], "
            f"got bool {list(unwanted.shape)}"
        )
    return unwanted.to(rows.ids.device)
