"""Rows split by column: each rank has some elements of every row.

Letters: n rows, W ranks, D dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recis_hybrid.embedding.distributed.dedup import rank_of
from recis_hybrid.embedding.distributed.exchange import Exchange, ExchangeError
from recis_hybrid.embedding.table.record_layout import RecordLayout
from recis_hybrid.ops.id_map import bucket_order


def side_by_side(parts: Tensor, rows: int, widths: Sequence[int]) -> Tensor:
    """Join column blocks ``[rows, width]``, flattened and concatenated, into rows ``[rows, sum(widths)]``."""
    blocks = parts.split([rows * width for width in widths])
    return torch.cat([block.view(rows, width) for block, width in zip(blocks, widths, strict=True)], 1)


def own_columns(columns: Mapping[str, Tensor], layout: RecordLayout) -> dict[str, Tensor]:
    """Return the elements of whole rows ``[n, ...]`` that a layout contains: some of them if rows are split by column.

    Raises:
        ValueError: If a part of the record has another width.
    """
    if layout.whole_dim is None:
        return dict(columns)
    own = {}
    for name, values in columns.items():
        if name in layout.parts:
            if tuple(values.shape[1:]) != (layout.whole.width(name),):
                raise ValueError(f"{name} must be [n, {layout.whole.width(name)}], got {list(values.shape)}")
            values = values[:, layout.first : layout.first + layout.dim].contiguous()
        own[name] = values
    return own


def whole_rows(columns: dict[str, Tensor], widths: Sequence[int], exchange: Exchange) -> dict[str, Tensor]:
    """Return the whole rows of this rank's buckets, ordered by (bucket, id); collective.

    Args:
        columns: Columns of the same rows on all ranks: ``ids`` int64 ``[n]``; columns ``[n]`` with one number per row,
            equal on all ranks; and columns ``[n, widths[rank]]``, which are split.
        widths: For each rank, the number of its elements of a row.
        exchange: Collectives of the ranks that share the table.

    Raises:
        ExchangeError: If ranks have different numbers of rows.
    """
    ids = columns["ids"].contiguous()
    rows = [n for (n,) in exchange.all([ids.numel()])]
    if set(rows) != {ids.numel()}:
        raise ExchangeError(
            f"rank {exchange.rank}: with sharding='column', all ranks must have the same rows, but they have {rows} "
            f"rows; evict and erase the same ids on all ranks"
        )
    order = bucket_order(ids)
    owners = rank_of(ids[order], exchange.size)
    counts = owners.bincount(minlength=exchange.size).tolist()
    mine, width = counts[exchange.rank], widths[exchange.rank]
    joined = {}
    for name, values in columns.items():
        if values.dim() == 1:
            joined[name] = values[order[owners == exchange.rank]]
            continue
        # The order by bucket is also an order by owner.
        send, receive = [n * width for n in counts], [mine * other for other in widths]
        received = exchange.start("rows", values[order].view(-1), send, receive).wait()
        joined[name] = side_by_side(received.to(values.device), mine, widths)
    return joined
