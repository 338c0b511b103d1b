"""The methods of an engine by which Saver saves and loads its tables."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from recis_hybrid.checkpointing import HostMemory, PartState, TableState
from recis_hybrid.embedding.checkpoint.load import TablesLoader, load_some_tables, load_tables_state
from recis_hybrid.embedding.checkpoint.ownership import Buckets, BucketShares
from recis_hybrid.embedding.checkpoint.save import rows_state, snapshot
from recis_hybrid.embedding.checkpoint.state import tables_changes, tables_layout, tables_state, watch_tables
from recis_hybrid.embedding.distributed.sharded_table import ShardedTables
from recis_hybrid.embedding.planner.coalesce import COUNTS
from recis_hybrid.embedding.table.hash_table import HashTable


class CheckpointedTables:
    """Logical tables of this rank that Saver can save and load."""

    tables: list[HashTable]
    _sharded: ShardedTables | None
    """The tables as ranks share them; None if this process has them alone."""

    def checkpoint_state(self) -> PartState:
        """Return every member table's rows, as Saver writes them; together the ranks return each row once."""
        return tables_state(self.tables, self._shares)

    def checkpoint_layout(self) -> PartState:
        """Return :meth:`checkpoint_state` without its rows."""
        return tables_layout(self.tables)

    def checkpoint_snapshot(self, memory: HostMemory | None) -> Callable[[], PartState]:
        """Return a function that returns :meth:`checkpoint_state` with rows that are read while they are written.

        Args:
            memory: Holds a copy of every row, so that the function can be called in any thread. None copies nothing,
                and no row may change before the call.
        """
        if memory is None:
            return partial(rows_state, self.tables, self._shares)
        return snapshot(self.tables, memory, self._shares)

    def checkpoint_loader(self, saved: PartState) -> TablesLoader:
        """Return a loader that takes the rows of a checkpoint in pieces; ``saved`` describes it, without rows."""
        return TablesLoader(self.tables, saved)

    def watch_checkpoint_changes(self) -> object:
        """Return logs of changes from now on, filled as long as they live; see :meth:`HashTable.watch`."""
        return watch_tables(self.tables)

    def checkpoint_changes(self, since: object, whole: Collection[str] = ()) -> PartState | None:
        """Return :meth:`checkpoint_state` of the rows that changed; see :func:`tables_changes`."""
        return tables_changes(self.tables, since, whole, self._shares)

    def checkpoint_buckets(self, table: str) -> Buckets | None:
        """Return the buckets of a member table whose rows this rank loads from a checkpoint.

        Args:
            table: Name in the checkpoint.

        Returns:
            The first bucket, and the one after the last; None if ranks do not share the tables.
        """
        if self._shares is None:
            return None
        name = table.removesuffix(COUNTS)
        places = (
            (t, m) for t, own in enumerate(self.tables) for m, each in enumerate(own.members) if each.name == name
        )
        place = next(places, None)
        return (0, 0) if place is None else self._shares.loaded(*place)

    def load_checkpoint_state(self, state: PartState) -> None:
        """Replace the rows of every member table; with several ranks, each loads its own from all rows."""
        load_tables_state(self.tables, state, self.checkpoint_buckets)

    @property
    def _shares(self) -> BucketShares | None:
        """The buckets that this rank saves and loads; None if it does not share the tables."""
        if self._sharded is None:
            return None
        return BucketShares(self._sharded.exchange, [table.routing for table in self._sharded.tables])

    def load_checkpoint_tables(self, tables: dict[str, TableState]) -> None:
        """Replace the rows of some member tables; see :func:`load_some_tables`."""
        load_some_tables(self.tables, tables)
