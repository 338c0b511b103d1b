"""What a lookup is asked and what it leaves behind."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.ops.gather import MAX, SOURCE_SHIFT, Bags, RowGroups


class FeatureIds(NamedTuple):
    """The ids of one feature, as a table takes them."""

    ids: Tensor
    """int64 ``[n]``, contiguous."""
    vectors: int
    """How many vectors they give: bags, or bags times tile."""
    member: int
    """Number of the member table."""
    offsets: Tensor | None = None
    """int64 ``[bags + 1]`` into ``ids``; None: one id a bag."""
    weights: Tensor | None = None
    """float32 ``[n]``; None: all are 1."""
    combiner: int = ops.gather.SUM
    """A number of ``ops.gather``."""
    tile: int = 0
    """0, or how many vectors a bag gives: of its first ids each."""
    unknown_zeros: bool = False
    """Whether an id that has no row counts as zeros and not with its first value."""
    used: Tensor | None = None
    """int64, whose last element says how many ids there are, where the host knows but a bound; None: all."""


class Request(NamedTuple):
    """All features of a lookup, end to end, as kernels take them."""

    ids: list[Tensor]
    members: list[int]
    bags: Bags
    unknown: list[int]
    """For each feature the member table whose first values stand for unknown ids; -1: zeros."""
    used: list[Tensor] = []
    """As ``ops.id_map.find`` takes it."""
    counts: Tensor | None = None
    """int64 ``[N]``: how often each id was met where it comes from, one id a bag; None: once for each time it is here.
    """

    @staticmethod
    def of(features: Sequence[FeatureIds]) -> Request:
        """Put features side by side."""
        ids, vectors, members, offsets, weights, combiners, tiles, zeros, used = map(list, zip(*features, strict=True))
        return Request(
            ids,
            members,
            Bags([part.numel() for part in ids], vectors, _some(offsets), _some(weights), combiners, tiles),
            [-1 if zero else member for zero, member in zip(zeros, members, strict=True)],
            _some(used),
        )

    def kept(self) -> Request:
        """Return it with offsets and weights of its own.

        A reader may use the memory of the batch's for the next one, and gradients may be summed after that.
        """
        bags = self.bags
        if not bags.offsets and not bags.weights:
            return self
        return self._replace(
            bags=bags._replace(
                offsets=[part.clone() for part in bags.offsets], weights=[part.clone() for part in bags.weights]
            )
        )


_generations = itertools.count()


def next_generation() -> int:
    """Return a number for a table's generation that no table of this process has had."""
    return next(_generations)


_EMPTY: dict[torch.device, Tensor] = {}


def _some(parts: list[Tensor | None]) -> list[Tensor]:
    """An empty list where all are None, else with an empty tensor for each None."""
    present = next((part for part in parts if part is not None), None)
    if present is None:
        return []
    empty = _EMPTY.get(present.device)
    if empty is None:
        empty = _EMPTY[present.device] = torch.empty(0, device=present.device)
    return [empty if part is None else part for part in parts]


@dataclass(eq=False)
class Lookup:
    """Which rows a batch met in one table: what :meth:`HashTable.apply_gradients` needs to find them again."""

    request: Request
    rows: Tensor
    """int64 ``[N]``, features end to end; -1 for an id that has none."""
    row_bound: int
    """Greater than every row in ``rows``."""
    generation: int
    """The table's generation at the time; rows mean nothing in a later one."""
    complete: bool
    """Whether every id is known to have a row."""
    step: int
    """The step that it belongs to."""
    grouped: RowGroups | None = None
    """The positions grouped by row, as gradients are summed; None if this was no training lookup."""
    gathered: Tensor | None = None
    """The buffer into which its vectors were gathered along with it, until :func:`gather.gather` takes it."""

    @property
    def train(self) -> bool:
        """Whether it was a training lookup: one whose rows may take gradients."""
        return self.grouped is not None

    @property
    def groups(self) -> RowGroups:
        """The positions grouped by row.

        Raises:
            RuntimeError: If this was no training lookup.
        """
        if self.grouped is None:
            raise RuntimeError(
                "the lookup was made in evaluation mode; call train() before it, for it to take gradients"
            )
        return self.grouped

    @property
    def sources(self) -> Bags:
        """How gradients belong to positions: as ``request.bags``, but one a position where the greatest was taken."""
        return gradient_bags(self.request.bags)

    def occurrences(self) -> Tensor:
        """Return int64 ``[N + 1]``: row ``unique[u]`` was met ``[u + 1] - [u]`` times."""
        counts, groups = self.request.counts, self.groups
        if counts is None:
            return groups.offsets
        lengths = torch.tensor([0, *self.request.bags.lengths[:-1]], device=counts.device)
        features, vectors = groups.sources >> SOURCE_SHIFT, groups.sources & (1 << SOURCE_SHIFT) - 1
        # Beyond the valid groups buffers hold anything.
        n = counts.numel()
        positions = (lengths.cumsum(0)[features.clamp(0, lengths.numel() - 1)] + vectors).clamp(0, max(n - 1, 0))
        total = torch.zeros(n + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts[positions], 0, out=total[1:])
        return total[groups.offsets.clamp(0, n)]


def select(bags: Bags, numbers: list[int]) -> Bags:
    """Return the bags of some of the features, by number."""
    lengths, vectors, offsets, weights, combiners, tiles = bags
    return Bags(
        [lengths[n] for n in numbers],
        [vectors[n] for n in numbers],
        [offsets[n] for n in numbers] if offsets else [],
        [weights[n] for n in numbers] if weights else [],
        [combiners[n] for n in numbers],
        [tiles[n] for n in numbers],
    )


def gradient_bags(bags: Bags) -> Bags:
    """Return how the gradients of these bags belong to positions."""
    if not bags.combiners.count(MAX):
        return bags
    greatest = [combiner == MAX for combiner in bags.combiners]
    offsets = bags.offsets and [part[:0] if g else part for part, g in zip(bags.offsets, greatest, strict=True)]
    return bags._replace(
        offsets=offsets,
        vectors=[n if g else v for n, v, g in zip(bags.lengths, bags.vectors, greatest, strict=True)],
        combiners=[ops.gather.SUM if g else c for c, g in zip(bags.combiners, greatest, strict=True)],
    )
