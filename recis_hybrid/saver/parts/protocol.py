"""What an object does to be saved and loaded: the seam between the saver and everything that has state.

What it hands out is `recis_hybrid.checkpointing`, which rooms below the saver can import.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from recis_hybrid.checkpointing import (
    BUCKETS as BUCKETS,
    JSON as JSON,
    HostMemory as HostMemory,
    PartState as PartState,
    RowReader as RowReader,
    TableState as TableState,
)


@runtime_checkable
class Saveable(Protocol):
    """An object that a `Saver` can save and load; `checkpoint_kind` of it is its kind, where it is not `saveable`."""

    def checkpoint_state(self) -> PartState:
        """Hand out the state.

        Returns:
            The state. The saver reads it before `Saver.save` returns and changes nothing in it, so tensors need not
            be copies.
        """
        ...

    def load_checkpoint_state(self, state: PartState) -> None:
        """Replace the state by a saved one.

        Called only after the whole checkpoint has been verified and found to have the tables, columns, dtypes, widths
        and table metadata, and the tensors with dtypes and shapes, that `checkpoint_state` has now.

        Args:
            state: the saved state, on the CPU in memory of its own; rows sorted by (bucket, id).
        """
        ...


@runtime_checkable
class HasChanges(Protocol):
    """A `Saveable` that can hand out just what changed since an earlier moment."""

    def watch_checkpoint_changes(self) -> object:
        """Begin to note what changes.

        Returns:
            What stands for this moment. Noting ends when nothing refers to it any more.
        """
        ...

    def checkpoint_changes(self, since: object, whole: Collection[str]) -> PartState | None:
        """Hand out what changed.

        Args:
            since: What `watch_checkpoint_changes` returned.
            whole: tables of which all rows are wanted.

        Returns:
            The state as `checkpoint_state` has it, but where a table has `removed` only the rows that may have changed
            since. None if that cannot be told.
        """
        ...


@runtime_checkable
class HasTables(Protocol):
    """A `Saveable` that can take over some tables and keep the others."""

    def checkpoint_layout(self) -> PartState:
        """Hand out the state without rows, as `HasLayout` does."""
        ...

    def load_checkpoint_tables(self, tables: dict[str, TableState]) -> None:
        """Replace the rows of some tables.

        Args:
            tables: by name, with columns of the widths that they have here; dtypes may be others, and columns may be
                missing but the first two. `step` in the meta of each is how many steps it had done, or None.
        """
        ...


@runtime_checkable
class HasLayout(Protocol):
    """A `Saveable` that can say what its state looks like without handing it out, which large tables had better."""

    def checkpoint_layout(self) -> PartState:
        """Hand out the state without rows.

        Returns:
            Tables, columns and tensors as in `checkpoint_state`, the tables empty; `meta` does not count.
        """
        ...


@runtime_checkable
class HasRows(Protocol):
    """A `Saveable` of large tables: its rows are read as they are written, and copied only for the background."""

    def checkpoint_rows(self) -> PartState:
        """Hand out the state, its tables with readers of their rows; nothing is changed before `Saver.save` returns."""
        ...

    def checkpoint_snapshot(self, memory: HostMemory) -> Callable[[], PartState]:
        """Copy the state into memory.

        Returns:
            Hands out the copies as `checkpoint_rows` does; called in another thread, and may take its time.
        """
        ...


class RowLoader(Protocol):
    """Takes the rows of a checkpoint in pieces."""

    differences: Sequence[str]
    """What keeps the checkpoint from being loaded, a text each."""
    changes: Sequence[str]
    """What is loaded in another way than it was saved, a text each."""
    holds_rows: bool
    """Whether there are rows that the checkpoint's would replace."""

    def begin(self, rows: Mapping[str, int]) -> None:
        """Remove all rows; about as many of each table will come."""
        ...

    def check(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Raise ValueError if rows of a table, columns as in `load`, cannot be loaded."""
        ...

    def load(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Take rows of a table, columns of one first dimension that are valid during the call.

        Raises:
            ValueError: as `check`.
        """
        ...

    def end(self) -> None:
        """Take over what is no row, when all rows have come."""
        ...

    def abandon(self) -> None:
        """Leave no rows: the rest of them will not come."""
        ...


@runtime_checkable
class TakesRows(Protocol):
    """A `Saveable` of large tables: it takes rows as they are read, and of tables that are not quite its own."""

    def checkpoint_loader(self, saved: PartState) -> RowLoader:
        """Compare with a checkpoint.

        Args:
            saved: the saved state, tables without rows.

        Returns:
            Says what differs, and takes the rows. Nothing is changed before it is told to begin.

        Raises:
            ValueError: what is saved beside rows is not what it must be.
        """
        ...


@runtime_checkable
class SharesRows(Protocol):
    """A `Saveable` whose ranks share tables in their own way, and not each table by buckets."""

    def checkpoint_buckets(self, table: str) -> tuple[int, int] | None:
        """Say which rows of a table this rank is to be given.

        Args:
            table: its name.

        Returns:
            The first bucket of them, and the one after the last; None for those that `owned_buckets` gives the rank.
        """
        ...
