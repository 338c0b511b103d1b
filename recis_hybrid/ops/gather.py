"""Operators from rows to one vector a bag, and from gradients of those back to rows.

Shapes: F features, N positions (ids of a call, features end to end), V vectors of a feature, U distinct rows (known
only to the device: buffers are [N], ``count`` holds U), D dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid.ops._fake import nothing_returned
from recis_hybrid.ops.blocks import Blocks

nothing_returned("gather_bags", "group_rows", "spread_max")

SUM, MEAN, SQRTN, MAX = range(4)


class Bags(NamedTuple):
    """How the ids of all features become vectors, as flat lists: one element a feature."""

    lengths: list[int]
    """Ids."""
    vectors: list[int]
    """V: bags, or bags times tile."""
    offsets: list[Tensor]
    """int64 ``[bags + 1]`` into the feature's ids, or an empty tensor: one id a bag. The list is empty if all are."""
    weights: list[Tensor]
    """float32 ``[ids]``, or an empty tensor: all weights are 1. The list is empty if all are."""
    combiners: list[int]
    """SUM, MEAN, SQRTN or MAX."""
    tiles: list[int]
    """0, or k: a bag gives k vectors, the v-th of its v-th id, and has at most k ids."""


@dataclass(frozen=True)
class RowGroups:
    """Positions grouped by row: row ``unique[u]`` takes the sources ``offsets[u]`` to ``offsets[u + 1]``, in order."""

    count: Tensor
    """int64 ``[1]``: U."""
    unique: Tensor
    """int64 ``[N]``: distinct rows, U of them, in an order that depends on the input alone."""
    offsets: Tensor
    """int64 ``[N + 1]``."""
    sources: Tensor
    """int64 ``[N]``: feature (bits 40 and up) and vector."""
    scales: Tensor | None
    """float32 ``[N]``: a source's share of its vector's gradient; None where all are 1."""


def gather_bags(
    blocks: Blocks, element: int, dim: int, rows: Tensor, bags: Bags, ids: Sequence[Tensor], members: Sequence[int],
    initializers: Tensor, out: Tensor, starts: Sequence[int], winners: Tensor | None,
) -> None:  # fmt: skip
    """Writes the combined embeddings of each bag.

    Args:
        blocks: Read.
        element: Of the embedding, a value of ``blocks.ELEMENTS``.
        dim: D.
        rows: int64 ``[N]``; -1 stands for an id without a row, which counts with its first value, or as zeros.
        bags: How ids become vectors.
        ids: For each feature, int64 ``[n_f]``; an empty list where no id is without a row.
        members: For each feature, the number of its member table; -1: ids without a row count as zeros.
        initializers: int64 ``[M, 5]``: first values, by member table.
        out: float32, one buffer for all features; written. An empty bag gives zeros.
        starts: For each feature, where in ``out`` its ``[V, D]`` begin.
        winners: int32, as ``out``: where a feature's combiner is MAX, which id of the bag each element is of; or None.
    """
    torch.ops.recis.gather_bags(
        *blocks, element, dim, rows, *bags, ids, members, initializers, out, starts, winners
    )  # fmt: skip


def group_rows(rows: Tensor, members: Sequence[int], row_bound: int, bags: Bags) -> RowGroups:
    """Groups the positions of a lookup by row, keeping their order within a row.

    Args:
        rows: int64 ``[N]``, each below row_bound; where it is below 0, the position belongs to no group.
        members: For each feature, the number of its member table: two of them have no row in common.
        row_bound: Greater than every row.
        bags: How ids became vectors. Every position lies in a bag. Where a combiner is MAX, and for vectors of single
            ids, offsets must be empty: the gradient is one a position.

    Returns:
        The groups, on the device of ``rows``, without waiting for it.
    """
    n = rows.numel()
    # One allocation: sources, unique, offsets (n + 1), count.
    words = torch.empty(3 * n + 2, dtype=torch.int64, device=rows.device)
    sources, unique, offsets, count = words.split_with_sizes((n, n, n + 1, 1))
    scaled = bool(bags.weights) or MEAN in bags.combiners or SQRTN in bags.combiners
    scales = torch.empty(n, dtype=torch.float32, device=rows.device) if scaled else None
    torch.ops.recis.group_rows(rows, members, row_bound, *bags, unique, offsets, sources, scales, count)
    return RowGroups(count, unique, offsets, sources, scales)


def spread_max(offsets: Tensor, winners: Tensor, gradient: Tensor, out: Tensor) -> None:
    """Gives every id of a bag the bag's gradient where it won, and zero elsewhere.

    Args:
        offsets: int64 ``[B + 1]``, or an empty tensor: one id a bag.
        winners: int32 ``[B, D]``, as :func:`gather_bags` left them.
        gradient: float32 ``[B, D]`` with contiguous rows.
        out: float32 ``[n, D]``, written.
    """
    torch.ops.recis.spread_max(offsets, winners, gradient, out)
