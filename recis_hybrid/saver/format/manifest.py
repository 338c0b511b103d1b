"""The manifest of a checkpoint: the contents of ``manifest.json``, and how they are written.

``manifest_reader.py`` reads them back. docs/format.md specifies the file.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recis_hybrid.checkpointing import BUCKETS, JSON
from recis_hybrid.saver.format.checksums import CHUNK_BYTES

FORMAT = "recis_hybrid.checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
KINDS = ("saveable", "module", "optimizer", "stateful", "generator", "json")

_TAIL = ',\n "crc32": "{:08x}"\n}}\n'
TAIL_BYTES = len(_TAIL.format(0))


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor; for a table's column, the shape of one row."""

    dtype: str
    """torch's name without ``torch.``, such as ``float32``."""

    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, skip: int = 0) -> TensorSpec:
        """Return the dtype and shape of a tensor.

        Args:
            tensor: Any tensor.
            skip: Number of leading dimensions to omit.
        """
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[skip:]))

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return int(getattr(torch, self.dtype).itemsize)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class FileEntry:
    """One file of the checkpoint."""

    path: str
    """Relative to the checkpoint's directory."""

    size: int
    """Bytes."""

    crc32: tuple[str, ...]
    """CRC-32 of each chunk of 4 MiB, 8 hexadecimal digits each."""


@dataclass(frozen=True)
class RangeEntry:
    """The rows of a contiguous range of buckets."""

    first_bucket: int
    last_bucket: int
    """The last bucket of the range, inclusive."""

    rows: int
    file: FileEntry


@dataclass(frozen=True)
class RemovedEntry:
    """Ids that were removed since the previous checkpoint."""

    rows: int
    ranges: tuple[RangeEntry, ...]
    """In bucket order; together they cover all buckets."""

    def as_table(self) -> TableEntry:
        """Return the ids as a table of one column, the form in which their files are written."""
        return TableEntry(self.rows, {"ids": TensorSpec("int64", ())}, {}, self.ranges)


@dataclass(frozen=True)
class TableEntry:
    """One table."""

    rows: int
    columns: dict[str, TensorSpec]
    """Shape of one row, by column; ``ids`` first."""

    meta: dict[str, JSON]
    ranges: tuple[RangeEntry, ...]
    """In bucket order; together they cover all buckets."""

    removed: RemovedEntry | None = None
    """None: these are all rows. Otherwise rows and removed ids are changes to the previous checkpoint."""


@dataclass(frozen=True)
class PartEntry:
    """One part."""

    kind: str
    """One of ``KINDS``."""

    meta: dict[str, JSON]
    tensors: dict[str, TensorSpec]
    file: FileEntry | None
    """File of the dense tensors; None if there are none."""

    tables: dict[str, TableEntry]


@dataclass(frozen=True)
class Link:
    """The checkpoint on which an incremental one builds."""

    step: int
    sha256: str
    """Digest of its ``manifest.json``, 64 hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """All of ``manifest.json``."""

    step: int
    world_size: int
    parts: dict[str, PartEntry]
    meta: dict[str, JSON]
    """Wall time and library versions; informational, never compared."""

    previous: Link | None = None
    """None if no other checkpoint is needed to load this one."""


def dump_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of ``manifest.json``.

    The last member, ``crc32``, is the CRC-32 of all bytes before the comma that precedes it.

    Args:
        manifest: The manifest.

    Returns:
        ASCII text that ends with a line feed.
    """
    document: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": manifest.step,
        "world_size": manifest.world_size,
        **({} if manifest.previous is None else {"previous": vars(manifest.previous)}),
        "buckets": BUCKETS,
        "checksum": {"algorithm": "crc32", "chunk_bytes": CHUNK_BYTES},
        "parts": {name: _part(part, manifest.previous) for name, part in sorted(manifest.parts.items())},
        "meta": manifest.meta,
    }
    body = json.dumps(document, indent=1, allow_nan=False).removesuffix("\n}").encode("ascii")
    return body + _TAIL.format(zlib.crc32(body)).encode("ascii")


def seal_is_valid(raw: bytes) -> bool:
    """Return whether the CRC-32 at the end of a ``manifest.json`` matches its text.

    Args:
        raw: Contents of the file.
    """
    body, tail = raw[:-TAIL_BYTES], raw[-TAIL_BYTES:]
    return tail == _TAIL.format(zlib.crc32(body)).encode("ascii")


def _part(part: PartEntry, previous: Link | None) -> dict[str, Any]:
    return {
        "kind": part.kind,
        "meta": part.meta,
        "tensors": {name: {"dtype": t.dtype, "shape": t.shape} for name, t in sorted(part.tensors.items())},
        "file": None if part.file is None else _file(part.file),
        "tables": {name: _table(table, previous) for name, table in sorted(part.tables.items())},
    }


def _table(table: TableEntry, previous: Link | None) -> dict[str, Any]:
    ids = table.removed
    removed = None if ids is None else {"rows": ids.rows, "ranges": _ranges(ids.ranges)}
    return {
        "rows": table.rows,
        "columns": [{"name": name, "dtype": c.dtype, "shape": c.shape} for name, c in table.columns.items()],
        "meta": table.meta,
        "ranges": _ranges(table.ranges),
        **({} if previous is None else {"removed": removed}),
    }


def _ranges(ranges: tuple[RangeEntry, ...]) -> list[dict[str, Any]]:
    return [{"buckets": (r.first_bucket, r.last_bucket), "rows": r.rows, "file": _file(r.file)} for r in ranges]


def _file(file: FileEntry) -> dict[str, Any]:
    return {"path": file.path, "size": file.size, "crc32": file.crc32}
