"""State in checkpoints: data classes, and the protocols with which the saver reads and restores the state of objects.

Both the saver and objects with state import this module, and neither imports the other.

Letters: n rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from recis_hybrid import ops

BUCKETS = 65536
"""Number of partitions of the id space. Fixed, so that it is independent of the world size."""

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"
"""A JSON value. Numbers are finite, and dictionaries have string keys."""


def owned_buckets(rank: int, world_size: int) -> tuple[int, int]:
    """Return the contiguous range of buckets that a rank owns, as the first bucket and the one after the last.

    The inverse of :func:`rank_of_bucket`. Every bucket has one owner, and range sizes differ by at most one bucket.

    Raises:
        ValueError: If the rank is not between 0 and ``world_size`` - 1.

    Example:
        >>> [owned_buckets(rank, 3) for rank in range(3)]
        [(0, 21846), (21846, 43691), (43691, 65536)]
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"owned_buckets: rank must be 0 to {world_size - 1}, got {rank}")
    return -(-rank * BUCKETS // world_size), -(-(rank + 1) * BUCKETS // world_size)


def rank_of_bucket(buckets: Tensor, world_size: int) -> Tensor:
    """Return the rank that owns each bucket, int64 like ``buckets``: ``bucket * world_size // 65536``.

    Example:
        >>> rank_of_bucket(torch.tensor([0, 21845, 21846, 65535]), 3)
        tensor([0, 0, 1, 2])
    """
    return (buckets * world_size) >> 16


_apart: ContextVar[bool] = ContextVar("recis_hybrid_tables_apart", default=False)


@contextmanager
def tables_apart() -> Iterator[None]:
    """Exclude tables, which are saved separately, from every ``state_dict`` and ``load_state_dict`` in the context."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def are_tables_apart() -> bool:
    """Return whether this is called within :func:`tables_apart`."""
    return _apart.get()


class HostMemory:
    """Host memory for copies of state. It is reused, because faulting in new pages costs more than copying."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[Tensor]] = {}
        self._used: list[tuple[tuple[int, bool], Tensor]] = []

    def take(self, size: int, *, pinned: bool = False) -> Tensor:
        """Return an uninitialized uint8 ``[size]`` on the CPU.

        Args:
            size: Number of bytes.
            pinned: Whether to return pinned memory, for copies from a GPU.
        """
        key = (size, pinned)
        free = self._free.get(key)
        if free:
            data = free.pop()
        elif pinned:
            data = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        else:
            data = ops.memory.empty_bytes(size, torch.device("cpu"))
        self._used.append((key, data))
        return data

    def reuse(self) -> None:
        """Make all taken memory available again, and free the memory that the last copies did not use."""
        self._free = {}
        for key, data in self._used:
            self._free.setdefault(key, []).append(data)
        self._used = []


class RowReader(Protocol):
    """Reads rows while they are written to disk, so that a large table need not be copied in memory."""

    def read(self, first: int, stop: int, out: Mapping[str, Tensor]) -> None:
        """Copy rows ``first`` to ``stop`` - 1 of some columns; called concurrently by several threads.

        Args:
            first: Position of the first row in ``TableState.columns["ids"]``.
            stop: Position after the last row.
            out: Output by column, on the CPU, contiguous, ``[stop - first, ...]``; written.
        """


@dataclass(frozen=True, eq=False)
class TableState:
    """The rows of one member table, in any order. The saver sorts them by (bucket, id).

    Example:
        >>> import torch
        >>> ids = torch.tensor([7, -1])
        >>> state = TableState(
        ...     columns={"ids": ids, "embedding": torch.zeros(2, 4)},
        ...     buckets=torch.tensor([12, 40000]),
        ...     meta={"dtype": "float32", "dim": 4},
        ... )
        >>> state.columns["embedding"].shape
        torch.Size([2, 4])
    """

    columns: dict[str, Tensor]
    """Columns with the same first dimension n: "ids" int64 [n], then "embedding" [n, dim], then optimizer state."""

    buckets: Tensor
    """int64 [n], from 0 to 65535: the bucket of each id."""

    meta: dict[str, JSON]
    """Description of the table (dtype, dim, record layout). A checkpoint can only be loaded if it is equal."""

    reader: RowReader | None = field(default=None, kw_only=True)
    """Reads all columns except "ids". The columns in ``columns`` then have no rows and only define dtype and width, and
    "ids" and ``buckets`` are on the CPU, sorted by (bucket, id)."""
    removed: TableState | None = field(default=None, kw_only=True)
    """None: the state contains all rows of the table. Otherwise it contains only the rows that changed since an earlier
    state, and ``removed`` has one column, "ids" int64 [m]: all ids that had a row then and have none now, and possibly
    ids that had none then either. None of them is in ``columns``."""


@dataclass(frozen=True, eq=False)
class PartState:
    """The complete state of one object: tables of rows, dense tensors, and JSON."""

    tables: dict[str, TableState] = field(default_factory=dict)
    """Member tables by name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Dense tensors by name, of any shape and any dtype that safetensors supports."""

    meta: dict[str, JSON] = field(default_factory=dict)
    """State other than tensors (step counts, seeds). Restored as saved; not compared with the live object."""

    owned: bool = False
    """True if the tensors are copies that will not be modified, so a background save need not copy them again."""


@runtime_checkable
class Saveable(Protocol):
    """An object that a ``Saver`` saves and loads. Its kind is its ``checkpoint_kind``, by default ``saveable``."""

    def checkpoint_state(self) -> PartState:
        """Return the state.

        Tensors need not be copies: the saver does not modify them and reads them before ``Saver.save`` returns.
        """
        ...

    def load_checkpoint_state(self, state: PartState) -> None:
        """Replace the state with a saved one.

        Called after the whole checkpoint has been verified and compared with :meth:`checkpoint_state`: tables, columns,
        dtypes, widths and table metadata, and dtypes and shapes of tensors, are equal.

        Args:
            state: The saved state, on the CPU, in memory that the object may keep; rows sorted by (bucket, id).
        """
        ...


@runtime_checkable
class WeightFiles(Protocol):
    """Files from which a module's parameters were read, so that checkpoints need not contain them while frozen.

    A module has it as its attribute ``weight_files``. Methods raise OSError or ValueError if files are missing or
    damaged.
    """

    @property
    def source(self) -> str:
        """Name or path, for messages."""
        ...

    def digest(self) -> str:
        """Return a digest of the present contents of the files, equal on all machines."""
        ...

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters with the values and dtypes that they had when the module was built.

        Args:
            names: Names in the module's ``state_dict``. Those without a tensor in the files are skipped.
        """
        ...


class StateLoader(Protocol):
    """One load into an object: compares the checkpoint with the object, then loads the rows in chunks."""

    differences: Sequence[str]
    """Reasons why the checkpoint cannot be loaded."""
    changes: Sequence[str]
    """Descriptions of the state that the load converts or resets."""
    holds_rows: bool
    """True if the load replaces existing rows of the object."""

    def begin(self, rows: Mapping[str, int]) -> None:
        """Remove all rows.

        Args:
            rows: Approximate number of rows to be loaded, by table.
        """
        ...

    def check(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Raise ValueError if rows of a table cannot be loaded; arguments as in :meth:`load`."""
        ...

    def load(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Insert rows of a table.

        Args:
            name: Name of the table.
            columns: By name, ``[m, ...]``; valid only during the call.

        Raises:
            ValueError: The rows cannot be loaded.
        """
        ...

    def end(self) -> None:
        """Load the state other than rows, after the last rows."""
        ...

    def abandon(self) -> None:
        """Remove all rows, because the load failed before the last ones."""
        ...


@runtime_checkable
class Loadable(Saveable, Protocol):
    """A ``Saveable`` that compares a checkpoint with itself and can load some that differ."""

    def checkpoint_loader(self, saved: PartState) -> StateLoader:
        """Compare with a checkpoint and return the loader. The object does not change before the loader's ``begin``.

        Args:
            saved: The saved state; its tables have no rows.

        Raises:
            ValueError: The state other than rows is malformed.
        """
        ...


@runtime_checkable
class SaveableTables(Loadable, Protocol):
    """A ``Saveable`` with large tables, such as an ``EmbeddingEngine``, saved incrementally or without copying them."""

    def checkpoint_layout(self) -> PartState:
        """Return :meth:`checkpoint_state` with tables, columns and tensors, but without rows and ``meta``."""
        ...

    def checkpoint_snapshot(self, memory: HostMemory | None) -> Callable[[], PartState]:
        """Return a function that returns the state, in which tables have row readers.

        Args:
            memory: Memory for a copy of the rows. The tables may then change, and the function may be called in another
                thread. None: the rows are read in place and must not change until they have been read.
        """
        ...

    def watch_checkpoint_changes(self) -> object:
        """Start recording changes.

        Returns:
            A token for this point in time. Recording stops when the token is garbage-collected.
        """
        ...

    def checkpoint_changes(self, since: object, whole: Collection[str]) -> PartState | None:
        """Return the changes since a token.

        Args:
            since: A token of :meth:`watch_checkpoint_changes`.
            whole: Names of tables to return whole.

        Returns:
            :meth:`checkpoint_state`, in which a table with ``removed`` has only the rows that may have changed since.
            None if the changes are unknown.
        """
        ...

    def checkpoint_buckets(self, table: str) -> tuple[int, int] | None:
        """Return the range of buckets whose rows this rank loads.

        Args:
            table: Name of the table.

        Returns:
            The first bucket and the one after the last; None for those of :func:`owned_buckets`.
        """
        ...

    def load_checkpoint_tables(self, tables: dict[str, TableState]) -> None:
        """Replace the rows of some tables and leave the others unchanged.

        Args:
            tables: By name. Columns have the same widths as in this object. Dtypes may differ, and all columns but the
                first two may be missing. ``step`` in each table's meta is the number of its optimizer steps, or None.
        """
        ...
