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
from recis_hybrid.ops.blocks import Blocks, StateArgs

nothing_returned("gather_bags", "group_rows", "insert_grouped", "distinct_ids", "spread_max")

SUM, MEAN, SQRTN, MAX = range(4)
SOURCE_SHIFT = 40
"""A source's feature stands in the bits from here up, its vector below."""


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

    @staticmethod
    def single(lengths: list[int]) -> Bags:
        """Return bags of one id each, with as many ids for each feature as ``lengths`` says."""
        zeros = [0] * len(lengths)
        return Bags(lengths, lengths, [], [], zeros, zeros)

    @property
    def plain(self) -> bool:
        """Whether each id gives one vector, which is its row's embedding."""
        return not self.offsets and not self.weights


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
    blocks: Blocks,
    element: int,
    dim: int,
    rows: Tensor,
    bags: Bags,
    ids: Sequence[Tensor],
    members: Sequence[int],
    initializers: Tensor,
    out: Tensor,
    starts: Sequence[int],
    winners: Tensor | None,
) -> None:
    """Write the combined embeddings of each bag.

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
    torch.ops.recis.gather_bags(*blocks, element, dim, rows, *bags, ids, members, initializers, out, starts, winners)


def group_rows(rows: Tensor, members: Sequence[int], row_bound: int, bags: Bags) -> RowGroups:
    """Group the positions of a lookup by row, keeping their order within a row.

    Args:
        rows: int64 ``[N]``, each below row_bound; where it is below 0, the position belongs to no group.
        members: For each feature, the number of its member table: two of them have no row in common.
        row_bound: Greater than every row.
        bags: How ids became vectors. Every position lies in a bag. Where a combiner is MAX, and for vectors of single
            ids, offsets must be empty: the gradient is one a position.

    Returns:
        The groups, on the device of ``rows``, without waiting for it.
    """
    groups = _room(rows.numel(), bags, rows.device)
    torch.ops.recis.group_rows(rows, members, row_bound, *bags, *_parts(groups))
    return groups


def insert_grouped(
    slots: Tensor,
    counters: Tensor,
    free_rows: Tensor,
    blocks: Blocks,
    element: int,
    dim: int,
    initializers: Tensor,
    state: StateArgs,
    ids: Sequence[Tensor],
    members: Sequence[int],
    row_bound: int,
    bags: Bags,
    *,
    used: Sequence[Tensor] = (),
    out: Tensor | None = None,
    starts: Sequence[int] = (),
) -> tuple[Tensor, RowGroups]:
    """Find each id or give it a row with its first values, and groups the positions by row: a training lookup.

    As ``id_map.find_or_insert``, ``blocks.init_fresh``, ``id_map.commit`` and :func:`group_rows` one after another,
    for a map and blocks on one device. On the CPU ids are grouped first, and only distinct ones are looked for.

    Args:
        slots: int64 ``[S, 2]``, written. At most 0.75 S entries may be in use afterwards.
        counters: int64 ``[5]``, written.
        free_rows: int64, rows to use again.
        blocks: Written. Must have room for every row that may be made.
        element: Of the embedding, a value of ``blocks.ELEMENTS``.
        dim: D.
        initializers: int64 ``[M, 5]``: first values, by member table.
        state: First values of the optimizer state.
        ids: For each feature, int64 ``[n_f]``, contiguous.
        members: For each feature, the number of its member table.
        row_bound: Greater than every row that may be made.
        bags: How gradients belong to positions, as in :func:`group_rows`.
        used: As in ``id_map.find``; empty on the CPU.
        out: As in :func:`gather_bags`, which this does too then, while records are near; only for bags of one id each
            without weights.
        starts: As in :func:`gather_bags`.

    Returns:
        int64 ``[N]``, the row of each id; and the groups.
    """
    n = sum(bags.lengths)
    rows = torch.empty(n, dtype=torch.int64, device=slots.device)
    groups = _room(n, bags, slots.device)
    torch.ops.recis.insert_grouped(
        slots,
        counters,
        free_rows,
        *blocks,
        element,
        dim,
        initializers,
        state.offsets,
        state.widths,
        state.sizes,
        state.first_values,
        ids,
        members,
        used,
        row_bound,
        *bags,
        rows,
        *_parts(groups),
        out,
        starts,
    )
    return rows, groups


class Distinct(NamedTuple):
    """The distinct ids of a lookup, by (owner, kind); where the host does not know U, buffers are longer."""

    ids: Tensor
    """int64 ``[U]``."""
    counts: Tensor
    """int64 ``[U]``: how many positions each has; zeros beyond."""
    places: Tensor
    """int64 ``[N]``: of each position, which of ``ids`` it is; -1 where there is no id."""
    sizes: Tensor
    """int64 ``[W, K]``: how many there are of each owner and kind; U together."""
    groups: RowGroups | None
    """The positions grouped by id, ``unique`` the ids' numbers; None where they were not."""


def distinct_ids(
    ids: Sequence[Tensor], kinds: Sequence[int], owners: Sequence[int], ranks: int, bags: Bags
) -> Distinct:
    """Find the distinct ids of a lookup, and which rank owns each; on the CPU.

    Args:
        ids: For each feature, int64 ``[n_f]``, contiguous.
        kinds: For each feature, a number below K: equal ids of two kinds are two.
        owners: For each of K kinds the rank that owns its ids, or -1: each id's bucket says (``id_map.bucket_of``),
            of which every rank owns a contiguous range.
        ranks: W.
        bags: How gradients belong to positions, as in :func:`group_rows`.
    """
    n = sum(bags.lengths)
    groups = _room(n, bags, torch.device("cpu"))
    counts, places, sizes = torch.empty(2 * n + ranks * len(owners), dtype=torch.int64).split_with_sizes(
        (n, n, ranks * len(owners))
    )
    torch.ops.recis.distinct_ids(ids, kinds, owners, ranks, *bags, *_parts(groups), counts, places, sizes)
    numbered = RowGroups(groups.count, torch.arange(n), groups.offsets, groups.sources, groups.scales)
    found = int(groups.count)
    return Distinct(groups.unique[:found], counts[:found], places, sizes.view(ranks, len(owners)), numbered)


def _room(n: int, bags: Bags, device: torch.device) -> RowGroups:
    # One allocation: sources, unique, offsets (n + 1), count.
    words = torch.empty(3 * n + 2, dtype=torch.int64, device=device)
    sources, unique, offsets, count = words.split_with_sizes((n, n, n + 1, 1))
    # Counted: a compiled caller may have symbols for the numbers, and dynamo's ``in`` finds no symbol (torch 2.13).
    scaled = bool(bags.weights) or bags.combiners.count(MEAN) > 0 or bags.combiners.count(SQRTN) > 0
    scales = torch.empty(n, dtype=torch.float32, device=device) if scaled else None
    return RowGroups(count, unique, offsets, sources, scales)


def _parts(groups: RowGroups) -> tuple[Tensor | None, ...]:
    return groups.unique, groups.offsets, groups.sources, groups.scales, groups.count


def spread_max(offsets: Tensor, winners: Tensor, gradient: Tensor, out: Tensor) -> None:
    """Give every id of a bag the bag's gradient where it won, and zero elsewhere.

    Args:
        offsets: int64 ``[B + 1]``, or an empty tensor: one id a bag.
        winners: int32 ``[B, D]``, as :func:`gather_bags` left them.
        gradient: float32 ``[B, D]`` with contiguous rows.
        out: float32 ``[n, D]``, written.
    """
    torch.ops.recis.spread_max(offsets, winners, gradient, out)
