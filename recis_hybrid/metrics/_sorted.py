"""Rows sorted by group and descending score, with their ties.

Letters: N rows, G groups, T runs of tied rows (rows of a group with equal scores).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sorted:
    """Boundaries of groups, and of runs of equal scores within them, in sorted rows."""

    order: Tensor
    """int64 ``[N]``: row numbers sorted by group, then by descending score."""
    group: Tensor
    """int64 ``[N]``: the group of each sorted row, 0 to G - 1."""
    groups: int
    """The number of groups, G."""
    tie: Tensor
    """int64 ``[N]``: the run of each sorted row, 0 to T - 1."""
    tie_group: Tensor
    """int64 ``[T]``: the group of each run."""
    first: Tensor
    """int64 ``[T]``: number of rows of the group that precede the run."""
    size: Tensor
    """int64 ``[T]``: number of rows of the run."""

    @classmethod
    def of(cls, groups: Tensor, scores: Tensor) -> Sorted:
        """Sort rows by groups, int64 ``[N]``, and scores, float64 ``[N]``; N must be at least 1."""
        order = scores.argsort(descending=True, stable=True)
        order = order[groups[order].argsort(stable=True)]
        _, group, sizes = groups[order].unique_consecutive(return_inverse=True, return_counts=True)
        ranked = scores[order]
        new = torch.ones(len(order), dtype=torch.bool)
        new[1:] = (group[1:] != group[:-1]) | (ranked[1:] != ranked[:-1])
        tie = new.cumsum(0) - 1
        starts = new.nonzero().view(-1)
        tie_group = group[starts]
        group_starts = sizes.cumsum(0) - sizes
        size = torch.bincount(tie)
        return cls(order, group, len(sizes), tie, tie_group, starts - group_starts[tie_group], size)

    def by_tie(self, values: Tensor) -> Tensor:
        """Sum values of sorted rows, float64 ``[N]``, over each run; returns float64 ``[T]``."""
        return torch.zeros(len(self.size), dtype=torch.float64).index_add_(0, self.tie, values)

    def by_group(self, values: Tensor) -> Tensor:
        """Sum values of runs, float64 ``[T]``, over each group; returns float64 ``[G]``."""
        return torch.zeros(self.groups, dtype=torch.float64).index_add_(0, self.tie_group, values)
