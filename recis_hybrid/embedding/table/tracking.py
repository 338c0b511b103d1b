"""Counts of the ids of a table's training lookups, and its most frequent ids.

Letters: N positions (ids of a call over all features), M member tables, C counters of a member table.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import is_accelerator, numbers_on
from recis_hybrid.embedding.table.lookup import Request
from recis_hybrid.embedding.table.slots import Slots
from recis_hybrid.ops.id_map import LINE_SLOTS

COUNTERS_OF_AN_ID = 10
"""Counters that :class:`SpaceSaving` has for each id that is to be listed."""
_LEAST_SLOTS = 1 << 18
_MAX_LOAD = 0.75
_COUNT_BITS = 46
"""Bits of a count in a sort key, below 17 bits of the member table."""


class HotId(NamedTuple):
    """A frequent id."""

    id: int
    """The id."""
    frequency: int
    """Upper bound of the number of its occurrences."""
    error: int
    """It occurred at least ``frequency - error`` times."""


class SpaceSaving:
    """The most frequent ids of each member table, in fixed memory.

    Each member table has C counters. After n occurrences in a member table, an id that occurred more than n / C times
    has a counter; counts are at most n / C too high and never too low. Batches are counted exactly in a map of ids,
    which is merged into the counters when it is full: an id without a counter starts at the lowest counter, and the C
    highest remain. The map has room for all counters and a few batches. On accelerators the host never waits.

    Args:
        members: M.
        counters: C.
        device: Device of the ids.

    References:
        Metwally, Agrawal, El Abbadi: Efficient computation of frequent and top-k elements in data streams. ICDT 2005.
        Agarwal, Cormode, Huang, Phillips, Wei, Yi: Mergeable summaries. PODS 2012 (the merge of exact counts).
    """

    def __init__(self, members: int, counters: int, device: torch.device) -> None:
        self._members, self._counters_each, self._device = members, counters, device
        self._lowest = torch.zeros(members, dtype=torch.int64, device=device)
        """int64 ``[M]``: upper bound of the count of an id without a counter."""
        self._allocate(max(_LEAST_SLOTS, _power_of_two(4 * members * counters)))

    @property
    def nbytes(self) -> int:
        """Bytes of the counters and the map."""
        return self._slots.nbytes + self._totals.nbytes + self._errors.nbytes

    def add(self, request: Request) -> None:
        """Count the ids of a request."""
        n = sum(request.bags.lengths)
        if self._entries + n > self._room:
            self._merge(n)
        rows = self._insert(request.ids, request.members, request.used)
        weights = self._ones(n) if request.counts is None else request.counts
        self._totals.index_add_(0, rows, weights)

    def top(self, n: int) -> list[list[HotId]]:
        """Return the n most frequent ids of each member table, most frequent first; waits for the device."""
        self._merge(0)
        ids, counts, errors, kept = (part.tolist() for part in self._top)
        found = []
        for member in range(self._members):
            hot = map(HotId, ids[member], counts[member], errors[member])
            ranked = sorted(list(hot)[: kept[member]], key=lambda each: (-each.frequency, each.id))
            found.append(ranked[:n])
        return found

    def _allocate(self, slots: int) -> None:
        self._slots = Slots(slots // LINE_SLOTS, self._device)
        self._room = int(_MAX_LOAD * slots)
        with torch.inference_mode(False):  # a tensor created in inference mode cannot be written outside of it
            self._counters = torch.zeros(ops.id_map.COUNTERS, dtype=torch.int64, device=self._device)
            self._no_rows = torch.empty(0, dtype=torch.int64, device=self._device)
            # The last element takes what belongs to no id.
            self._totals = torch.empty(self._room + 1, dtype=torch.int64, device=self._device)
            self._errors = torch.empty(self._room + 1, dtype=torch.int64, device=self._device)
        self._weights = torch.empty(0, dtype=torch.int64, device=self._device)
        self._clear()

    def _clear(self) -> None:
        self._slots.clear()
        self._counters.zero_()
        self._totals.zero_()
        self._errors.fill_(-1)  # no counter yet
        self._entries = 0
        """Upper bound of the number of ids in the map; exact on the CPU."""

    def _insert(self, ids: Sequence[Tensor], members: Sequence[int], used: Sequence[Tensor]) -> Tensor:
        """Return the place of each id in the totals, int64 ``[N]``; those not in use have the last place."""
        n = sum(part.numel() for part in ids)
        rows, fresh = ops.memory.empty((2, n), torch.int64, self._device).unbind()
        ops.id_map.find_or_insert(
            self._slots.header, self._counters, self._no_rows, None, ids, members, rows, fresh, used=used
        )
        ops.id_map.commit(self._counters)
        on_device = is_accelerator(self._device)
        self._entries = self._entries + n if on_device else int(self._counters[ops.id_map.LIVE])
        return torch.where(rows < 0, self._room, rows) if used else rows

    def _ones(self, n: int) -> Tensor:
        if self._weights.numel() < n:
            self._weights = torch.ones(n, dtype=torch.int64, device=self._device)
        return self._weights[:n]

    def _merge(self, more: int) -> None:
        """Merge the map into the counters, and make room for ``more`` ids."""
        ids, members, counts, errors = self._listed()
        each = self._counters_each
        counters = torch.arange(each, device=self._device)
        # Ids by member table, highest count first; entries that are not in use follow all member tables.
        order = ((members << _COUNT_BITS) - counts).argsort()
        sizes = torch.zeros(self._members + 1, dtype=torch.int64, device=self._device)
        sizes = sizes.index_add_(0, members, torch.ones_like(members))[:-1]
        places = (sizes.cumsum(0) - sizes).unsqueeze(1) + counters
        kept = sizes.clamp(max=each)
        chosen = order[places.clamp(max=max(order.numel() - 1, 0))] if order.numel() else None
        zeros = torch.zeros(self._members, each, dtype=torch.int64, device=self._device)
        ids, counts, errors = (zeros if chosen is None else part[chosen] for part in (ids, counts, errors))
        self._top = ids, counts, errors, kept
        self._lowest = torch.where(sizes >= each, counts[:, -1], self._lowest)
        if more + self._members * each > self._room:
            self._allocate(_power_of_two(int((4 * more + self._members * each) / _MAX_LOAD)))
        else:
            self._clear()
        numbers = list(range(self._members))
        rows = self._insert(list(ids.contiguous().unbind()), numbers, list(kept.unsqueeze(1).unbind()))
        self._totals[rows] = counts.view(-1)
        self._errors[rows] = errors.view(-1)
        self._totals[-1:].zero_()

    def _listed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ids, member tables, counts and errors of the map, int64 ``[n]``; the member table M: not in use."""
        size = min(self._entries, self._room)
        ids, members, rows, slots = torch.empty(4, size, dtype=torch.int64, device=self._device).unbind()
        count = torch.zeros(1, dtype=torch.int64, device=self._device)
        ops.id_map.list_ids(self._slots.header, len(self._slots), ids, members, rows, slots, count)
        in_use = torch.arange(size, device=self._device) < count
        members, rows = torch.where(in_use, members, self._members), torch.where(in_use, rows, self._room)
        counts, errors = self._totals[rows], self._errors[rows]
        lowest = torch.cat([self._lowest, self._lowest.new_zeros(1)])[members]
        is_new = errors < 0
        return ids, members, torch.where(is_new, counts + lowest, counts), torch.where(is_new, lowest, errors)


