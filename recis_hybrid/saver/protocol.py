"""What an object does to be saved and loaded: the seam between the saver and everything that has state.

What it hands out is `recis_hybrid.state`, which rooms below the saver can import.
"""

from typing import Protocol, runtime_checkable

from recis_hybrid.state import (
    BUCKETS as BUCKETS,
    JSON as JSON,
    PartState as PartState,
    RowReader as RowReader,
    TableState as TableState,
)


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
class HasLayout(Protocol):
    """A `Saveable` that can say what its state looks like without handing it out, which large tables had better."""

    def checkpoint_layout(self) -> PartState:
        """Hand out the state without rows.

        Returns:
            Tables, columns and tensors as in `checkpoint_state`, the tables empty; `meta` does not count.
        """
        ...
