"""Operators on row gradients: grouping by row, ordered reduction, and the optimizers' updates.

Shapes: N positions, U distinct rows (known only to the device: buffers are [N], ``count`` holds U), B bags, D dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recis_hybrid.ops._fake import nothing_returned
from recis_hybrid.ops.blocks import Blocks

nothing_returned("bag_sources", "group_rows", "reduce_rows", "sgd_update", "adagrad_update", "adam_update")


@dataclass(frozen=True)
class RowGroups:
    """Positions grouped by row: row ``unique[u]`` takes the sources ``offsets[u]`` to ``offsets[u + 1]``, in order."""

    count: Tensor
    """int64 ``[1]``: U."""
    unique: Tensor
    """int64 ``[N]``: distinct rows, ascending; U of them."""
    offsets: Tensor
    """int64 ``[N + 1]``."""
    sources: Tensor
    """int64 ``[N]``: feature (bits 40 and up) and bag."""
    scales: Tensor | None
    """float32 ``[N]``: a source's share of its bag's gradient; None where all are 1."""


def group_rows(
    rows: Tensor, offsets: Sequence[Tensor], bags: Sequence[int], lengths: Sequence[int], combiners: Sequence[int],
    row_bound: int,
) -> RowGroups:  # fmt: skip
    """Groups the positions of a lookup by row, keeping their order within a row.

    Args:
        rows: int64 ``[N]``, each in [0, row_bound).
        offsets: For each feature, int64 ``[B + 1]``, or an empty tensor: one id a bag.
        bags: For each feature, B.
        lengths: For each feature, the number of its positions.
        combiners: For each feature, a value of ``blocks.COMBINERS``.
        row_bound: Greater than every row.

    Returns:
        The groups, on the device of ``rows``, without waiting for it.
    """
    n = rows.numel()
    # One allocation: sources, grouped sources, unique, offsets (n + 1), count.
    words = torch.empty(4 * n + 2, dtype=torch.int64, device=rows.device)
    sources, grouped, unique = words[:n], words[n : 2 * n], words[2 * n : 3 * n]
    starts, count = words[3 * n : 4 * n + 1], words[4 * n + 1 :]
    scales = grouped_scales = None
    if any(combiner != 0 for combiner in combiners):
        scales, grouped_scales = torch.empty(2, n, dtype=torch.float32, device=rows.device).unbind()
    torch.ops.recis.bag_sources(offsets, bags, lengths, combiners, sources, scales)
    torch.ops.recis.group_rows(rows, sources, scales, row_bound, unique, starts, grouped, grouped_scales, count)
    return RowGroups(count, unique, starts, grouped, grouped_scales)


def reduce_rows(gradients: Sequence[Tensor], groups: RowGroups, out: Tensor) -> None:
    """Sums the gradients of each row, in input order, in chunks of 256 whose sums are added in order.

    Args:
        gradients: For each feature, float32 ``[B, D]`` with contiguous rows (a stride of 0 between rows is fine).
        groups: From :func:`group_rows`.
        out: float32 ``[N, D]``; the first U rows are written, in the order of ``groups.unique``.
    """
    torch.ops.recis.reduce_rows(gradients, *_parts(groups), out)


def sgd_update(blocks: Blocks, dim: int, gradients: Sequence[Tensor], groups: RowGroups, *, lr: float) -> None:
    """Reduces row gradients and does w -= lr g, in one pass. Arguments as in :func:`reduce_rows`."""
    torch.ops.recis.sgd_update(*blocks, dim, gradients, *_parts(groups), lr)


def adagrad_update(
    blocks: Blocks, dim: int, gradients: Sequence[Tensor], groups: RowGroups, *, sum_offset: int, lr: float, eps: float
) -> None:
    """Reduces row gradients and applies Adagrad, in one pass; ``sum_offset`` is the byte offset of ``sum``."""
    torch.ops.recis.adagrad_update(*blocks, dim, gradients, *_parts(groups), sum_offset, lr, eps)


def adam_update(
    blocks: Blocks, dim: int, gradients: Sequence[Tensor], groups: RowGroups, *, exp_avg_offset: int,
    exp_avg_sq_offset: int, lr: float, betas: tuple[float, float], eps: float, step: int,
) -> None:  # fmt: skip
    """Reduces row gradients and applies Adam to rows that have one, in one pass; ``step`` counts from 1."""
    torch.ops.recis.adam_update(
        *blocks, dim, gradients, *_parts(groups), exp_avg_offset, exp_avg_sq_offset, lr, *betas, eps, step
    )


def _parts(groups: RowGroups) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return groups.count, groups.unique, groups.offsets, groups.sources, groups.scales
