"""State in checkpoints: plain data, and the protocols by which the saver takes it from objects and gives it back.

Objects that have state import this module; so does the saver, and neither imports the other.

Letters: n rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from recis_hybrid import ops

BUCKETS = 65536
"""Number of shares of the id space: fixed, so that it depends neither on the world size nor on anything else."""

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"
"""A value that JSON can hold. Numbers are finite; dictionaries have string keys."""


def owned_buckets(rank: int, world_size: int) -> tuple[int, int]:
    """Return the contiguous range of buckets that a rank owns: the first, and the one after the last.

    The inverse of :func:`rank_of_bucket`. Every bucket has one owner; ranges differ by one bucket at most.

    Raises:
        ValueError: If the rank is not among 0 to ``world_size`` - 1.

    Example:
        >>> [owned_buckets(rank, 3) for rank in range(3)]
        [(0, 21846), (21846, 43691), (43691, 65536)]
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"owned_buckets: rank must be 0 to {world_size - 1}, got {rank}")
    return -(-rank * BUCKETS // world_size), -(-(rank + 1) * BUCKETS // world_size)


def rank_of_bucket(buckets: Tensor, world_size: int) -> Tensor:
    """Return the rank that owns each bucket, int64 as ``buckets``: ``bucket * world_size // 65536``.

    Example:
        >>> rank_of_bucket(torch.tensor([0, 21845, 21846, 65535]), 3)
        tensor([0, 0, 1, 2])
    """
    return (buckets * world_size) >> 16


_apart: ContextVar[bool] = ContextVar("recis_hybrid_tables_apart", default=False)


@contextmanager
def tables_apart() -> Iterator[None]:
    """Leave tables out of every ``state_dict`` and ``load_state_dict`` in the context: they are saved separately."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def are_tables_apart() -> bool:
    """Return whether this is called within :func:`tables_apart`."""
    return _apart.get()


class HostMemory:
    """Host memory for copies of state. It is used again for the next copies: fresh pages cost more than the copying."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[Tensor]] = {}
        self._used: list[tuple[tuple[int, bool], Tensor]] = []

    def take(self, size: int, *, pinned: bool = False) -> Tensor:
        """Return uint8 ``[size]`` on the CPU, of any contents.

        Args:
            size: Bytes.
            pinned: Whether a GPU will copy into it.
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
        """Make all memory that was taken available again, and free what the last copies did not need."""
        self._free = {}
        for key, data in self._used:
            self._free.setdefault(key, []).append(data)
        self._used = []


class RowReader(Protocol):
    """Reads rows when they are written, so that a large table need not be in memory a second time."""

    def read(self, first: int, stop: int, out: Mapping[str, Tensor]) -> None:
        """Write rows ``first`` to ``stop`` of some columns; called by several threads at once.

        Args:
            first: Position of the first row in ``TableState.columns["ids"]``.
            stop: Position after the last.
            out: By column, on the CPU, contiguous, ``[stop - first, ...]``; written.
        """


@dataclass(frozen=True, eq=False)
class TableState:
    """The rows of one member table, in any order; the saver sorts them by (bucket, id).

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
    """Columns of one first dimension n: "ids" int64 [n] first, then "embedding" [n, dim], then optimizer state."""

    buckets: Tensor
    """int64 [n], from 0 to 65535: the bucket that owns each id."""

    meta: dict[str, JSON]
    """Description of the table (dtype, dim, record layout); must be equal when a checkpoint is loaded."""

    reader: RowReader | None = field(default=None, kw_only=True)
    """Reads the other columns, which then hold no rows and only say dtype and width; "ids" and ``buckets`` are on the
    CPU and in order, by (bucket, id)."""
    removed: TableState | None = field(default=None, kw_only=True)
    """None: the rows are all there are. Else they are those that changed since an earlier state, and this has one
    column, "ids" int64 [m]: the ids that had a row then and may have, and have none now; none of them in
    ``columns``."""


@dataclass(frozen=True, eq=False)
class PartState:
    """All state of one object: tables of rows, dense tensors, and JSON."""

    tables: dict[str, TableState] = field(default_factory=dict)
    """Member tables by name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Dense tensors by name, of any shape and of a dtype that safetensors knows."""

    meta: dict[str, JSON] = field(default_factory=dict)
    """State that is no tensor (step counts, seeds). Handed back as it was saved; not compared with the live object."""

    owned: bool = False
    """True if the tensors are copies that nobody will change: a save in the background need not copy them again."""


@runtime_checkable
class Saveable(Protocol):
    """An object that a ``Saver`` saves and loads. Its kind is its ``checkpoint_kind``, or else ``saveable``."""

    def checkpoint_state(self) -> PartState:
        """Return the state.

        Tensors need not be copies: the saver changes nothing in them and reads them before ``Saver.save`` returns.
        """
        ...

    def load_checkpoint_state(self, state: PartState) -> None:
        """Replace the state by a saved one.

        Called after the whole checkpoint has been verified and compared with :meth:`checkpoint_state`: tables, columns,
        dtypes, widths and table metadata, and dtypes and shapes of tensors, are the same.

        Args:
            state: The saved state, on the CPU, in memory of its own; rows sorted by (bucket, id).
        """
        ...


class StateLoader(Protocol):
    """One load into an object: compares a checkpoint with it, then takes the rows in pieces."""

    differences: Sequence[str]
    """Reasons why the checkpoint cannot be loaded."""
    changes: Sequence[str]
    """Descriptions of what is converted or reset by the load."""
    holds_rows: bool
    """True if the load replaces rows that the object has now."""

    def begin(self, rows: Mapping[str, int]) -> None:
        """Remove all rows.

        Args:
            rows: By table, about how many rows will be loaded.
        """
        ...

    def check(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Raise ValueError if rows of a table, columns as in :meth:`load`, cannot be loaded."""
        ...

    def load(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Insert rows of a table.

        Args:
            name: Name of the table.
            columns: By name, ``[m, ...]``, valid during the call only.

        Raises:
            ValueError: The rows cannot be loaded.
        """
        ...

    def end(self) -> None:
        """Load what is not a row, after the last rows."""
        ...

    def abandon(self) -> None:
        """Remove all rows: the rest of them will not come."""
        ...


@runtime_checkable
class Loadable(Saveable, Protocol):
    """A ``Saveable`` that compares a checkpoint with itself, and loads one that differs where it can."""

    def checkpoint_loader(self, saved: PartState) -> StateLoader:
        """Compare with a checkpoint, and return the loader; nothing is changed before its ``begin``.

        Args:
            saved: The saved state, tables without rows.

        Raises:
            ValueError: The state beside the rows is malformed.
        """
        ...


@runtime_checkable
class SaveableTables(Loadable, Protocol):
    """A ``Saveable`` of large tables, such as an ``EmbeddingEngine``: saved without a copy in memory, or by changes."""

    def checkpoint_layout(self) -> PartState:
        """Return :meth:`checkpoint_state` without rows: tables, columns and tensors, no ``meta``."""
        ...

    def checkpoint_snapshot(self, memory: HostMemory | None) -> Callable[[], PartState]:
        """Return a function that returns the state, its tables with readers of their rows.

        Args:
            memory: Takes a copy of the rows, after which the tables may change, and the function may be called in
                another thread. None: the rows are read where they are, and must not change before.
        """
        ...

    def watch_checkpoint_changes(self) -> object:
        """Start to record changes.

        Returns:
            A token for this moment. Recording stops when nothing refers to it any more.
        """
        ...

    def checkpoint_changes(self, since: object, whole: Collection[str]) -> PartState | None:
        """Return what changed.

        Args:
            since: A token of :meth:`watch_checkpoint_changes`.
            whole: Names of tables to return whole.

        Returns:
            :meth:`checkpoint_state`, but of a table with ``removed`` only the rows that may have changed since. None if
            the changes are not known.
        """
        ...

    def checkpoint_buckets(self, table: str) -> tuple[int, int] | None:
        """Return the buckets whose rows this rank loads: the first, and the one after the last.

        Args:
            table: Name of the table.

        Returns:
            None for those of :func:`owned_buckets`.
        """
        ...

    def load_checkpoint_tables(self, tables: dict[str, TableState]) -> None:
        """Replace the rows of some tables and leave the others unchanged.

        Args:
            tables: By name. Columns have the widths that they have here; dtypes may differ, and all columns but the
                first two may be missing. ``step`` in the meta of each is the number of its optimizer steps, or None.
        """
        ...
