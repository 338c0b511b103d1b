"""Copies of records that catch up on missed steps, so that reading a table does not change it.

Letters: n rows, N positions (ids of a lookup over all features), U records.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import numbers_on
from recis_hybrid.embedding.optimizer import BeforeRead
from recis_hybrid.embedding.table.blocks import in_one_block
from recis_hybrid.embedding.table.lookup import Lookup
from recis_hybrid.embedding.table.record_layout import META, RecordLayout
from recis_hybrid.embedding.table.store import RowStore
from recis_hybrid.ops.blocks import Blocks

_PIECE_BYTES = 64 << 20


def copied_records(store: RowStore, lookup: Lookup) -> tuple[Tensor, Tensor]:
    """Copy the records that a lookup reads, and make records with first values for ids without a row.

    Args:
        store: The rows.
        lookup: The lookup.

    Returns:
        uint8 ``[U, record_bytes]``, the records; and int64 ``[N]``, their numbers for the positions of the lookup, -1
        for an id without a row that counts as zeros.
    """
    layout, request = store.layout, lookup.request
    blocks, rows = store.blocks.at(lookup.rows)
    distinct, numbers = rows.unique(return_inverse=True)
    absent = int((distinct < 0).sum())
    have_first_values = numbers_on(rows.device, [int(member >= 0) for member in request.unknown])
    lengths = numbers_on(rows.device, request.bags.lengths)
    fresh = ((rows < 0) & have_first_values.repeat_interleave(lengths).bool()).nonzero().view(-1)
    known = distinct.numel() - absent
    records = torch.zeros(known + fresh.numel(), layout.record_bytes // 4, device=rows.device)
    ops.blocks.read(blocks, distinct[absent:].contiguous(), 0, records[:known])
    places = torch.where(rows < 0, rows, numbers - absent)
    places[fresh] = torch.arange(known, records.size(0), device=rows.device)
    bytes_of_records = records.view(torch.uint8)
    if fresh.numel():
        counters = torch.zeros(ops.id_map.COUNTERS, dtype=torch.int64, device=rows.device)
        counters[ops.id_map.FRESH] = fresh.numel()
        ops.blocks.init_fresh(
            in_one_block(layout, bytes_of_records)[0],
            layout.element,
            counters,
            places,
            fresh,
            request.ids,
            request.members,
            store.initializers,
            layout.dim,
            layout.state_args,
        )
    return bytes_of_records, places


def caught_up(layout: RecordLayout, records: Tensor, before_read: BeforeRead, step: int) -> Blocks:
    """Let copied records (uint8 ``[n, record_bytes]``), which must stay alive, catch up; return them as blocks."""
    blocks, rows = in_one_block(layout, records)
    before_read(blocks, rows.new_tensor([rows.numel()]), rows, step)
    return blocks


def caught_up_columns(
    layout: RecordLayout, columns: dict[str, Tensor], before_read: BeforeRead, step: int
) -> dict[str, Tensor]:
    """Return the columns of an export (``[n, ...]``) after their rows have caught up."""
    result = {name: torch.empty_like(values) for name, values in columns.items()}
    result["ids"] = columns["ids"]
    piece = max(_PIECE_BYTES // layout.record_bytes, 1)
    for first in range(0, columns["ids"].numel(), piece):
        some = {name: values[first : first + piece] for name, values in columns.items()}
        records = torch.zeros(some["ids"].numel(), layout.record_bytes, dtype=torch.uint8, device=some["ids"].device)
        blocks, rows = in_one_block(layout, records)
        for part in layout.parts:
            ops.blocks.write(blocks, rows, layout.offset(part), some[part])
        ops.blocks.write_meta(blocks, rows, torch.stack([some[name] for name in META]))
        caught_up(layout, records, before_read, step)
        for part in layout.parts:
            ops.blocks.read(blocks, rows, layout.offset(part), result[part][first : first + piece])
        for name, values in zip(META, ops.blocks.read_meta(blocks, rows), strict=True):
            result[name][first : first + piece] = values
    return result
