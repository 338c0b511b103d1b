"""Tables of exports: ids, and their embeddings, in files by bucket. Letters: n ids, m rows of a file, D dim."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recis_hybrid.serving.errors import ServingError
from recis_hybrid.serving.files import Array, Tensor, map_tensors, widened

_FLOAT32 = np.dtype(np.float32)
_MANY = 64


class Table:
    """A table that opens its files on first use.

    Args:
        root: Folder of the export.
        name: Name of the table.
        entry: The table's entry in the manifest.
    """

    def __init__(self, root: Path, name: str, entry: dict[str, Any]) -> None:
        shapes = {column["name"]: column["shape"] for column in entry["columns"]}
        self._name = name
        dtype = entry["meta"].get("dtype")
        self._quantized: str | None = dtype if dtype in ("int8", "int4") else None
        self.dim = int(shapes["embedding"][0]) if "embedding" in shapes else 0
        if self._quantized is not None:
            self.dim = int(entry["meta"]["dim"])
        self._width = (self.dim + 1) // 2 if self._quantized == "int4" else self.dim
        self._root = root
        self._ranges = entry["ranges"]
        self._firsts = np.array([item["buckets"][0] for item in self._ranges])
        self._open: dict[int, dict[str, Tensor]] = {}

    def lookup(self, ids: npt.NDArray[np.int64], default: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the embeddings of ids, float32 ``[n, D]``, searching the files; see :meth:`Reader.lookup`."""
        if not self.dim:
            raise ServingError(f"{self._root}: table {self._name!r} has no embeddings.")
        out = np.empty((ids.size, self.dim), np.float32)
        out[:] = default
        buckets = bucket_of(ids)
        file_numbers = np.searchsorted(self._firsts, buckets, side="right") - 1
        for number in np.unique(file_numbers).tolist():
            positions = np.flatnonzero(file_numbers == number)
            tensors = self._file(number)
            rows = _rows(tensors, ids[positions], buckets[positions])
            found = rows >= 0
            out[positions[found]] = self.vectors(tensors, rows[found])
        return out

    def vectors(self, tensors: dict[str, Tensor], rows: Array) -> Array:
        """Return the embeddings of rows of an open file, a new float32 ``[n, D]``."""
        return self._decoded(tensors, rows, tensors["embedding"].values.take(rows, axis=0))

    def vector(self, tensors: dict[str, Tensor], row: int) -> Array:
        """Return the embedding of a row of an open file, float32 ``[1, D]``: a read-only view if it is stored so."""
        rows = slice(row, row + 1)
        values = tensors["embedding"].values[rows]
        return values if values.dtype == _FLOAT32 else self._decoded(tensors, rows, values)

    def _decoded(self, tensors: dict[str, Tensor], rows: Array | slice, values: Array) -> Array:
        """Return ``values``, the stored embeddings of ``rows``, as float32."""
        if self._quantized is None:
            return widened(values, tensors["embedding"].bfloat16).astype(np.float32, copy=False)
        if self._quantized == "int4":
            values = np.stack([values & 15, values >> 4], axis=2).reshape(len(values), 2 * self._width)[:, : self.dim]
        scale, minimum = (tensors[name].values[rows, None] for name in ("scale", "minimum"))
        vectors: Array = minimum + scale * values
        return vectors

    @property
    def where(self) -> str:
        """The table, for messages."""
        return f"{self._root}: table {self._name!r}"

    def open(self) -> list[dict[str, Tensor]]:
        """Open all files, and return their tensors by name."""
        return [self._file(number) for number in range(len(self._ranges))]

    def _file(self, number: int) -> dict[str, Tensor]:
        if number not in self._open:
            item = self._ranges[number]
            tensors = map_tensors(self._root, item["file"])
            rows, m = tensors.get("ids"), item["rows"]
            columns: dict[str, tuple[int, ...]] = {"ids": (m,), "embedding": (m, self._width)}
            if self._quantized is not None:
                columns |= {"scale": (m,), "minimum": (m,)}
            present = tensors["buckets"].values.size if "buckets" in tensors else 0
            columns |= {"buckets": (present,), "bucket_offsets": (present + 1,)}
            for name, shape in columns.items():
                if name not in tensors or tensors[name].values.shape != shape:
                    raise ServingError(f"{self._root / item['file']['path']}: must contain {name} {list(shape)}.")
            if self._quantized is not None and tensors["embedding"].values.dtype != np.uint8:
                raise ServingError(f"{self._root / item['file']['path']}: embedding must be uint8.")
            offsets = tensors["bucket_offsets"].values
            if rows is None or offsets[0] != 0 or offsets[-1] != m or bool((np.diff(offsets) <= 0).any()):
                raise ServingError(f"{self._root / item['file']['path']}: bucket_offsets must increase from 0 to {m}.")
            self._open[number] = tensors
        return self._open[number]


