"""What an object does to be saved and loaded: the seam between the saver and everything that has state.

What it hands out is `recis_hybrid.state`, which rooms below the saver can import.
"""

from typing import Protocol, runtime_checkable

from recis_hybrid.state import JSON as JSON, PartState as PartState, TableState as TableState

BUCKETS = 65536
"""Number of shares of the id space; part of the format, so it never depends on the world size."""


@runtime_checkable
class Saveable(Protocol):
    """An object that a `Saver` can save and load."""

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

    def checkpoint_changes(self, since: object) -> PartState | None:
        """Hand out what changed.

        Args:
            since: What `watch_checkpoint_changes` returned.

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
                missing but the first two.
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
