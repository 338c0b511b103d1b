"""Distinct ids of a batch, sorted by the rank that owns them.

Letters: N positions (ids of a call over all features), U distinct ids, W ranks, K kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import numbers_on
from recis_hybrid.checkpointing import rank_of_bucket
from recis_hybrid.embedding.table.lookup import Request, gradient_bags
from recis_hybrid.ops.gather import Distinct


@dataclass(frozen=True)
class Kind:
    """Class of ids that are looked up in the same way; equal ids of one kind are requested only once."""

    member: int
    """Number of the member table."""
    unknown: int
    """The member table whose first values ids without a row get; -1: zeros."""
    owner: int | None
    """The rank that owns all of them; None: each belongs to the owner of its bucket."""


def rank_of(ids: Tensor, ranks: int) -> Tensor:
    """Return the rank, int64 ``[N]``, that owns the bucket of each id (int64 ``[N]``)."""
    return rank_of_bucket(ops.id_map.bucket_of(ids), ranks)


def distinct_ids(
    request: Request, kind_of: Sequence[int], kinds: Sequence[Kind], ranks: int, *, deduplicate: bool = True
) -> Distinct:
    """Return the distinct ids of a request, without waiting for the device.

    Args:
        request: The ids of all features.
        kind_of: For each feature, the number of its kind.
        kinds: All kinds.
        ranks: W.
        deduplicate: False treats every position as a distinct id.
    """
    if deduplicate:
        owners = [-1 if kind.owner is None else kind.owner for kind in kinds]
        bags = gradient_bags(request.bags)
        return ops.gather.distinct_ids(request.ids, kind_of, owners, ranks, bags, used=request.used)
    return distinct_by_sorting(request, kind_of, kinds, ranks, deduplicate=deduplicate)


def distinct_by_sorting(
    request: Request, kind_of: Sequence[int], kinds: Sequence[Kind], ranks: int, *, deduplicate: bool = True
) -> Distinct:
    """Like :func:`distinct_ids`, with torch operations; also without deduplication."""
    ids = torch.cat(request.ids) if len(request.ids) > 1 else request.ids[0]
    n, device = ids.numel(), ids.device
    lengths = numbers_on(device, request.bags.lengths)
    feature = torch.arange(lengths.numel(), device=device).repeat_interleave(lengths, output_size=n)
    kind = numbers_on(device, kind_of)[feature]
    owners = [kind.owner for kind in kinds]
    if all(owner is None for owner in owners):
        owner = rank_of(ids, ranks)
    else:
        fixed = numbers_on(device, [-1 if owner is None else owner for owner in owners])[kind]
        owner = torch.where(fixed < 0, rank_of(ids, ranks), fixed)
    share, shares = owner * len(kinds) + kind, ranks * len(kinds)
    if request.used:
        bounds = [part[-1:] if part.numel() else lengths[f : f + 1] for f, part in enumerate(request.used)]
        within = torch.arange(n, device=device) - (lengths.cumsum(0) - lengths)[feature]
        share = torch.where(within < torch.cat(bounds)[feature], share, shares)

    order = ids.argsort(stable=True) if deduplicate else torch.arange(n, device=device)
    order = order[share[order].argsort(stable=True)]
    ids, share = ids[order], share[order]
    first = torch.ones(n, dtype=torch.bool, device=device)
    if deduplicate:
        first[1:] = (ids[1:] != ids[:-1]) | (share[1:] != share[:-1])
    place = first.cumsum(0) - 1
    # The host does not know U, so the buffers have N elements. Equal ids write equal values.
    found = torch.empty_like(ids).scatter_(0, place, ids)
    counts = torch.zeros_like(ids).scatter_add_(0, place, torch.ones_like(ids))
    sizes = torch.zeros(shares + 1, dtype=torch.int64, device=device).scatter_add_(0, share, first.to(torch.int64))
    places = torch.empty_like(place).scatter_(0, order, torch.where(share < shares, place, -1))
    return Distinct(found, counts, places, sizes[:-1].view(ranks, len(kinds)), None)
