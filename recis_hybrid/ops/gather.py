"""Operators that combine rows into one vector per bag, and group the gradients of vectors by row.

Shapes: F features, N positions (ids of a call, feature after feature), V vectors of a feature, U distinct rows (only
the device knows U, so buffers are ``[N]``, and ``count`` holds U), D dim.
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
"""First bit of the feature number in a source; the lower bits hold the vector number."""


class Bags(NamedTuple):
    """The bags of ids that are combined into vectors, as lists with one element per feature."""

    lengths: list[int]
    """Numbers of ids."""
    vectors: list[int]
    """Numbers of vectors, V: the number of bags, or bags times tile."""
    offsets: list[Tensor]
    """int64 ``[bags + 1]`` into the ids of the feature; empty tensors or an empty list: bags of one id."""
    weights: list[Tensor]
    """float32 ``[ids]``; empty tensors or an empty list: weights of 1."""
    combiners: list[int]
    """SUM, MEAN, SQRTN or MAX."""
    tiles: list[int]
    """0; or k for bags of at most k ids that yield k vectors, one for each id."""

    @staticmethod
    def single(lengths: list[int]) -> Bags:
        """Return bags of one id each; ``lengths`` are the numbers of ids of the features."""
        zeros = [0] * len(lengths)
        return Bags(lengths, lengths, [], [], zeros, zeros)

    @property
    def plain(self) -> bool:
        """True if each id yields one vector, the embedding of its row."""
        return not self.offsets and not self.weights


@dataclass(frozen=True)
class RowGroups:
    """Positions grouped by row.

    Row ``unique[u]`` has the sources ``offsets[u]`` to ``offsets[u + 1]``, in input order.
    """

    count: Tensor
    """int64 ``[1]``: U."""
    unique: Tensor
    """int64 ``[N]``: U distinct rows, in an order that depends only on the input."""
    offsets: Tensor
    """int64 ``[N + 1]``."""
    sources: Tensor
    """int64 ``[N]``: the feature (bits 40 and up) and vector of each position."""
    scales: Tensor | None
    """float32 ``[N]``: factor of each source for the gradient of its vector; None if all are 1."""


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
        element: Element type of the embedding, a value of ``blocks.ELEMENTS``.
        dim: D.
        rows: int64 ``[N]``; -1 for an id without a row, for which its first value or zeros are used.
        bags: The bags.
        ids: For each feature, int64 ``[n_f]``; an empty list if every id has a row.
        members: For each feature, the number of its member table; -1 to use zeros for ids without a row.
        initializers: int64 ``[M, 5]``: initializer of each member table.
        out: float32, one buffer for all features; written. Empty bags yield zeros.
        starts: For each feature, the position of its ``[V, D]`` in ``out``.
        winners: int32, of the shape of ``out``; for combiner MAX, written with the index within the bag of the id that
            each element came from. May be None.
    """
    torch.ops.recis.gather_bags(*blocks, element, dim, rows, *bags, ids, members, initializers, out, starts, winners)


def group_rows(rows: Tensor, members: Sequence[int], row_bound: int, bags: Bags) -> RowGroups:
    """Group the positions of a lookup by row, keeping their order within a row.

    Args:
        rows: int64 ``[N]``, each below ``row_bound``; positions with negative rows belong to no group.
        members: For each feature, the number of its member table; different member tables must have no row in common.
        row_bound: Greater than every row.
        bags: The bags; every position must be in one. For combiner MAX and for vectors of single ids, offsets must be
            empty, because there is a gradient for each position.

    Returns:
        The groups, on the device of ``rows``; does not wait for it.
    """
    groups = room_for_groups(rows.numel(), bags, rows.device)
    torch.ops.recis.group_rows(rows, members, row_bound, *bags, *parts_of_groups(groups))
    return groups


