"""The contents of a sparse file, which are the rows of a contiguous range of buckets; reads all or some of its rows.

Legend: m rows of the file, K buckets with rows.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.checkpointing import JSON
from recis_hybrid.saver.errors import OTHER_STEP, CorruptCheckpoint
from recis_hybrid.saver.format.checksums import CHUNK_BYTES, PAGE_BYTES, chunk_sums, page_sums
from recis_hybrid.saver.format.file_io import check_size, check_sum, fill, open_file, read_chunk
from recis_hybrid.saver.format.header import (
    LONGEST_HEADER,
    Place,
    buffer,
    parse_header,
    typed,
    views,
)
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import FileEntry, RangeEntry, TableEntry, TensorSpec
from recis_hybrid.saver.format.tensor_file import check_contents

INDEX = ("buckets", "bucket_offsets")
_CPU = torch.device("cpu")


class Reads:
    """Counts the bytes that a load reads."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Add the size of a read."""
        with self._lock:
            self.bytes += count


@dataclass(frozen=True)
class Rows:
    """Rows of one file, sorted by (bucket, id)."""

    columns: dict[str, Tensor]
    """``[m, ...]`` each, "ids" among them."""
    buckets: Tensor
    """int64 ``[m]``."""


def row_tag(part: str, table: str, first: int, last: int) -> dict[str, JSON]:
    """Return the header entry that identifies a sparse file."""
    return {"part": part, "table": table, "buckets": [first, last]}


def file_specs(columns: Mapping[str, TensorSpec], rows: int, present: int) -> dict[str, TensorSpec]:
    """Return the tensors of a file with ``rows`` rows in ``present`` buckets."""
    specs = {name: TensorSpec(spec.dtype, (rows, *spec.shape)) for name, spec in columns.items()}
    specs["buckets"] = TensorSpec("int32", (present,))
    specs["bucket_offsets"] = TensorSpec("int64", (present + 1,))
    return specs


def read_rows(
    path: Location, part: str, table: str, entry: TableEntry, item: RangeEntry, wanted: tuple[int, int], reads: Reads
) -> Rows:
    """Read the rows of some buckets and verify their checksums.

    Args:
        path: Path of the file.
        part: Name of the part.
        table: Name of the table.
        entry: Manifest entry of the table.
        item: Manifest entry of the file.
        wanted: The first bucket to read, and the one after the last.
        reads: Counts the bytes that are read.

    Returns:
        The rows, in new memory.

    Raises:
        CorruptCheckpoint: The file differs from the manifest, or its rows are not sorted.
    """
    where = f"part {part!r}, table {table!r}"
    file = _File(path, where, item.file, reads)
    tag = row_tag(part, table, item.first_bucket, item.last_bucket)
    whole = wanted[0] <= item.first_bucket and item.last_bucket < wanted[1]
    with open_file(path) as handle:
        file.open(handle, whole)
        present = file.places["buckets"].spec.shape[:1] if "buckets" in file.places else ()
        specs = file_specs(entry.columns, item.rows, *(present or (0,)))
        check_contents(path, where, file.tag, {name: place.spec for name, place in file.places.items()}, tag, specs)
        rows = file.all() if whole else file.some(entry, item, wanted)
    found, offsets = rows.pop("buckets").long(), rows.pop("bucket_offsets")
    inside = not found.numel() or item.first_bucket <= int(found[0]) <= int(found[-1]) <= item.last_bucket
    ascending = bool((found[1:] > found[:-1]).all()) and bool((offsets[1:] > offsets[:-1]).all())
    count = rows["ids"].numel()
    if not inside or not ascending or int(offsets[0]) != 0 or int(offsets[-1]) != count:
        raise CorruptCheckpoint(
            f"{path} ({where}): buckets must ascend from {item.first_bucket} to {item.last_bucket} at most, and "
            f"bucket_offsets from 0 to {item.rows}; they do not. {OTHER_STEP}"
        )
    buckets = found.repeat_interleave(offsets.diff(), output_size=count)
    if not in_order(rows["ids"], buckets):
        raise CorruptCheckpoint(f"{path} ({where}): rows must be sorted by (bucket, id), they are not. {OTHER_STEP}")
    return Rows(rows, buckets)


def in_order(ids: Tensor, buckets: Tensor) -> bool:
    """Return whether rows ascend strictly by (bucket, id)."""
    above = buckets[1:] > buckets[:-1]
    return bool((above | ((buckets[1:] == buckets[:-1]) & (ids[1:] > ids[:-1]))).all())


