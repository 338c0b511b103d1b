"""What a table is told of its members, and what an optimizer is to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from recis_hybrid.embedding.initializers import Initializer
from recis_hybrid.ops.gather import RowGroups
from recis_hybrid.ops.update import Gradients

if TYPE_CHECKING:
    from recis_hybrid.embedding.table.hash_table import HashTable

META = ("updated_step", "seen_step", "frequency")
"""What a row keeps of its past, as columns of :meth:`HashTable.export`; int64 ``[n]`` each."""

META_BITS = {"updated_step": 40, "seen_step": 40, "frequency": 48}
"""How many bits of a record each has."""


@dataclass(frozen=True)
class MemberTable:
    """A table as the user named it."""

    name: str
    initializer: Initializer


class RowUpdate(Protocol):
    """An optimizer's step on one table: updates the records that ``gradients`` belong to."""

    def __call__(self, table: HashTable, gradients: Gradients | None) -> None:
        """Update the table, and counts the step; without gradients it only counts."""


class BeforeRead(Protocol):
    """What an optimizer does to rows that are about to be read in training: for what is due in steps without gradient.

    So exact weight decay or moments need no pass over the whole table: a row catches up when it is next met. Its
    metadata still hold the steps before this lookup. An evaluation reads rows as they are and calls nothing.
    """

    def __call__(self, table: HashTable, groups: RowGroups) -> None:
        """Change the records of the rows ``groups.unique``, of which ``groups.count`` (int64 ``[1]``) are valid."""
