"""Rows sorted by group and descending score, with their ties.

Letters: N rows, G groups, T ties (runs of rows with one score).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sorted:
    """Boundaries of groups, and within them of runs of equal scores, in sorted rows."""

    order: Tensor
    """int64 ``[N]``: row numbers by group, and within it by descending score."""
    group: Tensor
    """int64 ``[N]``: the group of each sorted row, 0 to G - 1."""
    groups: int
    """The number of groups, G."""
    tie: Tensor
    """int64 ``[N]``: the run of each sorted row, 0 to T - 1."""
    tie_group: Tensor
    """int64 ``[T]``: the group of each run."""
    first: Tensor
    """int64 ``[T]``: number of rows of the group before the run."""
    size: Tensor
    """int64 ``[T]``: number of rows of the run."""

    @classmethod
    def of(cls, groups: Tensor, scores: Tensor) -> Sorted:
        """Sort rows by groups, int64 ``[N]``, and scores, float64 ``[N]``; N is at least 1."""
        order = scores.argsort(descending=True, stable=True)
        order = order[groups[order].argsort(stable=True)]
        _, group, sizes = groups[order].unique_consecutive(return_inverse=True, return_counts=True)
        ranked = scores[order]
        new = torch.ones(len(order), dtype=torch.bool)
        new[1:] = (group[1:] != group[:-1]) | (ranked[1:] != ranked[:-1])
        tie = new.cumsum(0) - 1
        begins = new.nonzero().view(-1)
        tie_group = group[begins]
        group_begins = sizes.cumsum(0) - sizes
        size = torch.bincount(tie)
        return cls(order, group, len(sizes), tie, tie_group, begins - group_begins[tie_group], size)

    def by_tie(self, values: Tensor) -> Tensor:
        """Return the sums over runs, float64 ``[T]``, of values of sorted rows, float64 ``[N]``."""
        return torch.zeros(len(self.size), dtype=torch.float64).index_add_(0, self.tie, values)

    def by_group(self, values: Tensor) -> Tensor:
        """Return the sums over groups, float64 ``[G]``, of values of runs, float64 ``[T]``."""
        return torch.zeros(self.groups, dtype=torch.float64).index_add_(0, self.tie_group, values)
