"""Rows that are split by column: each rank has some elements of every row.

Letters: n rows, W ranks, D dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from recis_hybrid.embedding.distributed.dedup import rank_of
from recis_hybrid.embedding.distributed.exchange import Exchange, ExchangeError
from recis_hybrid.embedding.initializers import QUAD
from recis_hybrid.embedding.table.record_layout import RecordLayout
from recis_hybrid.ops.id_map import bucket_order


def columns_of(dim: int, ranks: int) -> list[int]:
    """Return how many elements of each row a rank has where rows are split by column.

    First values are drawn four at a time: so each rank has a multiple of four, the last one what is left, too.
    """
    quads, left = divmod(dim, QUAD)
    each = [quads * rank // ranks for rank in range(ranks + 1)]
    widths = [QUAD * (end - begin) for begin, end in pairwise(each)]
    widths[-1] += left
    return widths


def side_by_side(parts: Tensor, rows: int, widths: Sequence[int]) -> Tensor:
    """Return rows ``[rows, sum(widths)]`` from some columns of all of them after another, in one dimension."""
    each = parts.split([rows * width for width in widths])
    return torch.cat([part.view(rows, width) for part, width in zip(each, widths, strict=True)], 1)


def own_columns(columns: Mapping[str, Tensor], layout: RecordLayout) -> dict[str, Tensor]:
    """Return of whole rows ``[n, ...]`` what a layout has: some of their elements, where they are split.

    Raises:
        ValueError: If a part of the record has another width.
    """
    if layout.whole_dim is None:
        return dict(columns)
    kept = {}
    for name, values in columns.items():
        if name in layout.parts:
            if tuple(values.shape[1:]) != (layout.whole.width(name),):
                raise ValueError(f"{name} must be [n, {layout.whole.width(name)}], got {list(values.shape)}")
            values = values[:, layout.first : layout.first + layout.dim].contiguous()
        kept[name] = values
    return kept


def whole_rows(columns: dict[str, Tensor], widths: Sequence[int], exchange: Exchange) -> dict[str, Tensor]:
    """Return whole rows, those of this rank's buckets, by (bucket, id); all ranks call it together.

    Args:
        columns: Of the same rows on all ranks: ``ids`` int64 ``[n]``; ``[n]`` of what is one number a row, and the same
            on all ranks; and ``[n, widths[rank]]`` of what is split.
        widths: For each rank, how many elements of a row it has.
        exchange: With the other ranks.

    Raises:
        ExchangeError: If ranks have other numbers of rows.
    """
    ids = columns["ids"].contiguous()
    told = [n for (n,) in exchange.all([ids.numel()])]
    if set(told) != {ids.numel()}:
        raise ExchangeError(
            f"rank {exchange.rank}: ranks that each have some columns of every row must have the same rows, and have "
            f"{told} of them; evict and erase on all ranks alike"
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
        # By bucket, and so by the rank that owns it.
        send, receive = [n * width for n in counts], [mine * other for other in widths]
        came = exchange.start("rows", values[order].view(-1), send, receive).wait()
        joined[name] = side_by_side(came.to(values.device), mine, widths)
    return joined
