"""Row gradients that backward has added to a table, pending until the optimizer's next step.

Letters: N positions, U distinct rows, D dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.table.lookup import Lookup, select
from recis_hybrid.ops.gather import Bags, RowGroups
from recis_hybrid.ops.update import Gradients

_MARK = 2.0**-500  # its square is negligible against that of any norm of float32 numbers


@dataclass
class Part:
    """The gradients of one lookup."""

    rows: Tensor
    """int64 ``[N]``; -1 for an id without a row."""
    members: list[int]
    """For each feature, its member table, or the same number for all; rows of different member tables are distinct."""
    row_bound: int
    """Greater than every row."""
    bags: Bags
    """Bags of the gradients: how they map to positions."""
    values: list[Tensor]
    """For each feature, float32 ``[V, D]``."""
    groups: RowGroups | None
    """The positions grouped by row; None if not grouped yet."""


@dataclass
class Reduced:
    """Summed row gradients. Only the device knows U: kernels read it, and touch no row beyond."""

    groups: RowGroups
    sums: Tensor
    """float32 ``[N, D]``: sums of the rows ``groups.unique``; the rest is uninitialized."""
    row_bound: int
    grad: Tensor | None = None
    """float64 ``[2]``, the anchor's ``grad``: the norm of the sums, and a mark too small to change a norm. None until
    it is read.

    A factor multiplied into ``grad`` is recovered exactly from the mark, even if the norm is not finite. float64 makes
    torch add the norms of tables in float64, too, so that coalescing does not change float32 gradients."""

    @property
    def factor(self) -> Tensor | None:
        """float32 ``[1]``: the factor to apply to the sums; None for 1."""
        return None if self.grad is None else (self.grad[1:] / _MARK).to(torch.float32)


class RemoteGradients(Protocol):
    """Gradients of a table shared by several ranks that are still to be exchanged."""

    # A protocol, although GradientExchange is the only implementation: embedding.distributed imports this package, so
    # a HashTable cannot import the class.

    exchanged: bool
    """True if no gradients can be waiting on any rank; then :meth:`announce` and :meth:`fetch` do nothing."""

    def __bool__(self) -> bool:
        """Return whether this rank has any."""

    def announce(self, tables: Sequence[RemoteGradients]) -> None:
        """Exchange the numbers of gradients of several tables at once; collective."""

    def fetch(self) -> list[tuple[Lookup, Part]]:
        """Exchange the gradients, and return those of this rank's rows with their lookups; collective."""

    def clear(self) -> None:
        """Drop the gradients of this rank."""

    def sum_squares(self, own: Tensor) -> Tensor:
        """Return the sum of squares (float64 ``[1]``) over the rows of all ranks, given this rank's; collective."""


class PendingGradients:
    """Gradients of any number of lookups, reduced only once: for an update, or when their norm is read."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._reduced: Reduced | None = None

    def __bool__(self) -> bool:
        return bool(self._parts) or self._reduced is not None

    def clear(self) -> None:
        """Drop all gradients."""
        self._parts = []
        self._reduced = None

    def add(self, part: Part) -> None:
        """Append the gradients of one lookup."""
        if self._reduced is not None:
            self._parts = [self._as_part(self._reduced)]
            self._reduced = None
        self._parts.append(part)

    def gradients(self) -> Gradients:
        """Return all gradients, for one update."""
        if self._reduced is not None:
            return Gradients([self._reduced.sums], self._reduced.groups, self._reduced.factor)
        part = self._parts[0]
        if len(self._parts) > 1:
            part = _merged(self._parts)
        groups = part.groups or ops.gather.group_rows(part.rows, part.members, part.row_bound, part.bags)
        return Gradients(part.values, groups)

    def norm(self, dim: int, over_ranks: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Return the norm of the summed gradients, in the form of :attr:`Reduced.grad`; None if there are none.

        Args:
            dim: D.
            over_ranks: Returns the sum of squares over the rows of all ranks, given that of this rank.
        """
        reduced = self._reduce(dim)
        if reduced is None:
            return None
        if reduced.grad is None:
            squares = over_ranks(ops.update.sum_squares(reduced.sums, reduced.groups.count))
            reduced.grad = torch.full((2,), _MARK, dtype=torch.float64, device=squares.device)
            torch.sqrt(squares, out=reduced.grad[:1])
        return reduced.grad

    def clip_rows(self, dim: int, max_norm: float) -> None:
        """Scale the summed gradient of each row down to a norm of at most ``max_norm``."""
        reduced = self._reduce(dim)
        if reduced is not None:
            ops.update.clip_rows(reduced.sums, reduced.groups.count, reduced.factor, max_norm)
            reduced.grad = None

    def _reduce(self, dim: int) -> Reduced | None:
        """Sum the gradients of each row, unless they are summed; None if there are none."""
        if self._reduced is None and self._parts:
            gradients = self.gradients()
            n, device = gradients.groups.sources.numel(), gradients.groups.sources.device
            sums = ops.memory.empty((n, dim), torch.float32, device)
            ops.update.reduce_rows(gradients, sums)
            numbers = torch.arange(n + 1, dtype=torch.int64, device=device)
            groups = RowGroups(gradients.groups.count, gradients.groups.unique, numbers, numbers[:n], None)
            self._reduced = Reduced(groups, sums, max(part.row_bound for part in self._parts))
            self._parts = []
        return self._reduced

    def _as_part(self, reduced: Reduced) -> Part:
        n, device = reduced.sums.size(0), reduced.sums.device
        in_use = torch.arange(n, device=device) < reduced.groups.count
        rows = torch.where(in_use, reduced.groups.unique, -1)
        scaled = reduced.sums
        if (factor := reduced.factor) is not None:
            scaled = ops.memory.empty(scaled.shape, torch.float32, device)
            ops.update.reduce_rows(Gradients([reduced.sums], reduced.groups, factor), scaled)
        return Part(rows, [0], reduced.row_bound, Bags.single([n]), [scaled], None)


