"""What a lookup is asked and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from recis_hybrid import ops


@dataclass(frozen=True)
class FeatureIds:
    """The ids of one feature, as a table takes them."""

    ids: Tensor
    """int64 ``[n]``, contiguous."""
    offsets: Tensor
    """int64 ``[B + 1]`` into ``ids``; empty: one id a bag."""
    bags: int
    """B."""
    member: int
    """Number of the member table."""
    combiner: int
    """A value of ``ops.blocks.COMBINERS``."""


@dataclass(frozen=True)
class Lookup:
    """Which rows a batch met in one table: what :meth:`HashTable.apply_gradients` needs to find them again."""

    features: tuple[FeatureIds, ...]
    rows: Tensor
    """int64 ``[N]``, features end to end."""
    row_bound: int
    """Greater than every row in ``rows``."""
    generation: int
    """The table's generation at the time; rows mean nothing in a later one."""

    @cached_property
    def groups(self) -> ops.update.RowGroups:
        """The positions grouped by row."""
        return ops.update.group_rows(
            self.rows,
            [feature.offsets for feature in self.features],
            [feature.bags for feature in self.features],
            [feature.ids.numel() for feature in self.features],
            [feature.combiner for feature in self.features],
            self.row_bound,
        )

    def select(self, features: list[int]) -> Lookup:
        """Returns the lookup of some of its features, by number."""
        if len(features) == len(self.features):
            return self
        parts = self.rows.split([feature.ids.numel() for feature in self.features])
        rows = torch.cat([parts[number] for number in features]) if features else self.rows[:0]
        return Lookup(tuple(self.features[number] for number in features), rows, self.row_bound, self.generation)

    @staticmethod
    def merged(lookups: list[Lookup]) -> Lookup:
        """Returns several lookups of one table as one, their features in order."""
        if len(lookups) == 1:
            return lookups[0]
        return Lookup(
            features=tuple(feature for lookup in lookups for feature in lookup.features),
            rows=torch.cat([lookup.rows for lookup in lookups]),
            row_bound=max(lookup.row_bound for lookup in lookups),
            generation=lookups[0].generation,
        )


@dataclass(frozen=True)
class RowGradients:
    """Gradients on their way into a table: pooled ones by feature, and which rows they belong to."""

    gradients: list[Tensor]
    """For each feature, float32 ``[B, dim]``."""
    groups: ops.update.RowGroups

    def summed(self, dim: int) -> tuple[Tensor, Tensor]:
        """Returns the distinct rows, int64 ``[U]``, and their summed gradients, float32 ``[U, dim]``; waits."""
        out = torch.empty(self.groups.unique.numel(), dim, dtype=torch.float32, device=self.groups.unique.device)
        ops.update.reduce_rows(self.gradients, self.groups, out)
        count = int(self.groups.count)
        return self.groups.unique[:count], out[:count]


@dataclass
class Pending:
    """Gradients that backward has left at a table for the optimizer's next step."""

    lookups: list[Lookup] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def add(self, lookup: Lookup, gradients: list[Tensor]) -> None:
        """Appends the gradients of one lookup."""
        self.lookups.append(lookup)
        self.gradients.extend(gradients)

    def clear(self) -> None:
        """Forgets everything."""
        self.lookups.clear()
        self.gradients.clear()
