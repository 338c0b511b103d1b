"""Operators of EmbeddingBlocks: first values of rows, row metadata, reads and writes of records.

Shapes: N positions (ids of a call), M member tables, U distinct rows, D dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid.ops._fake import nothing_returned

nothing_returned(
    "blocks_init_fresh",
    "blocks_read",
    "blocks_write",
    "blocks_read_meta",
    "blocks_write_meta",
    "blocks_copy_records",
    "blocks_see_rows",
    "blocks_mark_touched",
    "blocks_export",
)

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types of records, and their numbers in kernels."""


class Blocks(NamedTuple):
    """EmbeddingBlocks in the form of kernel arguments."""

    addresses: Tensor
    """int64 ``[blocks]``: the address of each block, on the device of the kernels."""
    block_shift: int
    """Binary logarithm of the number of rows per block."""
    meta_offset: int
    """Bytes from a record's start to its metadata."""
    record_bytes: int
    """Bytes of a record, a multiple of 16."""


@dataclass(frozen=True)
class StateArgs:
    """The optimizer state of a record, as flat lists."""

    offsets: list[int]
    """Bytes from the record's start."""
    widths: list[int]
    """Elements."""
    sizes: list[int]
    """Bytes of an element: 4 or 2."""
    first_values: list[int]
    """Bits of the first value."""


def init_fresh(
    blocks: Blocks,
    element: int,
    counters: Tensor,
    rows: Tensor,
    fresh: Tensor,
    ids: Sequence[Tensor],
    members: Sequence[int],
    initializers: Tensor,
    dim: int,
    state: StateArgs,
) -> None:
    """Write the first values of the rows added since the last commit.

    Args:
        blocks: Written. Must hold every row that ``counters`` counts.
        element: Element type of the embedding, a value of ``ELEMENTS``.
        counters: int64 ``[6]`` of the IDMap.
        rows: int64 ``[N]``, from ``id_map.find_or_insert``.
        fresh: int64 ``[N]``, from ``id_map.find_or_insert``.
        ids: For each feature, int64 ``[n_f]``: the same lists as in that call.
        members: For each feature, the number of its member table.
        initializers: int64 ``[M, 5]``, in the layout of ``csrc/core/initializer.h``.
        dim: D.
        state: First values of the optimizer state.
    """
    torch.ops.recis.blocks_init_fresh(
        *blocks,
        element,
        counters,
        rows,
        fresh,
        ids,
        members,
        initializers,
        dim,
        state.offsets,
        state.widths,
        state.sizes,
        state.first_values,
    )


def read(blocks: Blocks, rows: Tensor, offset: int, values: Tensor) -> None:
    """Copy one part of the records of rows into a tensor.

    Args:
        blocks: Read.
        rows: int64 ``[n]``.
        offset: Offset of the part in the record, in bytes.
        values: ``[n, width]`` in the dtype of the part; written.
    """
    torch.ops.recis.blocks_read(*blocks, rows, offset, values)


def write(blocks: Blocks, rows: Tensor, offset: int, values: Tensor) -> None:
    """Copy a tensor into one part of the records of rows.

    Args:
        blocks: Written.
        rows: int64 ``[n]``, distinct.
        offset: Offset of the part in the record, in bytes.
        values: ``[n, width]`` in the dtype of the part.
    """
    torch.ops.recis.blocks_write(*blocks, rows, offset, values)


def read_meta(blocks: Blocks, rows: Tensor) -> Tensor:
    """Return the updated step, seen step and frequency of rows (int64 ``[n]``), as int64 ``[3, n]``."""
    columns = torch.empty(3, rows.numel(), dtype=torch.int64, device=rows.device)
    torch.ops.recis.blocks_read_meta(*blocks, rows, columns)
    return columns


def write_meta(blocks: Blocks, rows: Tensor, columns: Tensor) -> None:
    """Write metadata of rows.

    Args:
        blocks: Written.
        rows: int64 ``[n]``, distinct.
        columns: int64 ``[3, n]``, as returned by :func:`read_meta`. Steps are below 2^40; frequencies saturate at
            2^48 - 1.
    """
    torch.ops.recis.blocks_write_meta(*blocks, rows, columns)


def copy_records(blocks: Blocks, source: Tensor, target: Tensor) -> None:
    """Copy records from the rows ``source`` to the rows ``target``.

    Args:
        blocks: Written.
        source: int64 ``[n]``.
        target: int64 ``[n]``, distinct, none of them among ``source``.
    """
    torch.ops.recis.blocks_copy_records(*blocks, source, target)


def see_rows(blocks: Blocks, count: Tensor, unique: Tensor, offsets: Tensor, step: int) -> None:
    """Mark rows as seen at ``step``, and add their number of occurrences to their frequencies.

    Args:
        blocks: Written.
        count: int64 ``[1]``: U.
        unique: int64: distinct rows, of which the first U are in use.
        offsets: int64: row ``unique[u]`` occurs ``offsets[u + 1] - offsets[u]`` times.
        step: Below 2^40.
    """
    torch.ops.recis.blocks_see_rows(*blocks, count, unique, offsets, step)


def mark_touched(blocks: Blocks, step: int, marks: Tensor) -> None:
    """Mark the rows that were updated, or seen by a training lookup, after a step.

    Args:
        blocks: Must hold every row.
        step: Rows whose updated and seen steps are both at most this step are not marked.
        marks: uint8, one element per row; written.
    """
    torch.ops.recis.blocks_mark_touched(*blocks, step, marks)


def export(
    blocks: Blocks, rows: Tensor, offsets: Sequence[int], parts: Sequence[Tensor], meta: Sequence[Tensor]
) -> None:
    """Copy parts and metadata of records into columns in one pass, in the calling thread; CPU only.

    Args:
        blocks: Read.
        rows: int64 ``[n]``.
        offsets: For each part, its offset in the record in bytes.
        parts: For each part, ``[n, width]`` in its dtype, contiguous; written.
        meta: Updated step, seen step and frequency, int64 ``[n]`` each, contiguous; written.
    """
    torch.ops.recis.blocks_export(*blocks, rows, offsets, parts, *meta)
