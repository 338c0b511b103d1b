"""Buckets of rows that a rank saves to checkpoints and loads from them.

Together the ranks save each row once, on a rank that has it; a rank loads the rows that it owns. So saving exchanges no
rows between ranks, and a save in the background does not disturb training. Rows that are split by column are the
exception: the owner of a row's bucket joins it first, and each rank loads all rows and takes its columns.

Letters: n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from recis_hybrid.checkpointing import BUCKETS, owned_buckets
from recis_hybrid.embedding.distributed.column_split import whole_rows
from recis_hybrid.embedding.distributed.exchange import Exchange
from recis_hybrid.embedding.distributed.id_exchange import TableRouting
from recis_hybrid.embedding.distributed.sharded_table import ShardedTables
from recis_hybrid.embedding.table.hash_table import HashTable

Buckets: TypeAlias = tuple[int, int]
"""The first bucket of a range, and the one after its last."""

ALL: Buckets = (0, BUCKETS)


class BucketShares:
    """The buckets of every table that this rank saves and loads.

    Args:
        exchange: Collectives of the ranks that share the tables.
        routings: For each logical table, on which ranks its rows are.
    """

    def __init__(self, exchange: Exchange, routings: Sequence[TableRouting]) -> None:
        self._exchange = exchange
        self._own = owned_buckets(exchange.rank, exchange.size)
        self._routings = routings

    def splits(self, table: int) -> bool:
        """Return whether each rank has only some columns of the rows of a logical table."""
        return self._routings[table].columns is not None

    def whole(self, table: int, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows to save; collective if rows are split by column.

        Args:
            table: Number of the logical table.
            columns: Rows of this rank, ``[n, ...]``; the same rows on all ranks if they are split by column.
        """
        widths = self._routings[table].columns
        return columns if widths is None else whole_rows(columns, widths, self._exchange)

    def saved(self, table: int, member: int) -> Buckets:
        """Return the buckets of a member table whose rows, and whose removed ids, this rank saves."""
        # A row that all ranks have is saved by the owner of its bucket.
        return self._own if self._routings[table].everywhere else self.loaded(table, member)

    def loaded(self, table: int, member: int) -> Buckets:
        """Return the buckets of a member table whose rows this rank has, and loads."""
        routing = self._routings[table]
        if routing.everywhere:
            return ALL
        owner = next((kind.owner for kind in routing.kinds if kind.member == member), None)
        return self._own if owner is None else ALL if owner == self._exchange.rank else (0, 0)


class OwnedTables:
    """Logical tables of this rank, and the buckets of them that it saves and loads."""

    tables: list[HashTable]
    _sharded: ShardedTables | None
    """The tables as ranks share them; None if this process has them alone."""

    @property
    def _shares(self) -> BucketShares | None:
        """The buckets that this rank saves and loads; None if it does not share the tables."""
        if self._sharded is None:
            return None
        return BucketShares(self._sharded.exchange, [table.routing for table in self._sharded.tables])


def within(buckets: Tensor, wanted: Buckets, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows whose buckets (int64 ``[n]``) are in a range."""
    if wanted == ALL:
        return columns
    chosen = (buckets >= wanted[0]) & (buckets < wanted[1])
    return {name: values[chosen] for name, values in columns.items()}
