"""Which rows a rank hands to checkpoints, and which it takes from them.

Together the ranks hand out each row once, and who writes the files takes it where it lies; who reads them takes what
its rank keeps. So the engines of a group need not send each other a row, and a save in the background does not get in
the way of what they exchange meanwhile.

Letters: n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from recis_hybrid.embedding.routing import Asks
from recis_hybrid.state import BUCKETS, owned_buckets

Buckets: TypeAlias = tuple[int, int]
"""The first bucket of a range, and the one after its last."""

ALL: Buckets = (0, BUCKETS)


class Shares:
    """This rank's part of every table.

    Args:
        rank: Of the group that shares the tables.
        size: How many ranks it has.
        asks: Of each logical table: where its rows are.
    """

    def __init__(self, rank: int, size: int, asks: Sequence[Asks]) -> None:
        self._rank = rank
        self._own = owned_buckets(rank, size)
        self._asks = asks

    def handed(self, table: int, member: int) -> Buckets:
        """Returns of which buckets this rank hands out the rows of a member table, and the ids that went."""
        # A row that other ranks have, too, is of the owner of its bucket.
        return self._own if self._asks[table].replicated else self.kept(table, member)

    def kept(self, table: int, member: int) -> Buckets:
        """Returns of which buckets this rank has the rows of a member table."""
        asks = self._asks[table]
        if asks.replicated:
            return ALL
        owner = next((kind.owner for kind in asks.kinds if kind.member == member), None)
        return self._own if owner is None else ALL if owner == self._rank else (0, 0)


def within(buckets: Tensor, wanted: Buckets, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns those rows whose buckets (int64 ``[n]``) are in a range."""
    if wanted == ALL:
        return columns
    chosen = (buckets >= wanted[0]) & (buckets < wanted[1])
    return {name: values[chosen] for name, values in columns.items()}