class _File:
    """An open sparse file; everything read from it is verified immediately."""

    def __init__(self, path: Location, where: str, entry: FileEntry, reads: Reads) -> None:
        self._path = path
        self._where = where
        self._entry = entry
        self._reads = reads
        self.tag: Any = None
        self.places: dict[str, Place] = {}

    def open(self, handle: io.RawIOBase, whole: bool) -> None:
        """Read the header, and with ``whole`` also the rest."""
        self._handle, size = handle, self._entry.size
        check_size(self._path, self._where, size, handle)
        if whole:
            self._image = ops.memory.empty_bytes(size, _CPU)
            for number, (expected, chunk) in enumerate(
                zip(self._entry.crc32, self._image.split(CHUNK_BYTES), strict=True)
            ):
                read_chunk(handle, self._path, self._where, number, expected, chunk)
            self._reads.add(size)
            head = self._image[: self._length(bytes(self._image[:8].tolist()))].numpy().tobytes()
        else:
            head = self._pread(0, min(size, PAGE_BYTES)).numpy().tobytes()
            length = self._length(head[:8])
            if length > len(head):
                head += self._pread(len(head), length - len(head)).numpy().tobytes()
            head = head[:length]
        self._start = len(head)
        try:
            self.tag, self.places = parse_header(head[8:], size - self._start)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._fail(f"must be a safetensors file, but {error}", error)
        if not whole:
            self._check_pages(head)

    def all(self) -> dict[str, Tensor]:
        """Return all tensors, as views of the file in memory."""
        return views(self._image[self._start :], self.places)

    def some(self, entry: TableEntry, item: RangeEntry, wanted: tuple[int, int]) -> dict[str, Tensor]:
        """Return the rows of the wanted buckets, and their index."""
        count = self.places["buckets"].spec.shape[0]
        # A bucket's position is highest if all buckets before it have rows, and lowest if all after it do.
        lead = max(wanted[0] - item.first_bucket, 0)
        first = max(0, count - (item.last_bucket - item.first_bucket + 1 - lead))
        stop = min(count, wanted[1] - item.first_bucket)
        buckets = self._slice("buckets", first, max(first, stop))
        begin, end = torch.searchsorted(buckets, torch.tensor(wanted, dtype=buckets.dtype)).tolist()
        offsets = self._slice("bucket_offsets", first + begin, first + end + 1)
        from_row, to_row = int(offsets[0]), int(offsets[-1])
        if not 0 <= from_row <= to_row <= item.rows or (item.rows and not count):
            self._fail(f"bucket_offsets must ascend from 0 to {item.rows}; they do not")
        rows = {name: self._slice(name, from_row, to_row) for name in entry.columns}
        return rows | {"buckets": buckets[begin:end], "bucket_offsets": offsets - from_row}

    def _slice(self, name: str, first: int, stop: int) -> Tensor:
        place = self.places[name]
        shape = (stop - first, *place.spec.shape[1:])
        width = (place.stop - place.first) // max(place.spec.shape[0], 1)
        spec = TensorSpec(place.spec.dtype, shape)
        return typed(self._data(place.first + first * width, place.first + stop * width), spec)

    def _data(self, first: int, stop: int) -> Tensor:
        """Return bytes ``first`` to ``stop`` after the header, uint8, after verifying their pages."""
        page = first // PAGE_BYTES
        begin, end = page * PAGE_BYTES, min(-(-stop // PAGE_BYTES) * PAGE_BYTES, self._entry.size - self._start)
        if first == stop:
            return torch.empty(0, dtype=torch.uint8)
        data = self._pread(self._start + begin, end - begin)
        for at, found in enumerate(page_sums(data).tolist()):
            if found != self._pages[page + at]:
                place = at * PAGE_BYTES
                check_sum(
                    self._path,
                    self._where,
                    self._start + begin + place,
                    f"{self._pages[page + at]:08x}",
                    data[place : place + PAGE_BYTES],
                )
        return data[first - begin : stop - begin]

    def _check_pages(self, head: bytes) -> None:
        """Verify the checksums of pages, from the header, against those of chunks, from the manifest."""
        text = self.tag.get("pages") if isinstance(self.tag, dict) else None
        size = self._entry.size
        try:
            self._pages = np.frombuffer(bytes.fromhex(text or ""), ">u4").astype(np.uint32)
        except (TypeError, ValueError) as error:
            self._fail("must have the checksums of its pages in its metadata", error)
        if len(self._pages) != -(-(size - self._start) // PAGE_BYTES):
            self._fail(f"must have {-(-(size - self._start) // PAGE_BYTES)} checksums of pages in its metadata")
        if len(self._entry.crc32) > 1 and self._start % PAGE_BYTES:
            self._fail("must have a header of whole pages")
        for chunk, (found, expected) in enumerate(
            zip(chunk_sums(head, self._pages, size), self._entry.crc32, strict=True)
        ):
            if found != expected:
                self._fail(
                    f"chunk {chunk} must have the CRC-32 {expected}, as the manifest says, its pages give {found}"
                )

    def _length(self, prefix: bytes) -> int:
        """Return the bytes of the header, including its length."""
        length = int.from_bytes(prefix, "little") + 8
        if len(prefix) < 8 or not 8 < length <= min(self._entry.size, LONGEST_HEADER):
            self._fail("must be a safetensors file, but its header is longer than the file")
        return length

    def _pread(self, offset: int, size: int) -> Tensor:
        data = ops.memory.empty_bytes(size, _CPU)
        self._handle.seek(offset)
        fill(self._handle, buffer(data))
        self._reads.add(size)
        return data

    def _fail(self, rule: str, error: BaseException | None = None) -> None:
        raise CorruptCheckpoint(f"{self._path} ({self._where}): {rule}. {OTHER_STEP}") from error
