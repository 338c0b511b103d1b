"""The request of a lookup, and its result."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import numbers_on
from recis_hybrid.ops.gather import MAX, SOURCE_SHIFT, Bags, RowGroups


class FeatureIds(NamedTuple):
    """The ids of one feature."""

    ids: Tensor
    """int64 ``[n]``, contiguous."""
    vectors: int
    """Number of vectors: bags, or bags times tile."""
    member: int
    """Number of the member table."""
    offsets: Tensor | None = None
    """int64 ``[bags + 1]`` into ``ids``; None: one id per bag."""
    weights: Tensor | None = None
    """float32 ``[n]``; None: all 1."""
    combiner: int = ops.gather.SUM
    """A combiner number of ``ops.gather``."""
    tile: int = 0
    """0, or the number of vectors of a bag, one for each of its first ids."""
    unknown_zeros: bool = False
    """True if an id without a row has zeros instead of its first value."""
    used: Tensor | None = None
    """int64 tensor whose last element is the number of valid ids, if the host only knows a bound; None: all."""


class Request(NamedTuple):
    """The ids of all features of a lookup, in the form kernels expect."""

    ids: list[Tensor]
    members: list[int]
    bags: Bags
    unknown: list[int]
    """For each feature, the member table whose first values unknown ids get; -1: zeros."""
    used: list[Tensor] = []
    """As in ``ops.id_map.find``."""
    counts: Tensor | None = None
    """int64 ``[N]``: how often each id occurs on the rank that sent it, with one id per bag; None: once each."""

    @staticmethod
    def of(features: Sequence[FeatureIds]) -> Request:
        """Return the request for several features."""
        ids, vectors, members, offsets, weights, combiners, tiles, zeros, used = map(list, zip(*features, strict=True))
        return Request(
            ids,
            members,
            Bags([part.numel() for part in ids], vectors, _some(offsets), _some(weights), combiners, tiles),
            [-1 if zero else member for zero, member in zip(zeros, members, strict=True)],
            _some(used),
        )

    def with_own_bags(self) -> Request:
        """Return the request with copies of its offsets and weights.

        A reader may reuse the batch's memory for the next batch before the gradients are summed.
        """
        bags = self.bags
        if not bags.offsets and not bags.weights:
            return self
        return self._replace(bags=bags._replace(offsets=_copies(bags.offsets), weights=_copies(bags.weights)))


_generations = itertools.count()


def next_generation() -> int:
    """Return a generation that no table of this process has had yet."""
    return next(_generations)


def _copies(parts: list[Tensor]) -> list[Tensor]:
    """Return copies of tensors, views of one buffer: one operator, whatever the number of features."""
    if not parts:
        return []
    # An empty tensor that stands for None has a dtype of its own.
    present = [part for part in parts if part.numel()] or parts[:1]
    return list(torch.cat(present).split([part.numel() for part in parts]))


_EMPTY: dict[torch.device, Tensor] = {}


def _some(parts: list[Tensor | None]) -> list[Tensor]:
    """Replace each None by an empty tensor; return an empty list if all are None."""
    present = next((part for part in parts if part is not None), None)
    if present is None:
        return []
    empty = _EMPTY.get(present.device)
    if empty is None:
        empty = _EMPTY[present.device] = torch.empty(0, device=present.device)
    return [empty if part is None else part for part in parts]


@dataclass(eq=False)
class Lookup:
    """The rows of a batch's ids in one table."""

    request: Request
    rows: Tensor
    """int64 ``[N]``, feature after feature; -1 for an id without a row."""
    row_bound: int
    """Greater than every row in ``rows``."""
    generation: int
    """Generation of the table at the time of the lookup; the rows are invalid in later ones."""
    complete: bool
    """True if every id is known to have a row."""
    step: int
    """Step of the table that the lookup belongs to."""
    grouped: RowGroups | None = None
    """The positions grouped by row, for summing gradients; None if this is not a training lookup."""
    gathered: Tensor | None = None
    """Buffer of the vectors, if they were gathered in the same pass; reset when :func:`pooling.gather` takes it."""

    @property
    def train(self) -> bool:
        """True for a training lookup, whose rows may take gradients."""
        return self.grouped is not None

    @property
    def groups(self) -> RowGroups:
        """The positions grouped by row.

        Raises:
            RuntimeError: If this is not a training lookup.
        """
        if self.grouped is None:
            raise RuntimeError("the lookup ran in evaluation mode and takes no gradients; call train() before it")
        return self.grouped

    @property
    def sources(self) -> Bags:
        """The bags of gradients: ``request.bags``, but one bag per position with the combiner ``max``."""
        return gradient_bags(self.request.bags)

    def occurrences(self) -> Tensor:
        """Return offsets ``o``, int64 ``[N + 1]``: row ``unique[u]`` occurs ``o[u + 1] - o[u]`` times."""
        counts, groups = self.request.counts, self.groups
        if counts is None:
            return groups.offsets
        lengths = numbers_on(counts.device, [0, *self.request.bags.lengths[:-1]])
        features, vectors = groups.sources >> SOURCE_SHIFT, groups.sources & (1 << SOURCE_SHIFT) - 1
        # Beyond the valid groups the buffers are undefined.
        n = counts.numel()
        positions = (lengths.cumsum(0)[features.clamp(0, lengths.numel() - 1)] + vectors).clamp(0, max(n - 1, 0))
        total = torch.zeros(n + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts[positions], 0, out=total[1:])
        return total[groups.offsets.clamp(0, n)]


def select(bags: Bags, numbers: list[int]) -> Bags:
    """Return the bags of the features with the given numbers."""
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
    """Return the bags of the gradients of bags; see ``Lookup.sources``."""
    if not bags.combiners.count(MAX):
        return bags
    is_max = [combiner == MAX for combiner in bags.combiners]
    offsets = bags.offsets and [part[:0] if m else part for part, m in zip(bags.offsets, is_max, strict=True)]
    return bags._replace(
        offsets=offsets,
        vectors=[n if m else v for n, v, m in zip(bags.lengths, bags.vectors, is_max, strict=True)],
        combiners=[ops.gather.SUM if m else c for c, m in zip(bags.combiners, is_max, strict=True)],
    )
