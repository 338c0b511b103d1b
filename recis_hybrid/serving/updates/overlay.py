"""Tables with updates: changed rows and removed ids in levels above the files of a bundle.

Letters: n ids of a call, m rows of a level, D dim.
"""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recis_hybrid.serving.errors import ServingError
from recis_hybrid.serving.files import Array, Tensor, map_tensors
from recis_hybrid.serving.tables import IndexedTable, Table

_FOLDED_SHARE = 0.5
"""Rows of the levels, as a share of those of the base, beyond which both become a new base."""


class Level(NamedTuple):
    """Rows of a table in order of their ids, in memory, and ids that have been removed."""

    ids: npt.NDArray[np.int64]
    """``[m]``, ascending, each once."""
    columns: dict[str, Tensor]
    """``[m, ...]`` each, as in the files; any values for removed ids."""
    exists: npt.NDArray[np.bool_]
    """``[m]``, False for removed ids."""


def read_level(root: Path, name: str, entry: dict[str, Any]) -> Level:
    """Read the changes of a table in an update.

    Args:
        root: Folder of the update.
        name: Name of the table.
        entry: Its entry in the manifest.

    Raises:
        ServingError: A file differs from the manifest, or an id occurs twice.
    """
    table = Table(root, name, entry)
    rows = _sorted(table.open(), table.where)
    files = [map_tensors(root, item["file"]) for item in entry["removed"]["ranges"]]
    if any("ids" not in tensors or tensors["ids"].values.ndim != 1 for tensors in files):
        raise ServingError(f"{root}: table {name!r}: a file of removed ids must contain ids [m]. Export it again.")
    removed = np.sort(np.concatenate([np.empty(0, np.int64), *(tensors["ids"].values for tensors in files)]))
    if len(removed) != entry["removed"]["rows"] or len(rows.ids) != entry["rows"]:
        raise ServingError(f"{root}: table {name!r} has other numbers of rows than its manifest. Export it again.")
    empty: dict[str, Tensor] = {
        key: Tensor(np.zeros((len(removed), *column.values.shape[1:]), column.values.dtype), column.bfloat16)
        for key, column in rows.columns.items()
    }
    level = merged(rows, Level(removed, empty, np.zeros(len(removed), bool)))
    if len(level.ids) != len(rows.ids) + len(removed) or (removed[1:] == removed[:-1]).any():
        raise ServingError(f"{root}: table {name!r} has an id twice. Export it again.")
    return level


def _sorted(files: list[dict[str, Tensor]], where: str) -> Level:
    """Return all rows of files, in memory."""
    ids = np.concatenate([np.empty(0, np.int64), *(tensors["ids"].values for tensors in files)])
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    if (ids[1:] == ids[:-1]).any():
        raise ServingError(f"{where} has an id twice. Export it again.")
    columns: dict[str, Tensor] = {
        key: Tensor(np.concatenate([tensors[key].values for tensors in files])[order], files[0][key].bfloat16)
        for key in ("embedding", "scale", "minimum")
        if key in files[0]
    }
    return Level(ids, columns, np.ones(len(ids), bool))


def merged(older: Level, newer: Level) -> Level:
    """Return the rows of two levels; those of the newer one replace those of the older one."""
    kept = ~find(newer.ids, older.ids)[1]
    ids = np.concatenate([older.ids[kept], newer.ids])
    order = np.argsort(ids, kind="stable")
    columns = {
        key: Tensor(np.concatenate([column.values[kept], newer.columns[key].values])[order], column.bfloat16)
        for key, column in older.columns.items()
    }
    return Level(ids[order], columns, np.concatenate([older.exists[kept], newer.exists])[order])


def find(within: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> tuple[Array, Array]:
    """Return the place of each id among ascending ids, any place for others, and whether each is there."""
    if len(within) == 0:
        return np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
    at = within.searchsorted(ids)
    at[at == len(within)] = 0
    return at, within[at] == ids


class UpdatedTable:
    """A table of a bundle with the changes of updates; immutable.

    Changes are in levels, each at least twice as large as the next. So a lookup searches the base and about
    log2(changed rows) levels, and a row is copied as often by later updates. Memory holds the changed rows. Once they
    are more than half of the base, both become a new base in memory.

    Args:
        table: The table of the bundle, which also decodes the rows of updates.
        base: Its rows: the bundle's files, or a level without removed ids.
        levels: Changes, oldest first.
    """

    def __init__(self, table: Table, base: IndexedTable | Level | None = None, levels: tuple[Level, ...] = ()) -> None:
        self._table, self._base, self._levels = table, IndexedTable(table) if base is None else base, levels
        self.dim = table.dim
        """Width of the embeddings, D."""

    @property
    def levels(self) -> tuple[int, ...]:
        """Numbers of rows and removed ids of the levels, oldest first."""
        return tuple(len(level.ids) for level in self._levels)

    def read_one(self, id: int) -> Array | None:
        """Return the embedding of an id, float32 ``[1, D]``, possibly a view; None if it has no row."""
        base = self._base
        for level in reversed((base, *self._levels) if isinstance(base, Level) else self._levels):
            at = bisect_left(level.ids.data, id)
            if at < len(level.ids) and level.ids[at] == id:
                return self._table.vector(level.columns, at) if level.exists[at] else None
        return None if isinstance(base, Level) else base.read_one(id)

    def read(self, ids: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        """Return embeddings, float32 ``[n, D]``, and whether each id has a row, bool ``[n]``.

        Args:
            ids: int64 ``[n]``.
        """
        if isinstance(self._base, Level):
            vectors, found = np.zeros((len(ids), self.dim), np.float32), np.zeros(len(ids), bool)
            levels = (self._base, *self._levels)
        else:
            read, found = self._base.read(ids)
            vectors, levels = read.astype(np.float32, copy=False), self._levels
        for level in levels:
            at, hit = find(level.ids, ids)
            places = np.flatnonzero(hit)
            if len(places):
                rows = at[places]
                vectors[places] = self._table.vectors(level.columns, rows)
                found[places] = level.exists[rows]
        return vectors, found

    def updated(self, level: Level) -> UpdatedTable:
        """Return the table with the changes of another update."""
        levels = [*self._levels, level]
        while len(levels) > 1 and len(levels[-2].ids) < 2 * len(levels[-1].ids):
            newer = levels.pop()
            levels.append(merged(levels.pop(), newer))
        base = self._base
        rows = len(base.ids) if isinstance(base, Level) else base.rows
        if sum(len(each.ids) for each in levels) > _FOLDED_SHARE * rows:
            base = base if isinstance(base, Level) else _sorted(self._table.open(), self._table.where)
            for each in levels:
                base = merged(base, each)
            kept = base.exists
            columns = {key: Tensor(column.values[kept], column.bfloat16) for key, column in base.columns.items()}
            base, levels = Level(base.ids[kept], columns, kept[kept]), []
        return UpdatedTable(self._table, base, tuple(levels))
