"""Reads ``manifest.json`` without trusting it: every type, range, sum and path is checked before use."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from recis_hybrid.checkpointing import BUCKETS
from recis_hybrid.saver.errors import OTHER_STEP, CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.format.checksums import CHUNK_BYTES
from recis_hybrid.saver.format.file_io import is_safe_path
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import (
    FORMAT,
    FORMAT_VERSION,
    KINDS,
    FileEntry,
    Link,
    Manifest,
    PartEntry,
    RangeEntry,
    RemovedEntry,
    TableEntry,
    TensorSpec,
    seal_is_valid,
)
from recis_hybrid.saver.format.tensor_file import DTYPES

_SHA256 = re.compile(r"[0-9a-f]{64}")
_CRC32 = re.compile(r"[0-9a-f]{8}")
_LARGEST = 2**63 - 1


def parse_manifest(raw: bytes, path: Location) -> Manifest:
    """Parse a manifest.

    Args:
        raw: Contents of ``manifest.json``.
        path: Path of the file, for messages.

    Returns:
        The manifest; it is consistent.

    Raises:
        CorruptCheckpoint: Malformed JSON, a changed byte, a missing, unknown or wrong member, an unsafe path.
        CheckpointError: Another format or format version.
    """
    try:
        document = json.loads(raw, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: must be JSON, but {error}. {OTHER_STEP}") from error
    root = _Reader(document, path, "")
    found = root.value("format")
    if found != FORMAT:
        raise CheckpointError(f"{path}: format must be {FORMAT!r}, got {found!r}. Load a recis_hybrid checkpoint.")
    version = root.integer("format_version", 1)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: this library reads format version {FORMAT_VERSION}, the checkpoint has {version}. Load it with "
            f"the version of recis_hybrid that wrote it (see meta.versions), or save it again with this one."
        )
    if not seal_is_valid(raw):
        raise CorruptCheckpoint(f"{path}: the CRC-32 at its end does not match its text. {OTHER_STEP}")
    previous = _previous(root)
    root.members(
        *("format", "format_version", "step", "world_size", "buckets", "checksum", "parts", "meta", "crc32"),
        *([] if previous is None else ["previous"]),
    )
    root.require("buckets", BUCKETS)
    root.require("checksum", {"algorithm": "crc32", "chunk_bytes": CHUNK_BYTES})
    manifest = Manifest(
        step=root.integer("step", 0),
        world_size=root.integer("world_size", 1),
        parts={name: _part(part, previous) for name, part in root.child("parts").children()},
        meta=root.child("meta").document,
        previous=previous,
    )
    _check_paths_differ(manifest, path)
    return manifest


class _Reader:
    """One JSON object of the manifest, and its place in it for messages."""

    def __init__(self, document: Any, path: Location, place: str) -> None:
        self.path = path
        self.place = place
        if not isinstance(document, dict):
            self.fail("must be an object", document)
        self.document: dict[str, Any] = document

    def fail(self, rule: str, found: object) -> NoReturn:
        text = repr(found)
        text = text if len(text) <= 80 else f"{text[:77]}..."
        raise CorruptCheckpoint(f"{self.path}: {self.place or 'the manifest'} {rule}, got {text}. {OTHER_STEP}")

    def at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def members(self, *expected: str) -> None:
        if set(self.document) != set(expected):
            self.fail(f"must have the members {sorted(expected)}", sorted(self.document))

    def value(self, key: str) -> Any:
        if key not in self.document:
            self.fail(f"must have a member {key!r}", sorted(self.document))
        return self.document[key]

    def require(self, key: str, expected: object) -> None:
        found = self.value(key)
        if found != expected:
            _Reader({}, self.path, self.at(key)).fail(f"must be {expected!r}", found)

    def integer(self, key: str, least: int) -> int:
        found = self.value(key)
        if type(found) is not int or not least <= found <= _LARGEST:
            _Reader({}, self.path, self.at(key)).fail(f"must be an integer from {least} to 2**63 - 1", found)
        return found

    def text(self, key: str) -> str:
        found = self.value(key)
        if not isinstance(found, str) or not found:
            _Reader({}, self.path, self.at(key)).fail("must be a non-empty string", found)
        return found

    def array(self, key: str) -> list[Any]:
        found = self.value(key)
        if not isinstance(found, list):
            _Reader({}, self.path, self.at(key)).fail("must be an array", found)
        return found

    def integers(self, key: str) -> list[int]:
        found = self.array(key)
        for item in found:
            if type(item) is not int or not 0 <= item <= _LARGEST:
                _Reader({}, self.path, self.at(key)).fail("must hold integers from 0 to 2**63 - 1", found)
        return found

    def child(self, key: str) -> _Reader:
        return _Reader(self.value(key), self.path, self.at(key))

    def children(self) -> list[tuple[str, _Reader]]:
        return [(key, self.child(key)) for key in self.document]

    def items(self, key: str) -> list[_Reader]:
        return [_Reader(item, self.path, f"{self.at(key)}[{i}]") for i, item in enumerate(self.array(key))]


def _previous(root: _Reader) -> Link | None:
    if "previous" not in root.document:
        return None
    link = root.child("previous")
    link.members("step", "sha256")
    sha256 = link.text("sha256")
    if not _SHA256.fullmatch(sha256):
        link.fail("must have a sha256 of 64 hexadecimal digits", sha256)
    step = link.integer("step", 0)
    if step >= root.integer("step", 0):
        link.fail("must have a step below the checkpoint's own", step)
    return Link(step, sha256)


def _part(part: _Reader, previous: Link | None) -> PartEntry:
    part.members("kind", "meta", "tensors", "file", "tables")
    kind = part.text("kind")
    if kind not in KINDS:
        part.fail(f"must have a kind of {KINDS}", kind)
    entry = PartEntry(
        kind=kind,
        meta=part.child("meta").document,
        tensors={name: _tensor(tensor, "dtype", "shape") for name, tensor in part.child("tensors").children()},
        file=None if part.value("file") is None else _file(part.child("file")),
        tables={name: _table(table, previous) for name, table in part.child("tables").children()},
    )
    if bool(entry.tensors) != (entry.file is not None):
        part.fail("must have a file if and only if it has tensors", part.value("file"))
    return entry


def _tensor(tensor: _Reader, *members: str) -> TensorSpec:
    tensor.members(*members)
    dtype = tensor.text("dtype")
    if dtype not in DTYPES:
        tensor.fail(f"must have a dtype of {sorted(DTYPES)}", dtype)
    return TensorSpec(dtype, tuple(tensor.integers("shape")))


def _table(table: _Reader, previous: Link | None) -> TableEntry:
    table.members("rows", "columns", "meta", "ranges", *([] if previous is None else ["removed"]))
    columns: dict[str, TensorSpec] = {}
    for column in table.items("columns"):
        name = column.text("name")
        if name in columns:
            column.fail("must have a unique name", name)
        columns[name] = _tensor(column, "name", "dtype", "shape")
    if next(iter(columns.items()), None) != ("ids", TensorSpec("int64", ())):
        table.fail("must have 'ids', int64 with shape [], as its first column", table.value("columns"))
    rows, ranges = _ranges(table)
    removed = None
    if previous is not None and table.value("removed") is not None:
        ids = table.child("removed")
        ids.members("rows", "ranges")
        removed = RemovedEntry(*_ranges(ids))
    return TableEntry(rows, columns, table.child("meta").document, ranges, removed)


def _ranges(table: _Reader) -> tuple[int, tuple[RangeEntry, ...]]:
    rows = table.integer("rows", 0)
    ranges = tuple(_range(item) for item in table.items("ranges"))
    firsts = [r.first_bucket for r in ranges] + [BUCKETS]
    expected = [0] + [r.last_bucket + 1 for r in ranges]
    if firsts != expected or any(r.first_bucket > r.last_bucket for r in ranges):
        found = [[r.first_bucket, r.last_bucket] for r in ranges]
        table.fail(f"must have contiguous ranges from bucket 0 to {BUCKETS - 1}", found)
    if sum(r.rows for r in ranges) != rows:
        table.fail(f"must have ranges of {rows} rows in total", [r.rows for r in ranges])
    return rows, ranges


def _range(item: _Reader) -> RangeEntry:
    item.members("buckets", "rows", "file")
    buckets = item.integers("buckets")
    if len(buckets) != 2:
        item.fail("must have two buckets, the first and the last", buckets)
    return RangeEntry(buckets[0], buckets[1], item.integer("rows", 0), _file(item.child("file")))


def _file(file: _Reader) -> FileEntry:
    file.members("path", "size", "crc32")
    path = file.text("path")
    if not is_safe_path(path):
        file.fail("must have a relative path without '..' and of letters, digits and _ - . % ~ /", path)
    size = file.integer("size", 1)
    sums = file.array("crc32")
    if any(not isinstance(s, str) or not _CRC32.fullmatch(s) for s in sums):
        file.fail("must have checksums of 8 hexadecimal digits", sums)
    if len(sums) != math.ceil(size / CHUNK_BYTES):
        file.fail(f"must have one checksum per {CHUNK_BYTES} bytes of {size}", sums)
    return FileEntry(path, size, tuple(sums))


def part_files(part: PartEntry) -> list[FileEntry]:
    """Return the files of a part: its dense file, if any, and those of its tables."""
    dense = [] if part.file is None else [part.file]
    return dense + [file for table in part.tables.values() for file in table_files(table)]


def table_files(table: TableEntry) -> list[FileEntry]:
    """Return the files of a table in bucket order: those of its rows, then those of removed ids."""
    return [r.file for r in (*table.ranges, *(() if table.removed is None else table.removed.ranges))]


def _check_paths_differ(manifest: Manifest, path: Location) -> None:
    seen: set[str] = set()
    for part in manifest.parts.values():
        for file in part_files(part):
            if file.path in seen:
                raise CorruptCheckpoint(
                    f"{path}: each file must be named once, {file.path!r} is repeated. {OTHER_STEP}"
                )
            seen.add(file.path)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"an object has duplicate members among {[key for key, _ in pairs]}")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
