"""State on its way to or from disk, as plain data: what parts with state hand out and the saver writes.

Letters: n rows of a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from torch import Tensor

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


class HostMemory(Protocol):
    """Host memory for copies of state, which is used again for the next."""

    def take(self, size: int, *, pinned: bool = False) -> Tensor:
        """Return uint8 ``[size]`` on the CPU, of any contents; ``pinned`` for copies from a GPU."""


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
    """What the table is (dtype, dim, record layout). Must be equal when a checkpoint is loaded."""

    reader: RowReader | None = field(default=None, kw_only=True)
    """Reads the other columns, which then hold no rows and only say dtype and width; "ids" and ``buckets`` are on the
    CPU and in order, by (bucket, id)."""
    removed: TableState | None = field(default=None, kw_only=True)
    """None: the rows are all there are. Else they are those that changed since an earlier state, and this has one
    column, "ids" int64 [m]: the ids that had a row then and may have, and have none now; none of them in `columns`."""


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
    """Whether the tensors are copies that nobody will change: a save in the background need not copy them again."""