def insert_grouped(
    header: Tensor,
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
    """Find or insert each id and group the positions by row: a training lookup.

    Equivalent to ``id_map.find_or_insert``, ``blocks.init_fresh``, ``id_map.commit`` and :func:`group_rows`, for a map
    and blocks on the same device. On the CPU, ids are grouped first, so that each distinct id is looked up only once.

    Args:
        header: Header of the map, which is written. At most 0.75 of its slots may be in use afterwards.
        counters: int64 ``[6]``, written.
        free_rows: int64: rows to reuse.
        blocks: Written. Must have room for all new rows.
        element: Element type of the embedding, a value of ``blocks.ELEMENTS``.
        dim: D.
        initializers: int64 ``[M, 5]``: initializer of each member table.
        state: First values of the optimizer state.
        ids: For each feature, int64 ``[n_f]``, contiguous.
        members: For each feature, the number of its member table.
        row_bound: Greater than every row, including new ones.
        bags: The bags of the gradients, as in :func:`group_rows`.
        used: As in ``id_map.find``; empty on the CPU.
        out: As in :func:`gather_bags`; if given, vectors are gathered in the same pass, while records are in the cache.
            Only for bags of one id without weights.
        starts: As in :func:`gather_bags`.

    Returns:
        The row of each id, int64 ``[N]``, and the groups.
    """
    n = sum(bags.lengths)
    rows = torch.empty(n, dtype=torch.int64, device=header.device)
    groups = room_for_groups(n, bags, header.device)
    torch.ops.recis.insert_grouped(
        header,
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
        *parts_of_groups(groups),
        out,
        starts,
    )
    return rows, groups


class Distinct(NamedTuple):
    """The distinct ids of a lookup, ordered by (owner, kind); buffers are longer if the host does not know U."""

    ids: Tensor
    """int64 ``[U]``."""
    counts: Tensor
    """int64 ``[U]``: number of positions of each id, followed by zeros."""
    places: Tensor
    """int64 ``[N]``: index in ``ids`` for each position; -1 for positions without an id."""
    sizes: Tensor
    """int64 ``[W, K]``: number of ids of each owner and kind; the sum is U."""
    groups: RowGroups | None
    """The positions grouped by id, with indices into ``ids`` as rows; None if not grouped."""


def distinct_ids(
    ids: Sequence[Tensor],
    kinds: Sequence[int],
    owners: Sequence[int],
    ranks: int,
    bags: Bags,
    *,
    used: Sequence[Tensor] = (),
) -> Distinct:
    """Return the distinct ids of a lookup, ordered by the ranks that own them; waits for no device.

    Args:
        ids: For each feature, int64 ``[n_f]``, contiguous.
        kinds: For each feature, its kind, a number below K; equal ids of different kinds are distinct.
        owners: For each kind, the rank that owns all its ids, or -1 if ids belong to the ranks that own their buckets
            (``id_map.bucket_of``); each rank owns a contiguous range of buckets.
        ranks: W.
        bags: The bags of the gradients, as in :func:`group_rows`.
        used: As in ``id_map.find``; empty on the CPU.
    """
    n, shares, device = sum(bags.lengths), ranks * len(owners), ids[0].device
    groups = room_for_groups(n, bags, device)
    words = torch.empty(2 * n + shares, dtype=torch.int64, device=device)
    counts, places, sizes = words.split_with_sizes((n, n, shares))
    torch.ops.recis.distinct_ids(
        ids, kinds, used, owners, ranks, *bags, *parts_of_groups(groups), counts, places, sizes
    )
    numbers = torch.arange(n, device=device)
    numbered = RowGroups(groups.count, numbers, groups.offsets, groups.sources, groups.scales)
    found = int(groups.count) if device.type == "cpu" else n
    return Distinct(groups.unique[:found], counts[:found], places, sizes.view(ranks, len(owners)), numbered)


def room_for_groups(n: int, bags: Bags, device: torch.device) -> RowGroups:
    """Return uninitialized groups for ``n`` positions, which an operator writes."""
    # One allocation: sources, unique, offsets (n + 1), count.
    words = torch.empty(3 * n + 2, dtype=torch.int64, device=device)
    sources, unique, offsets, count = words.split_with_sizes((n, n, n + 1, 1))
    # count(), not ``in``: a compiled caller may pass symbols, which ``in`` does not find under Dynamo (torch 2.13).
    scaled = bool(bags.weights) or bags.combiners.count(MEAN) > 0 or bags.combiners.count(SQRTN) > 0
    scales = torch.empty(n, dtype=torch.float32, device=device) if scaled else None
    return RowGroups(count, unique, offsets, sources, scales)


def parts_of_groups(groups: RowGroups) -> tuple[Tensor | None, ...]:
    """Return groups as the arguments of an operator that writes them."""
    return groups.unique, groups.offsets, groups.sources, groups.scales, groups.count


def spread_max(offsets: Tensor, winners: Tensor, gradient: Tensor, out: Tensor) -> None:
    """Write the gradient of each id of max-pooled bags: that of the bag where the id is the maximum, otherwise 0.

    Args:
        offsets: int64 ``[B + 1]``, or an empty tensor for bags of one id.
        winners: int32 ``[B, D]``, from :func:`gather_bags`.
        gradient: float32 ``[B, D]`` with contiguous rows.
        out: float32 ``[n, D]``, written.
    """
    torch.ops.recis.spread_max(offsets, winners, gradient, out)
