"""The methods of an engine that save and load rows: those that Saver calls, and ``load_rows``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from recis_hybrid.checkpointing import HostMemory, PartState, TableState
from recis_hybrid.embedding.checkpoint.load import TablesLoader, load_some_tables, load_tables_state
from recis_hybrid.embedding.checkpoint.ownership import ALL, Buckets, BucketShares
from recis_hybrid.embedding.checkpoint.save import rows_state, snapshot
from recis_hybrid.embedding.checkpoint.state import tables_changes, tables_layout, tables_state, watch_tables
from recis_hybrid.embedding.checkpoint.vectors import VectorLoader, load_vectors
from recis_hybrid.embedding.distributed.sharded_table import ShardedTables
from recis_hybrid.embedding.planner.coalesce import COUNTS
from recis_hybrid.embedding.table.hash_table import HashTable


class CheckpointedTables:
    """Logical tables of this rank, whose rows can be saved and loaded."""

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
        place = self._places.get(table.removesuffix(COUNTS))
        return (0, 0) if place is None else self._shares.loaded(*place)

    def load_checkpoint_state(self, state: PartState) -> None:
        """Replace the rows of every member table; with several ranks, each loads its own from all rows."""
        load_tables_state(self.tables, state, self.checkpoint_buckets)

    @property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Numbers of the logical table and of the member table in it, by the member table's name."""
        return {member.name: (t, m) for t, table in enumerate(self.tables) for m, member in enumerate(table.members)}

    @property
    def _shares(self) -> BucketShares | None:
        """The buckets that this rank saves and loads; None if it does not share the tables."""
        if self._sharded is None:
            return None
        return BucketShares(self._sharded.exchange, [table.routing for table in self._sharded.tables])

    def load_checkpoint_tables(self, tables: dict[str, TableState]) -> None:
        """Replace the rows of some member tables; see :func:`load_some_tables`."""
        load_some_tables(self.tables, tables)

    def load_rows(self, table: str, ids: Any, vectors: Any = None) -> int:
        """Write vectors that were computed elsewhere into a table, also into one with ``trainable=False``.

        Ids without a row get one, regardless of admission. Other rows stay, and the optimizer state of rows that exist
        already is kept. The vectors are converted to the table's dtype.

        If ranks share the tables, the call is collective. Every rank must pass the rows of all ranks, e.g. read from
        one file; each keeps its own.

        Args:
            table: Name of the table: ``EmbeddingConfig.table``, or else the feature's name.
            ids: Integers ``[n]``, distinct: a tensor, or an array of numpy or another library, as for
                :meth:`EmbeddingEngine.forward`. Without ``vectors``, an iterable of pairs (ids, vectors), such as
                ``columnio.read_vectors(path, ids="id", vectors="embedding")``; one pair at a time is in memory.
            vectors: Floats ``[n, dim]``, finite.

        Returns:
            Number of rows written on this process.

        Raises:
            ExchangeError: If ranks passed different rows.
            OtherRankError: If another rank failed.
            TypeError: If ids or vectors are no arrays, or there are no pairs.
            ValueError: If there is no such table, shapes do not fit, an id occurs twice, or a value is not finite in
                the table's dtype. The rows of earlier pairs stay; those of the pair in question are not written.

        Example:
            >>> from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
            >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2, trainable=False, unknown="zeros")})
            >>> engine.load_rows("item", [7, 8], torch.tensor([[0.5, 1.0], [2.0, 3.0]]))
            2
            >>> engine({"item": torch.tensor([8, 9])})["item"].tolist()
            [[2.0, 3.0], [0.0, 0.0]]
        """
        if table not in self._places:
            raise ValueError(f"load_rows: there is no table {table!r}; the tables are {sorted(self._places)}")
        number, member = self._places[table]
        shares = self._shares
        loader = VectorLoader(self.tables[number], member, ALL if shares is None else shares.loaded(number, member))
        load_vectors(loader, ids, vectors, None if self._sharded is None else self._sharded.exchange.group)
        return loader.rows
