"""A reader of exported tables that needs only NumPy, neither torch nor the native library.

Files are memory-mapped, so a lookup touches only the pages of the rows that it returns.

Letters: n ids of a call, m rows of a file, D dim.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_FORMAT, _VERSION, _BUCKETS = "recis_hybrid.checkpoint", 1, 65536
_SEAL = re.compile(rb'(.*),\n "crc32": "([0-9a-f]{8})"\n}\n', re.DOTALL)
_STEP = re.compile(r"step_(\d{6,18})")
_PATH = re.compile(r"[A-Za-z0-9_%~-][A-Za-z0-9_.%~-]*(?:/[A-Za-z0-9_%~-][A-Za-z0-9_.%~-]*)*")
_MOST_HEADER, _MOST_MANIFEST = 100_000_000, 2**30
_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "|b1"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1"},
}

Array = npt.NDArray[Any]


class ServingError(ValueError):
    """An export is missing or damaged, or lacks the requested table or part."""


class Reader:
    """Embeddings and dense tensors of one checkpoint written by ``recis-hybrid export``.

    Full training checkpoints can be read too; incremental ones are rejected.

    Args:
        path: A ``step_…`` folder, or a folder of several, of which the one with the highest step is read.
        verify: Whether to verify the checksums of all files, which reads them completely.

    Raises:
        ServingError: The checkpoint is missing, damaged, incremental, or of another format version.

    Example:
        >>> Reader("no/such/place")
        Traceback (most recent call last):
        ...
        recis_hybrid.serving.ServingError: no/such/place is not a directory. Pass the output of `recis-hybrid export`.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = False) -> None:
        self.path = _step_folder(os.fspath(path))
        document = _manifest(self.path / "manifest.json")
        self.step: int = document["step"]
        """Training step of the checkpoint."""
        self.parts: dict[str, Any] = document["parts"]
        """Entries of the manifest by part, specified in ``docs/format.md``."""
        self._tables: dict[str, _Table] = {}
        for part, entry in self.parts.items():
            for name, table in entry["tables"].items():
                key = name if name not in self._tables else f"{part}/{name}"
                self._tables[key] = _Table(self.path, name, table)
        if verify:
            for file in self._files():
                _verify(self.path, file)

    @property
    def tables(self) -> list[str]:
        """Names of the tables. If two parts share a table name, the second table is ``part/name``."""
        return list(self._tables)

    def dim(self, table: str) -> int:
        """Return the width of a table's embeddings.

        Args:
            table: Name of the table.

        Returns:
            D.

        Raises:
            ServingError: The table does not exist.
        """
        return self._table(table).dim

    def lookup(self, table: str, ids: npt.ArrayLike, default: npt.ArrayLike = 0.0) -> npt.NDArray[np.float32]:
        """Return the embeddings of ids.

        Args:
            table: Name of the table.
            ids: int64 ``[n]``, any values, in any order.
            default: Embedding of ids without a row: a number, or float32 ``[D]``.

        Returns:
            float32 ``[n, D]``; bfloat16 and float16 are widened, and codes of int8 and int4 are converted back.

        Raises:
            ServingError: The table does not exist, or the ids are not int64 ``[n]``.
        """
        wanted = np.asarray(ids)
        if wanted.size == 0:
            wanted = wanted.astype(np.int64)
        if wanted.dtype != np.int64 or wanted.ndim != 1:
            raise ServingError(
                f"lookup: table {table!r}: ids must be int64 [n], got {wanted.dtype} {list(wanted.shape)}. Convert "
                "them with .astype(numpy.int64)."
            )
        return self._table(table).lookup(wanted, default)

    def dense(self, part: str) -> dict[str, Array]:
        """Return the dense tensors of a part, such as a tower's weights.

        Args:
            part: Name of the part.

        Returns:
            Read-only views of the mapped file by name; bfloat16 is copied into float32.

        Raises:
            ServingError: The part does not exist.
        """
        if part not in self.parts:
            raise ServingError(f"{self.path}: there is no part {part!r}, there are {sorted(self.parts)}.")
        file = self.parts[part]["file"]
        if file is None:
            return {}
        return {name: _widened(*tensor) for name, tensor in _tensors(self.path, file).items()}

    def _table(self, name: str) -> _Table:
        if name not in self._tables:
            raise ServingError(f"{self.path}: there is no table {name!r}, there are {self.tables}.")
        return self._tables[name]

    def _files(self) -> Iterator[dict[str, Any]]:
        for part in self.parts.values():
            if part["file"] is not None:
                yield part["file"]
            for table in part["tables"].values():
                yield from (item["file"] for item in table["ranges"])


class _Tensor(NamedTuple):
    values: Array
    bfloat16: bool
    """True if the values are bfloat16, stored as unsigned words."""


