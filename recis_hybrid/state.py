"""State on its way to or from disk, as plain data: what parts with state hand out and the saver writes.

Letters: n rows of a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"
"""A value that JSON can hold. Numbers are finite; dictionaries have string keys."""


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

    removed: TableState | None = None
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
