"""Which rows a rank hands to checkpoints, and which it takes from them.

Together the ranks hand out each row once, and who writes the files takes it where it lies; who reads them takes what
its rank keeps. So the engines of a group need not send each other a row, and a save in the background does not get in
the way of what they exchange meanwhile. But for rows that are split by column: they are put together first, each by the
owner of its bucket; and who reads them takes all rows, and keeps its columns.

Letters: n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from recis_hybrid.checkpointing import BUCKETS, owned_buckets
from recis_hybrid.embedding.distributed.column_split import whole_rows
from recis_hybrid.embedding.distributed.exchange import Exchange
from recis_hybrid.embedding.distributed.id_exchange import Asks

Buckets: TypeAlias = tuple[int, int]
"""The first bucket of a range, and the one after its last."""

ALL: Buckets = (0, BUCKETS)


class Shares:
    """This rank's part of every table.

    Args:
        exchange: With the other ranks that share the tables.
        asks: Of each logical table: where its rows are.
    """

    def __init__(self, exchange: Exchange, asks: Sequence[Asks]) -> None:
        self._exchange = exchange
        self._own = owned_buckets(exchange.rank, exchange.size)
        self._asks = asks

    def splits(self, table: int) -> bool:
        """Whether ranks have but some columns of the rows of a logical table."""
        return self._asks[table].columns is not None

    def whole(self, table: int, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return rows that are to be handed out; all ranks call it together where rows are split by column.

        Args:
            table: Number of the logical table.
            columns: Rows that this rank has, ``[n, ...]``: those that others have, too, where they are split.
        """
        widths = self._asks[table].columns
        return columns if widths is None else whole_rows(columns, widths, self._exchange)

    def handed(self, table: int, member: int) -> Buckets:
        """Return of which buckets this rank hands out the rows of a member table, and the ids that went."""
        # A row that other ranks have, too, is of the owner of its bucket.
        return self._own if self._asks[table].everywhere else self.kept(table, member)

    def kept(self, table: int, member: int) -> Buckets:
        """Return of which buckets this rank has the rows of a member table."""
        asks = self._asks[table]
        if asks.everywhere:
            return ALL
        owner = next((kind.owner for kind in asks.kinds if kind.member == member), None)
        return self._own if owner is None else ALL if owner == self._exchange.rank else (0, 0)


def within(buckets: Tensor, wanted: Buckets, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those rows whose buckets (int64 ``[n]``) are in a range."""
    if wanted == ALL:
        return columns
    chosen = (buckets >= wanted[0]) & (buckets < wanted[1])
    return {name: values[chosen] for name, values in columns.items()}