class LookupTracker:
    """Counts of the ids of a table's training lookups by member table, and its most frequent ids.

    Args:
        rows: For each member table, its number of rows.
        hottest: Number of frequent ids to list for each member table; 0: none.
        device: Device of the ids.
    """

    def __init__(self, rows: Sequence[int], hottest: int, device: torch.device) -> None:
        members = len(rows)
        self.hottest = hottest
        self._first_rows = list(rows)
        self._loaded, self._erased, self._ids = [0] * members, [0] * members, [0] * members
        with torch.inference_mode(False):
            # Ids that only the device can count: looked up, and not admitted.
            self._counted = torch.zeros(2, members, dtype=torch.int64, device=device)
        counters = COUNTERS_OF_AN_ID * hottest
        self._sketch = SpaceSaving(members, counters, device) if hottest else None

    def add(self, request: Request, rows: Tensor, *, complete: bool) -> None:
        """Count the ids of a training lookup, without waiting for the device.

        Args:
            request: The ids.
            rows: int64 ``[N]``: the row of each id after the lookup.
            complete: True if every id has a row.
        """
        if complete and request.counts is None and not request.used:
            for member, n in zip(request.members, request.bags.lengths, strict=True):
                self._ids[member] += n
        else:
            self._count(request, rows)
        if self._sketch is not None:
            self._sketch.add(request)

    def _count(self, request: Request, rows: Tensor) -> None:
        n, lengths = rows.numel(), request.bags.lengths
        device = rows.device
        sizes = numbers_on(device, lengths)
        feature = torch.arange(len(lengths), device=device).repeat_interleave(sizes, output_size=n)
        weights = torch.ones_like(rows) if request.counts is None else request.counts
        if request.used:
            bounds = [part[-1:] if part.numel() else sizes[f : f + 1] for f, part in enumerate(request.used)]
            within = torch.arange(n, device=device) - (sizes.cumsum(0) - sizes)[feature]
            weights = torch.where(within < torch.cat(bounds)[feature], weights, 0)
        members = numbers_on(device, request.members)[feature]
        self._counted[0].index_add_(0, members, weights)
        self._counted[1].index_add_(0, members, torch.where(rows < 0, weights, 0))

    def add_loaded(self, member: int, rows: int) -> None:
        """Count rows that were inserted other than by a lookup."""
        self._loaded[member] += rows

    def add_erased(self, member: int, rows: int) -> None:
        """Count rows that were erased, whatever erased them."""
        self._erased[member] += rows

    def figures(self, rows: Sequence[int]) -> list[dict[str, int]]:
        """Return ``ids``, ``new_rows``, ``rejected_ids`` and ``evicted_rows`` of each member table.

        Args:
            rows: For each member table, its number of rows now. Waits for the device.
        """
        looked_up, rejected = self._counted.tolist()
        return [
            {"ids": a + b, "new_rows": now - first - loaded + erased, "rejected_ids": c, "evicted_rows": erased}
            for a, b, now, first, loaded, erased, c in zip(
                self._ids, looked_up, rows, self._first_rows, self._loaded, self._erased, rejected, strict=True
            )
        ]

    def top(self) -> list[list[HotId]]:
        """Return the most frequent ids of each member table; waits for the device."""
        if self._sketch is None:
            return list(repeat([], len(self._first_rows)))
        return self._sketch.top(self.hottest)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