class IndexedTable:
    """A table whose files are open and whose ids are sorted in memory, so that a lookup is one binary search.

    The index has 12 bytes a row; embeddings stay in the memory-mapped files.

    Args:
        table: The table.

    Raises:
        ServingError: A file is damaged, or the table has no embeddings.
    """

    def __init__(self, table: Table) -> None:
        if not table.dim:
            raise ServingError(f"{table.where} has no embeddings. Export it again.")
        self.table = table
        """The files."""
        self.dim = table.dim
        """Width of the embeddings, D."""
        self._files = table.open()
        ids = [tensors["ids"].values for tensors in self._files]
        joined = np.concatenate(ids) if ids else np.empty(0, np.int64)
        order = np.argsort(joined, kind="stable")
        # An id above all others is searched for after the last, where one that differs from it must be.
        self._padded = joined[np.append(order, order[:1])]
        self._ids = self._padded[: len(order)]
        self._order = np.append(order, order[:1]).astype(np.int32 if len(order) < 2**31 else np.int64)
        if bool((self._ids[1:] == self._ids[:-1]).any()):
            raise ServingError(f"{table.where} has an id twice. Export it again.")
        self._ends = np.cumsum([len(part) for part in ids])
        # One id is found sooner by bisect, which needs elements that are Python integers, than by array operations.
        self._one_id, self._one_order = self._ids.data, self._order.data
        self._one_end: list[int] = self._ends.tolist()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self._ids)

    def read_one(self, id: int) -> Array | None:
        """Return the embedding of an id, float32 ``[1, D]``, possibly a read-only view; None if it has no row."""
        ids = self._one_id
        at = bisect_left(ids, id)
        if at == len(ids) or ids[at] != id:
            return None
        row = self._one_order[at]
        if len(self._files) == 1:
            return self.table.vector(self._files[0], row)
        number = bisect_right(self._one_end, row)
        return self.table.vector(self._files[number], row - (self._one_end[number - 1] if number else 0))

    def read(self, ids: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        """Return the embeddings of ids.

        Args:
            ids: int64 ``[n]``.

        Returns:
            float32 ``[n, D]``, where those of ids without a row are any numbers; and whether each id has a row, bool
            ``[n]``.
        """
        if not len(self._ids):
            return np.zeros((len(ids), self.dim), np.float32), np.zeros(len(ids), bool)
        if len(ids) > _MANY:
            # In ascending order, so that neighbors share cache lines.
            order = np.argsort(ids)
            at = np.empty(len(ids), np.int64)
            at[order] = self._ids.searchsorted(ids[order])
        else:
            at = self._ids.searchsorted(ids)
        found = self._padded.take(at) == ids
        rows = self._order.take(at)
        if len(self._files) == 1:
            return self.table.vectors(self._files[0], rows), found
        out = np.empty((len(ids), self.dim), np.float32)
        numbers = self._ends.searchsorted(rows, side="right")
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            first = self._ends[number - 1] if number else 0
            out[places] = self.table.vectors(self._files[number], rows[places] - first)
        return out, found


def bucket_of(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the bucket of each id, from 0 to 65,535, as specified in ``docs/format.md``.

    Args:
        ids: int64 ``[n]``.

    Returns:
        int64 ``[n]``.

    Example:
        >>> bucket_of(np.array([0, -1])).tolist()
        [62190, 55781]
    """
    x = ids.view(np.uint64) ^ np.uint64(0x5851F42D4C957F2D)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(48)).astype(np.int64)


def _rows(tensors: dict[str, Tensor], ids: Array, buckets: Array) -> Array:
    """Return the row of each id within a file, or -1 if it has none, by binary search within its bucket."""
    present, offsets, stored = (tensors[name].values for name in ("buckets", "bucket_offsets", "ids"))
    if stored.size == 0:
        return np.full(ids.size, -1)
    at = np.searchsorted(present, buckets)
    is_present = present[np.minimum(at, present.size - 1)] == buckets
    at = np.where(is_present, at, 0)
    low, high = offsets[at], np.where(is_present, offsets[at + 1], offsets[at])
    end = high
    while bool((low < high).any()):
        middle = (low + high) // 2
        below = stored[np.minimum(middle, stored.size - 1)] < ids
        low, high = np.where((low < high) & below, middle + 1, low), np.where((low < high) & ~below, middle, high)
    return np.where((low < end) & (stored[np.minimum(low, stored.size - 1)] == ids), low, -1)
