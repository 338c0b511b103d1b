"""Operators of tables whose records are on disk, with those in use in frames in memory.

The *location* of a row is a word: 0 without a record, an even number that tells its frame, or an odd one that tells its
slot in the log of records. All frames are one block of records, whose address is the value of the handle. So kernels
access the records of rows that :func:`fetch` has brought into frames, by the numbers of the frames.

Shapes: n rows, N positions (ids of a call), R rows of the table, D dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid.ops._fake import nothing_returned
from recis_hybrid.ops.blocks import StateArgs
from recis_hybrid.ops.gather import Bags, RowGroups, parts_of_groups, room_for_groups

nothing_returned(
    "disk_fetch",
    "disk_insert_grouped",
    "disk_stage",
    "disk_forget",
    "disk_read",
    "disk_touched",
    "disk_pin",
    "disk_unpin",
    "disk_read_pinned",
    "disk_figures",
)

BYTES_OF_A_FRAME = 24
"""Bytes of a frame in addition to its record."""
SEGMENT_BYTES = 4 << 20
"""Bytes of a segment of the log, which is written in one piece."""


@torch.library.register_fake("recis::disk_open")  # type: ignore[untyped-decorator]
def _disk_open(
    name: str, path: str, record_bytes: int, meta_offset: int, frames: int, segment_bytes: int, ring: bool
) -> Tensor:
    return torch.empty(1, dtype=torch.int64)


class DiskFigures(NamedTuple):
    """Figures of the records of a table since they were opened."""

    hits: int
    """Distinct rows of training lookups whose record was in memory."""
    misses: int
    """Those whose record was on disk."""
    prefetched: int
    """Those of ``misses`` that had been read, or were being read, when the lookup began."""
    written_back: int
    """Changed records that were written to the disk."""
    moved: int
    """Records that the compaction of the log has moved."""
    log_bytes: int
    """Bytes on disk now."""
    memory_bytes: int
    """Bytes of frames and buffers now."""
    io_uring: int
    """1 if io_uring is used; 0: threads."""
    direct: int
    """1 if transfers bypass the page cache."""


def most_log_bytes(rows: int, record_bytes: int, more: int = 0) -> int:
    """Return the most that the log of a table with ``rows`` rows takes on disk, once it has been compacted.

    Args:
        rows: Number of rows.
        record_bytes: Bytes of a record.
        more: Number of rows that one call of :func:`fetch` may bring into frames.
    """
    stride = record_bytes + 8  # with the row behind it
    segment = -(-max(SEGMENT_BYTES, 8 * stride) // 4096) * 4096
    of_segment = segment // stride
    # A third of the log and six segments that are not current; one that is filled, and space for a call's records.
    used = -(-3 * rows // (2 * of_segment)) + 6 + 1 + -(-more // of_segment)
    # Of the segments, an eighth and four may be free.
    return (used + 4 + used // 7) * segment


def open_disk(
    name: str,
    path: str,
    *,
    record_bytes: int,
    meta_offset: int,
    frames: int,
    segment_bytes: int | None = None,
    ring: bool = True,
) -> Tensor:
    """Open the records of a table in a new file without a name, which vanishes with the result or the process.

    Args:
        name: Name of the table, for messages.
        path: Folder of the file.
        record_bytes: Bytes of a record, a multiple of 16.
        meta_offset: Bytes from a record's start to its metadata.
        frames: Number of records that fit into memory.
        segment_bytes: Bytes of a segment of the log; None: ``SEGMENT_BYTES``.
        ring: Use io_uring if it is permitted.

    Returns:
        A handle, int64 ``[1]``, for the other functions, which refuse copies of it. Its value is the address of the
        frames, for ``ops.blocks.Blocks``.

    Raises:
        RuntimeError: If no file can be created in the folder, or memory runs out.
    """
    return torch.ops.recis.disk_open(  # type: ignore[no-any-return]
        name, path, record_bytes, meta_offset, frames, segment_bytes or SEGMENT_BYTES, ring
    )


def fetch(
    disk: Tensor,
    locations: Tensor,
    rows: Tensor,
    *,
    count: Tensor | None = None,
    writes: bool = False,
    counts: bool = False,
) -> Tensor:
    """Bring the records of rows into frames, where they stay until the next call; a row without one gets zeros.

    Args:
        disk: The handle.
        locations: int64 ``[R]``; written.
        rows: int64 ``[n]``; negative for none.
        count: int64 ``[1]``: number of valid rows; None: all.
        writes: The records are about to be written.
        counts: The rows are those of a training lookup, which decides what stays in memory.

    Returns:
        The frame of each row, int64 ``[n]``; a negative row is its own frame.

    Raises:
        RuntimeError: If there are more distinct rows than frames, or the disk is full or fails. Each record is still
            that of its row.
    """
    frames = torch.empty_like(rows)
    torch.ops.recis.disk_fetch(disk.data_ptr(), locations, rows, count, writes, counts, frames)
    return frames


def insert_grouped(
    disk: Tensor,
    locations: Tensor,
    header: Tensor,
    counters: Tensor,
    free_rows: Tensor,
    element: int,
    dim: int,
    initializers: Tensor,
    state: StateArgs,
    ids: Sequence[Tensor],
    members: Sequence[int],
    bags: Bags,
) -> tuple[Tensor, RowGroups, Tensor, Tensor]:
    """Find or insert each id, group the positions by row, and :func:`fetch` the rows: a training lookup.

    Args:
        disk: The handle.
        locations: int64 ``[R]``; written. Must have room for all new rows.
        header: As in ``gather.insert_grouped``, like the following.
        counters: int64 ``[6]``, written.
        free_rows: int64.
        element: A value of ``blocks.ELEMENTS``.
        dim: D.
        initializers: int64 ``[M, 5]``.
        state: First values of the optimizer state.
        ids: For each feature, int64 ``[n_f]``, contiguous.
        members: For each feature, the number of its member table.
        bags: The bags of the gradients.

    Returns:
        The row of each id, int64 ``[N]``; the groups; the frame of each id, int64 ``[N]``; and that of each distinct
        row, int64 ``[N]``, of which only the first are valid.

    Raises:
        RuntimeError: As :func:`fetch`; no id has been inserted.
    """
    n = sum(bags.lengths)
    rows, frames, unique_frames = torch.empty(3, n, dtype=torch.int64).unbind()
    groups = room_for_groups(n, bags, rows.device)
    torch.ops.recis.disk_insert_grouped(
        disk.data_ptr(),
        locations,
        header,
        counters,
        free_rows,
        element,
        dim,
        initializers,
        state.offsets,
        state.widths,
        state.sizes,
        state.first_values,
        ids,
        members,
        *bags,
        rows,
        *parts_of_groups(groups),
        frames,
        unique_frames,
    )
    return rows, groups, frames, unique_frames


def stage(disk: Tensor, locations: Tensor, rows: Tensor) -> None:
    """Start to read the records of rows (int64 ``[n]``, negative for none) for a later :func:`fetch`."""
    torch.ops.recis.disk_stage(disk.data_ptr(), locations, rows)


def forget(disk: Tensor, locations: Tensor, rows: Tensor) -> None:
    """Drop the records of rows (int64 ``[n]``, negative for none); ``locations`` (int64 ``[R]``) are written."""
    torch.ops.recis.disk_forget(disk.data_ptr(), locations, rows)


def read(disk: Tensor, locations: Tensor, rows: Tensor, records: Tensor) -> None:
    """Copy the records of rows (int64 ``[n]``), which must have one, to uint8 ``[n, record_bytes]``."""
    torch.ops.recis.disk_read(disk.data_ptr(), locations, rows, records)


def touched(disk: Tensor, locations: Tensor, step: int) -> Tensor:
    """Return whether each row was updated or seen by a training lookup after a step, uint8 ``[R]``.

    Reads the segments of the log that were written after that step, one at a time.
    """
    marks = torch.empty(locations.numel(), dtype=torch.uint8)
    torch.ops.recis.disk_touched(disk.data_ptr(), locations, step, marks)
    return marks


def pin(disk: Tensor, locations: Tensor) -> tuple[Tensor, int]:
    """Write all records to the log, and keep those of this moment.

    Returns:
        The slot of each row's record, int64 ``[R]``, -1 without one; and a number for :func:`unpin`.
    """
    slots, number = torch.empty_like(locations), torch.zeros(1, dtype=torch.int64)
    torch.ops.recis.disk_pin(disk.data_ptr(), locations, slots, number)
    return slots, int(number)


def unpin(disk: Tensor, number: int) -> None:
    """Stop keeping the records of a :func:`pin`."""
    torch.ops.recis.disk_unpin(disk.data_ptr(), number)


def read_pinned(disk: Tensor, rows: Tensor, slots: Tensor, records: Tensor) -> None:
    """Copy pinned records to uint8 ``[n, record_bytes]``, in any thread.

    Args:
        disk: The handle.
        rows: int64 ``[n]``.
        slots: int64 ``[n]``: their slots, from :func:`pin`.
        records: Written.
    """
    torch.ops.recis.disk_read_pinned(disk.data_ptr(), rows, slots, records)


def figures(disk: Tensor) -> DiskFigures:
    """Return the figures of the records so far."""
    values = torch.empty(len(DiskFigures._fields), dtype=torch.int64)
    torch.ops.recis.disk_figures(disk.data_ptr(), values)
    return DiskFigures(*values.tolist())