class _Table:
    """A table that opens its files on first use."""

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
        self._open: dict[int, dict[str, _Tensor]] = {}

    def lookup(self, ids: npt.NDArray[np.int64], default: npt.ArrayLike) -> npt.NDArray[np.float32]:
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
            out[positions[found]] = self._vectors(tensors, rows[found])
        return out

    def _vectors(self, tensors: dict[str, _Tensor], rows: Array) -> Array:
        values = tensors["embedding"].values[rows]
        if self._quantized is None:
            return _widened(values, tensors["embedding"].bfloat16)
        if self._quantized == "int4":
            values = np.stack([values & 15, values >> 4], axis=2).reshape(len(values), 2 * self._width)[:, : self.dim]
        scale, minimum = (tensors[name].values[rows, None] for name in ("scale", "minimum"))
        vectors: Array = minimum + scale * values
        return vectors

    def _file(self, number: int) -> dict[str, _Tensor]:
        if number not in self._open:
            item = self._ranges[number]
            tensors = _tensors(self._root, item["file"])
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


def _rows(tensors: dict[str, _Tensor], ids: Array, buckets: Array) -> Array:
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


def _widened(values: Array, bfloat16: bool) -> Array:
    return (values.astype(np.uint32) << 16).view(np.float32) if bfloat16 else values


def _step_folder(text: str) -> Path:
    if "://" in text:
        raise ServingError(f"{text}: must be a directory, because files are memory-mapped. Copy the export to one.")
    path = Path(text)
    if not path.is_dir():
        raise ServingError(f"{path} is not a directory. Pass the output of `recis-hybrid export`.")
    if (path / "manifest.json").is_file():
        return path
    found = [(int(match[1]), entry) for entry in path.iterdir() if (match := _STEP.fullmatch(entry.name))]
    complete = [(step, entry) for step, entry in found if (entry / "manifest.json").is_file()]
    if not complete:
        raise ServingError(f"{path} holds no complete checkpoint. Pass the output of `recis-hybrid export`.")
    return max(complete)[1]


def _manifest(path: Path) -> dict[str, Any]:
    """Return a manifest after checking its CRC-32 and the paths in it."""
    if path.stat().st_size > _MOST_MANIFEST:
        raise ServingError(f"{path}: must have at most {_MOST_MANIFEST} bytes, has {path.stat().st_size}.")
    raw = path.read_bytes()
    match = _SEAL.fullmatch(raw)
    if match is None or int(match[2], 16) != zlib.crc32(match[1]):
        raise ServingError(f"{path}: is damaged: the CRC-32 at its end does not match its text. Export it again.")
    try:
        document: dict[str, Any] = json.loads(raw)
        if document["format"] != _FORMAT or document["format_version"] != _VERSION:
            found = (document["format"], document["format_version"])
            raise ServingError(f"{path}: format must be {_FORMAT!r}, version {_VERSION}, got {found}. Export it again.")
        if document["buckets"] != _BUCKETS:
            raise ServingError(f"{path}: must have {_BUCKETS} buckets, got {document['buckets']}.")
        if "previous" in document:
            raise ServingError(
                f"{path}: contains only the changes since step {document['previous']['step']}. Export it with "
                "`recis-hybrid export`, or make it full with `recis-hybrid compact`."
            )
        for part in document["parts"].values():
            files = [part["file"], *(r["file"] for table in part["tables"].values() for r in table["ranges"])]
            for file in files:
                if file is not None and not _PATH.fullmatch(file["path"]):
                    raise ServingError(f"{path}: a path must lead to a file in this folder, got {file['path']!r}.")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ServingError(f"{path}: is not a manifest: {error!r}. Export it again.") from error
    return document


def _tensors(root: Path, file: dict[str, Any]) -> dict[str, _Tensor]:
    """Map a safetensors file and return views of its tensors."""
    path = root / file["path"]
    try:
        with open(path, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != file["size"]:
                raise ServingError(f"{path}: must have {file['size']} bytes according to the manifest, has {size}.")
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(data[:8], "little")
        if not 0 < length <= min(_MOST_HEADER, size - 8):
            raise ServingError(f"{path}: its header cannot have {length} bytes.")
        header = json.loads(data[8 : 8 + length])
        begin = 8 + length
        tensors: dict[str, _Tensor] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            count = 1
            for extent in shape:
                count *= extent
            if (
                not 0 <= first <= last <= size - begin
                or count * dtype.itemsize != last - first
                or min(shape, default=0) < 0
            ):
                raise ServingError(f"{path}: tensor {name!r} of shape {list(shape)} cannot be at {first} to {last}.")
            values = np.frombuffer(data, dtype, count, begin + first).reshape(shape)
            tensors[name] = _Tensor(values, entry["dtype"] == "BF16")
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, ServingError):
            raise
        raise ServingError(f"{path}: cannot be read: {error!r}. Export it again.") from error
    return tensors


def _verify(root: Path, file: dict[str, Any]) -> None:
    chunk = 4 * 2**20
    with open(root / file["path"], "rb") as opened:
        sums = [f"{zlib.crc32(part):08x}" for part in iter(lambda: opened.read(chunk), b"")]
    if sums != file["crc32"]:
        raise ServingError(f"{root / file['path']}: has changed since it was written: the checksums differ.")