def _merged(parts: list[Part]) -> Part:
    """Join several parts; their features follow one another."""
    bags = [part.bags for part in parts]
    return Part(
        torch.cat([part.rows for part in parts]),
        [0] * sum(len(part.members) for part in parts),
        max(part.row_bound for part in parts),
        Bags(
            [n for each in bags for n in each.lengths],
            [v for each in bags for v in each.vectors],
            _joined([part.bags.offsets for part in parts], bags),
            _joined([part.bags.weights for part in parts], bags),
            [c for each in bags for c in each.combiners],
            [t for each in bags for t in each.tiles],
        ),
        [value for part in parts for value in part.values],
        None,
    )


def _joined(lists: list[list[Tensor]], bags: list[Bags]) -> list[Tensor]:
    present = next((part for parts in lists for part in parts), None)
    if present is None:
        return []
    none = present.new_empty(0)
    return [p for parts, each in zip(lists, bags, strict=True) for p in (parts or [none] * len(each.lengths))]


def gradient_part(
    where: str,
    rows: Tensor,
    members: list[int],
    row_bound: int,
    bags: Bags,
    groups: RowGroups | None,
    gradients: Sequence[Tensor | None],
    dim: int,
) -> Part | None:
    """Return the gradients of a lookup as a part, or None if no feature has any.

    Args:
        where: Name of the table, for messages.
        rows: int64 ``[N]``.
        members: For each feature, its member table.
        row_bound: Greater than every row.
        bags: How gradients map to positions.
        groups: The positions grouped by row; None if not grouped yet.
        gradients: For each feature, float32 ``[V, D]``, or None.
        dim: D.

    Raises:
        ValueError: If a gradient is not float32 ``[V, D]``.
    """
    values = checked_gradients(where, bags.vectors, gradients, dim, rows.device)
    used = [number for number, gradient in enumerate(gradients) if gradient is not None]
    if len(used) < len(gradients):
        parts = rows.split(bags.lengths)
        rows = torch.cat([parts[number] for number in used]) if used else rows[:0]
        bags, groups = select(bags, used), None
    return Part(rows, [members[number] for number in used], row_bound, bags, values, groups) if used else None


def checked_gradients(
    where: str, vectors: Sequence[int], gradients: Sequence[Tensor | None], dim: int, device: torch.device
) -> list[Tensor]:
    """Return the gradients that are not None in the form kernels expect: on the device, with contiguous rows.

    Raises:
        ValueError: If a gradient is not float32 ``[V, D]``.
    """
    found = []
    for count, gradient in zip(vectors, gradients, strict=True):
        if gradient is None:
            continue
        fits = gradient.ndim == 2 and gradient.size(0) == count and gradient.size(1) == dim  # faster than .shape
        if not fits or gradient.dtype is not torch.float32:
            raise ValueError(
                f"table {where}: a gradient must be float32 {[count, dim]}, got {gradient.dtype} {list(gradient.shape)}"
            )
        if gradient.device != device:
            gradient = gradient.to(device)
        found.append(gradient if dim == 1 or gradient.stride(1) == 1 else gradient.contiguous())
    return found
