"""What an engine's tables are to Saver: rows to hand out, whole or what changed, and rows to take."""

from __future__ import annotations

from collections.abc import Callable, Collection

from recis_hybrid.checkpointing import HostMemory, PartState, TableState
from recis_hybrid.embedding.checkpoint.load import TablesLoader, load_some_tables, load_tables_state
from recis_hybrid.embedding.checkpoint.ownership import Buckets, Shares
from recis_hybrid.embedding.checkpoint.save import rows_state, snapshot
from recis_hybrid.embedding.checkpoint.state import tables_changes, tables_layout, tables_state, watch_tables
from recis_hybrid.embedding.distributed.sharded_table import ShardedTables
from recis_hybrid.embedding.planner.coalesce import COUNTS
from recis_hybrid.embedding.table.hash_table import HashTable


class CheckpointedTables:
    """Logical tables, this rank's, that go into checkpoints and come from them."""

    tables: list[HashTable]
    _sharded: ShardedTables | None
    """The tables as ranks share them; None where this process has them alone."""

    def checkpoint_state(self) -> PartState:
        """Return every member table's rows: what Saver writes; of several ranks each hands out some, each row once."""
        return tables_state(self.tables, self._shares)

    def checkpoint_layout(self) -> PartState:
        """Return :meth:`checkpoint_state` without its rows."""
        return tables_layout(self.tables)

    def checkpoint_rows(self) -> PartState:
        """Return :meth:`checkpoint_state` with rows to be read as they are written; none may change before."""
        return rows_state(self.tables, self._shares)

    def checkpoint_snapshot(self, memory: HostMemory) -> Callable[[], PartState]:
        """Copy every row into host memory; what it returns hands the copies out, in any thread."""
        return snapshot(self.tables, memory, self._shares)

    def checkpoint_loader(self, saved: PartState) -> TablesLoader:
        """Return what takes the rows of a checkpoint in pieces; ``saved`` says what it holds, without rows."""
        return TablesLoader(self.tables, saved)

    def watch_checkpoint_changes(self) -> object:
        """Begins to note what changes in the tables, for as long as the result lives; see :meth:`HashTable.watch`."""
        return watch_tables(self.tables)

    def checkpoint_changes(self, since: object, whole: Collection[str] = ()) -> PartState | None:
        """Return :meth:`checkpoint_state` of the rows that changed; see :func:`tables_changes`."""
        return tables_changes(self.tables, since, whole, self._shares)

    def checkpoint_buckets(self, table: str) -> Buckets | None:
        """Return of which buckets this rank takes a member table's rows from a checkpoint.

        Args:
            table: Name in the checkpoint.

        Returns:
            The first bucket, and the one after the last; None where ranks do not share the tables.
        """
        if self._shares is None:
            return None
        name = table.removesuffix(COUNTS)
        places = (
            (t, m) for t, own in enumerate(self.tables) for m, each in enumerate(own.members) if each.name == name
        )
        place = next(places, None)
        return (0, 0) if place is None else self._shares.kept(*place)

    def load_checkpoint_state(self, state: PartState) -> None:
        """Replace every member table's rows; of several ranks each takes its own of a state that has them all."""
        load_tables_state(self.tables, state, self.checkpoint_buckets)

    @property
    def _shares(self) -> Shares | None:
        """What of the tables this rank saves and loads; None where no others have them, too."""
        if self._sharded is None:
            return None
        return Shares(self._sharded.exchange, [table.asks for table in self._sharded.tables])

    def load_checkpoint_tables(self, tables: dict[str, TableState]) -> None:
        """Replace the rows of some member tables; see :func:`load_some_tables`."""
        load_some_tables(self.tables, tables)
