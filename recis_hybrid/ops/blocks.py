"""Operators of EmbeddingBlocks: first values, what rows keep of their past, plain reads and writes of records.

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
    "blocks_list_touched",
    "blocks_export",
)

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The element types of records, by the number that kernels know them by."""


class Blocks(NamedTuple):
    """EmbeddingBlocks as kernels see them."""

    addresses: Tensor
    """int64 ``[blocks]``: the address of each block, on the device that kernels run on."""
    block_shift: int
    """Binary logarithm of the rows of a block."""
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
    """Bits of the first value, as they lie in memory."""


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
    """Give the rows handed out since the last commit their first values.

    Args:
        blocks: Written. Must hold every row that ``counters`` counts.
        element: Of the embedding, a value of ``ELEMENTS``.
        counters: int64 ``[5]`` of the IDMap.
        rows: int64 ``[N]`` as find_or_insert left it.
        fresh: int64 ``[N]`` as find_or_insert left it.
        ids: For each feature, int64 ``[n_f]``: the same lists as in that call.
        members: For each feature, the number of its member table.
        initializers: int64 ``[M, 5]``, as ``csrc/core/initializer.h`` lays them out.
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
    """Copy one part of the records of ``rows`` (int64 ``[n]``) into ``values`` ``[n, width]`` of the part's dtype."""
    torch.ops.recis.blocks_read(*blocks, rows, offset, values)


def write(blocks: Blocks, rows: Tensor, offset: int, values: Tensor) -> None:
    """Copy ``values`` ``[n, width]`` into one part of the records of ``rows`` (int64 ``[n]``, distinct)."""
    torch.ops.recis.blocks_write(*blocks, rows, offset, values)


def read_meta(blocks: Blocks, rows: Tensor) -> Tensor:
    """Return int64 ``[3, n]``: updated step, seen step and frequency of ``rows`` (int64 ``[n]``)."""
    columns = torch.empty(3, rows.numel(), dtype=torch.int64, device=rows.device)
    torch.ops.recis.blocks_read_meta(*blocks, rows, columns)
    return columns


def write_meta(blocks: Blocks, rows: Tensor, columns: Tensor) -> None:
    """Overwrite what :func:`read_meta` reads. Steps are below 2^40; a frequency stops at 2^48 - 1."""
    torch.ops.recis.blocks_write_meta(*blocks, rows, columns)


def copy_records(blocks: Blocks, source: Tensor, target: Tensor) -> None:
    """Copy whole records from the rows ``source`` to the distinct rows ``target``, none of which is a source."""
    torch.ops.recis.blocks_copy_records(*blocks, source, target)


def see_rows(blocks: Blocks, count: Tensor, unique: Tensor, offsets: Tensor, step: int) -> None:
    """Mark rows as seen at ``step``, and add to their frequencies how often they occur.

    Args:
        blocks: Written.
        count: int64 ``[1]``: U.
        unique: int64, distinct rows; the first U count.
        offsets: int64: row ``unique[u]`` occurs ``offsets[u + 1] - offsets[u]`` times.
        step: Below 2^40.
    """
    torch.ops.recis.blocks_see_rows(*blocks, count, unique, offsets, step)


def list_touched(
    blocks: Blocks, slots: Tensor, step: int, marks: Tensor, ids: Tensor, members: Tensor, count: Tensor
) -> None:
    """Write the ids, and their member tables, whose rows an update or a training lookup has met after a step.

    Args:
        blocks: Must hold every row of the map.
        slots: int64 ``[S, 2]``: of the IDMap, on the device of the blocks.
        step: Rows whose updated and seen step are both at most this are left out.
        marks: uint8, one for each row that there is; becomes 1 where the row was met, else 0.
        ids: int64, an upper bound of what is there; written, in no particular order.
        members: As ``ids``; written.
        count: int64 ``[1]``, zeroed; becomes the number written.
    """
    torch.ops.recis.blocks_list_touched(*blocks, slots, step, marks, ids, members, count)


def export(
    blocks: Blocks, rows: Tensor, offsets: Sequence[int], parts: Sequence[Tensor], meta: Sequence[Tensor]
) -> None:
    """Copy all that is wanted of records into columns in one pass, in the calling thread; on the CPU alone.

    Args:
        blocks: Read.
        rows: int64 ``[n]``.
        offsets: For each part, the bytes from the record's start.
        parts: For each part, ``[n, width]`` of its dtype, contiguous; written.
        meta: Updated step, seen step and frequency, int64 ``[n]`` each, contiguous; written.
    """
    torch.ops.recis.blocks_export(*blocks, rows, offsets, parts, *meta)
